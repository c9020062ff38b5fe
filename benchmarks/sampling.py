"""Three ways to write the sampling of deformable attention: time and peak memory.

    python benchmarks/sampling.py            one encoder layer of Deformable DETR at 480 x 640

All forms give the same numbers (checked first, with gradients). Times alternate, so that their ratios can be
trusted. The last is the fastest forward, but not in training, and no longer shows that a map is read at
points.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from speed import peak_memory  # noqa: E402

from deformable_detr import deformable_sampling  # noqa: E402

SHAPES = [(60, 80), (30, 40), (15, 20), (8, 10)]  # C3 to C6 of a 480 x 640 image
B, M, K, WIDTH = 1, 8, 4, 32


def all_levels_at_once(value, spatial_shapes, locations, weights):
    """The usual form: sample all levels, stack, weigh, sum."""
    batch, Q = locations.shape[:2]
    samples = []
    for level, v in enumerate(value.split([h * w for h, w in spatial_shapes], dim=1)):
        h, w = spatial_shapes[level]
        v = v.flatten(2).transpose(1, 2).reshape(batch * M, WIDTH, h, w)
        grid = (2 * locations - 1)[:, :, :, level].transpose(1, 2).flatten(0, 1)
        samples.append(F.grid_sample(v, grid, align_corners=False))  # [B*M, D/M, Q, K]
    weights = weights.transpose(1, 2).reshape(batch * M, 1, Q, -1)
    out = (torch.stack(samples, dim=-2).flatten(-2) * weights).sum(-1)  # [B*M, D/M, Q]
    return out.view(batch, M * WIDTH, Q).transpose(1, 2)


def weighted_sum_of_rows(value, spatial_shapes, locations, weights):
    """A head's answer is a weighted sum of 4 L K rows of the value matrix: what embedding_bag computes.

    The rows are the four neighbours of every point. The samples themselves are never stored.
    """
    batch, T = value.shape[:2]
    sizes = torch.tensor(spatial_shapes, dtype=torch.int32)[:, None]  # [L, 1, 2] as (h, w)
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
    rows = (rows + torch.arange(batch, dtype=torch.int32).view(-1, 1, 1, 1, 1, 1) * T) * M  # of [B*T*M, D/M]
    rows = rows + torch.arange(M, dtype=torch.int32).view(-1, 1, 1, 1)
    rows, shares = rows.flatten(3).flatten(0, 2), shares.flatten(3).flatten(0, 2)  # [B*Q*M, L*K*4]
    out = F.embedding_bag(rows, value.flatten(0, 2), mode="sum", per_sample_weights=shares)
    return out.view(batch, -1, M * WIDTH)


FORMS = {
    "all levels at once": all_levels_at_once,
    "level by level (ours)": deformable_sampling,
    "embedding_bag": weighted_sum_of_rows,
}


def inputs():
    torch.manual_seed(0)
    T = sum(h * w for h, w in SHAPES)
    locations, weights = torch.rand(B, T, M, 4, K, 2), torch.rand(B, T, M, 4, K)
    return [x.requires_grad_() for x in (torch.randn(B, T, M, WIDTH), locations, weights)]


def forward(form, value, locations, weights):
    with torch.inference_mode():
        FORMS[form](value, SHAPES, locations, weights)


def step(form, value, locations, weights):
    """Forward and backward: the output, and the gradients of values and weights.

    The gradient of a location jumps where a point crosses from one pixel into the next, which rounding
    decides for a few of them.
    """
    out = FORMS[form](value, SHAPES, locations, weights)
    return out, *torch.autograd.grad(out.sum(), (value, weights, locations))[:2]


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=7)
    args = p.parse_args()
    leaves, (usual, *others) = inputs(), FORMS
    for form in others:
        torch.testing.assert_close(step(form, *leaves), step(usual, *leaves), rtol=1e-4, atol=1e-3)
    tasks = [(kind, form) for form in FORMS for kind in (forward, step)]
    times = {task: [] for task in tasks}
    for _ in range(args.repeats):
        for kind, form in tasks:
            start = time.perf_counter()
            kind(form, *leaves)
            times[kind, form].append(time.perf_counter() - start)
    seconds = {task: statistics.median(t) for task, t in times.items()}
    memory = {form: peak_memory(lambda: step(form, *leaves)) for form in FORMS}
    print(f"{torch.get_num_threads()} threads; in brackets relative to the first row, above 1 is better\n\n"
          "| form | forward | forward + backward | peak memory |\n|---|---|---|---|")
    for form in FORMS:
        ahead, both = [f"{seconds[kind, form]:.2f} s ({seconds[kind, usual] / seconds[kind, form]:.2f})"
                       for kind in (forward, step)]
        print(f"| {form} | {ahead} | {both} | {memory[form]:.0f} MiB ({memory[usual] / memory[form]:.2f}) |")


if __name__ == "__main__":
    main()
