"""The race: every runner trains for the same steps of 8 images, with the same cosine and the same images.

    python benchmarks/race.py --jobs 2 --seeds 0 1 2           trains the five methods
    python benchmarks/race.py --groups race_all maps layers    trains other groups of runners
    python benchmarks/race.py --only "sqr dense" --steps 600   trains some runners by name
    python benchmarks/race.py --draw                           trains nothing: tables, figures of docs/
    python benchmarks/race.py --compare RUN RUN                draws the curves of your own runs

Each runner is `python train.py` with its laptop preset on one thread. A run is recorded in
benchmarks/results/race.json when it ends, and a recorded run is not trained again. After Ctrl-C or SIGTERM
the same command resumes each run where it stopped. To start a new race, delete race.json and benchmarks/runs.

Minutes are CPU minutes of the run's process, evaluations included. Waiting does not count. A second run on
the same machine makes them a little longer, because the two share caches and memory.
"""
import argparse
import datetime
import json
import os
import platform
import shlex
import shutil
import signal
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
from support import UserError  # noqa: E402
from support.checkpoints import known_files  # noqa: E402
from support.report import one_line_errors  # noqa: E402

RUNS, RESULTS, DOCS = ROOT / "benchmarks/runs", ROOT / "benchmarks/results/race.json", ROOT / "docs"
BATCH, EVALUATIONS = 8, 10  # of each run
LOCK, CHILDREN = threading.Lock(), set()  # of race.json; process ids


def runner(model, *options, times=1):
    """A model file with its laptop preset and these options; it makes `times` the steps of the others."""
    return {"model": model, "options": options, "times": times}


CONTROLS = {
    "detr, coarse map": runner("detr", "last_stage=3", "temperature=10000"),
    "detr, 5 times as long": runner("detr", times=5),
    "conditional_detr, coarse map": runner("conditional_detr", "last_stage=3", "temperature=10000"),
    "sam_detr smca": runner("sam_detr", "smca=true"),
    "deformable_detr plain": runner("deformable_detr", "box_refine=false"),
    "deformable_detr two-stage": runner("deformable_detr", "two_stage=true"),
    "sqr dense": runner("sqr", "recollect=dense"),
    "sqr recurrent": runner("sqr", "recurrent=true"),
    **{f"group_detr K={K}": runner("group_detr", f"num_groups={K}") for K in (1, 6, 11)},
    **{f"{name} 6 layers": runner(name, "dec_layers=6") for name in ("deformable_detr", "sqr", "adamixer")},
    **{f"csq-{x}": runner("conditional_detr_ablations", f"spatial_query=csq-{x}") for x in "iptc"},
}
FILES = known_files()
RUNNERS = {**{name: runner(name) for name in FILES}, **CONTROLS}
MAIN = [name for name, path in FILES.items() if path.parent == ROOT]
RELATIVES = [name for name in FILES if name not in MAIN and (DOCS / f"{name}.md").exists()]
GROUPS = {  # trained together, and shown in one table
    "race": MAIN,
    "race_all": [*MAIN, *RELATIVES],
    "maps": [name for name in RUNNERS if name.split(",")[0] in ("detr", "conditional_detr")],
    "rivals": ["conditional_detr", "smca_detr", "dab_detr", "sam_detr", "sam_detr smca"],
    "variants": ["deformable_detr", "deformable_detr plain", "deformable_detr two-stage"],
    "supervision": ["conditional_detr", *(name for name in RUNNERS if name.startswith("group_detr")),
                    "deformable_detr", "hdetr", "sqr", "sqr dense"],
    "layers": [name for name in RUNNERS if "6 layers" in name],
    "spatial_query": ["conditional_detr", *(name for name in RUNNERS if name.startswith("csq"))],
}
FIGURES = ("race", "race_all", "rivals", "supervision")  # the groups of docs/GROUP.png


# ---- Training ----------------------------------------------------------------------------------------------
def flags_of(name, steps):
    """The runner as flags of train.py."""
    chosen = RUNNERS[name]
    options = [word for option in chosen["options"] for word in ("--option", option)]
    return ["--model", chosen["model"], "--batch-size", str(BATCH), "--schedule", "cosine",
            "--steps", str(steps * chosen["times"]), *options]


