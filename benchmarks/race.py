"""The race: every method trains on `shapes` for about ten minutes of a core, with the same pictures.

    python benchmarks/race.py --jobs 2              the files at the top level, seed 0: 30 minutes on 2 cores
    python benchmarks/race.py --seeds 0 1 2 --only sqr deformable_detr
    python benchmarks/race.py --table               no training: table and figure from the results

Each runner is `python train.py` with its laptop preset on one thread, so anybody can repeat one by hand. What
is finished is not run again, what was interrupted goes on where it stopped. Runs lie in benchmarks/runs/,
their curves in benchmarks/results/race.json, the figure in docs/race.png.

Minutes are CPU minutes of the run's process, evaluations included: they do not depend on other work of the
machine.
"""
import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from support.model_files import known_files  # noqa: E402

RUNS, FIGURE = ROOT / "benchmarks/runs", ROOT / "docs/race.png"
RESULTS = ROOT / "benchmarks/results/race.json"


def runner(model, *options, steps=1800):
    return ["--model", model, "--steps", str(steps), *(x for option in options for x in ("--option", option))]


# Every model file is a runner of its own name: the laptop preset for 1800 steps, about ten minutes. Here are
# those that differ: other options, other numbers of steps, ablations of a paper. Batches are those of the
# presets: 8 images with deformable attention, whose steps cost as much as others do with 16.
SPECIAL = {
    "sam_detr": runner("sam_detr", steps=900),
    "deformable_detr plain": runner("deformable_detr", "box_refine=false"),
    "deformable_detr two-stage": runner("deformable_detr", "two_stage=true"),
    "sqr dense": runner("sqr", "recollect=dense"),
    "detr 3600 steps": runner("detr", steps=3600),
    "deformable_detr 1300 steps": runner("deformable_detr", steps=1300),
    "sqr 1300 steps": runner("sqr", steps=1300),
    "sqr recurrent": runner("sqr", "recurrent=true"),
    "sam_detr 1800 steps": runner("sam_detr"),
    "csq": runner("conditional_detr", steps=1000),
    "csq-i": runner("conditional_detr_ablations", "spatial_query=csq-i", steps=1000),
    "csq-p": runner("conditional_detr_ablations", "spatial_query=csq-p", steps=1000),
    "csq-t": runner("conditional_detr_ablations", "spatial_query=csq-t", steps=1000),
    "csq-c": runner("conditional_detr_ablations", "spatial_query=csq-c", steps=1000),
}
RUNNERS = {**{name: runner(name) for name in known_files()}, **SPECIAL}
MAIN = [name for name, path in known_files().items() if path.parent == ROOT]  # README's figure


# ---- Running -----------------------------------------------------------------------------------------------
def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def run(name, seed):
    """Train one runner to its end, or go on with it: its entry for race.json, or None if it stopped early."""
    flags = RUNNERS[name]
    steps = int(flags[flags.index("--steps") + 1])
    folder, start = RUNS / f"{name.replace(' ', '-')}-seed{seed}", 0
    command = [sys.executable, str(ROOT / "train.py"), "--workers", "0", "--device", "cpu"]
    if (folder / "last.pt").exists():
        start = torch.load(folder / "last.pt", weights_only=True)["step"]
        command += ["--resume", str(folder)]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
        command += [*flags, "--seed", str(seed), "--eval-every", str(steps // 15), "--out", str(folder)]
    RUNS.mkdir(parents=True, exist_ok=True)
    with open(f"{folder}.txt", "w") as output:
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=one_thread)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        print(f"{name}, seed {seed}: stopped, see {folder}.txt", flush=True)
        return None
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keep = ("AP", "AP50", "AP75", "AP_small")
    evals = [{"step": line["step"], **{k: round(line["eval"][k], 4) for k in keep}}
             for line in lines if "eval" in line]
    print(f"{name}, seed {seed}: AP {evals[-1]['AP']:.3f}, AP50 {evals[-1]['AP50']:.3f}", flush=True)
    settings = json.loads((folder / "args.json").read_text())
    minutes = (usage.ru_utime + usage.ru_stime) / 60 * steps / (steps - start)
    return {"name": name, "seed": seed, "flags": shlex.join(flags), "batch": settings["train"]["batch_size"],
            "cpu_minutes": round(minutes, 2), "commit": git("rev-parse", "--short", "HEAD"),
            "date": str(datetime.date.today()), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": settings["versions"]["torch"], "evals": evals}


def race(names, seeds, jobs):
    """Run what is not in race.json yet, `jobs` at a time, and store each result at once."""
    done, lock = read_results(), threading.Lock()

    def one(job):
        result = run(*job)
        with lock:
            if result:
                done[f"{job[0]}, seed {job[1]}"] = result
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps(dict(sorted(done.items())), indent=1) + "\n")

    todo = [(name, seed) for seed in seeds for name in names if f"{name}, seed {seed}" not in done]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, todo))


