"""The race: every method trains on `shapes` for the same CPU minutes of one core, with the same pictures.

    python benchmarks/race.py --jobs 2                         the files at the top level, seed 0
    python benchmarks/race.py --group race_all --seeds 0 1 2   another group of runners, more seeds
    python benchmarks/race.py --only sqr deformable_detr       some runners by name
    python benchmarks/race.py --table --group race_all         no training: table and figure from the results

Each runner is `python train.py` with its laptop preset and batches of 8 on one thread, so anybody can repeat
one by hand. Its number of steps is what fits into --minutes of a core at the CPU seconds of its step. These
are measured first and kept in benchmarks/results/steps.json: delete the file to measure all again. What is
finished is not run again, what was interrupted goes on where it stopped. Runs lie in benchmarks/runs/, their
curves in benchmarks/results/race.json, the figures in docs/.

Minutes are CPU minutes of the run's process, evaluations included: waiting does not count. They still grow
a little with a second run beside it, since the two share caches and memory.
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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import train  # noqa: E402
from support import data, options  # noqa: E402
from support.model_files import build_model, known_files  # noqa: E402

RUNS, DOCS = ROOT / "benchmarks/runs", ROOT / "docs"
RESULTS, STEPS = (ROOT / "benchmarks/results" / name for name in ("race.json", "steps.json"))
EVALUATIONS = 10  # in each run


def runner(model, *options, steps=None, batch=8):
    """Flags of train.py. With `steps` the number of steps is given, not what fits into the minutes."""
    length = ["--steps", str(steps)] if steps else []
    chosen = [word for option in options for word in ("--option", option)]
    return ["--model", model, "--batch-size", str(batch), *length, *chosen]


# Every model file is a runner of its own name with its laptop preset. Here are those that differ: other
# options, a length of their own, ablations of a paper.
SPECIAL = {
    "deformable_detr plain": runner("deformable_detr", "box_refine=false"),
    "deformable_detr two-stage": runner("deformable_detr", "two_stage=true"),
    "sqr dense": runner("sqr", "recollect=dense"),
    "sqr recurrent": runner("sqr", "recurrent=true"),
    "group_detr K=6": runner("group_detr", "num_groups=6"),
    "group_detr K=11": runner("group_detr", "num_groups=11"),
    "detr 3600 steps": runner("detr", steps=3600, batch=16),
    "deformable_detr 1300 steps": runner("deformable_detr", steps=1300),
    "sqr 1300 steps": runner("sqr", steps=1300),
    "deformable_detr 6 stages": runner("deformable_detr", "dec_layers=6"),
    "sqr 6 stages": runner("sqr", "dec_layers=6"),
    "adamixer 6 stages": runner("adamixer", "dec_layers=6"),
    "deformable_detr 6 stages, no loss on the first": runner(
        "benchmarks/no_first_loss.py", "recollect=none", "dec_layers=6"),
    "sqr 6 stages, no loss on the first": runner("benchmarks/no_first_loss.py", "dec_layers=6"),
    # Of the same length as conditional_detr in a race of 11 minutes, which is the fifth of them
    "csq-i": runner("conditional_detr_ablations", "spatial_query=csq-i", steps=1990),
    "csq-p": runner("conditional_detr_ablations", "spatial_query=csq-p", steps=1990),
    "csq-t": runner("conditional_detr_ablations", "spatial_query=csq-t", steps=1990),
    "csq-c": runner("conditional_detr_ablations", "spatial_query=csq-c", steps=1990),
}
FILES = known_files()
RUNNERS = {**{name: runner(name) for name in FILES}, **SPECIAL}
MAIN = [name for name, path in FILES.items() if path.parent == ROOT]  # README's figure
RELATIVES = [name for name in FILES if name not in MAIN and (DOCS / f"{name}.md").exists()]
# What is run, shown in one table and drawn in docs/GROUP.png
GROUPS = {
    "race": MAIN,
    "race_all": [*MAIN, *RELATIVES],
    "variants": ["deformable_detr", "deformable_detr plain", "deformable_detr two-stage", "sqr", "sqr dense"],
    "supervision": ["conditional_detr", "group_detr", "group_detr K=6", "group_detr K=11", "deformable_detr",
                    "hdetr", "sqr", "sqr dense"],
    "rivals": ["conditional_detr", "smca_detr", "dab_detr", "sam_detr"],
    "stages": [name for name in RUNNERS if "6 stages" in name],
    "spatial_query": ["conditional_detr", *(name for name in RUNNERS if name.startswith("csq"))],
}
COLOURS = ["#0072b2", "#d55e00", "#000000", "#cc79a7", "#009e73", "#8c564b", "#9467bd", "#b8860b", "#17a2b8",
           "#e0115f", "#7f7f7f", "#5f8f00"]  # of the files, in order
SHOWN = {"group_detr": "group_detr K=3"}  # a clearer name in tables and figures


# ---- Running -----------------------------------------------------------------------------------------------
def git(*words):
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def launch(flags, output):
    """CPU seconds of one run of train.py on one thread, which prints into `output`; None if it fails."""
    command = [sys.executable, str(ROOT / "train.py"), "--workers", "0", "--device", "cpu", *map(str, flags)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    with open(output, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=one_thread, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        print(f"stopped, see {output}", flush=True)
        return None
    return usage.ru_utime + usage.ru_stime


def measure(names, rounds=10):
    """CPU seconds of a step and of an evaluation of each runner on one thread, kept in steps.json.

    They take turns, and the least of all rounds counts: whatever else the machine does weighs on all alike.
    """
    torch.set_num_threads(1)
    trained = {name: Trained(RUNNERS[name]) for name in names}
    seconds = {name: [] for name in names}
    for _ in range(rounds + 2):  # the first ones warm up
        for name in names:
            seconds[name].append(cpu_seconds(trained[name].step))
    for name in names:
        evaluation = min(cpu_seconds(trained[name].evaluate) for _ in range(2))
        write(STEPS, name, [round(min(seconds[name][2:]), 4), round(evaluation, 2)])


class Trained:
    """A runner's model and its data, for measuring."""

    def __init__(self, flags):
        request = options.parse(None, [*flags, "--workers", "0", "--device", "cpu"])
        self.args, sets = request.args, data.load_datasets(request.args, ("train", "val"))
        options.resolve(request, sets["train"])
        model = build_model(request.module, len(sets["val"].class_names), request.model_options)
        self.model, self.criterion, self.val_set = model, train.SetCriterion(model), sets["val"]
        self.optimizer = train.make_optimizer(model, 1e-4, 1e-4, 1e-4)
        self.train_set = sets["train"]

    def step(self):
        batch = data.collate([self.train_set[i] for i in range(self.args.batch_size)])
        train.train_step(self.model, self.criterion, self.optimizer, [batch], self.args)

    def evaluate(self):
        train.evaluate(self.model, self.criterion, self.val_set, self.args)


