"""Where do my numbers leave yours? python -m tests.grading.first_difference my_detr.py --like
conditional_detr

Both models get the same weights (through load_official) and the same images. If their parts have the same
names, the arguments and outputs of all parts are compared in the order of execution, otherwise the stages
of the output. The first difference is named and described, and compared with what our file gives with each
of the mistakes that people make.
"""

import argparse
import inspect
import itertools
from pathlib import Path

import torch
from torchvision.ops import box_convert

from tests.grading.child import load_file, sentence
from tests.grading.files import ours_named
from tests.grading.marks import ranked, start, training
from tests.grading.pairs import (
    BOTH,
    PADDED,
    TINY,
    WIDE,
    NotLoaded,
    NotWritten,
    Pair,
    batch,
    case_name,
    file_of,
    gradient_pattern,
    gradient_sizes,
    origin,
)
from tests.grading.planted import MISTAKES, module_of

# What is looked at one after the other: (what it is called, options of the pair, changes of the weights,
# image sizes)
PLAIN = ("with the default options", {}, (), PADDED)
REFINED = ("with box_refine", {"variant": "refinement"}, (), PADDED)
TWO_STAGE = [
    ("with two_stage", {"variant": "two_stage"}, (ranked,), PADDED),
    ("with two_stage, a wide image", {"variant": "two_stage"}, (ranked,), WIDE),
]
VARIANTS = {
    "detr": [PLAIN],
    "conditional_detr": [PLAIN],
    "deformable_detr": [PLAIN, REFINED, *TWO_STAGE],
    "sam_detr": [PLAIN, ("with smca", {"variant": "smca"}, (), PADDED)],
    "sqr": [
        ("with recollect=none", {}, (), PADDED),
        ("with recollection", {"recollect": "selective"}, (), PADDED),
        ("with dense recollection", {"recollect": "dense"}, (), PADDED),
        ("with box_refine", {"variant": "refinement", "recollect": "selective"}, (), PADDED),
        *TWO_STAGE,
        ("with recurrent", {"recurrent": True}, (), PADDED),
    ],
}


# ---- What is executed --------------------------------------------------------------------------------------
def tensors(x, name):
    """All tensors in a value, each with a name: pos, levels[0][1], output["boxes"]."""
    if isinstance(x, torch.Tensor):
        yield name, x.detach()
    elif isinstance(x, dict):
        for key, value in x.items():
            yield from tensors(value, f"{name}[{key!r}]")
    elif isinstance(x, (list, tuple)):
        for i, value in enumerate(x):
            yield from tensors(value, f"{name}[{i}]")


def events(model, inputs, train):
    """({(part, which call, what): tensor} of all arguments and outputs in order of execution, the model's
    output).
    """
    found, calls, hooks = {}, {}, []

    def before(name, signature):
        def hook(module, args, kwargs):
            calls[name] = calls.get(name, 0) + 1
            for argument, value in signature.bind(*args, **kwargs).arguments.items():
                for what, x in tensors(value, argument):
                    found[name, calls[name], f"argument `{what}`"] = x

        return hook

    def after(name):
        def hook(module, args, output):
            for what, x in tensors(output, "output"):
                found[name, calls[name], what] = x

        return hook

    for name, module in model.named_modules():
        if name and not name.startswith("backbone."):
            hook = before(name, inspect.signature(module.forward))
            hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            hooks.append(module.register_forward_hook(after(name)))
    with torch.no_grad():
        out = model.train(train)(*inputs)
    for hook in hooks:
        hook.remove()
    return found, out


def close(a, b):
    if a.shape != b.shape:
        return False
    return torch.allclose(a.double(), b.double(), rtol=1e-3, atol=1e-4 * size(b), equal_nan=True)


def size(x):
    x = x.double()[x.isfinite()]
    return max(1e-6, x.abs().max().item()) if x.numel() else 1


