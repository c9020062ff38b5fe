"""AP of several runs against steps and against minutes, in one figure; a curve is named after its folder.

    python benchmarks/compare.py curves.png runs/detr-shapes runs/conditional_detr-shapes ...
"""
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.pictures import drawable, read_log


def evaluations(run):
    """The evaluations of a run as [(step, minutes, {name: number})], from 0 on. Raises SystemExit."""
    try:
        lines = [line for line in read_log(run / "log.jsonl") if "eval" in line]
    except OSError as error:
        raise SystemExit(f"{run}: not the folder of a run ({error.strerror}: log.jsonl)")
    if not lines:
        raise SystemExit(f"{run}: no evaluation in log.jsonl yet")
    return [(0, 0.0, {"AP": 0.0})] + [(line["step"], line["seconds"] / 60, line["eval"]) for line in lines]


def main(path, *runs):
    runs = [Path(run).resolve() for run in runs]
    names = [run.name for run in runs]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run, name in zip(runs, names):
        label = name if names.count(name) == 1 else f"{run.parent.name}/{name}"
        steps, minutes, metrics = zip(*evaluations(run))
        values = [max(0, one["AP"]) for one in metrics]  # -1: no object to find
        left.plot(steps, values, "o-", ms=3, label=drawable(label))
        right.plot(minutes, values, "o-", ms=3)
        print(f"{label:34} {steps[-1]:6} steps {minutes[-1]:6.1f} min  "
              f"AP {metrics[-1]['AP']:.3f}  AP50 {metrics[-1]['AP50']:.3f}")
    left.set(xlabel="steps", ylabel="AP on held-out images", ylim=(0, None))
    right.set(xlabel="minutes, evaluations included")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:  # ValueError: an ending that is no format of pictures
        raise SystemExit(f"{path}: {error}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
