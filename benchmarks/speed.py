"""The cost of the models: multiply-adds, time and memory of inference and of a training step.

    python benchmarks/speed.py                          laptop size on 96 x 96 pixels, paper size on 480 x 640
    python benchmarks/speed.py --against-transformers   Hugging Face's three, if that is installed
    python benchmarks/speed.py --data                   time and memory to read large data sets
    python benchmarks/speed.py --draw                   measures nothing: writes the tables of docs/speed.md
    python benchmarks/speed.py --only detr hdetr        some models, by name: prints, and records nothing
    python benchmarks/speed.py --flops 800 1066         prints multiply-adds on the papers' image size
    python benchmarks/speed.py --size 800 1066 --batch 1 8 --precision float32 bfloat16    on a GPU

A training step is forward, matching, losses and backward of one batch; no optimiser. Memory is the peak of
live tensors above those that exist before (parameters do). The models take turns, so that noise of the
machine affects all of them. Times are the least of --repeats: on a CPU those of one thread, in which waiting
does not count, on a GPU those of the clock. --compile takes minutes for each model.
"""
import argparse
import datetime
import functools
import itertools
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from support import machine  # noqa: E402
from support.checkpoints import known_files, load_model_file  # noqa: E402
from support.options import TRAINING, preset_values  # noqa: E402
from train import SetCriterion  # noqa: E402

RESULTS, PAGE = ROOT / "benchmarks/results/speed.json", ROOT / "docs/speed.md"
VARIANTS = {  # besides the files themselves: (file, options that differ from the default)
    "deformable_detr, one level": ("deformable_detr", {"num_feature_levels": 1}),
    "deformable_detr, two-stage": ("deformable_detr", {"two_stage": True}),
    "sqr, dense": ("sqr", {"recollect": "dense"}),
}
MODELS = {**{name: (name, {}) for name in known_files()}, **VARIANTS}
METHODS = [name for name in known_files() if (ROOT / f"docs/{name}.md").exists()]  # without ablations
DEVICE = machine.choose_device("auto")


def build(name, size):
    """A model on DEVICE: 91 classes at the paper's size, 4 classes and its laptop preset otherwise."""
    file, options = MODELS[name]
    module = load_model_file(file)
    if size == "laptop":
        preset = {k: v for k, v in preset_values("laptop", module).items() if k not in TRAINING}
        options = {**preset, "num_queries": 20, **options}
    torch.manual_seed(0)
    return module.build(91 if size == "paper" else 4, **{"pretrained_backbone": False, **options}).to(DEVICE)


def batch(B, height, width):
    """Random images without padding, and three objects in each."""
    torch.manual_seed(0)
    images, mask = torch.randn(B, 3, height, width), torch.zeros(B, height, width, dtype=torch.bool)
    boxes = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.4], [0.2, 0.7, 0.1, 0.1]])
    labels = torch.tensor([0, 2, 1], device=DEVICE)
    targets = [{"labels": labels, "boxes": boxes.to(DEVICE)} for _ in range(B)]
    return images.to(DEVICE), mask.to(DEVICE), targets


def take_turns(calls, repeats):
    """{name: least seconds of the function}; a text for a function that fails."""
    torch.set_num_threads(1)
    clock = time.process_time if DEVICE == "cpu" else time.perf_counter
    times, failed = {name: [] for name in calls}, {}
    for _, (name, call) in itertools.product(range(repeats), calls.items()):
        start = clock()
        try:
            if name not in failed:
                call()
                machine.synchronize(DEVICE)
                times[name].append(clock() - start)
        except RuntimeError as error:  # no memory, or it does not compile
            failed[name] = " ".join(str(error).split())[:80]
    return {name: failed.get(name) or min(t) for name, t in times.items()}


