"""The cost of the models: parameters, multiply-adds, time and memory of inference and of a training step.

    python benchmarks/speed.py                          laptop size on 96 x 96 pixels, paper size on 480 x 640
    python benchmarks/speed.py --only detr hdetr        some models, by name
    python benchmarks/speed.py --flops 800 1066         only multiply-adds, on the papers' image size
    python benchmarks/speed.py --growth                 0.25 to 4 megapixels: a table and docs/growth.png
    python benchmarks/speed.py --against-transformers   ratios to Hugging Face's three, if that is installed
    python benchmarks/speed.py --size 800 1066 --batch 1 8 --precision float32 bfloat16    on a GPU

A training step is forward, matching, losses and backward of one batch; no optimiser. Memory is the peak of
live tensors above those that exist before (parameters do). The models take turns, so that noise of the
machine affects all of them; times are medians. --compile takes minutes for each model.
"""
import argparse
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from support import machine  # noqa: E402
from support.checkpoints import known_files, load_model_file  # noqa: E402
from support.options import TRAINING, preset_values  # noqa: E402
from train import SetCriterion  # noqa: E402

VARIANTS = {  # besides the files themselves: (file, options that differ from the default)
    "deformable_detr, one level": ("deformable_detr", {"num_feature_levels": 1}),
    "deformable_detr, two-stage": ("deformable_detr", {"two_stage": True}),
    "sqr, none": ("sqr", {"recollect": "none"}),
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


def seconds(call):
    start = time.perf_counter()
    call()
    machine.synchronize(DEVICE)
    return time.perf_counter() - start


def take_turns(calls, repeats):
    """{name: median seconds of the function after one warm-up}; a text for a function that fails."""
    times, failed = {name: [] for name in calls}, {}
    for _, (name, call) in itertools.product(range(repeats + 1), calls.items()):
        try:
            if name not in failed:
                times[name].append(seconds(call))
        except RuntimeError as error:  # no memory, or it does not compile
            failed[name] = " ".join(str(error).split())[:80]
    return {name: failed.get(name) or statistics.median(t[1:]) for name, t in times.items()}


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
    model.train().zero_grad()
    inputs = (images, mask, targets) if model.recipe.get("denoising") else (images, mask)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        out = model(*inputs)
    criterion(out, targets)["total"].backward()  # outside of autocast, as in train.py


def where():
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE
    return f"{card}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def costs(names, size, shape, precisions, repeats, compiled=False):
    """Markdown table of one batch [B, height, width], one row for each model and precision."""
    images, mask, targets = batch(*shape)
    models = {name: build(name, size) for name in names}
    work = {name: multiply_adds(model, images, mask) for name, model in models.items()}
    criteria = {name: SetCriterion(model) for name, model in models.items()}
    forward = {name: torch.compile(m, dynamic=False) if compiled else m for name, m in models.items()}
    print(f"\n{size} size{', compiled' * compiled}, {' x '.join(map(str, shape))}, {where()}\n\n"
          "| model | precision | parameters | multiply-adds | inference | training step | its memory |\n"
          f"|{'---|' * 7}")
    for precision in precisions:
        dtype = getattr(torch, precision)
        infer = {name: functools.partial(inference, forward[name], images, mask, dtype) for name in names}
        step = {name: functools.partial(training_step, forward[name], criteria[name], images, mask, targets,
                                        dtype) for name in names}
        for name, *times in zip(names, *(take_turns(calls, repeats).values() for calls in (infer, step))):
            count = sum(p.numel() for p in models[name].parameters()) / 1e6
            cells = [t if isinstance(t, str) else f"{t:.3g} s" for t in times]
            cells.append("" if isinstance(times[1], str) else f"{peak_memory(step[name]):.0f} MiB")
            print(f"| {name} | {precision} | {count:.1f} M | {work[name]:.1f} G | {' | '.join(cells)} |",
                  flush=True)


# ---- Growth with the image ---------------------------------------------------------------------------------
def sides(megapixels):
    """Height and width of an image of about so many megapixels: 3 to 4, multiples of 32."""
    height = (megapixels * 0.75e6) ** 0.5
    return 32 * round(height / 32), 32 * round(height * 4 / 3 / 32)


def exponent(points, column):
    """Slope of the last three points (megapixels, seconds, MiB) in logarithms: 1 linear, 2 quadratic."""
    x, y = np.log([[point[0], point[column]] for point in points[-3:]]).T
    return np.polyfit(x, y, 1)[0] if len(points) > 1 else np.nan


def growth(names, sizes, path, longest=60):
    """Inference of one image at the paper's size: a table of exponents, and a figure.

    A model stops before a size that would take more than `longest` seconds if its time grew linearly.
    """
    print(f"\n{where()}\n\n| model | largest image | seconds | MiB | exponent of time | of memory |\n"
          f"|{'---|' * 6}")
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    axes = figure.subplots(1, 2)
    for i, name in enumerate(names):
        model, points = build(name, "paper"), []  # (megapixels, seconds, MiB)
        for height, width in map(sides, sorted(sizes)):
            millions = height * width / 1e6
            if points and points[-1][1] * millions / points[-1][0] > longest:
                break
            call = functools.partial(inference, model, *batch(1, height, width)[:2])
            mebibytes = peak_memory(call)  # also the warm-up
            points.append((millions, seconds(call), mebibytes))
        cells = [f"{points[-1][0]:.2f} M", *(f"{x:.2f}" for x in points[-1][1:]),
                 *(f"{exponent(points, column):.2f}" for column in (1, 2))]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        marks = "o-" if known_files()[name].parent == ROOT else "s--"
        x, *columns = zip(*points)
        for column, (ax, y) in enumerate(zip(axes, columns)):
            ax.plot(x, y, marks, color=f"C{i % 10}", ms=3, label=f"{name}: {cells[3 + column]}")
    for ax, label in zip(axes, ("seconds of one image", "MiB of one image, besides the parameters")):
        ax.set(xscale="log", yscale="log", xlabel="megapixels", ylabel=f"inference: {label}")
        ax.set_xticks(sizes, sizes)
        ax.minorticks_off()
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8, title="exponent", title_fontsize=8)
    figure.savefig(path, dpi=110)


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


