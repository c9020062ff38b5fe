"""TP fading, FP exacerbation and the oracle, on predictions made by hand."""
import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import no_first_loss
import stages

from support.model_files import check_options
from tests.tiny_models import TARGETS, batch, shaken
from train import SetCriterion

TRUTH = [10.0, 10.0, 50.0, 50.0]
SHIFTED = {1.0: 0.0, 0.6: 10.0, 0.3: 20.0}  # about this IoU with TRUTH when moved by so many pixels in x


def image(scores, ious, labels=None, truth=(TRUTH,), image_id=1):
    """One image from tables [S][Q] of scores, and of IoUs with the first object (0: somewhere else)."""
    boxes = [
        [[10 + SHIFTED[v], 10, 50 + SHIFTED[v], 50] if v else [200, 200, 210, 210] for v in row]
        for row in ious
    ]
    labels = (
        torch.zeros(len(scores), len(scores[0]), dtype=torch.int64)
        if labels is None
        else torch.tensor(labels)
    )
    truth = torch.tensor(truth).reshape(-1, 4)
    return stages.Stages(image_id, torch.tensor(scores), labels, torch.tensor(boxes, dtype=torch.float32),
                         torch.zeros(len(truth), dtype=torch.int64), truth)


def test_an_object_is_found_once_by_the_highest_score():
    found, iou = image([[0.5, 0.9, 0.7]], [[1.0, 0.6, 1.0]]).match()
    assert found.tolist() == [[-1, 0, -1]], "two predictions share an object, or a lower score came first"
    assert iou[0, 1].item() == pytest.approx(0.6)


@pytest.mark.parametrize("label, iou, hit", [(0, 0.6, True), (1, 0.6, False), (0, 0.3, False)])
def test_class_and_overlap_must_both_be_right(label, iou, hit):
    assert (image([[0.9]], [[iou]], [[label]]).match()[0].item() == 0) == hit


@pytest.mark.parametrize("early_score, early_iou, faded", [
    (0.8, 1.0, 1), (0.8, 0.6, 0), (0.3, 1.0, 0), (0.8, 0.3, 0)])
def test_a_true_positive_fades_if_an_earlier_stage_had_more_of_both(early_score, early_iou, faded):
    fading, _ = stages.rates([image([[early_score], [0.5]], [[early_iou], [0.6]])])
    assert fading == faded


def test_any_earlier_stage_counts_but_only_the_same_query():
    three = image([[0.9], [0.1], [0.5]], [[1.0], [0.0], [0.6]])
    assert stages.rates([three])[0] == 1
    other_query = image([[0.9, 0.1], [0.1, 0.5]], [[1.0, 0.0], [0.0, 0.6]])
    assert stages.rates([other_query])[0] == 0, "the object was better found by another query"


def test_rates_over_images_with_known_answers():
    faded = image([[0.9, 0.1], [0.5, 0.4]], [[1.0, 0.0], [0.6, 0.0]])  # TP fades, FP got worse
    fine = image([[0.2, 0.6], [0.5, 0.3]], [[0.6, 0.0], [1.0, 0.0]])  # both got better
    empty = image([[0.3, 0.6], [0.4, 0.5]], [[0.0, 0.0], [0.0, 0.0]], truth=())  # one of two got worse
    fading, exacerbation = stages.rates([faded, fine, empty])
    assert fading == pytest.approx(1 / 2) and exacerbation == pytest.approx(2 / 4)


def test_without_true_positives_there_is_no_fading_rate():
    assert math.isnan(stages.rates([image([[0.5], [0.5]], [[0.0], [0.0]])])[0])


def test_oracle_trusts_the_right_stage_of_every_query():
    one = image([[0.9, 0.1], [0.3, 0.05], [0.5, 0.4]], [[1.0, 0.0], [1.0, 0.0], [0.6, 0.0]])
    best = stages.oracle(one)
    torch.testing.assert_close(best["scores"], torch.tensor([0.9, 0.05]))
    assert best["boxes"][0].tolist() == TRUTH


def test_the_surest_stage_answers_for_every_query_whether_it_is_right_or_not():
    one = image([[0.9, 0.1], [0.3, 0.6], [0.5, 0.4]], [[0.3, 0.0], [1.0, 0.0], [0.6, 0.0]],
                [[1, 0], [0, 2], [0, 0]])
    best = stages.highest_score(one)
    torch.testing.assert_close(best["scores"], torch.tensor([0.9, 0.6]))
    assert best["labels"].tolist() == [1, 2] and best["boxes"][0, 0] == 30


def test_nms_leaves_the_surest_of_each_pile_of_one_class():
    """The first two are the same box, the third is of another class, the fourth overlaps too little."""
    one = image([[0.6, 0.9, 0.5, 0.4]], [[1.0, 1.0, 1.0, 0.3]], [[0, 0, 1, 0]])
    left = stages.after_nms(one, 0)
    assert left["scores"].tolist() == pytest.approx([0.9, 0.5, 0.4]) and left["labels"].tolist() == [0, 1, 0]


@pytest.mark.parametrize("recollect, groups", [("none", 2), ("selective", 5), ("dense", 6)])
def test_without_a_loss_on_the_first_stage_the_others_have_theirs(recollect, groups):
    model = shaken(no_first_loss, dec_layers=3, recollect=recollect, box_refine=True)
    whole = shaken("sqr", dec_layers=3, recollect=recollect, box_refine=True).train()(*batch())
    out = model.train()(*batch())
    assert len(out["logits"]) == groups
    for name in ("logits", "boxes"):
        torch.testing.assert_close(out[name], whole[name][1:])
    SetCriterion(model)(out, TARGETS)["total"].backward()
    trained = [head.weight.grad.any().item() for head in model.class_head]
    assert trained == [False, True, True], "the first stage's head is trained, or another one is not"
    assert model.decoder.layers[0].ffn.linear1.weight.grad.any(), "later stages do not train the first"
    assert len(model.eval()(*batch())["logits"]) == 3


def test_options_of_the_model_without_a_first_loss_are_checked():
    check_options(no_first_loss, {"recollect": "dense"})
    with pytest.raises(SystemExit, match="no such option"):
        check_options(no_first_loss, {"recolect": "dense"})
    with pytest.raises(ValueError, match="dec_layers must be 2 or more"):
        shaken(no_first_loss, dec_layers=1)


def test_lost_objects_are_those_that_only_early_stages_find():
    lost = image([[0.9], [0.5]], [[1.0], [0.3]], image_id=7)
    kept = image([[0.9], [0.5]], [[1.0], [0.6]])
    (clarity, found, g, stage, query), = stages.lost_objects([lost, kept])
    assert (found.image_id, g, stage, query) == (7, 0, 0, 0) and clarity == pytest.approx(0.9)
