"""Two ways to write the sampling of deformable attention, the official one and ours: time and peak memory.

    python benchmarks/sampling.py                   one encoder layer of Deformable DETR, with two sizes
    python benchmarks/sampling.py --batch 2         other numbers of images (default: 1 and 8)
    python benchmarks/sampling.py --compile         both through torch.compile, which a GPU needs more

Both give the same numbers and gradients, which is checked first. They take turns, so that noise of the
machine affects both. Each cell is the official value divided by ours; above 1 ours is better.
"""
import argparse
import functools
import itertools
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from speed import DEVICE, peak_memory, report, take_turns  # noqa: E402

from deformable_detr import deformable_sampling  # noqa: E402

# Maps (h, w), points and width of a head: C3 to C6 of a 480 x 640 image, and the laptop preset's 96 x 96
SIZES = {"480 x 640": ([(60, 80), (30, 40), (15, 20), (8, 10)], 4, 32),
         "laptop preset": ([(12, 12), (6, 6), (3, 3)], 2, 16)}
M = 8


def official(value, spatial_shapes, locations, weights):
    """The official PyTorch form: samples of all levels are stacked, weighted and summed."""
    B, Q = locations.shape[:2]
    width = value.shape[-1]
    samples = []
    for level, v in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        h, w = spatial_shapes[level]
        v = v.flatten(2).transpose(1, 2).reshape(B * M, width, h, w)
        grid = (2 * locations - 1)[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(v, grid, align_corners=False))  # [B*M, D/M, Q, K]
    weights = weights.transpose(1, 2).reshape(B * M, 1, Q, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)  # [B*M, D/M, Q]
    return out.view(B, M * width, Q).transpose(1, 2)


FORMS = {"ours, point by point": deformable_sampling, "official PyTorch form": official}


def inputs(B, shapes, K, width):
    torch.manual_seed(0)
    T, L = sum(h * w for h, w in shapes), len(shapes)
    leaves = torch.randn(B, T, M, width), torch.rand(B, T, M, L, K, 2), torch.rand(B, T, M, L, K)
    return [x.to(DEVICE).requires_grad_() for x in leaves]


def forward(form, shapes, value, locations, weights):
    with torch.inference_mode():
        form(value, shapes, locations, weights)


def step(form, shapes, value, locations, weights):
    """The output, and gradients of values and weights. Those of locations jump at the edge of a pixel."""
    out = form(value, shapes, locations, weights)
    return out, *torch.autograd.grad(out.sum(), (value, weights, locations))[:2]


def compare(batches, sizes, repeats, compiled=False):
    """{size and batch: {column: [ours, official]}}. Raises AssertionError if both differ."""
    forms = {name: torch.compile(form) if compiled else form for name, form in FORMS.items()}
    rows = {}
    for (name, size), B in itertools.product(sizes.items(), batches):
        ours, theirs = (step(form, size[0], *inputs(1, *size)) for form in forms.values())
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)
        row, leaves = {}, inputs(B, *size)
        for what, kind in (("forward", forward), ("forward + backward", step)):
            calls = {form: functools.partial(kind, forms[form], size[0], *leaves) for form in forms}
            row[f"{what}, s"] = list(take_turns(calls, repeats).values())
            row[f"memory of {what}, MiB"] = [peak_memory(call) for call in calls.values()]
        rows[f"{name}, {B} image{'s' * (B > 1)}"] = row
    return rows


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--batch", type=int, nargs="+")
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    rows = compare(args.batch or [1, 8], SIZES, args.repeats, args.compile)
    report("sampling", rows, DEVICE == "cpu" and not (args.batch or args.compile))


if __name__ == "__main__":
    main()
