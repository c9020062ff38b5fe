"""How time and memory of inference grow with the image: every method, paper size, 0.25 to 4 megapixels.

    python benchmarks/growth.py                            docs/growth.png and a table; minutes on 2 cores
    python benchmarks/growth.py --only detr sqr --megapixels 0.5 1 2

One image, ResNet-50, random weights. Memory is the peak of live tensors beside the parameters. That run is
also the warm-up of the one whose time is taken. Exponents are slopes of a line through the last three sizes,
in logarithms: 1 is linear in the number of pixels, 2 quadratic. A model stops before a size that it would
need more than --longest seconds for, or more than half of the machine's memory.
"""
import argparse
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import speed  # noqa: E402

from support.model_files import known_files  # noqa: E402


def sides(megapixels):
    """Height and width of an image of about so many megapixels: 3 to 4, multiples of 32."""
    height = math.sqrt(megapixels * 0.75e6)
    return 32 * round(height / 32), 32 * round(height * 4 / 3 / 32)


def exponent(points, column):
    """Slope of the last three points (megapixels, seconds, MiB), in logarithms; nan for a single one."""
    x, y = np.log([[point[0], point[column]] for point in points[-3:]]).T
    return np.polyfit(x, y, 1)[0] if len(points) > 1 else math.nan


def fits(points, megapixels, longest, memory):
    """Whether a size may be tried: linear growth of time and quadratic growth of memory stay in bounds."""
    if not points:
        return True
    before, seconds, mebibytes = points[-1]
    ratio = megapixels / before
    return seconds * ratio <= longest and mebibytes * ratio**2 <= memory


def measure(name, sizes, longest, memory):
    """[(megapixels, seconds, MiB)] of one model, from the smallest size up."""
    model, points = speed.build(name, "paper"), []
    for size in sorted(sizes):
        height, width = sides(size)
        if not fits(points, height * width / 1e6, longest, memory):
            break
        images, mask, _ = speed.batch(1, height, width)
        mebibytes = speed.peak_memory(lambda: speed.inference(model, images, mask))
        seconds = speed.seconds(lambda: speed.inference(model, images, mask))
        points.append((height * width / 1e6, seconds, mebibytes))
    return points


def half_the_memory():
    """In MiB: of the card, or of the machine."""
    if speed.DEVICE == "cuda":
        return torch.cuda.mem_get_info()[1] / 2**21
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**21


def table_head(sizes):
    names = [f"{height} x {width}" for height, width in map(sides, sorted(sizes))]
    print(f"\nSeconds and MiB of one image, {speed.DEVICE}, {torch.get_num_threads()} threads, torch "
          f"{torch.__version__}\n\n| model | {' | '.join(names)} | exponent of time | of memory |\n"
          f"|---|{'---|' * (len(names) + 2)}")


def row(name, points, count):
    cells = [f"{seconds:.2f} s, {mebibytes:.0f} MiB" for _, seconds, mebibytes in points]
    cells += ["" for _ in range(count - len(points))]
    cells += [f"{exponent(points, column):.2f}" for column in (1, 2)]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def draw(results, path):
    """Time and memory against megapixels, both axes logarithmic; dashed: relatives."""
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    panels = zip(figure.subplots(1, 2), ("seconds of one image", "MiB of one image, beside the parameters"))
    ticks = sorted({round(point[0], 2) for points in results.values() for point in points})
    for column, (axes, label) in enumerate(panels, 1):
        for i, (name, points) in enumerate(results.items()):
            x, y = [point[0] for point in points], [point[column] for point in points]
            line = "o-" if known_files()[name].parent == ROOT else "s--"
            axes.plot(x, y, line, color=f"C{i % 10}", ms=3, label=f"{name}: {exponent(points, column):.2f}")
        axes.set(xscale="log", yscale="log", xlabel="megapixels", ylabel=f"inference: {label}")
        axes.set_xticks(ticks, ticks)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="exponent", title_fontsize=8)
    figure.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=known_files(), metavar="MODEL", default=speed.METHODS)
    p.add_argument("--megapixels", nargs="+", type=float, default=[0.25, 0.5, 1, 2, 4])
    p.add_argument("--longest", type=float, default=15, metavar="SECONDS", help="of one inference")
    p.add_argument("--figure", type=Path, default=ROOT / "docs/growth.png", metavar="FILE")
    args = p.parse_args()
    table_head(args.megapixels)
    results = {}
    for name in args.only:
        results[name] = measure(name, args.megapixels, args.longest, half_the_memory())
        row(name, results[name], len(args.megapixels))
    draw(results, args.figure)


if __name__ == "__main__":
    main()
