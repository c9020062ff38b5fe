"""Marks of train.py: matching and losses, seen through SetCriterion alone."""

import torch

from tests.golden import assert_close
from tests.grading.pairs import NotWritten, case_of, same


class Softmax:
    recipe = dict(class_loss="softmax", w_class=1, w_l1=5, w_giou=2)


class Focal:
    recipe = dict(class_loss="focal", w_class=2, w_l1=5, w_giou=2)


def criteria(student, ours):
    """(name, the student's criterion, ours) for both kinds of classification."""
    if not hasattr(student, "SetCriterion"):
        raise NotWritten("not written yet: SetCriterion")
    for model in (Softmax(), Focal()):
        yield model.recipe["class_loss"], student.SetCriterion(model), ours.SetCriterion(model)


def some_boxes(generator, *shape):
    xy, wh = torch.rand(2, *shape, 2, generator=generator)
    return torch.cat([0.2 + 0.6 * xy, 0.05 + 0.3 * wh], -1)


def some_targets(generator, *counts):
    return [
        {"labels": torch.randint(0, 3, (n,), generator=generator), "boxes": some_boxes(generator, n)}
        for n in counts
    ]


def plain_predictions(generator, targets, S=3, Q=6, off=0.02):
    """Predictions that nobody can match in a wrong way: every stage has each object at another query."""
    logits = torch.randn(S, len(targets), Q, 4, generator=generator) - 2
    boxes = torch.full((S, len(targets), Q, 4), 0.02)
    for s in range(S):
        for b, target in enumerate(targets):
            n = len(target["labels"])
            query = torch.randperm(Q, generator=generator)[:n]
            boxes[s, b, query] = target["boxes"] + off * torch.rand(n, 4, generator=generator)
            logits[s, b, query, target["labels"]] += 4
    return {"logits": logits, "boxes": boxes}


def far_targets(generator, *counts):
    """Objects that lie far from each other, and none of them twice."""
    corners = torch.tensor([[0.2, 0.2], [0.8, 0.25], [0.3, 0.8], [0.75, 0.7]])
    targets = some_targets(generator, *counts)
    for target in targets:
        n = len(target["labels"])
        target["boxes"][:, :2] = corners[torch.randperm(4, generator=generator)[:n]]
    return targets


def matcher(student, ours, seed):
    """Matching: the assignment of least cost, with a probability in the cost; also for more objects than queries."""
    generator = torch.Generator().manual_seed(seed)
    logits, boxes = torch.randn(40, 6, 3, generator=generator) * 2, some_boxes(generator, 40, 6)
    targets = some_targets(generator, *[n % 9 for n in range(40)])
    for name, theirs, mine in criteria(student, ours):
        stored = case_of(f"matcher_{name}")
        cases = [
            ("of the official code", stored.arrays["logits"], stored.arrays["boxes"], stored.targets()),
            ("drawn at random", logits, boxes, targets),
        ]
        for what, logits, boxes, targets in cases:
            found, expected = (
                [{g: q for q, g in zip(*(i.tolist() for i in pair))}
                 for pair in c.match(logits[None], boxes[None], targets)[0]]
                for c in (theirs, mine)
            )
            wrong = sum(a != b for a, b in zip(found, expected))
            assert not wrong, f"{name}: {wrong} of {len(expected)} images {what} are matched differently"


def losses_of(student, ours, seed, counts=(2, 3), **how):
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, *counts)
    for name, theirs, mine in criteria(student, ours):
        out = plain_predictions(generator, targets, **how)
        theirs, mine = theirs(out, targets), mine(out, targets)
        for loss in ("class", "l1", "giou"):
            assert loss in theirs, f"the criterion returns no {loss!r}"
            found, wanted = list(theirs[loss].shape), list(mine[loss].shape)
            assert found == wanted, f"loss {loss!r} has the shape {found}, not {wanted}, one number for each stage"
        yield name, theirs, mine


def one_loss(student, ours, seed, loss, **how):
    for name, theirs, expected in losses_of(student, ours, seed, S=1, **how):
        same(f"{name}: values of loss {loss!r}", theirs[loss][None], expected[loss][None], 1e-4, rows="")


def pairing(student, ours, seed):
    """Pairing: the losses compare each matched query with its own object, and return a number for each stage."""
    for name, theirs, _ in losses_of(student, ours, seed, counts=(3, 1, 4), S=1, off=0):
        if (theirs["l1"].abs() > 1e-3).all() and not (theirs["giou"].abs() < 1e-3).all():
            raise AssertionError(f"{name}: boxes that equal their objects have L1 loss {theirs['l1'].item():.2g} and GIoU "
                                 f"loss {theirs['giou'].item():.2g}, not 0: other objects are compared")


