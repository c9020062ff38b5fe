"""AP of several runs against steps and against minutes, in one figure.

    python benchmarks/compare.py curves.png runs/detr-shapes runs/conditional_detr-shapes ...
"""
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure


def main(path, *runs):
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for run in map(Path, runs):
        lines = map(json.loads, (run / "log.jsonl").read_text().splitlines())
        evals = [line for line in lines if "eval" in line]
        settings = json.loads((run / "args.json").read_text())["train"]
        label = f"{settings['model']} (batch {settings['batch_size']})"
        values = [0] + [line["eval"]["AP"] for line in evals]
        left.plot([0] + [line["step"] for line in evals], values, "o-", ms=3, label=label)
        right.plot([0] + [line["seconds"] / 60 for line in evals], values, "o-", ms=3, label=label)
        last = evals[-1]
        print(f"{label:34} {last['step']:6} steps {last['seconds'] / 60:6.1f} min  "
              f"AP {last['eval']['AP']:.3f}  AP50 {last['eval']['AP50']:.3f}")
    left.set(xlabel="steps", ylabel="AP on held-out images", ylim=(0, None))
    right.set(xlabel="minutes, evaluations included")
    left.legend()
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