def launch(flags, output):
    """CPU seconds of train.py on one thread, which prints into `output`; None if it does not end well."""
    command = [sys.executable, str(ROOT / "train.py"), "--workers", "0", "--device", "cpu", *map(str, flags)]
    with open(output, "a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=ROOT,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        CHILDREN.add(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
    CHILDREN.discard(process.pid)
    return None if status else usage.ru_utime + usage.ru_stime


def run(name, seed, steps):
    """Trains a runner to its end, or resumes it, and records it in race.json."""
    flags = flags_of(name, steps)
    steps = int(flags[flags.index("--steps") + 1])
    folder = RUNS / f"{name.replace(',', '').replace(' ', '-')}-{steps}-seed{seed}"
    start, seconds = 0, None
    if (folder / "last.pt").exists():
        start = torch.load(folder / "last.pt", weights_only=True)["step"]
        command = ["--resume", folder]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # a run stopped before its first checkpoint
        command = [*flags, "--seed", seed, "--eval-every", max(1, steps // EVALUATIONS), "--out", folder]
    if start < steps:
        seconds = launch(command, f"{folder}.txt")
        if seconds is None:
            print(f"{name}, seed {seed}: stopped, see {folder}.txt", flush=True)
            return
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    entry = {**entry_of(folder), "name": name, "seed": seed, "flags": shlex.join(flags),
             "commit": commit.stdout.strip(), "date": str(datetime.date.today()),
             "machine": f"{platform.machine()}, {os.cpu_count()} cores"}
    if seconds:  # of the last part; those of the whole run follow from it
        entry["cpu_minutes"] = round(seconds / 60 * steps / (steps - start), 2)
    with LOCK:
        key = f"{name}, seed {seed}, {steps} steps"
        content = json.dumps(dict(sorted({**read(), key: entry}.items())), indent=1)
        RESULTS.with_suffix(".tmp").write_text(content + "\n")
        os.replace(RESULTS.with_suffix(".tmp"), RESULTS)  # race.json is whole at any moment
    print(f"{name}, seed {seed}: AP {entry['evals'][-1]['AP']:.3f}", flush=True)


def entry_of(folder):
    """Settings and evaluations of a run. Minutes are those of its clock. Raises UserError."""
    settings = json.loads((folder / "args.json").read_text())
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keep = ("AP", "AP50", "AP75", "AP_small")
    evals = [{"step": line["step"], **{k: round(line["eval"][k], 4) for k in keep}}
             for line in lines if "eval" in line]
    if not evals:
        raise UserError(f"{folder}: no evaluation in log.jsonl yet")
    return {"name": folder.name, "batch": settings["train"]["batch_size"], "options": settings["model"],
            "cpu_minutes": round(lines[-1]["seconds"] / 60, 2), "torch": settings["versions"]["torch"],
            "evals": evals}


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def race(names, seeds, steps, jobs):
    """Trains the runs that race.json lacks, `jobs` at a time."""
    RUNS.mkdir(parents=True, exist_ok=True)
    done = [(entry["name"], entry["seed"], entry["flags"]) for entry in read().values()]
    todo = [(name, seed) for seed in seeds for name in names
            if (name, seed, shlex.join(flags_of(name, steps))) not in done]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C
    pool = ThreadPoolExecutor(jobs)
    try:
        list(pool.map(lambda job: run(*job, steps), todo))
    finally:
        for child in set(CHILDREN):
            os.kill(child, signal.SIGTERM)  # it saves its last step
        pool.shutdown(cancel_futures=True)


# ---- Tables and figures ------------------------------------------------------------------------------------
def entries_of(name):
    """Recorded runs of a runner, one a seed; only the longest if there are several lengths."""
    found = [entry for entry in read().values() if entry["name"] == name]
    longest = max((entry["evals"][-1]["step"] for entry in found), default=0)
    return [entry for entry in found if entry["evals"][-1]["step"] == longest]


def curve(entry, key="AP"):
    """(images seen, minutes, values) at the start and at each evaluation of a run."""
    steps = np.array([0] + [line["step"] for line in entry["evals"]])
    values = np.array([0] + [max(0, line[key]) for line in entry["evals"]])  # -1: no object of that size
    return steps * entry["batch"], entry["cpu_minutes"] * steps / steps[-1], values


def images_to(entry, key="AP50", level=0.5):
    """Images seen when a curve first reaches the level, by straight lines between evaluations, or None."""
    images, _, values = curve(entry, key)
    above = int(np.argmax(values >= level))
    return np.interp(level, values[above - 1:above + 1], images[above - 1:above + 1]) if above else None


def spread(values):
    """"mean ± standard deviation", or the value if there is only one."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean} ± {statistics.stdev(values):.3f}" if len(values) > 1 else mean


def table(runners):
    """Markdown table of {name: entries}. The last column compares when the fastest runner ends."""
    minutes = {name: statistics.mean(entry["cpu_minutes"] for entry in entries)
               for name, entries in runners.items()}
    least = min(minutes.values())
    print("\n| runner | seeds | steps | seconds a step | CPU minutes | AP | AP50 | AP small "
          f"| images to AP50 0.5 | AP after {least:.1f} minutes |\n|{'---|' * 10}")
    for name, entries in runners.items():
        last = [entry["evals"][-1] for entry in entries]
        reached = [images_to(entry) for entry in entries]
        equal = [np.interp(least, *curve(entry)[1:]) for entry in entries]
        cells = [name, len(entries), last[0]["step"], f"{60 * minutes[name] / last[0]['step']:.3f}",
                 f"{minutes[name]:.1f}", *(spread([line[key] for line in last])
                                           for key in ("AP", "AP50", "AP_small")),
                 "never" if None in reached else f"{statistics.mean(reached):.0f}", spread(equal)]
        print(f"| {' | '.join(map(str, cells))} |")


def draw(runners, path, minutes="minutes of one CPU core, evaluations included"):
    """AP of {name: entries} against images and against minutes: mean of the seeds, band of all seeds."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shown = []  # (last AP, line), for the legend
    for name, entries in runners.items():
        images, times, values = (np.array(rows) for rows in zip(*map(curve, entries)))  # [seeds, evaluations]
        mean, dashes = values.mean(0), "--" if name in RELATIVES else ":" if name in CONTROLS else "-"
        for ax, x in zip(axes, (images[0], times.mean(0))):
            line, = ax.plot(x, mean, linestyle=dashes, label=f"{mean[-1]:.2f}  {name}")
            ax.fill_between(x, values.min(0), values.max(0), color=line.get_color(), alpha=0.12, linewidth=0)
        shown.append((mean[-1], line))
    axes[0].set(xlabel="training images seen", ylabel="AP on held-out images")
    axes[1].set(xlabel=minutes)
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set(xlim=(0, None), ylim=(0, None))
    order = [line for _, line in sorted(shown, key=lambda one: -one[0])]
    axes[1].legend(handles=order, loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False,
                   title="AP at the end")
    figure.savefig(path, dpi=110)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--groups", nargs="+", choices=GROUPS, help="default: race; with --draw all groups")
    p.add_argument("--only", nargs="+", choices=RUNNERS, metavar="RUNNER",
                   help=f"instead of groups, some of: {'; '.join(RUNNERS)}")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--steps", type=int, default=3000, help="of each run (default: 3000)")
    p.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    p.add_argument("--draw", action="store_true", help="draws tables and figures of docs/, trains nothing")
    p.add_argument("--compare", nargs="+", type=Path, metavar="RUN", help="draws your runs in compare.png")
    args = p.parse_args(argv)
    if args.compare:
        runs = {str(folder): [entry_of(folder)] for folder in args.compare}
        table(runs)
        return draw(runs, "compare.png", "minutes")
    groups = {"chosen": args.only} if args.only else {
        group: GROUPS[group] for group in args.groups or (GROUPS if args.draw else ["race"])}
    if not args.draw:
        race(list(dict.fromkeys(sum(groups.values(), []))), args.seeds, args.steps, args.jobs)
    for group, names in groups.items():
        runners = {name: entries_of(name) for name in names if entries_of(name)}
        if runners:
            print(f"\n{group}")
            table(runners)
        if runners and args.draw and group in FIGURES:
            draw(runners, DOCS / f"{group}.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