def class_loss(student, ours, seed):
    """Class loss: cross-entropy with 0.1 for "no object", or focal, and what each is divided by."""
    one_loss(student, ours, seed, "class")


def l1_loss(student, ours, seed):
    """L1 loss: summed over coordinates, divided by the number of objects."""
    one_loss(student, ours, seed, "l1")


def giou_loss(student, ours, seed):
    """GIoU loss, divided by the number of objects."""
    one_loss(student, ours, seed, "giou")


def stages(student, ours, seed):
    """Every stage is matched by itself, and has a loss of its own."""
    for name, theirs, expected in losses_of(student, ours, seed, S=3):
        for loss in ("l1", "giou", "class"):
            same(f"{name}: values of loss {loss!r}, if each stage has its objects at other queries,",
                 theirs[loss][:, None], expected[loss][:, None], 1e-4)


def total(student, ours, seed):
    """The total is the sum of all losses of all stages, with the recipe's weights."""
    for name, theirs, _ in losses_of(student, ours, seed, S=3):
        weights = (Softmax if name == "softmax" else Focal).recipe
        expected = sum(weights[f"w_{loss}"] * theirs[loss].sum() for loss in ("class", "l1", "giou"))
        same(f"{name}: total and weighted sum of the losses it returns", theirs["total"].reshape(1, 1),
             expected.reshape(1, 1), 1e-4, rows="")


def empty(student, ours, seed):
    """Images without objects, in a batch with others and alone: every query must say that there is nothing."""
    for counts in [(0, 2), (0, 0)]:
        for name, theirs, expected in losses_of(student, ours, seed, counts):
            for loss in ("class", "l1", "giou"):
                assert theirs[loss].isfinite().all(), f"{name}, {counts} objects: {loss!r} is not finite"
                same(f"{name}, images with {counts[0]} and {counts[1]} objects: values of loss {loss!r}",
                     theirs[loss][:, None], expected[loss][:, None])


def proposals(student, ours, seed):
    """Two-stage models: proposals are trained with every label set to class 0."""
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, 2, 3)
    objects = [{**t, "labels": t["labels"] * 0} for t in targets]
    _, (_, theirs, _) = criteria(student, ours)
    out, enc = plain_predictions(generator, targets), plain_predictions(generator, objects, S=1, Q=20)
    with_proposals = {**out, "proposals": {key: x[0] for key, x in enc.items()}}
    more = theirs(with_proposals, targets)["total"] - theirs(out, targets)["total"]
    wanted = theirs(enc, objects)["total"]  # as much as if they were a stage
    same("total and what proposals must add to it", more.reshape(1, 1), wanted.reshape(1, 1), rows="")


def criterion(student, ours, seed):
    """The numbers of the official criterion: all losses of all stages, and their gradient."""
    if not hasattr(student, "SetCriterion"):
        raise NotWritten("not written yet: SetCriterion")
    for name, model in [("criterion_detr", Softmax()), ("criterion_conditional", Focal())]:
        case = case_of(name)
        out = {key: case.arrays[key].clone().requires_grad_() for key in ("logits", "boxes")}
        losses = student.SetCriterion(model)(out, case.targets())
        last = len(out["logits"]) - 1
        for loss, stored in [("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")]:
            for s in range(last + 1):
                expected = case.json["given"]["loss_raw"][stored if s == last else f"{stored}_{s}"]
                assert_close(f"{name}: {loss} of stage {s + 1}", losses[loss][s].detach(), expected, "loss")
        losses["total"].backward()
        for key, x in out.items():
            assert_close(f"{name}: gradient of {key}", x.grad, case.arrays[f"given_grad_{key}"], "criterion_grad")


def box_counts(student, ours, seed):
    """Parts of a batch (accumulation, several GPUs) are divided by the number of objects in the whole of it."""
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, 1, 3, 0, 2)
    counts = [len(target["labels"]) for target in targets]
    for name, theirs, mine in criteria(student, ours):
        out = plain_predictions(generator, targets)
        images = [({key: x[:, b:b + 1] for key, x in out.items()}, targets[b:b + 1], counts) for b in range(4)]
        whole, expected = theirs(out, targets), [mine(*image) for image in images]
        for loss in ("class", "l1", "giou"):
            parts = torch.stack([theirs(*image)[loss] for image in images])
            if (parts.sum(0) - whole[loss]).abs().max() > 1e-4:
                same(f"{name}: {loss!r} of four images one by one", parts,
                     torch.stack([e[loss] for e in expected]), rows="image")
