"""The race: every runner trains for the same steps of 8 images, with the same cosine and the same images.

    python benchmarks/race.py --jobs 2 --seeds 0 1 2           trains the five methods
    python benchmarks/race.py --groups race_all maps layers    trains other groups of runners
    python benchmarks/race.py --only "sqr dense" --steps 600   trains some runners by name
    python benchmarks/race.py --draw                           trains nothing: docs/results.md and figures
    python benchmarks/race.py --compare RUN RUN                draws the curves of your own runs

Each runner is `python train.py` with its laptop preset on one thread. A run is recorded in
benchmarks/results/race.json when it ends, and a recorded run is not trained again. After Ctrl-C or SIGTERM
the same command resumes each run where it stopped. To start a new race, delete race.json and benchmarks/runs.
--draw writes into docs/results.md the tables between its marks and every number behind the name of a runner:
"`sqr` 0.712" is its mean AP, "`sqr` 2,201 images" its images to AP50 0.5; "?" means that it has no run yet.

Minutes are CPU minutes of the run's process, evaluations included. Waiting does not count. A second run on
the same machine makes them a little longer, because the two share caches and memory.
"""
import argparse
import datetime
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
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
STAGES = ROOT / "benchmarks/results/stages.json"  # stages.py writes it
BATCH, EVALUATIONS = 8, 10  # of each run
LOCK, CHILDREN = threading.Lock(), set()  # of race.json; process ids


def runner(model, *options, times=1, flags=""):
    """A model file with its laptop preset and these options; it makes `times` the steps of the others."""
    return {"model": model, "options": options, "times": times, "flags": flags.split()}


def between(*parts):
    """DETR with these parts of Conditional DETR: "offsets", "focal", "spatial query"."""
    return runner("conditional_detr_ablations", f"offsets={'offsets' in parts}".lower(),
                  f"class_loss={'focal' if 'focal' in parts else 'softmax'}",
                  f"attention={'conditional' if 'spatial query' in parts else 'detr'}")


BETWEEN = {" + ".join(["detr", *parts]): between(*parts)
           for count in (1, 2) for parts in combinations(("offsets", "focal", "spatial query"), count)}
LAYERED = ("deformable_detr", "sqr", "adamixer", "sqr_adamixer")
CONTROLS = {
    "detr, coarse map": runner("detr", "last_stage=3", "temperature=10000"),
    "detr, 5 times as long": runner("detr", times=5),
    "conditional_detr, coarse map": runner("conditional_detr", "last_stage=3", "temperature=10000"),
    "sam_detr smca": runner("sam_detr", "smca=true"),
    "deformable_detr plain": runner("deformable_detr", "box_refine=false"),
    "deformable_detr two-stage": runner("deformable_detr", "two_stage=true"),
    "sqr dense": runner("sqr", "recollect=dense"),
    "group_detr K=6": runner("group_detr", "num_groups=6"),
    **{f"dn_detr G={G}": runner("dn_detr", f"dn_groups={G}") for G in (0, 1, 5)},
    "dab_detr w_class=2": runner("dab_detr"),
    "deformable_detr lr=3e-4": runner("deformable_detr", flags="--lr 3e-4 --lr-backbone 3e-4"),
    "dino without noise": runner("dino", "dn_number=0"),
    **{f"{name} 6 layers": runner(name, "dec_layers=6") for name in LAYERED},
    **BETWEEN,
}
EDITS = {"dab_detr w_class=2": ("w_class=1", "w_class=2")}  # trains a copy of the file with this change
OTHERS = {  # no part of the race: runs of deformable_detr with these flags
    "default run": "--steps 1800",
    "photos": "--data BCCD --size 224 --batch-size 4 --lr 4e-4 --lr-backbone 4e-4 --steps 2400",
    "photos, short": "--data BCCD --size 160 --steps 760",
    "photos, fine-tuned": "--data BCCD --size 160 --steps 760 "
                          "--init benchmarks/runs/deformable_detr-3000-seed0",
}
FILES = known_files()
RUNNERS = {**{name: runner(name) for name in FILES}, **CONTROLS, **OTHERS}
MAIN = [name for name, path in FILES.items() if path.parent == ROOT]
RELATIVES = [name for name in FILES if name not in MAIN and (DOCS / f"{name}.md").exists()]
GROUPS = {  # trained together, and shown in one table
    "race": MAIN,
    "race_all": [*MAIN, *RELATIVES, "sam_detr smca"],
    "maps": [name for name in RUNNERS if name.split(",")[0] in ("detr", "conditional_detr")],
    "variants": [name for name in RUNNERS if name.startswith("deformable_detr") and "layers" not in name],
    "supervision": ["conditional_detr", *(name for name in RUNNERS if name.startswith("group_detr")),
                    "deformable_detr", "hdetr", "sqr", "sqr dense"],
    "denoising": sorted(name for name in RUNNERS if name.startswith(("dab_detr", "dn_detr", "dino"))),
    "layers": sorted(f"{name}{six}" for name in LAYERED for six in ("", " 6 layers")),
    "taken_apart": ["detr", *BETWEEN, "conditional_detr"],  # the step from the first to the last
    "others": list(OTHERS),
}
FIGURES = ("race", "race_all")  # the groups of docs/GROUP.png
COLUMNS = {"race_all": "(?!seeds|steps|AP50)", "taken_apart": "run|AP$", "denoising": "run|AP( after|$)"}