def peak_memory(call):
    """Peak of live tensors that the call adds, in MiB."""
    if DEVICE != "cpu":
        memory = torch.get_device_module(DEVICE)
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        call()
        return (memory.max_memory_allocated() - before) / 2**20
    with profile(profile_memory=True) as recorded:  # the peak of the process depends on malloc
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def multiply_adds(model, images, mask):
    """Of a forward pass, in 1e9: matrix products and convolutions, not sampling, softmax or RoIAlign."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.eval()(images, mask)
    return counter.get_total_flops() / 2e9  # the counter sees two operations in each


def inference(model, images, mask, dtype=torch.float32):
    model.eval()
    with torch.inference_mode(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        model(images, mask)


def training_step(model, criterion, images, mask, targets, dtype=torch.float32):
    model.train()
    inputs = (images, mask, targets) if model.recipe.get("denoising") else (images, mask)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = model(*inputs)
    criterion(out, targets)["total"].backward()  # outside of autocast, as in train.py
    model.zero_grad()  # so that the next step adds its gradients to the memory, too


def costs(names, size, shape, precisions, repeats, compiled=False):
    """{model: {column: value}} for one batch [B, height, width]."""
    images, mask, targets = batch(*shape)
    models = {name: build(name, size) for name in names}
    criteria = {name: SetCriterion(model) for name, model in models.items()}
    forward = {name: torch.compile(m, dynamic=False) if compiled else m for name, m in models.items()}
    rows = {}
    for precision in precisions:
        dtype = getattr(torch, precision)
        infer = {name: functools.partial(inference, forward[name], images, mask, dtype) for name in names}
        step = {name: functools.partial(training_step, forward[name], criteria[name], images, mask, targets,
                                        dtype) for name in names}
        for name, *times in zip(names, *(take_turns(calls, repeats).values() for calls in (infer, step))):
            rows[name if dtype == torch.float32 else f"{name}, {precision}"] = {
                "multiply-adds, G": multiply_adds(models[name], images, mask),
                "inference, s": times[0], "training step, s": times[1],
                "its memory, MiB": "" if isinstance(times[1], str) else peak_memory(step[name])}
    return rows


# ---- speed.json and the tables of the page -----------------------------------------------------------------
def where():
    """The machine in words."""
    if DEVICE == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")  # Linux
    cpu = re.search(r"model name\s*: (.*)", info.read_text() if info.exists() else "")
    return f"{cpu[1] if cpu else platform.machine()} with {torch.backends.cpu.get_cpu_capability()}"


def report(part, rows, keep):
    """Prints a table {row: {column: value}}. If `keep`, puts it into speed.json and on the page."""
    print(f"\n{part}; {where()}, torch {torch.__version__}\n\n{table(rows, None)}", flush=True)
    if keep:
        commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True)
        entry = {"command": shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]]),
                 "machine": where(), "torch": torch.__version__.partition("+")[0],
                 "date": str(datetime.date.today()), "commit": commit.strip(), "rows": rows}
        short = json.loads(json.dumps(entry), parse_float=lambda number: float(f"{float(number):.4g}"))
        RESULTS.write_text(json.dumps({**read(), part: short}, indent=1) + "\n")
        PAGE.write_text(drawn(PAGE.read_text()))


def read():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def table(rows, base):
    """Markdown: numbers, theirs / ours for [ours, theirs], seconds divided by those of the row `base`."""
    cells = {}
    for name, row in rows.items():
        for key, value in row.items():
            if isinstance(value, list):
                key, value = key.partition(", ")[0], f"{value[1] / value[0]:.2f}"
            elif key.endswith(", s") and base in rows and not isinstance(value, str):
                key, value = f"{key[:-3]} (1 = {rows[base][key]:.3g} s)", f"{value / rows[base][key]:.2f}"
            elif not isinstance(value, str):
                value = f"{value:.3g}" if value < 1000 else f"{value:,.0f}"
            cells.setdefault(name, {})[key] = value
    head = ["", *next(iter(cells.values()))]
    lines = [head, ["---"] * len(head), *([name, *row.values()] for name, row in cells.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def drawn(page):
    """The text of the page with the tables of speed.json between their markers."""
    texts = {part: table(entry["rows"], "detr") for part, entry in read().items()}
    texts["machine"] = " and ".join(sorted({f"{e['machine']}, torch {e['torch']}" for e in read().values()}))
    return re.sub(r"(<!-- speed.py: (.+?) -->\n\n).*?(\n\n<!-- end -->)", flags=re.S, string=page,
                  repl=lambda match: match[1] + texts.get(match[2], "Not measured yet.") + match[3])


# ---- Hugging Face transformers, the same configurations ----------------------------------------------------
THEIRS = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}


def transformers_model(name):
    """Theirs with random weights and our configuration: dropout, a loss for every layer, frozen layers."""
    import transformers
    stem = THEIRS[name]
    config = getattr(transformers, f"{stem}Config")(
        num_labels=91, auxiliary_loss=True, attention_dropout=0.1, activation_dropout=0.1)
    model = getattr(transformers, f"{stem}ForObjectDetection")(config)
    for key, parameter in model.named_parameters():
        if "backbone" in key and not any(part in key for part in (".layer2.", ".layer3.", ".layer4.")):
            parameter.requires_grad_(False)
    return model.to(DEVICE)


def against_transformers(names, height, width, repeats):
    """{model: {column: [ours, theirs]}}, which take turns."""
    images, mask, targets = batch(1, height, width)
    theirs_mask = (~mask).long()  # theirs is 1 on the image
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    rows = {}
    for name in [name for name in THEIRS if name in names]:
        ours, theirs = build(name, "paper"), transformers_model(name)
        our_inference = functools.partial(inference, ours, images, mask)
        our_step = functools.partial(training_step, ours, SetCriterion(ours), images, mask, targets)

        def their_inference():
            with torch.inference_mode():
                theirs.eval()(pixel_values=images, pixel_mask=theirs_mask)

        def their_step():
            theirs.train()(pixel_values=images, pixel_mask=theirs_mask, labels=labels).loss.backward()
            theirs.zero_grad()

        pairs = {"inference, s": (our_inference, their_inference), "training step, s": (our_step, their_step)}
        rows[name] = {key: list(take_turns(dict(enumerate(pair)), repeats).values())
                      for key, pair in pairs.items()}
        rows[name]["its memory, MiB"] = [peak_memory(call) for call in (our_step, their_step)]
    return rows


# ---- Reading data sets -------------------------------------------------------------------------------------
def reading():
    """{set: {column: value}} as tests/folders.py prints them."""
    rows = {}
    for form in ("COCO", "YOLO"):
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(2):  # the first process also writes the set, which needs memory
                printed = subprocess.check_output(
                    [sys.executable, "-m", "tests.folders", form, f"{folder}/set"], cwd=ROOT, text=True)
        images, cpu, memory = re.findall(r"[\d.]+", printed)
        rows[form] = {"images": int(images), "CPU time, s": float(cpu), "memory, GB": float(memory)}
    return rows


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", help=f"some of: {'; '.join(MODELS)}")
    p.add_argument("--repeats", type=int, default=5, help="4 times as many for the laptop size (default: 5)")
    p.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="only models of the paper's size")
    p.add_argument("--batch", nargs="+", type=int, default=[1], help="images, for the paper's models")
    p.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    p.add_argument("--compile", action="store_true")
    p.add_argument("--flops", nargs=2, type=int, metavar=("H", "W"), help="only multiply-adds of this image")
    p.add_argument("--against-transformers", action="store_true")
    p.add_argument("--data", action="store_true", help="how long it takes to read COCO and a YOLO set")
    p.add_argument("--draw", action="store_true", help="only writes the tables of docs/speed.md again")
    args = p.parse_args(argv)
    names = args.only or [*METHODS, *VARIANTS]
    size = args.size or (480, 640)
    if args.flops:
        for name in names:
            print(f"{name:28} {multiply_adds(build(name, 'paper'), *batch(1, *args.flops)[:2]):6.1f} G")
    elif args.draw:
        PAGE.write_text(drawn(PAGE.read_text()))
    elif args.data:
        report("data", reading(), True)
    elif args.against_transformers:
        report("transformers", against_transformers(names, *size, args.repeats), not args.only)
    else:
        runs = [("laptop", (8, 96, 96), 4 * args.repeats)] * (not args.size)
        for kind, shape, repeats in [*runs, *(("paper", (B, *size), args.repeats) for B in args.batch)]:
            rows = costs(names, kind, shape, args.precision, repeats, args.compile)
            part = f"{kind} {' x '.join(map(str, shape))}{' compiled' * args.compile}"
            report(part if DEVICE == "cpu" else f"{part} {DEVICE}", rows, not args.only)


if __name__ == "__main__":
    main()
