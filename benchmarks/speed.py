"""What the models cost: parameters, multiply-adds, time and memory of inference and of a training step.

    python benchmarks/speed.py                          paper size on 480 x 640 pixels, laptop size on 96 x 96
    python benchmarks/speed.py --only detr hdetr        some models, by name
    python benchmarks/speed.py --flops 800 1066         only multiply-adds, on the papers' image size
    python benchmarks/speed.py --against-transformers   ratios to Hugging Face's three, if that is installed

A training step is forward, matching, losses and backward of one batch; no optimiser. Memory is the peak of
live tensors above what is there before (parameters are). Models take turns, so that noise hits all of them
alike; times are medians. "of its limit": the time that its multiply-adds would take at the speed of one large
matrix product, divided by its time. A ratio to transformers is one of medians; printed are the median of
--runs such ratios, and in brackets the smallest and the largest.
"""
import argparse
import functools
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from support import machine  # noqa: E402
from support.model_files import known_files, load_model_file  # noqa: E402
from support.options import TRAINING, preset_values  # noqa: E402
from train import SetCriterion  # noqa: E402

VARIANTS = {  # beside the files themselves: (file, options that differ from the default)
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
    """Median seconds of each of {name: function}, after one warm-up."""
    times = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(repeats + 1), calls.items()):
        times[name].append(seconds(call))
    return {name: statistics.median(t[1:]) for name, t in times.items()}