def cpu_seconds(function):
    start = time.process_time()
    function()
    return time.process_time() - start


def flags_of(name, minutes):
    """The runner's flags with --steps: a multiple of the number of evaluations, as many as fit."""
    if "--steps" in RUNNERS[name]:
        return RUNNERS[name]
    step, evaluation = read(STEPS)[name]
    fit = (60 * minutes - EVALUATIONS * evaluation) / step
    return [*RUNNERS[name], "--steps", str(max(1, round(fit / EVALUATIONS)) * EVALUATIONS)]


def run(name, seed, minutes):
    """Train one runner to its end, or go on with it: its entry for race.json, or None if it stopped early."""
    flags = flags_of(name, minutes)
    steps = int(flags[flags.index("--steps") + 1])
    folder, start = RUNS / f"{name.replace(',', '').replace(' ', '-')}-{steps}-seed{seed}", 0
    if (folder / "last.pt").exists():
        start = torch.load(folder / "last.pt", weights_only=True)["step"]
        command = ["--resume", folder]
    else:
        shutil.rmtree(folder, ignore_errors=True)  # stopped before its first checkpoint
        command = [*flags, "--seed", seed, "--eval-every", steps // EVALUATIONS, "--out", folder]
    if start < steps:
        seconds = launch(command, f"{folder}.txt")
        if seconds is None:
            return None
        minutes = seconds / 60 * steps / (steps - start)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    keep = ("AP", "AP50", "AP75", "AP_small")
    evals = [{"step": line["step"], **{k: round(line["eval"][k], 4) for k in keep}}
             for line in lines if "eval" in line]
    print(f"{name}, seed {seed}: AP {evals[-1]['AP']:.3f}, AP50 {evals[-1]['AP50']:.3f}", flush=True)
    settings = json.loads((folder / "args.json").read_text())
    return {"name": name, "seed": seed, "flags": shlex.join(flags), "batch": settings["train"]["batch_size"],
            "cpu_minutes": round(minutes, 2), "commit": git("rev-parse", "--short", "HEAD"),
            "date": str(datetime.date.today()), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
            "torch": settings["versions"]["torch"], "evals": evals}


def read(path):
    return json.loads(path.read_text()) if path.exists() else {}


def write(path, key, value):
    path.write_text(json.dumps(dict(sorted({**read(path), key: value}.items())), indent=1) + "\n")


def race(names, seeds, jobs, minutes):
    """Run what is not in race.json yet, `jobs` at a time, and store each result at once."""
    lock = threading.Lock()
    RUNS.mkdir(parents=True, exist_ok=True)
    RESULTS.parent.mkdir(parents=True, exist_ok=True)

    def keep(path, key, value):
        with lock:
            if value:
                write(path, key, value)

    def one(job):
        name, seed = job
        keep(RESULTS, f"{name}, seed {seed}", run(name, seed, minutes))

    measure([name for name in names if "--steps" not in RUNNERS[name] and name not in read(STEPS)])
    with ThreadPoolExecutor(jobs) as pool:
        todo = [(name, seed) for seed in seeds for name in names
                if read(RESULTS).get(f"{name}, seed {seed}", {}).get("flags")
                != shlex.join(flags_of(name, minutes))]
        list(pool.map(one, todo))


# ---- Table and figure --------------------------------------------------------------------------------------
def entries_of(name):
    """Results of a runner, one a seed; of the same length, should --minutes have changed."""
    found = [entry for entry in read(RESULTS).values() if entry["name"] == name]
    return [entry for entry in found if entry["flags"] == found[-1]["flags"]]


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
        cells = [SHOWN.get(name, name), len(entries), entries[0]["batch"], last[0]["step"],
                 f"{statistics.mean(e['cpu_minutes'] for e in entries):.1f}",
                 *(spread([line[key] for line in last]) for key in ("AP", "AP50", "AP_small")),
                 f"{images:.0f}" if images else "never", f"{detr / images:.1f}" if detr and images else ""]
        print(f"| {' | '.join(map(str, cells))} |")


def style(name):
    """(colour, line style): a colour for each file; solid at the top level, dashed for relatives."""
    model = RUNNERS[name][1]
    place = list(FILES).index(model) if model in FILES else len(FILES)
    variants = [other for other in RUNNERS if RUNNERS[other][1] == model]
    dashes = ["-" if model in MAIN else "--", ":", "-.", (0, (1, 3)), (0, (5, 1, 1, 1, 1, 1))]
    return COLOURS[place % len(COLOURS)], dashes[variants.index(name) % len(dashes)]


def draw(names, path):
    """AP against images seen and against minutes: the mean of the seeds, and a band from worst to best."""
    figure = Figure(figsize=(13, 5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    ends = []  # (last AP, minutes, label, colour)
    for name in names:
        entries, steps, values, minutes = curves(name)
        colour, dashes = style(name)
        for ax, x in zip(axes, (steps * entries[0]["batch"], minutes)):
            ax.plot([0, *x], [0, *values.mean(0)], color=colour, linestyle=dashes, linewidth=1.8)
            ax.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.12, linewidth=0)
        relative = ", relative" if RUNNERS[name][1] in RELATIVES else ""
        label = f"{SHOWN.get(name, name)}{relative}  {values.mean(0)[-1]:.2f}"
        ends.append((values.mean(0)[-1], minutes[-1], label, colour, dashes))
    axes[0].set(xlabel="training images seen", ylabel="AP on held-out images", ylim=(0, None))
    axes[1].set(xlabel="minutes of one CPU core, evaluations included")
    for ax in axes:
        ax.grid(alpha=0.3)
        ax.set_xlim(0, None)
    seeds = sorted({len(entries_of(name)) for name in names})
    if seeds[-1] > 1:
        count = " to ".join(map(str, sorted({seeds[0], seeds[-1]})))
        axes[0].set_title(f"mean of {count} seeds, band from worst to best", fontsize=9)
    ends.sort()
    heights = spaced([end[0] / axes[1].get_ylim()[1] for end in ends], gap=0.055)
    for (value, minute, label, colour, dashes), y in zip(ends, heights):
        line = {"arrowstyle": "-", "color": colour, "linestyle": dashes, "relpos": (0, 0.5)}
        axes[1].annotate(label, (minute, value), (1.08, y), textcoords="axes fraction", color=colour,
                         va="center", annotation_clip=False, arrowprops=line)
    figure.savefig(path, dpi=110)


def spaced(heights, gap, top=0.99):
    """Sorted heights of labels, moved apart to at least `gap` and not above `top`."""
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for i in reversed(range(len(heights))):
        heights[i] = min(heights[i], top - gap * (len(heights) - 1 - i))
    return heights


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--group", choices=GROUPS, default="race", help="what to run, to list and to draw")
    p.add_argument("--only", nargs="+", choices=RUNNERS, metavar="RUNNER",
                   help=f"instead of a group some of: {', '.join(RUNNERS)}")
    p.add_argument("--figure", type=Path, metavar="FILE",
                   help="default: docs/GROUP.png; with --only none is drawn without it")
    p.add_argument("--seeds", nargs="+", type=int, default=[0])
    p.add_argument("--minutes", type=float, default=10, help="CPU minutes of each run (default: 10)")
    p.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each")
    p.add_argument("--table", action="store_true", help="only table and figure, from what is there")
    args = p.parse_args()
    names = args.only or GROUPS[args.group]
    if not args.table:
        race(names, args.seeds, args.jobs, args.minutes)
    present = [name for name in names if entries_of(name)]
    if not present:
        raise SystemExit(f"{RESULTS}: no results of these runners yet; run without --table first.")
    table(present)
    figure = args.figure or (None if args.only else DOCS / f"{args.group}.png")
    if figure:
        draw(present, figure)


if __name__ == "__main__":
    main()
