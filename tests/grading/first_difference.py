"""Where do my numbers leave yours?  python -m tests.grading.first_difference work/my_detr.py --like detr

Both models get the same weights and images. Arguments and outputs of parts that have the same name in both
are compared in the order of execution, then the output, stage by stage.
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
from tests.grading.pairs import PADDED, WIDE, Pair, batch, file_of, gradient_pattern, gradient_sizes, origin

# Looked at one after the other: (name, options of the pair, changes of the weights, image sizes)
PLAIN = ("with the default options", {}, (), PADDED)
BOXES = [("with box_refine", {"variant": "refinement"}, (), PADDED),
         ("with two_stage", {"variant": "two_stage"}, (ranked,), WIDE)]
VARIANTS = {"deformable_detr": [PLAIN, *BOXES],
            "sam_detr": [PLAIN, ("with smca", {"variant": "smca"}, (), PADDED)],
            "sqr": [PLAIN, ("with recollection", {"recollect": "selective"}, (), PADDED), *BOXES]}


# ---- Events: what is computed, in the order of execution ---------------------------------------------------
def tensors(x, name):
    """All tensors in a value, each with a name: pos, levels[0][1], output["boxes"]."""
    if isinstance(x, torch.Tensor):
        yield name, x.detach()
    elif isinstance(x, (dict, list, tuple)):
        for key, value in x.items() if isinstance(x, dict) else enumerate(x):
            yield from tensors(value, f"{name}[{key!r}]")


def events(model, inputs, train):
    """{(part, which call, name): tensor} of all arguments and outputs, at last those of the model."""
    found, calls, hooks = {}, {}, []

    def keep(name, values):
        for what, value in values.items():
            found.update({(name, calls[name], place): x.clone() for place, x in tensors(value, what)})

    def before(name, signature):
        def hook(module, args, kwargs):
            calls[name] = calls.get(name, 0) + 1
            keep(name, {f"argument {k}": x for k, x in signature.bind(*args, **kwargs).arguments.items()})

        return hook

    for name, module in model.named_modules():
        if name and not name.startswith("backbone."):
            hooks.append(module.register_forward_pre_hook(
                before(name, inspect.signature(module.forward)), with_kwargs=True))
            hooks.append(module.register_forward_hook(
                lambda module, args, output, name=name: keep(name, {"output": output})))
    with torch.no_grad():
        out = model.train(train)(*inputs)
    for hook in hooks:
        hook.remove()
    for name, x in tensors(out, "output"):  # stages one by one
        rows = [x] if "proposals" in name else x
        found.update({("the model", i + 1, name): row for i, row in enumerate(rows)})
    return found


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
    halves = ours.roll(ours.shape[-1] // 2, -1)
    corners = box_convert(ours, "cxcywh", "xyxy") if ours.shape[-1] == 4 else halves
    for words, x in [(f"scaled by {ratio:.4g}", ratio * ours), ("the sigmoid is missing", ours.logit()),
                     ("a sigmoid too much", ours.sigmoid()), ("its two halves are swapped", halves),
                     ("corners (x, y, x, y) instead of centre and size", corners)]:
        if close(theirs, x):
            return words
    return f"off by up to {(theirs - ours).abs().max():.2g}"


# ---- The first difference ----------------------------------------------------------------------------------
def first_event(pair, train, sizes=PADDED):
    """(place, description, last place that agrees) of the first difference, or None."""
    theirs, ours = (events(model, batch(pair.seed, sizes), train) for model in (pair.student, pair.ours))
    last = "nothing that can be compared inside, the names of the parts differ"
    for name, call, what in ours:
        count = "stage" if name == "the model" else "call"
        place = f"{what} of {name}" + (f" ({count} {call})" if call > 1 or count == "stage" else "")
        a, b = theirs.get((name, call, what)), ours[name, call, what]
        if a is not None and not close(a, b):
            return place, how(a, b), last
        last = last if a is None else place
    missing = [what for name, call, what in ours if name == "the model" and (name, call, what) not in theirs]
    return (f"{missing[0]} of the model", "it is missing", last) if missing else None


def first_difference(student, ours, seed=0, variants=None):
    """Lines about where the student's file and ours differ first."""
    path = getattr(student, "__file__", "")
    for what, options, changes, sizes in variants or VARIANTS.get(file_of(ours), [PLAIN]):
        try:
            pair = Pair(student, ours, seed, calm=False, **options)
            pair.load(*changes)
        except Exception as error:  # not written yet, or not loaded
            yield f"{what}: cannot be built or filled. {sentence(error.__cause__ or error, path)}"
            continue
        for mode in ("inference", "training"):
            try:
                difference = first_event(pair, mode == "training", sizes)
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--like", required=True, help="the file of ours that it is meant to equal")
    parser.add_argument("--seed", type=int, default=0, help="other weights and images")
    args = parser.parse_args()
    path = Path(args.file).resolve()
    if args.like == "train":
        parser.error("--like train has no parts to follow; its marks name the loss (see docs/exercises.md)")
    try:
        ours = ours_named(args.like)
        student = load_file(str(path))
    except ValueError as error:
        parser.error(f"--like {error}")
    except Exception as error:
        parser.error(f"{args.file} cannot be imported: {sentence(error, path)}")
    print(*first_difference(student, ours, args.seed), sep="\n")


if __name__ == "__main__":
    main()