# ---- Training ----------------------------------------------------------------------------------------------
def flags_of(name, steps):
    """The runner as flags of train.py."""
    if name in OTHERS:
        return ["--model", "deformable_detr", *OTHERS[name].split()]
    chosen = RUNNERS[name]
    options = [word for option in chosen["options"] for word in ("--option", option)]
    model = f"benchmarks/runs/{name}.py" if name in EDITS else chosen["model"]
    return ["--model", model, "--batch-size", str(BATCH), "--schedule", "cosine",
            "--steps", str(steps * chosen["times"]), *chosen["flags"], *options]


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
    if name in EDITS:
        (RUNS / f"{name}.py").write_text(FILES[RUNNERS[name]["model"]].read_text().replace(*EDITS[name]))
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
    evals = [{"step": line["step"], **{key: round(line["eval"][key], 5) for key in ("AP", "AP50", "AP75")}}
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


def images_to(entries):
    """Mean of the images seen when AP50 is 0.5, by straight lines between evaluations; or, if never, ">N"."""
    reached = []
    for entry in entries:
        images, _, values = curve(entry, "AP50")
        above = int(np.argmax(values >= 0.5))
        if not above:
            return f">{images[-1]:,}"
        reached.append(np.interp(0.5, values[above - 1:above + 1], images[above - 1:above + 1]))
    return f"{statistics.mean(reached):,.0f}"


def spread(values):
    """"mean±standard deviation", or the value if there is only one."""
    mean = f"{statistics.mean(values):.3f}"
    return f"{mean}±{statistics.stdev(values):.3f}" if len(values) > 1 else mean


def map_of(options):
    """The maps that queries read: "C3", "C2,C3", or "C3+2" for C3 and two coarser levels made of it."""
    last, levels = options.get("last_stage", 0), options.get("num_feature_levels", 1)
    first = 2 if "in_points" in options else 3 if levels > 1 else last + 1  # AdaMixer has in_points
    maps = [f"C{stage}" for stage in range(first, last + 2)]
    return ",".join(maps) + f"+{levels - len(maps)}" * (levels > len(maps)) if last else ""


def table(runners, columns=""):
    """Markdown of {name: entries}. The last column compares when the fastest runner ends."""
    minutes = {name: statistics.mean(e["cpu_minutes"] for e in entries) for name, entries in runners.items()}
    least, rows = min(minutes.values(), default=0), []
    for name, entries in runners.items():
        last = [entry["evals"][-1] for entry in entries]
        equal = [np.interp(least, *curve(entry)[1:]) for entry in entries]
        rows.append({
            "runner": name, "seeds": len(entries), "map": map_of(entries[0]["options"]),
            "steps": last[0]["step"], "seconds a step": f"{60 * minutes[name] / last[0]['step']:.2f}",
            "images to AP50 0.5": images_to(entries), "AP": spread([line["AP"] for line in last]),
            "AP50": spread([line["AP50"] for line in last]), f"AP after {least:.1f} minutes": spread(equal)})
    return markdown(rows, columns)


def markdown(rows, columns):
    """A table of dicts, with the columns that match a pattern; a line if there are no rows."""
    rows = [{key: row[key] for key in row if re.match(columns, key)} for row in rows]
    if not rows:
        return "Not measured yet."
    head, *lines = (f"| {' | '.join(map(str, line))} |" for line in [rows[0], *map(dict.values, rows)])
    return "\n".join([head, "|" + "---|" * len(rows[0]), *lines])


# ---- docs/results.md ---------------------------------------------------------------------------------------
def known(names):
    return {name: entries for name in names if (entries := entries_of(name))}


def updated(page):
    """The text of docs/results.md with the numbers of race.json and stages.json."""
    tables = {group: table(known(GROUPS[group]), columns) for group, columns in COLUMNS.items()}
    stages = list(json.loads(STAGES.read_text()).values()) if STAGES.exists() else []
    for name, wanted, columns in (("nms", [*MAIN, *GROUPS["denoising"]], "run|last|after"),
                                  ("fading", GROUPS["layers"], "run|last|oracle|TP|FP")):
        rows = [row for row in stages if row["run"].rsplit("-", 2)[0].replace("-", " ") in wanted]
        tables[name] = markdown(rows, columns)

    def number(match):
        name, space, _, images = match.groups()
        if not (entries := entries_of(name)):
            return f"`{name}`{space}?{images}" if name in RUNNERS else match[0]
        AP = statistics.mean(entry["evals"][-1]["AP"] for entry in entries)
        return f"`{name}`{space}{images_to(entries) if images else f'{AP:.3f}'}{images}"

    page = re.sub(r"(?s)(<!-- race.py: (\w+) -->\n).*?(\n<!--)", lambda m: m[1] + tables[m[2]] + m[3], page)
    return re.sub(r"`([^`]+)`(\s)(>?[\d.,]*\d|\?)( images|)", number, page)


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
    axes[0].set_ylabel("AP on held-out images")
    for ax, xlabel in zip(axes, ("training images seen", minutes)):
        ax.grid(alpha=0.3)
        ax.set(xlim=(0, None), ylim=(0, None), xlabel=xlabel)
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
        print(table(runs))
        return draw(runs, "compare.png", "minutes")
    groups = {"chosen": args.only} if args.only else {
        group: GROUPS[group] for group in args.groups or (GROUPS if args.draw else ["race"])}
    if args.draw:
        page = DOCS / "results.md"
        page.write_text(updated(page.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        race(list(dict.fromkeys(sum(groups.values(), []))), args.seeds, args.steps, args.jobs)
    for group, names in groups.items():
        if runners := known(names):
            print(f"\n{group}\n{table(runners)}")
            if args.draw and group in FIGURES:
                draw(runners, DOCS / f"{group}.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