def read_results():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


# ---- Table and figure --------------------------------------------------------------------------------------
def entries_of(name):
    return [entry for entry in read_results().values() if entry["name"] == name]


def curves(name):
    """All seeds of a runner: (its entries, steps [n], AP [seeds, n], minutes [n])."""
    entries = entries_of(name)
    steps = np.array([line["step"] for line in entries[0]["evals"]])
    values = np.array([[line["AP"] for line in entry["evals"]] for entry in entries])
    minutes = np.mean([entry["cpu_minutes"] for entry in entries]) * steps / steps[-1]
    return entries, steps, values, minutes


def crossing(entry, key="AP50", level=0.5):
    """The step at which a curve first reaches the level, by straight lines between evaluations, or None."""
    step, value = 0, 0.0
    for line in entry["evals"]:
        if line[key] >= level:
            return step + (line["step"] - step) * (level - value) / (line[key] - value)
        step, value = line["step"], line[key]
    return None


def spread(values, form="{:.3f}"):
    """"mean ± standard deviation", or the one value there is."""
    mean = form.format(statistics.mean(values))
    return f"{mean} ± {form.format(statistics.stdev(values))}" if len(values) > 1 else mean


def images_to(entries):
    """Mean number of training images until AP50 = 0.5; None without runs, or if a seed never gets there."""
    reached = [crossing(entry) for entry in entries]
    return statistics.mean(reached) * entries[0]["batch"] if reached and None not in reached else None


def table(names):
    """Markdown, one row a runner. "DETR / it": images to AP50 0.5 that DETR needs over those it needs."""
    print("| runner | seeds | batch | steps | CPU min | AP | AP50 | AP small "
          "| images to AP50 0.5 | DETR / it |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    detr = images_to(entries_of("detr")) or images_to(entries_of("detr 3600 steps"))
    for name in names:
        entries = entries_of(name)
        last, images = [entry["evals"][-1] for entry in entries], images_to(entries)
        cells = [name, len(entries), entries[0]["batch"], last[0]["step"],
                 f"{statistics.mean(e['cpu_minutes'] for e in entries):.1f}",
                 *(spread([line[key] for line in last]) for key in ("AP", "AP50", "AP_small")),
                 f"{images:.0f}" if images else "never", f"{detr / images:.1f}" if detr and images else ""]
        print(f"| {' | '.join(map(str, cells))} |")


def draw(names, path):
    """AP against images seen and against minutes: the mean of the seeds, and a band from worst to best."""
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for i, name in enumerate(names):
        entries, steps, values, minutes = curves(name)
        colour = f"C{i % 10}"
        label = f"{name} ({len(entries)} seeds)" if len(entries) > 1 else name
        for ax, x in zip(axes, (steps * entries[0]["batch"], minutes)):
            ax.plot([0, *x], [0, *values.mean(0)], color=colour, label=label)
            ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0)
    axes[0].set(xlabel="training images seen", ylabel="AP on held-out images", ylim=(0, None))
    axes[1].set(xlabel="minutes of one CPU core, evaluations included")
    axes[1].legend(fontsize=8, loc="upper left")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlim(0, None)
    figure.savefig(path, dpi=110)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=RUNNERS, metavar="RUNNER", default=MAIN,
                   help=f"some of: {', '.join(RUNNERS)}; default: {', '.join(MAIN)}")
    p.add_argument("--draw", nargs="+", choices=RUNNERS, metavar="RUNNER", default=MAIN,
                   help="curves of the figure")
    p.add_argument("--figure", type=Path, default=FIGURE, metavar="FILE", help="default: docs/race.png")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    p.add_argument("--table", action="store_true", help="only table and figure, from what is there")
    args = p.parse_args()
    if not args.table:
        race(args.only, args.seeds, args.jobs)
    present = {entry["name"] for entry in read_results().values()}
    if not present:
        raise SystemExit(f"{RESULTS}: no results yet; run without --table first.")
    table([name for name in RUNNERS if name in present])
    draw([name for name in args.draw if name in present], args.figure)


if __name__ == "__main__":
    main()