def against_transformers(names, height, width, repeats, runs=3):
    """Table of theirs / ours, which take turns: the median of the runs, the smallest and the largest."""
    import transformers
    images, mask, targets = batch(1, height, width)
    theirs_mask = (~mask).long()  # theirs is 1 on the image
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    print(f"\ntransformers {transformers.__version__}, 1 x {height} x {width}, {where()}; theirs / ours, "
          f"above 1 ours is better; median (smallest to largest) of {runs} runs of {repeats} pairs\n\n"
          f"| model | inference | training step | its memory |\n|{'---|' * 4}")
    for name in [name for name in THEIRS if name in names]:
        ours, theirs = build(name, "paper"), transformers_model(name)
        our_inference = functools.partial(inference, ours, images, mask)
        our_step = functools.partial(training_step, ours, SetCriterion(ours), images, mask, targets)

        def their_inference():
            with torch.inference_mode():
                theirs.eval()(pixel_values=images, pixel_mask=theirs_mask)

        def their_step():
            theirs.train().zero_grad()
            theirs(pixel_values=images, pixel_mask=theirs_mask, labels=labels).loss.backward()

        cells = []
        for ours_and_theirs in ((our_inference, their_inference), (our_step, their_step)):
            times = [take_turns(dict(enumerate(ours_and_theirs)), repeats) for _ in range(runs)]
            ratios = sorted(t[1] / t[0] for t in times)
            cells.append(f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
        memory = peak_memory(their_step) / peak_memory(our_step)
        print(f"| {name} | {' | '.join(cells)} | {memory:.2f} |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", help=f"some of: {'; '.join(MODELS)}")
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--size", nargs=2, type=int, metavar=("H", "W"), help="only models of the paper's size")
    p.add_argument("--batch", nargs="+", type=int, default=[1], help="images, for the paper's models")
    p.add_argument("--precision", nargs="+", choices=("float32", "bfloat16"), default=["float32"])
    p.add_argument("--compile", action="store_true")
    p.add_argument("--flops", nargs=2, type=int, metavar=("H", "W"), help="only multiply-adds of this image")
    p.add_argument("--growth", nargs="*", type=float, metavar="MEGAPIXELS")
    p.add_argument("--against-transformers", action="store_true")
    args = p.parse_args(argv)
    names = args.only or [*METHODS, *VARIANTS]
    size = args.size or (480, 640)
    if args.flops:
        for name in names:
            print(f"{name:28} {multiply_adds(build(name, 'paper'), *batch(1, *args.flops)[:2]):6.1f} G")
    elif args.growth is not None:
        growth(args.only or METHODS, args.growth or [0.25, 0.5, 1, 2, 4], ROOT / "docs/growth.png")
    elif args.against_transformers:
        against_transformers(names, *size, args.repeats)
    else:
        if not args.size:
            costs(names, "laptop", (8, 96, 96), args.precision, args.repeats, args.compile)
        for B in args.batch:
            costs(names, "paper", (B, *size), args.precision, args.repeats, args.compile)


if __name__ == "__main__":
    main()
