"""support/evaluation.py: from outputs to scored boxes, from those to the 12 COCO numbers."""
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from support import data
from support.evaluation import coco_eval, explain, postprocess
from tests.folders import VAL, change, coco_folder, edit
from tests.golden import Case


@pytest.fixture
def folder(tmp_path):
    return coco_folder(tmp_path)


@pytest.mark.parametrize("name, softmax", [("postprocess_softmax", True), ("postprocess_focal", False)])
def test_postprocess_agrees_with_the_official_code(name, softmax):
    case = Case(name)
    sizes = case.arrays["target_sizes_hw"].tolist()
    results = postprocess(case.arrays["logits"], case.arrays["boxes"], sizes, softmax)
    for i, result in enumerate(results):
        assert torch.equal(result["labels"], case.arrays[f"result_{i}_labels"].long())
        assert torch.allclose(result["scores"], case.arrays[f"result_{i}_scores"], rtol=0, atol=1e-6)
        assert torch.allclose(result["boxes"], case.arrays[f"result_{i}_boxes"], rtol=0, atol=1e-3)


def test_postprocess_with_few_queries_keeps_all_pairs():
    logits, boxes = torch.randn(1, 3, 2), torch.rand(1, 3, 4)
    (result,) = postprocess(logits, boxes, [(10, 20)], softmax=False)
    assert len(result["scores"]) == 6 and result["scores"].diff().max() <= 0, "3 queries x 2 classes, sorted"