# ---- How two tensors differ --------------------------------------------------------------------------------
def how(theirs, ours, padding=None):
    """What was done to `ours` to get `theirs`, in words, as far as that can be told. padding: [B, T] of
    tokens.
    """
    for order in itertools.permutations(range(ours.dim())):
        if list(order) != sorted(order) and close(theirs, ours.permute(order)):
            return f"transposed, its dimensions are ours in the order {list(order)}"
    if theirs.shape != ours.shape:
        return f"shape {list(theirs.shape)}, not {list(ours.shape)}"
    if ours.dtype == torch.bool:
        return (
            "inverted"
            if theirs.equal(~ours)
            else f"another mask, {(theirs != ours).sum()} of {ours.numel()} differ"
        )
    theirs, ours = theirs.double(), ours.double()
    if not theirs.isfinite().all() and ours.isfinite().all():
        return "not finite" + only_at(~theirs.isfinite())
    ratio, shift = (theirs * ours).sum() / ours.square().sum(), (theirs - ours).mean()
    if not theirs.any() and ours.any():
        return "all zero"
    if close(theirs, ratio * ours):
        return f"scaled by {ratio:.4g}"
    if close(theirs, ours + shift):
        return f"shifted by {shift:.4g}"
    for words, x in transforms(ours):
        if close(theirs, x):
            return words
    wrong = ~torch.isclose(theirs, ours, rtol=1e-3, atol=1e-4 * size(ours))
    if padding is not None and ours.dim() >= 2 and ours.shape[:2] == padding.shape:
        if not wrong[~padding].any():
            return "wrong only on tokens that are padding"
    likeness = torch.cosine_similarity(theirs.flatten(), ours.flatten(), 0)
    return f"off by up to {(theirs - ours).abs().max():.2g}, likeness {likeness:.3f}" + only_at(wrong)


