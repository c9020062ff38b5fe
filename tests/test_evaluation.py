"""support/evaluation.py: from outputs to scored boxes, from those to the 12 COCO numbers."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.ops import box_convert

from support.evaluation import boxes_to_pixels, coco_eval, metrics_table, postprocess, to_coco
from support.images import AnnotatedImage
from tests.golden import Case


def test_boxes_become_corners_in_pixels():
    boxes = torch.tensor([[[0.5, 0.5, 1.0, 0.5], [0.25, 0.1, 0.5, 0.2]]])
    assert boxes_to_pixels(boxes, (100, 200)).tolist() == [[[0, 25, 200, 75], [0, 0, 100, 20]]]


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


def test_answers_of_a_class_that_has_no_name_are_left_out():
    logits = torch.tensor([[[3.0, 0, 4], [2, 1, 5]]])  # [1, 2 queries, 2 classes and one logit more]
    (all_of_them,) = postprocess(logits, torch.rand(1, 2, 4), [(10, 10)], softmax=False)
    (named,) = postprocess(logits, torch.rand(1, 2, 4), [(10, 10)], softmax=False, num_classes=2)
    assert all_of_them["labels"].tolist() == [2, 2, 0, 0, 1, 1]
    assert named["labels"].tolist() == [0, 0, 1, 1]
    assert named["scores"].tolist() == all_of_them["scores"][2:].tolist() and named["boxes"].shape == (4, 4)


# ---- COCO's numbers ----------------------------------------------------------------------------------------
def data_set(*images):
    """A data set with category ids 3 and 7: for image 1, 2, ... a list of (label, [x, y, w, h], crowd)."""
    annotated = []
    for number, objects in enumerate(images, 1):
        labels, boxes, crowd = (np.array(column) for column in zip(*objects))
        boxes = boxes.astype(np.float32)
        boxes_xyxy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
        areas = boxes[:, 2:].prod(1)
        annotated.append(AnnotatedImage(number, "", 48, 64, labels, boxes_xyxy, areas, crowd > 0))
    dataset = SimpleNamespace(name="val", class_names=["cat", "dog"], category_ids=[3, 7],
                              max_boxes=max(map(len, images)))
    dataset.coco = to_coco(dataset, annotated)
    return dataset


def answer(*found):
    """Predictions for one image from (score, label, [x, y, width, height])."""
    scores, labels, boxes = zip(*found) if found else ((), (), ())
    return {"scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": box_convert(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")}


TWO = data_set([(0, [10, 10, 10, 10], 0), (1, [30, 20, 20, 20], 0)], [(1, [2, 3, 40, 40], 0)])


def test_perfect_predictions_have_ap_1_and_print_nothing(capsys):
    found = {1: answer((1, 0, [10, 10, 10, 10]), (1, 1, [30, 20, 20, 20])), 2: answer((1, 1, [2, 3, 40, 40]))}
    metrics = coco_eval(TWO, found)
    assert [metrics[name] for name in ("AP", "AP_small", "AP_medium")] == pytest.approx([1, 1, 1])
    assert metrics["AP_large"] == metrics["AR_large"] == -1, "nothing as large as 96 x 96 here"
    assert capsys.readouterr().out == "", "pycocotools should be silent"
    text = metrics_table(metrics)
    assert all(name in text for name in metrics) and "-1: no" in text
    swapped = {i: p | {"labels": 1 - p["labels"]} for i, p in found.items()}
    assert coco_eval(TWO, swapped)["AP"] == 0, "right boxes with the wrong class are worth nothing"


def test_ap_of_cases_computed_by_hand():
    dataset = data_set([(0, [0, 0, 10, 10], 0)], [(0, [0, 0, 10, 10], 0)])

    def ap(predictions, name="AP"):
        return coco_eval(dataset, predictions)[name]

    hit, miss = (0.9, 0, [0, 0, 10, 10]), (0.95, 0, [30, 30, 10, 10])
    assert ap({1: answer(hit), 2: answer(hit)}) == pytest.approx(1)
    assert ap({1: answer(hit)}) == pytest.approx(51 / 101), "recall 0.5 reaches 51 of the 101 recall levels"
    assert ap({1: answer(hit, miss), 2: answer(hit)}) == pytest.approx(2 / 3), \
        "a miss ranked first: precision 1/2, then 2/3; AP takes the best precision at that recall or beyond"
    narrow = {i: answer((0.9, 0, [0, 0, 6.2, 10])) for i in (1, 2)}  # IoU 0.62
    assert (ap(narrow), ap(narrow, "AP50"), ap(narrow, "AP75")) == pytest.approx((0.3, 1, 0)), \
        "IoU 0.62 passes 0.50, 0.55 and 0.60 of ten thresholds"
    for nothing in ({}, {1: answer()}, {1: answer(), 2: answer()}):
        assert ap(nothing) == 0, "nothing found is AP 0, not a crash"


def test_crowds_are_forgiven():
    dataset = data_set([(1, [5, 5, 30, 30], 1)], [(1, [2, 3, 40, 40], 0)])
    found = {1: answer((0.99, 1, [10, 10, 8, 8]), (0.98, 1, [20, 20, 8, 8])),
             2: answer((0.9, 1, [2, 3, 40, 40]))}
    assert coco_eval(dataset, found)["AP"] == pytest.approx(1), "inside a crowd nothing is right or wrong"


def test_evaluation_agrees_with_pycocotools():
    rng = np.random.default_rng(0)
    boxes = rng.integers(1, 24, (60, 4))
    objects = [(int(k % 3 > 0), boxes[k].tolist(), int(k % 15 == 0)) for k in range(30)]
    noisy = (boxes + rng.normal(0, 1, boxes.shape)).clip(0.5).tolist()
    found = {i: answer(*[(float(np.float32(rng.random())), int(k % 3 > 0), noisy[k])
                         for k in range(60) if k % 2 == i - 1]) for i in (1, 2)}
    truth = COCO()
    truth.dataset = {
        "images": [{"id": 1}, {"id": 2}], "categories": [{"id": 3}, {"id": 7}],
        "annotations": [{"id": k + 1, "image_id": 1 + k % 2, "category_id": (3, 7)[label], "bbox": box,
                         "area": box[2] * box[3], "iscrowd": crowd}
                        for k, (label, box, crowd) in enumerate(objects)]}
    truth.createIndex()
    results = [{"image_id": i, "category_id": (3, 7)[label], "score": score, "bbox": box}
               for i, p in found.items()
               for score, label, box in zip(p["scores"].tolist(), p["labels"].tolist(),
                                            box_convert(p["boxes"], "xyxy", "xywh").tolist())]
    judge = COCOeval(truth, truth.loadRes(results), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    ours = coco_eval(data_set(objects[::2], objects[1::2]), found)
    assert list(ours.values()) == pytest.approx(judge.stats.tolist(), abs=1e-9)
    assert 0.05 < judge.stats[0] < 0.95, "the test should be neither hopeless nor trivial"


def test_more_than_100_objects_in_an_image_are_noted_once(capsys):
    dataset = data_set([(0, [0, 0, 5, 5], 0)] * 101)
    for _ in range(2):
        coco_eval(dataset, {})
    assert capsys.readouterr().out.count("WARNING  val: an image has 101 objects") == 1
