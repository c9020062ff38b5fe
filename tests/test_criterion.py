"""Matching and losses, against brute force and formulas written out in plain Python."""
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torchvision.ops import box_convert, generalized_box_iou

import train

SOFTMAX = SimpleNamespace(recipe=dict(class_loss="softmax", w_class=1, w_l1=5, w_giou=2))
FOCAL = SimpleNamespace(recipe=dict(class_loss="focal", w_class=2, w_l1=5, w_giou=2))
EMPTY = {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}


def predictions(S=2, B=3, Q=4, C=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return {"logits": torch.randn(S, B, Q, C, generator=g),
            "boxes": torch.rand(S, B, Q, 4, generator=g) * 0.4 + 0.2}


def targets(counts, classes=2, seed=1):
    g = torch.Generator().manual_seed(seed)
    return [{"labels": torch.randint(classes, (n,), generator=g),
             "boxes": torch.rand(n, 4, generator=g) * 0.4 + 0.2} for n in counts]


def other(model, **recipe):
    return SimpleNamespace(recipe={**model.recipe, **recipe})


# ---- Matching ----------------------------------------------------------------------------------------------
def cost_by_hand(logits, boxes, label, box, recipe):
    """One query against one object, from the papers' formulas, in plain Python floats."""
    if recipe["class_loss"] == "softmax":
        cost_class = -logits.softmax(0)[label].item()
    else:
        p = logits[label].sigmoid().item()
        cost_class = 0.25 * (1 - p) ** 2 * -math.log(p) - 0.75 * p ** 2 * -math.log(1 - p)
    corners = [box_convert(b[None], "cxcywh", "xyxy") for b in (boxes, box)]
    giou = generalized_box_iou(*corners).item()
    a, b = corners if recipe.get("corner_l1") else (boxes, box)
    l1 = (a - b).abs().sum().item()
    return recipe.get("cost_class", recipe["w_class"]) * cost_class + 5 * l1 - 2 * giou


@pytest.mark.parametrize("model", [SOFTMAX, FOCAL, other(FOCAL, cost_class=7), other(FOCAL, corner_l1=True)])
@pytest.mark.parametrize("objects", [1, 3, 4, 6])
def test_matching_is_the_cheapest_of_all_assignments(model, objects):
    criterion, out, target = train.SetCriterion(model), predictions(1, 1), targets([objects])[0]
    logits, boxes = out["logits"][0, 0], out["boxes"][0, 0]  # [4, 3], [4, 4]
    cost = [[cost_by_hand(logits[q], boxes[q], target["labels"][g], target["boxes"][g], model.recipe)
             for g in range(objects)] for q in range(4)]
    pairs = min(4, objects)
    best = min(sum(cost[q][g] for q, g in zip(qs, gs)) for qs in itertools.permutations(range(4), pairs)
               for gs in itertools.combinations(range(objects), pairs))
    query, index = criterion.match(logits[None, None], boxes[None, None], [target])[0][0]
    assert query.dtype == index.dtype == torch.int64 and len(set(query.tolist())) == len(query) == pairs
    assert sum(cost[q][g] for q, g in zip(query, index)) == pytest.approx(best, abs=1e-4)


def test_every_stage_is_matched_by_itself():
    criterion, out, wanted = train.SetCriterion(FOCAL), predictions(S=5), targets([2, 0, 3])
    together = criterion.match(out["logits"], out["boxes"], wanted)
    for stage in range(5):
        alone = criterion.match(out["logits"][stage], out["boxes"][stage], wanted)
        assert [[a.tolist() for a in p] for p in together[stage]] == [[a.tolist() for a in p] for p in alone]


def test_predictions_that_are_not_finite_say_so():
    out = predictions()
    out["boxes"][1, 0, 2, 3] = math.nan
    with pytest.raises(train.Diverged, match="not finite"):
        train.SetCriterion(FOCAL)(out, targets([1, 1, 1]))


# ---- Losses ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", [SOFTMAX, FOCAL, other(FOCAL, corner_l1=True)])
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 0], [6, 1, 4]])
def test_losses_by_hand(model, counts):
    """Query by query, in plain Python: no objects, some, and more than queries."""
    criterion, out, wanted = train.SetCriterion(model), predictions(), targets(counts)
    softmax = model.recipe["class_loss"] == "softmax"
    losses, total = criterion(out, wanted), 0
    for stage in range(2):
        matches, = criterion.match(out["logits"][stage:stage + 1], out["boxes"][stage:stage + 1], wanted)
        loss_class = weights = l1 = giou = 0
        for b in range(3):
            object_of = dict(zip(*(index.tolist() for index in matches[b])))
            for q in range(4):
                logits, g = out["logits"][stage, b, q], object_of.get(q)
                if softmax:
                    label = 2 if g is None else wanted[b]["labels"][g]
                    weight = 0.1 if g is None else 1
                    loss_class += -weight * logits.log_softmax(0)[label].item()
                    weights += weight
                for c in range(3) if not softmax else ():
                    p = logits[c].sigmoid().item()
                    positive = g is not None and wanted[b]["labels"][g] == c
                    loss_class += -0.25 * (1 - p) ** 2 * math.log(p) if positive else \
                        -0.75 * p ** 2 * math.log(1 - p)
                if g is not None:
                    pair = out["boxes"][stage, b, q], wanted[b]["boxes"][g]
                    corners = [box_convert(x[None], "cxcywh", "xyxy") for x in pair]
                    mine, true = corners if criterion.corner_l1 else pair
                    l1 += (mine - true).abs().sum().item()
                    giou += 1 - generalized_box_iou(*corners).item()
        n = max(sum(counts), 1)
        expected = {"class": loss_class / (weights if softmax else n), "l1": l1 / n, "giou": giou / n}
        for name, value in expected.items():
            found = losses[name][stage].item()
            assert found == pytest.approx(value, rel=1e-4, abs=1e-5), f"{name} of stage {stage}"
            total += {"class": model.recipe["w_class"], "l1": 5, "giou": 2}[name] * value
    assert losses["total"].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("model", [SOFTMAX, FOCAL])
