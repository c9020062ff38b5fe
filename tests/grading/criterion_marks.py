"""Marks of train.py: matching and losses, seen only through SetCriterion."""
import torch

from tests.golden import assert_close
from tests.grading.pairs import NotWritten, case_of, same

LOSSES = ("class", "l1", "giou")


class Softmax:  # stands for a model
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
    return [{"labels": torch.randint(0, 3, (n,), generator=generator), "boxes": some_boxes(generator, n)}
            for n in counts]


def far_targets(generator, *counts):
    """Objects that lie far from each other, and none of them twice."""
    corners = torch.tensor([[0.2, 0.2], [0.8, 0.25], [0.3, 0.8], [0.75, 0.7]])
    targets = some_targets(generator, *counts)
    for t in targets:
        t["boxes"][:, :2] = corners[torch.randperm(4, generator=generator)[:len(t["labels"])]]
    return targets


def plain_predictions(generator, targets, S=3, Q=6, off=0.02):
    """Predictions that are easy to match: every stage has each object at another query."""
    logits = torch.randn(S, len(targets), Q, 4, generator=generator) - 2
    boxes = torch.full((S, len(targets), Q, 4), 0.02)
    for s in range(S):
        for b, target in enumerate(targets):
            n = len(target["labels"])
            query = torch.randperm(Q, generator=generator)[:n]
            boxes[s, b, query] = target["boxes"] + off * torch.rand(n, 4, generator=generator)
            logits[s, b, query, target["labels"]] += 4
    return {"logits": logits, "boxes": boxes}


def matcher(student, ours, seed):
    """Matching: the assignment of least cost, with a probability; also for more objects than queries."""
    generator = torch.Generator().manual_seed(seed)
    logits, boxes = torch.randn(40, 6, 3, generator=generator) * 2, some_boxes(generator, 40, 6)
    targets = some_targets(generator, *[n % 9 for n in range(40)])
    for name, theirs, mine in criteria(student, ours):
        stored = case_of(f"matcher_{name}")
        official = stored.arrays["logits"], stored.arrays["boxes"], stored.targets()
        for inputs in (official, (logits, boxes, targets)):
            wrong = sum(a != b for a, b in zip(matched(theirs, *inputs), matched(mine, *inputs)))
            assert not wrong, f"{name}: {wrong} of {len(inputs[2])} images are matched differently"


def matched(criterion, logits, boxes, targets):
    """{object: query} of each image."""
    stage, = criterion.match(logits[None], boxes[None], targets)
    return [dict(zip(objects.tolist(), queries.tolist())) for queries, objects in stage]


def losses_of(student, ours, seed, counts=(2, 3), **how):
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, *counts)
    for name, theirs, mine in criteria(student, ours):
        out = plain_predictions(generator, targets, **how)
        theirs, mine = theirs(out, targets), mine(out, targets)
        for loss in LOSSES:
            assert loss in theirs, f"the criterion returns no {loss!r}"
            found, wanted = theirs[loss].numel(), mine[loss].numel()
            assert found == wanted, f"loss {loss!r} has {found} numbers, not {wanted}, one for each stage"
            theirs[loss] = theirs[loss].reshape(-1)
        yield name, theirs, mine


def one_loss(student, ours, seed, loss, **how):
    for name, theirs, expected in losses_of(student, ours, seed, S=1, **how):
        same(f"{name}: values of loss {loss!r}", theirs[loss], expected[loss], 1e-4, rows="")


def pairing(student, ours, seed):
    """Pairing: the losses compare each matched query with its own object."""
    for name, theirs, _ in losses_of(student, ours, seed, counts=(3, 1, 4), S=1, off=0):
        assert min(abs(theirs["l1"].item()), abs(theirs["giou"].item())) < 1e-3, (
            f"{name}: boxes that equal their objects have L1 and GIoU losses; are they compared with others?")


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
            same(f"{name}: {loss!r} losses, if each stage has its objects at other queries,", theirs[loss],
                 expected[loss], 1e-4)


def total(student, ours, seed):
    """The total is the sum of all losses of all stages, with the recipe's weights."""
    for name, theirs, _ in losses_of(student, ours, seed, S=3):
        weights = (Softmax if name == "softmax" else Focal).recipe
        expected = sum(weights[f"w_{loss}"] * theirs[loss].sum() for loss in LOSSES)
        same(f"{name}: total and weighted sum of its losses", theirs["total"], expected, 1e-4, rows="")


def empty(student, ours, seed):
    """Images without objects, in a batch with others and without: their queries still have a class loss."""
    for counts in [(0, 2), (0, 0)]:
        for name, theirs, expected in losses_of(student, ours, seed, counts):
            for loss in LOSSES:
                same(f"{name}, images with {counts} objects: {loss!r} losses", theirs[loss], expected[loss])


def proposals(student, ours, seed):
    """Two-stage models: proposals are trained with every label set to class 0."""
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, 2, 3)
    objects = [{**t, "labels": t["labels"] * 0} for t in targets]
    _, (_, theirs, _) = criteria(student, ours)  # focal
    out, enc = plain_predictions(generator, targets), plain_predictions(generator, objects, S=1, Q=20)
    with_proposals = {**out, "proposals": {key: x[0] for key, x in enc.items()}}
    more = theirs(with_proposals, targets)["total"] - theirs(out, targets)["total"]
    same("total and the losses of proposals", more, theirs(enc, objects)["total"], rows="")  # like a stage


def criterion(student, ours, seed):
    """The numbers of the official criterion: all losses of all stages, and their gradient."""
    for name, (_, theirs, _) in zip(["criterion_detr", "criterion_conditional"], criteria(student, ours)):
        case = case_of(name)
        out = {key: case.arrays[key].clone().requires_grad_() for key in ("logits", "boxes")}
        losses = theirs(out, case.targets())
        last = len(out["logits"]) - 1
        for loss, stored in [("class", "loss_ce"), ("l1", "loss_bbox"), ("giou", "loss_giou")]:
            for s in range(last + 1):
                expected = case.json["given"]["loss_raw"][stored if s == last else f"{stored}_{s}"]
                assert_close(f"{name}: {loss} of stage {s + 1}", losses[loss][s].detach(), expected, "loss")
        losses["total"].backward()
        for key, x in out.items():
            stored = case.arrays[f"given_grad_{key}"]
            assert_close(f"{name}: gradient of {key}", x.grad, stored, "criterion_grad")


def box_counts(student, ours, seed):
    """Parts of a batch (accumulation, several GPUs) are divided by the number of objects in all of it."""
    generator = torch.Generator().manual_seed(seed)
    targets = far_targets(generator, 1, 3, 0, 2)
    counts = [len(target["labels"]) for target in targets]
    for name, theirs, mine in criteria(student, ours):
        out = plain_predictions(generator, targets)
        images = [({key: x[:, b:b + 1] for key, x in out.items()}, targets[b:b + 1], counts)
                  for b in range(4)]
        whole = theirs(out, targets)
        for loss in LOSSES:
            parts, expected = (torch.stack([c(*image)[loss] for image in images]) for c in (theirs, mine))
            if (parts.sum(0) - whole[loss]).abs().max() > 1e-4:
                same(f"{name}: {loss!r} losses of four images one by one", parts, expected, rows="image")
