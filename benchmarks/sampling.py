"""Four ways to write the sampling of deformable attention: time and peak memory.

    python benchmarks/sampling.py                   one encoder layer of Deformable DETR at 480 x 640
    python benchmarks/sampling.py --batch 1         one image only (default: 1, 2 and 8)
    python benchmarks/sampling.py --small           the maps of the laptop preset, 96 x 96
    python benchmarks/sampling.py --compile         each form through torch.compile, which a GPU needs more

All forms give the same numbers (checked first, with gradients). Times alternate, so that their ratios can be
trusted. embedding_bag no longer shows that a map is read at points.
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from speed import DEVICE, peak_memory, take_turns  # noqa: E402

from deformable_detr import deformable_sampling  # noqa: E402

# Maps (h, w) of C3 to C6, points and width of a head: a 480 x 640 image, and the laptop preset's 96 x 96
PAPER = [(60, 80), (30, 40), (15, 20), (8, 10)], 4, 32
SMALL = [(12, 12), (6, 6), (3, 3)], 2, 16
M = 8


def all_levels_at_once(value, spatial_shapes, locations, weights):
    """The usual form: sample all levels, stack, weigh, sum."""
    batch, Q = locations.shape[:2]
    width = value.shape[-1]
    samples = []
    for level, v in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        h, w = spatial_shapes[level]
        v = v.flatten(2).transpose(1, 2).reshape(batch * M, width, h, w)
        grid = (2 * locations - 1)[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(v, grid, align_corners=False))  # [B*M, D/M, Q, K]
    weights = weights.transpose(1, 2).reshape(batch * M, 1, Q, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)  # [B*M, D/M, Q]
    return out.view(batch, M * width, Q).transpose(1, 2)


def level_by_level(value, spatial_shapes, locations, weights):
    """Ours until November 2026: the points of one level at once, weighted and summed by einsum."""
    batch = len(value)
    grid, total = 2 * locations - 1, 0
    for level, v in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        feature_map = v.permute(0, 2, 3, 1).reshape(batch * M, -1, *spatial_shapes[level])
        points = grid[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B*M, Q, K, 2]
        weight = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B*M, Q, K]
        sampled = F.grid_sample(feature_map, points, align_corners=False)  # [B*M, D/M, Q, K]
        total = total + torch.einsum("ndqk,nqk->nqd", sampled, weight)  # [B*M, Q, D/M]
    return total.unflatten(0, (batch, M)).transpose(1, 2).flatten(2)  # [B, Q, D]


def weighted_sum_of_rows(value, spatial_shapes, locations, weights):
    """A head's answer is a weighted sum of 4 L K rows of the value matrix: what embedding_bag computes.

    The rows are the four neighbours of every point. The samples themselves are never stored.
    """
    batch, T = value.shape[:2]
    sizes = torch.tensor(spatial_shapes, dtype=torch.int32, device=value.device)[:, None]  # [L, 1, 2], (h, w)
    starts = F.pad(sizes.prod(-1).cumsum(0, dtype=torch.int32), (0, 0, 1, -1))  # [L, 1], of the first row
    points = locations * sizes.flip(-1) - 0.5  # [B, Q, M, L, K, 2] as (x, y), in pixels
    corner = points.detach().floor()
    (right, below), (x, y) = (points - corner).unbind(-1), corner.int().unbind(-1)  # [B, Q, M, L, K] each
    height, width = sizes.unbind(-1)  # [L, 1]
    left, top = (1 - right) * (x >= 0) * (x < width), (1 - below) * (y >= 0) * (y < height)  # 0 outside
    right, below = right * (x >= -1) * (x + 1 < width), below * (y >= -1) * (y + 1 < height)
    shares = torch.stack([left * top, right * top, left * below, right * below], -1) * weights[..., None]
    x0, x1 = (x.clamp(min=0).minimum(width - 1), (x + 1).clamp(min=0).minimum(width - 1))
    y0, y1 = ((starts + i.clamp(min=0).minimum(height - 1) * width) for i in (y, y + 1))
    rows = torch.stack([y0 + x0, y0 + x1, y1 + x0, y1 + x1], -1)  # [B, Q, M, L, K, 4]
    image, head = (torch.arange(n, dtype=torch.int32, device=value.device) for n in (batch, M))
    rows = (rows + image.view(-1, 1, 1, 1, 1, 1) * T) * M + head.view(-1, 1, 1, 1)  # of [B*T*M, D/M]
    rows, shares = rows.flatten(3).flatten(0, 2), shares.flatten(3).flatten(0, 2)  # [B*Q*M, L*K*4]
    out = F.embedding_bag(rows, value.flatten(0, 2), mode="sum", per_sample_weights=shares)
    return out.view(batch, -1, M * value.shape[-1])


FORMS = {
    "samples of all levels stacked, weighted, summed (the official PyTorch form)": all_levels_at_once,
    "level by level, weighted and summed by `einsum` (ours until November 2026)": level_by_level,
    "point by point, `addcmul` (our files)": deformable_sampling,
    "a weighted sum of rows, `embedding_bag`": weighted_sum_of_rows,
}


def inputs(B, shapes, K, width):
    torch.manual_seed(0)
    T, L = sum(h * w for h, w in shapes), len(shapes)
    leaves = torch.randn(B, T, M, width), torch.rand(B, T, M, L, K, 2), torch.rand(B, T, M, L, K)
    return [x.to(DEVICE).requires_grad_() for x in leaves]


def forward(form, shapes, value, locations, weights):
    with torch.inference_mode():
        form(value, shapes, locations, weights)


def step(form, shapes, value, locations, weights):
    """Forward and backward: the output, and the gradients of values and weights.

    The gradient of a location jumps where a point crosses from one pixel into the next, which rounding
    decides for a few of them.
    """
    out = form(value, shapes, locations, weights)
    return out, *torch.autograd.grad(out.sum(), (value, weights, locations))[:2]


def check(forms, size):
    """Raises AssertionError unless all forms agree."""
    leaves, (usual, *others) = inputs(1, *size), forms
    for form in others:
        torch.testing.assert_close(step(form, size[0], *leaves), step(usual, size[0], *leaves),
                                   rtol=1e-4, atol=1e-3)


def compare(batches, size, repeats, compiled=False):
    """Prints a Markdown table, one row for each batch and form."""
    forms = {name: torch.compile(form) if compiled else form for name, form in FORMS.items()}
    check(forms.values(), size)
    shapes = size[0]
    maps, how = ", ".join(f"{h} x {w}" for h, w in shapes), ", compiled" if compiled else ""
    print(f"\nMaps {maps}{how}; {DEVICE}, {torch.get_num_threads()} threads, torch {torch.__version__}. In "
          "brackets relative to the first row of the batch, above 1 is better.\n\n"
          "| batch | form | forward | forward + backward | memory, inference | memory, training |\n"
          "|---|---|---|---|---|---|")
    for B in batches:
        leaves = inputs(B, *size)
        rows = {name: [] for name in forms}
        for kind in (forward, step):
            calls = {name: lambda form=form: kind(form, shapes, *leaves) for name, form in forms.items()}
            for name, t in take_turns(calls, repeats).items():
                rows[name].append((1000 * t, "ms"))
        for kind in (forward, step):
            for name, form in forms.items():
                rows[name].append((peak_memory(lambda: kind(form, shapes, *leaves)), "MiB"))
        usual = next(iter(rows.values()))
        for name, row in rows.items():
            cells = [f"{x:.{digits(x)}f} {unit} ({first / x:.2f})"
                     for (x, unit), (first, _) in zip(row, usual)]
            print(f"| {B} | {name} | {' | '.join(cells)} |", flush=True)


def digits(x):
    """After the point, so that about three digits are shown."""
    return 0 if x >= 100 else 1 if x >= 10 else 2


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 2, 8])
    p.add_argument("--small", action="store_true", help="the laptop preset's maps")
    p.add_argument("--compile", action="store_true")
    args = p.parse_args()
    compare(args.batch, SMALL if args.small else PAPER, args.repeats, args.compile)


if __name__ == "__main__":
    main()