def test_parts_of_a_batch_add_up_to_the_whole(model):
    """--accumulate and several processes rely on this; [0] is a part without any object."""
    criterion, out, wanted = train.SetCriterion(model), predictions(), targets([2, 0, 3])
    whole = criterion(out, wanted)
    parts = [criterion({k: v[:, i:i + 1] for k, v in out.items()}, wanted[i:i + 1], box_counts=[2, 0, 3])
             for i in range(3)]
    for name in whole:
        torch.testing.assert_close(sum(p[name] for p in parts), whole[name])


def test_an_all_empty_batch_trains_the_classes_and_leaves_the_boxes_alone():
    out = {k: v.requires_grad_() for k, v in predictions().items()}
    train.SetCriterion(FOCAL)(out, [EMPTY] * 3)["total"].backward()
    assert out["logits"].grad.abs().sum() > 0
    assert out["boxes"].grad is None or not out["boxes"].grad.any()


def test_groups_count_by_their_mean():
    """Stage l * K + k is group k of layer l (Group DETR)."""
    criterion, out, wanted = train.SetCriterion(FOCAL), predictions(S=6), targets([2, 0, 3])
    losses = criterion({**out, "groups": 3}, wanted)
    alone = criterion(out, wanted)
    for name in ("class", "l1", "giou"):
        means = torch.stack([alone[name][:3].mean(), alone[name][3:].mean()])
        torch.testing.assert_close(losses[name], means)
    assert losses["total"].item() == pytest.approx(alone["total"].item() / 3)


def test_one_to_many_queries_see_every_object_several_times():
    criterion, out, wanted = train.SetCriterion(FOCAL), predictions(), targets([2, 0, 1])
    many = predictions(Q=9, seed=5)
    losses = criterion({**out, "one2many": {**many, "repeat": 3, "weight": 0.5}}, wanted)
    copies = [{"labels": torch.cat([t["labels"]] * 3), "boxes": torch.cat([t["boxes"]] * 3)} for t in wanted]
    plain, repeated = criterion(out, wanted), criterion(many, copies)
    assert losses["total"].item() == pytest.approx((plain["total"] + 0.5 * repeated["total"]).item())
    assert losses["one2many_class"].equal(repeated["class"])
