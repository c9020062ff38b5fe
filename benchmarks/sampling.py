"""Does it pay to weigh and add the samples of deformable attention level by level? Time and peak memory.

    python benchmarks/sampling.py            the encoder of Deformable DETR at 480 x 640, forward + backward

Both forms give the same numbers (checked first). Times alternate, so that their ratio can be trusted.
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


FORMS = {"all levels at once": all_levels_at_once, "level by level (ours)": deformable_sampling}


def inputs():
    torch.manual_seed(0)
    T = sum(h * w for h, w in SHAPES)
    locations, weights = torch.rand(B, T, M, 4, K, 2), torch.rand(B, T, M, 4, K)
    return [x.requires_grad_() for x in (torch.randn(B, T, M, WIDTH), locations, weights)]


def step(form):
    value, locations, weights = inputs()
    out = FORMS[form](value, SHAPES, locations, weights)
    out.sum().backward()
    return out, value.grad


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=7)
    args = p.parse_args()
    (a, grad_a), (b, grad_b) = (step(form) for form in FORMS)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_a, grad_b, rtol=1e-4, atol=1e-4)
    times = {form: [] for form in FORMS}
    for _ in range(args.repeats):
        for form in FORMS:
            start = time.perf_counter()
            step(form)
            times[form].append(time.perf_counter() - start)
    seconds = {form: statistics.median(t) for form, t in times.items()}
    memory = {form: peak_memory(lambda: step(form)) for form in FORMS}
    for form in FORMS:
        print(f"{form:24} {seconds[form]:.2f} s, peak {memory[form]:.0f} MiB")
    usual, ours = FORMS
    print(f"usual / ours: {seconds[usual] / seconds[ours]:.2f} in time, {memory[usual] / memory[ours]:.2f} in memory "
          f"({torch.get_num_threads()} threads)")


if __name__ == "__main__":
    main()