def answer(*found):
    """Predictions for one image from (score, class index, [x, y, width, height])."""
    scores, labels, boxes = zip(*found) if found else ((), (), ())
    return {"scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": box_convert(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")}


def perfect(dataset):
    """The targets of all images as predictions, so back from [0, 1] to original pixels."""
    predictions = {}
    for _, target in (dataset[i] for i in range(len(dataset))):
        height, width = target["size"]
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        predictions[target["image_id"]] = {"scores": torch.ones(len(boxes)), "labels": target["labels"],
                                           "boxes": boxes}
    return predictions


def test_perfect_predictions_have_ap_1_and_print_nothing(folder, capsys):
    dataset = data.load(folder)["val"]
    metrics = coco_eval(dataset, perfect(dataset))
    assert list(metrics) == ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
                             "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    assert metrics["AP"] == metrics["AP_small"] == metrics["AP_medium"] == pytest.approx(1)
    assert metrics["AP_large"] == metrics["AR_large"] == -1, "nothing as large as 96 x 96 here"
    assert capsys.readouterr().out == "", "pycocotools should be silent"
    text = explain(metrics)
    assert all(name in text for name in metrics) and "-1 =" in text
    shapes = data.first_with_boxes(data.load(size=64)["val"], 5)
    assert coco_eval(shapes, perfect(shapes))["AP"] == pytest.approx(1)


def test_class_indices_are_mapped_back_to_category_ids(folder):
    dataset = data.load(folder)["val"]
    swapped = {i: p | {"labels": 1 - p["labels"]} for i, p in perfect(dataset).items()}
    assert coco_eval(dataset, swapped)["AP"] == 0, "right boxes with the wrong class are worth nothing"
    assert {a["category_id"] for a in dataset.coco.dataset["annotations"]} == {3, 7}


def test_ap_of_cases_computed_by_hand(folder):
    change(folder, lambda c: c.update(annotations=[
        {"id": 0, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10]},
        {"id": 1, "image_id": 2, "category_id": 3, "bbox": [0, 0, 10, 10]}]), "val")
    dataset = data.load(folder)["val"]

    def ap(predictions, name="AP", **how):
        return coco_eval(dataset, predictions, **how)[name]

    hit, miss = (0.9, 0, [0, 0, 10, 10]), (0.95, 0, [30, 30, 10, 10])
    assert ap({1: answer(hit), 2: answer(hit)}) == pytest.approx(1), "annotation id 0 counts like any other"
    assert ap({1: answer(hit)}) == pytest.approx(51 / 101), "recall 0.5 reaches 51 of the 101 recall levels"
    assert ap({1: answer(hit)}, image_ids=[1]) == pytest.approx(1), "image 2 was not asked about"
    assert ap({1: answer(hit, miss), 2: answer(hit)}) == pytest.approx(2 / 3), \
        "a miss ranked first: precision 1/2, then 2/3; AP takes the best precision at that recall or beyond"
    narrow = {i: answer((0.9, 0, [0, 0, 6.2, 10])) for i in (1, 2)}  # IoU 0.62
    assert (ap(narrow), ap(narrow, "AP50"), ap(narrow, "AP75")) == pytest.approx((0.3, 1, 0)), \
        "IoU 0.62 passes 0.50, 0.55 and 0.60 of ten thresholds"
    for nothing in ({}, {1: answer()}, {1: answer(), 2: answer()}):
        assert ap(nothing) == 0, "nothing found is AP 0, not a crash"


def test_crowds_are_not_trained_on_and_forgiven_in_the_evaluation(folder):
    change(folder, edit("annotations", 0, iscrowd=1, category_id=7), "val")
    dataset = data.load(folder)["val"]
    assert dataset.num_boxes == 1
    assert [a["iscrowd"] for a in dataset.coco.dataset["annotations"]] == [1, 0]
    for field in (dataset[0][1]["boxes"], dataset[0][1]["labels"]):
        assert len(field) == 0, "the crowd box should be gone together with its label"
    found = {1: answer((0.99, 1, [10, 10, 8, 8]), (0.98, 1, [20, 20, 8, 8])), 2: answer((0.9, 1, VAL[1]))}
    assert coco_eval(dataset, found)["AP"] == pytest.approx(1), \
        "what is found inside a crowd is neither right nor wrong"
    assert any("crowd regions" in note and ": 1 (" in note for note in dataset.notes)


def test_answers_of_a_class_that_has_no_name_are_left_out():
    logits = torch.tensor([[[3.0, 0, 4], [2, 1, 5]]])  # [1, 2 queries, 2 classes and one logit more]
    (all_of_them,) = postprocess(logits, torch.rand(1, 2, 4), [(10, 10)], softmax=False)
    (named,) = postprocess(logits, torch.rand(1, 2, 4), [(10, 10)], softmax=False, num_classes=2)
    assert all_of_them["labels"].tolist() == [2, 2, 0, 0, 1, 1]
    assert named["labels"].tolist() == [0, 0, 1, 1]
    assert named["scores"].tolist() == all_of_them["scores"][2:].tolist() and named["boxes"].shape == (4, 4)


def test_evaluation_agrees_with_pycocotools_on_the_files_themselves(folder, tmp_path):
    rng = np.random.default_rng(0)
    boxes = rng.integers(1, 24, (60, 4))
    change(folder, lambda c: c.update(annotations=[
        {"id": k, "image_id": 1 + k % 2, "category_id": (3, 7)[k % 3 > 0], "bbox": box,
         "area": box[2] * box[3], "iscrowd": int(k % 15 == 0)}
        for k, box in enumerate(boxes[:30].tolist(), 1)]), "val")
    dataset = data.load(folder)["val"]
    noisy = (boxes + rng.normal(0, 1, boxes.shape)).clip(0.5)
    found = {i: answer(*[(float(np.float32(rng.random())), (0, 1)[k % 3 > 0], noisy[k - 1].tolist())
                         for k in range(1, 61) if 1 + k % 2 == i]) for i in (1, 2)}
    results = [{"image_id": i, "category_id": [3, 7][label], "score": score, "bbox": box}
               for i, p in found.items()
               for score, label, box in zip(p["scores"].tolist(), p["labels"].tolist(),
                                            box_convert(p["boxes"], "xyxy", "xywh").tolist())]
    truth = COCO(str(folder / "annotations/instances_val.json"))
    judge = COCOeval(truth, truth.loadRes(results), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    assert list(coco_eval(dataset, found).values()) == pytest.approx(judge.stats.tolist(), abs=1e-9)
    assert 0.05 < judge.stats[0] < 0.95, "the test should be neither hopeless nor trivial"