def peak_memory(call):
    """Peak of live tensors that the call adds, in MiB.

    On a CPU from the profiler's record of every allocation: the process's own peak depends on what malloc
    gives back, and varies by a factor of two from run to run.
    """
    if DEVICE != "cpu":
        memory = torch.get_device_module(DEVICE)  # that of mps has no peak
        memory.reset_peak_memory_stats()
        before = memory.memory_allocated()
        call()
        return (memory.max_memory_allocated() - before) / 2**20
    with profile(profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return max(itertools.accumulate(sizes)) / 2**20


def multiply_adds(call):
    """Those of one call, in units of 1e9; the papers call those of a forward pass FLOPs.

    Matrix products and convolutions, not bilinear sampling, softmax or RoIAlign.
    """
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() / 2e9  # the counter sees two operations in each


def inference(model, images, mask):
    model.eval()
    with torch.inference_mode():
        model(images, mask)


def training_step(model, criterion, images, mask, targets):
    model.train().zero_grad()
    criterion(model(images, mask), targets)["total"].backward()


def costs(names, size, B, height, width, repeats):
    """Markdown table, one row a model."""
    images, mask, targets = batch(B, height, width)
    models = {name: build(name, size) for name in names}
    criteria = {name: SetCriterion(model) for name, model in models.items()}
    forward = {name: lambda m=model: inference(m, images, mask) for name, model in models.items()}
    step = {name: lambda m=model, c=criteria[name]: training_step(m, c, images, mask, targets)
            for name, model in models.items()}
    matrix = torch.randn(2048, 2048, device=DEVICE)
    product = {"product": lambda: matrix @ matrix}
    infer = take_turns({**forward, **product}, repeats)
    trained = take_turns({**step, **product}, repeats)
    speed = 2.048**3 / infer["product"]
    print(
        f"\n{size} size, {B} x {height} x {width}, {DEVICE}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}; large matrix product: {speed:.0f} G multiply-adds a second\n\n"
        "| model | parameters | multiply-adds | inference | of its limit | training step | of its limit "
        "| its memory |\n|---|---|---|---|---|---|---|---|"
    )
    for name, model in models.items():
        count = sum(p.numel() for p in model.parameters()) / 1e6
        work = [multiply_adds(lambda: model.eval()(images, mask)), multiply_adds(step[name])]
        at_best = [G / 2.048**3 * t["product"] / t[name] for G, t in zip(work, (infer, trained))]
        print(f"| {name} | {count:.1f} M | {work[0]:.1f} G | {infer[name]:.3f} s | {at_best[0]:.0%} | "
              f"{trained[name]:.3f} s | {at_best[1]:.0%} | {peak_memory(step[name]):.0f} MiB |", flush=True)


# ---- Hugging Face transformers, the same configurations ----------------------------------------------------
THEIRS = {"detr": "Detr", "conditional_detr": "ConditionalDetr", "deformable_detr": "DeformableDetr"}


def transformers_model(name):
    """Their model with random weights and the paper's configuration, as in ours.

    Dropout inside attention and FFN, a loss for every layer, conv1 and layer1 frozen.
    """
    import transformers
    stem = THEIRS[name]
    config = getattr(transformers, f"{stem}Config")(
        num_labels=91, auxiliary_loss=True, attention_dropout=0.1, activation_dropout=0.1)
    model = getattr(transformers, f"{stem}ForObjectDetection")(config)
    for key, parameter in model.named_parameters():
        if "backbone" in key and not any(part in key for part in (".layer2.", ".layer3.", ".layer4.")):
            parameter.requires_grad_(False)
    return model.to(DEVICE)


def ratio(theirs, ours, repeats, runs):
    """Theirs / ours of two functions that take turns: "median (smallest to largest)" over the runs."""
    times = [take_turns({"ours": ours, "theirs": theirs}, repeats) for _ in range(runs)]
    ratios = sorted(t["theirs"] / t["ours"] for t in times)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


def against_transformers(names, height, width, repeats, runs):
    import transformers
    images, mask, targets = batch(1, height, width)
    theirs_mask = (~mask).long()  # theirs is 1 on the image
    labels = [{"class_labels": t["labels"], "boxes": t["boxes"]} for t in targets]
    print(f"\nours against transformers {transformers.__version__}, 1 x {height} x {width}, {DEVICE}, "
          f"{torch.get_num_threads()} threads, torch {torch.__version__}; theirs / ours, above 1 = ours is "
          f"better; median (smallest to largest) of {runs} runs of {repeats} pairs\n\n"
          "| model | inference | training step | its memory | trained parameters |\n|---|---|---|---|---|")
    for name in [name for name in THEIRS if name in names]:
        ours, theirs = build(name, "paper"), transformers_model(name)
        criterion = SetCriterion(ours)

        def their_inference():
            with torch.inference_mode():
                theirs.eval()(pixel_values=images, pixel_mask=theirs_mask)

        def their_step():
            theirs.train().zero_grad()
            theirs(pixel_values=images, pixel_mask=theirs_mask, labels=labels).loss.backward()

        def our_step():
            training_step(ours, criterion, images, mask, targets)

        our_inference = functools.partial(inference, ours, images, mask)
        infer, step = (ratio(*pair, repeats, runs) for pair in (
            (their_inference, our_inference), (their_step, our_step)))
        memory = peak_memory(their_step) / peak_memory(our_step)
        mine, yours = (sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs))
        print(f"| {name} | {infer} | {step} | {memory:.2f} | {mine / 1e6:.1f} M, {yours / 1e6:.1f} M |",
              flush=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--only", nargs="+", choices=MODELS, metavar="MODEL", default=[*METHODS, *VARIANTS],
                   help=f"some of: {'; '.join(MODELS)}")
    p.add_argument("--size", nargs=2, type=int, default=(480, 640), metavar=("H", "W"),
                   help="of the paper's models")
    p.add_argument("--flops", nargs=2, type=int, metavar=("H", "W"),
                   help="only multiply-adds, for this image")
    p.add_argument("--against-transformers", action="store_true")
    p.add_argument("--runs", type=int, default=3, help="of the comparison with transformers")
    args = p.parse_args()
    if args.flops:
        images, mask, _ = batch(1, *args.flops)
        for name in args.only:
            model = build(name, "paper")
            print(f"{name:28} {multiply_adds(lambda: model.eval()(images, mask)):6.1f} G")
    elif args.against_transformers:
        try:
            import timm  # noqa: F401
            import transformers  # noqa: F401
        except ImportError:
            raise SystemExit("pip install transformers timm; they are not needed for anything else here")
        against_transformers(args.only, *args.size, args.repeats, args.runs)
    else:
        costs(args.only, "laptop", 8, 96, 96, args.repeats)
        costs(args.only, "paper", 1, *args.size, args.repeats)


if __name__ == "__main__":
    main()