def transforms(x):
    """(words, what x would be) of everything simple that happens to numbers."""
    if x.shape[-1] == 2:
        yield "x and y are swapped", x.flip(-1)
    if x.shape[-1] == 4:
        yield "corners (x, y, x, y) instead of centre and size", box_convert(x, "cxcywh", "xyxy")
        yield "centre and size instead of corners", box_convert(x, "xyxy", "cxcywh")
        yield "x and y are swapped", x[..., [1, 0, 3, 2]]
    if x.shape[-1] % 2 == 0:
        yield "its two halves are swapped", x.roll(x.shape[-1] // 2, -1)
        yield (
            "even channels first, then odd ones, instead of in turn",
            torch.cat([x[..., ::2], x[..., 1::2]], -1),
        )
    if x.isfinite().all():
        yield "a sigmoid too much", x.sigmoid()
        yield "the sigmoid is missing", x.logit()
        yield "a ReLU too much", x.relu()
    for dim in range(x.dim()):
        yield f"in reverse order along dimension {dim}", x.flip(dim)
        yield f"softmax over dimension {dim} too much", x.softmax(dim)


def only_at(wrong):
    """Where in a tensor the wrong numbers are, if they are in a part of it only."""
    parts = []
    for dim in range(wrong.dim()):
        where = wrong.movedim(dim, 0).flatten(1).any(1).nonzero().flatten().tolist()
        if len(where) < wrong.shape[dim] and len(where) <= 4:
            parts.append(named_part(dim, wrong.shape, where))
    return f", only for {' and '.join(parts)}" if parts else ""


def named_part(dim, shape, where):
    """Some indices of a dimension, in words: image 2, queries 1 and 3, width and height."""
    count = [str(i + 1) for i in where]
    if dim == len(shape) - 1 and shape[dim] == 4:
        kind, count = "", [("cx", "cy", "width", "height")[i] for i in where]
    elif dim == 0 and shape[0] == len(PADDED):
        kind = "image"
    elif dim == 1 and shape[dim] == TINY["num_queries"]:
        kind = "query"
    elif dim == len(shape) - 1:
        kind = "channel"
    elif dim == 1 and len(shape) == 4:
        kind = "head"
    else:
        kind = "token"
    plural = {"query": "queries"}.get(kind, f"{kind}s") if kind and len(count) > 1 else kind
    return f"{plural} {' and '.join([', '.join(count[:-1]), count[-1]] if count[1:] else count)}".strip()


# ---- The first difference ----------------------------------------------------------------------------------
def first_event(pair, train, sizes=PADDED):
    """(place, description, last place that agrees) of the first difference, or None."""
    inputs = batch(pair.seed, sizes)
    theirs, their_out = events(pair.student, inputs, train)
    ours, our_out = events(pair.ours, inputs, train)
    common = [key for key in ours if key in theirs]
    paddings = {x.shape: x for x in ours.values() if x.dtype == torch.bool and x.dim() == 2}
    last = "the images"
    for key in common:
        name, call, what = key
        place = f"{what} of {name}" + (f" (call {call})" if call > 1 else "")
        if not close(theirs[key], ours[key]):
            return place, how(theirs[key], ours[key], paddings.get(ours[key].shape[:2])), last
        last = place
    if not common:
        last = "nothing that can be compared inside, the names of the parts differ"
    for key in [*BOTH, *(f"proposals {key}" for key in BOTH if "proposals" in our_out)]:
        x, y = (out["proposals"][key.split()[1]] if " " in key else out[key] for out in (their_out, our_out))
        if x.shape != y.shape:
            return f"the output {key}", how(x, y), last
        for stage in range(len(y) if key in BOTH else 0):
            if not close(x[stage], y[stage]):
                return f"the output {key} of stage {stage + 1}", how(x[stage], y[stage]), last
        if not close(x, y):
            return f"the output {key}", how(x, y), last
    return None


def suspects(pair, like, train, sizes=PADDED):
    """Mistakes that people make: those with which our file gives exactly the student's numbers."""
    inputs, found = batch(pair.seed, sizes), []
    with torch.no_grad():
        wanted = list(tensors(pair.student.train(train)(*inputs), ""))
        for mistake in MISTAKES:
            module = None if mistake.file == "train" else module_of(mistake, like)
            try:
                model = module.build(3, **dict(pair.options))
                module.load_official(model, {"model": pair.checkpoint})
                out = dict(tensors(model.train(train)(*inputs), ""))
            except Exception:
                continue  # not every mistake can be made in every file
            if all(name in out and close(out[name], x) for name, x in wanted):
                found.append(mistake.what)
    return list(dict.fromkeys(found))


def variants_of(like):
    """What is looked at: of relatives the default options."""
    return VARIANTS.get(like, [PLAIN])


def first_difference(student, ours, seed=0, variants=None):
    """Lines that say where the student's file and ours differ first."""
    like, path = file_of(ours), getattr(student, "__file__", "")
    for what, options, changes, sizes in variants or variants_of(like):
        try:
            with torch.device("meta"):
                ours.build(
                    3, **{**dict(pretrained_backbone=False), **case_name(options.get("variant", like))[1]}
                )
        except TypeError:
            continue  # an option that this relative does not have
        try:
            pair = Pair(student, ours, seed, calm=False, **options)
            pair.load(*changes)
        except (NotLoaded, NotWritten, NotImplementedError, TypeError, ValueError) as error:
            yield f"{what}: cannot be built or filled. {sentence(error.__cause__ or error, path)}"
            if not options:
                return
            continue
        for train in (False, True):
            mode = "training" if train else "inference"
            try:
                difference = first_event(pair, train, sizes)
            except Exception as error:
                yield f"{what}, {mode}: your file stops. {sentence(error, path)}"
                return
            if difference:
                place, description, last = difference
                yield f"{what}, {mode}: the first difference is {place}: {description}."
                yield f"What agrees up to there: {last}."
                for mistake in suspects(pair, like, train, sizes):
                    yield f"The output is exactly that of our file where {mistake}."
                return
        try:
            theirs = origin(pair)
            gradient_pattern(pair, theirs)
            gradient_sizes(pair, theirs)
        except AssertionError as error:
            yield f"{what}: predictions agree. {error}"
            return
        yield f"{what}: no difference, neither in numbers nor in gradients."
    for what, mark in [
        ("initial values", start),
        ("training", training),
    ]:  # what does not show in given weights
        try:
            mark(student, ours, seed)
        except Exception as error:
            yield f"{what}: {sentence(error, path)}"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file")
    parser.add_argument("--like", required=True, help="the file of ours that it is meant to equal")
    parser.add_argument("--seed", type=int, default=0, help="other weights and images")
    args = parser.parse_args()
    if not Path(args.file).is_file():
        parser.error(f"{args.file}: no such file")
    if args.like == "train":
        parser.error(
            "--like train has no parts to follow; its marks name the loss that is off: "
            f"python -m pytest tests --file {args.file} --like train --points"
        )
    try:
        ours = ours_named(args.like)
    except ValueError as error:
        parser.error(f"--like {error}")
    path = Path(args.file).resolve()
    try:
        student = load_file(str(path))
    except Exception as error:
        parser.error(f"{args.file} cannot be imported: {sentence(error, path)}")
    for line in first_difference(student, ours, args.seed):
        print(line)


if __name__ == "__main__":
    main()
