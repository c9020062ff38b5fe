"""Where do my numbers leave yours?  python -m tests.grading.first_difference work/my_detr.py --like detr

Both models get the same weights (through load_official) and the same images. If their parts have the same
names, the arguments and outputs of all parts are compared in the order of execution, otherwise the stages of
the output.
"""
import argparse
import inspect
import itertools
from pathlib import Path

import torch
from torchvision.ops import box_convert

from tests.grading.child import load_file, sentence
from tests.grading.files import ours_named
from tests.grading.marks import failure_of, ranked
from tests.grading.pairs import (
    PADDED,
    WIDE,
    NotLoaded,
    NotWritten,
    Pair,
    batch,
    file_of,
    gradient_pattern,
    gradient_sizes,
    origin,
)

# Looked at one after the other: (name, options of the pair, changes of the weights, image sizes)
PLAIN = ("with the default options", {}, (), PADDED)
SELECTIVE = {"recollect": "selective"}
TWO_STAGE = [("with two_stage", {"variant": "two_stage"}, (ranked,), PADDED),
             ("with two_stage, a wide image", {"variant": "two_stage"}, (ranked,), WIDE)]
VARIANTS = {
    "deformable_detr": [PLAIN, ("with box_refine", {"variant": "refinement"}, (), PADDED), *TWO_STAGE],
    "sam_detr": [PLAIN, ("with smca", {"variant": "smca"}, (), PADDED)],
    "sqr": [("with recollect=none", {}, (), PADDED), ("with recollection", SELECTIVE, (), PADDED),
            ("with box_refine", {"variant": "refinement", **SELECTIVE}, (), PADDED), *TWO_STAGE,
            ("with recurrent", {"recurrent": True}, (), PADDED)],
}


# ---- Events: what is computed, in the order of execution ---------------------------------------------------
def tensors(x, name):
    """All tensors in a value, each with a name: pos, levels[0][1], output["boxes"]."""
    if isinstance(x, torch.Tensor):
        yield name, x.detach()
    elif isinstance(x, (dict, list, tuple)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from tensors(value, f"{name}[{key!r}]")


def events(model, inputs, train):
    """({(part, which call, name): tensor} of all arguments and outputs, the model's output)."""
    found, calls, hooks = {}, {}, []

    def before(name, signature):
        def hook(module, args, kwargs):
            calls[name] = calls.get(name, 0) + 1
            for argument, value in signature.bind(*args, **kwargs).arguments.items():
                for what, x in tensors(value, argument):
                    found[name, calls[name], f"argument `{what}`"] = x.clone()

        return hook

    def after(name):
        def hook(module, args, output):
            for what, x in tensors(output, "output"):
                found[name, calls[name], what] = x.clone()

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
    a, b = a.double(), b.double()
    least = 1e-4 * max(1e-6, b[b.isfinite()].abs().max().item() if b.isfinite().any() else 1)
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=least, equal_nan=True)


# ---- How two tensors differ --------------------------------------------------------------------------------
def how(theirs, ours):
    """How to get `theirs` from `ours`, in words, for six simple transformations."""
    for order in itertools.permutations(range(ours.dim())):
        if list(order) != sorted(order) and close(theirs, ours.permute(order)):
            return f"transposed, its dimensions are ours in the order {list(order)}"
    if theirs.shape != ours.shape:
        return f"shape {list(theirs.shape)}, not {list(ours.shape)}"
    if ours.dtype == torch.bool:
        return "inverted" if theirs.equal(~ours) else f"{(theirs != ours).sum()} of {ours.numel()} differ"
    theirs, ours = theirs.double(), ours.double()
    ratio = (theirs * ours).sum() / ours.square().sum()
    for words, x in [(f"scaled by {ratio:.4g}", ratio * ours), ("the sigmoid is missing", ours.logit()),
                     ("a sigmoid too much", ours.sigmoid()), *pairs_of_numbers(ours)]:
        if close(theirs, x):
            return words
    return f"off by up to {(theirs - ours).abs().max():.2g}"


def pairs_of_numbers(x):
    if x.shape[-1] == 4:
        yield "corners (x, y, x, y) instead of centre and size", box_convert(x, "cxcywh", "xyxy")
    if x.shape[-1] % 2 == 0:
        yield "its two halves (x and y?) are swapped", x.roll(x.shape[-1] // 2, -1)


# ---- The first difference ----------------------------------------------------------------------------------
def first_event(pair, train, sizes=PADDED):
    """(place, description, last place that agrees) of the first difference, or None."""
    theirs, their_out = events(pair.student, batch(pair.seed, sizes), train)
    ours, our_out = events(pair.ours, batch(pair.seed, sizes), train)
    last = "nothing that can be compared inside, the names of the parts differ"
    for key in [key for key in ours if key in theirs]:
        name, call, what = key
        place = f"{what} of {name}" + (f" (call {call})" if call > 1 else "")
        if not close(theirs[key], ours[key]):
            return place, how(theirs[key], ours[key]), last
        last = place
    for (name, x), (_, y) in zip(*(list(tensors(out, "the output")) for out in (their_out, our_out))):
        stages = range(len(y)) if x.shape == y.shape and "proposals" not in name else [None]
        for stage in stages:
            a, b = (x, y) if stage is None else (x[stage], y[stage])
            if not close(a, b):
                return name + ("" if stage is None else f" of stage {stage + 1}"), how(a, b), last
    return None


def first_difference(student, ours, seed=0, variants=None):
    """Lines that say where the student's file and ours differ first."""
    path = getattr(student, "__file__", "")
    for what, options, changes, sizes in variants or VARIANTS.get(file_of(ours), [PLAIN]):
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
                yield f"The last place that agrees: {last}."
                return
        try:
            theirs = origin(pair)
            gradient_pattern(pair, theirs)
            gradient_sizes(pair, theirs)
        except AssertionError as error:
            yield f"{what}: predictions agree. {error}"
            return
        yield f"{what}: no difference, neither in numbers nor in gradients."
    for what, mark in [("initial values", "start"), ("training", "training")]:  # not seen in given weights
        if failure := failure_of(mark, student, ours, seed, lambda error: sentence(error, path)):
            yield f"{what}: {failure.sentence}"


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("file")
    parser.add_argument("--like", required=True, help="the file of ours that it is meant to equal")
    parser.add_argument("--seed", type=int, default=0, help="other weights and images")
    args = parser.parse_args()
    if not Path(args.file).is_file():
        parser.error(f"{args.file}: no such file")
    if args.like == "train":
        parser.error("--like train has no parts to follow; its marks name the loss that is off: "
                     f"python -m pytest tests/grading --file {args.file} --like train --points")
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
