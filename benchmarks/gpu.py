"""Everything that we would like to know about one CUDA card, by one command; it prints Markdown.

    python benchmarks/gpu.py                       models, sampling and train
    python benchmarks/gpu.py --parts models train  some of: models sampling train data compiled
    python benchmarks/gpu.py --data BCCD           and your folder, in COCO or VOC format, at 512 pixels
    python benchmarks/gpu.py --tiny                tiny sizes, also on a CPU: only to see that it works

models, compiled: inference and a training step (forward, matching, losses, backward) of every method on 800 x
1066 pixels. "Of its rate" is what the multiply-adds of the model would take at the speed of one large matrix
product, divided by its time; of float32 with the tensor cores (TF32), which PyTorch gives to convolutions.
sampling: the forms of benchmarks/sampling.py, as they are and compiled. train: the laptop preset of one model
until AP 0.6. Every row is printed as soon as it is known, and what fails says so in its row. On an H200
models takes two minutes. compiled must be named, because it takes minutes for each row.
"""
import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
import sampling  # noqa: E402
import speed  # noqa: E402
from speed import DEVICE  # noqa: E402

from train import SetCriterion  # noqa: E402

PARTS = ("models", "sampling", "train", "data", "compiled")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def matrix_rate(dtype, size):
    """G multiply-adds a second of one large matrix product."""
    torch.set_float32_matmul_precision("high" if DEVICE == "cuda" else "highest")
    matrix = torch.randn(size, size, device=DEVICE, dtype=dtype)
    seconds = speed.take_turns({"product": lambda: matrix @ matrix}, 5)["product"]
    torch.set_float32_matmul_precision("highest")
    return size**3 / 1e9 / seconds


def models(names, batches, size, repeats, rates, model_size, compiled):
    """One row for each model, batch and precision."""
    print("\n| model | batch | precision | inference | of its rate | training step | of its rate "
          "| its memory |\n|---|---|---|---|---|---|---|---|")
    backend = "inductor" if DEVICE == "cuda" else "eager"  # on a CPU only to see that it works
    for name in names:
        model = speed.build(name, model_size)
        criterion = SetCriterion(model)
        images, mask, targets = speed.batch(1, *size)
        work = [speed.multiply_adds(lambda: model.eval()(images, mask)),
                speed.multiply_adds(lambda: speed.training_step(model, criterion, images, mask, targets))]
        for B in batches:
            for precision, rate in rates.items():
                how = f"{precision}, compiled" if compiled else precision
                torch.compiler.reset()
                forward = torch.compile(model, backend=backend, dynamic=False) if compiled else model
                try:
                    cells = row(forward, criterion, speed.batch(B, *size), precision, repeats,
                                [G * B / rate for G in work])
                except RuntimeError as error:  # out of memory, or it does not compile
                    cells = [" ".join(str(error).split())[:80], "", "", "", ""]
                print(f"| {name} | {B} | {how} | {' | '.join(cells)} |", flush=True)


def row(forward, criterion, batch, precision, repeats, at_best):
    """Cells of one row: times, shares of the seconds `at_best`, memory of a training step."""
    images, mask, targets = batch
    lower = torch.autocast(DEVICE, DTYPES[precision], enabled=precision != "float32")

    def inference():
        with lower:
            speed.inference(forward, images, mask)

    def step():
        forward.train().zero_grad()
        with lower:
            out = forward(images, mask)
        criterion(out, targets)["total"].backward()  # outside of autocast, as in train.py

    cells = []
    for call, best in zip((inference, step), at_best):
        call()  # a compiled model compiles here; take_turns warms up once more
        seconds = speed.take_turns({"call": call}, repeats)["call"]
        cells += [f"{1000 * seconds:.1f} ms", f"{best / seconds:.0%}"]
    return [*cells, f"{speed.peak_memory(step):.0f} MiB"]


# ---- Training ----------------------------------------------------------------------------------------------
def train(*flags):
    """Evaluations [(seconds, {name: number})] of a run of train.py in a folder that is thrown away."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        command = [str(ROOT / "train.py"), "--device", DEVICE, "--out", str(out), *map(str, flags)]
        subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
        lines = map(json.loads, (out / "log.jsonl").read_text().splitlines())
        return [(line["seconds"], line["eval"]) for line in lines if "eval" in line]


def training(title, flags, variants, level):
    """One row for each set of further flags: time until AP reaches the level, and how it ended."""
    print(f"\n`python train.py {' '.join(map(str, flags))}`, {title}\n\n"
          f"| further flags | AP {level} after | evaluations | AP | AP50 | in all |\n"
          "|---|---|---|---|---|---|")
    for further in variants:
        try:
            found = train(*flags, *further)
        except subprocess.CalledProcessError:
            print(f"| {' '.join(further)} | failed, see above | | | | |", flush=True)
            continue
        reached = [f"{seconds:.0f} s" for seconds, metrics in found if metrics["AP"] >= level] or ["never"]
        seconds, metrics = found[-1]
        print(f"| {' '.join(further)} | {reached[0]} | {len(found)} | {metrics['AP']:.3f} "
              f"| {metrics['AP50']:.3f} | {seconds:.0f} s |", flush=True)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS[:-1])
    p.add_argument("--only", nargs="+", choices=speed.MODELS, metavar="MODEL", default=speed.METHODS)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--precision", nargs="+", choices=DTYPES, default=[*DTYPES])
    p.add_argument("--repeats", type=int, default=10)
    p.add_argument("--data", metavar="DIR", help="trains deformable_detr on it at 512 pixels")
    p.add_argument("--tiny", action="store_true", help="tiny sizes: only to see that everything runs")
    args = p.parse_args(argv)
    if DEVICE != "cuda" and not args.tiny:
        raise SystemExit("No CUDA card here. Give --tiny to see that the script works; on a CPU use "
                         "benchmarks/speed.py, growth.py and sampling.py.")
    card = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
    rates = {name: matrix_rate(DTYPES[name], 128 if args.tiny else 8192) for name in args.precision}
    said = [f"{rate / 1000:.3g} T multiply-adds a second in {name}" for name, rate in rates.items()]
    print(f"{card}, torch {torch.__version__}; one large matrix product: {', '.join(said)}")
    if args.tiny:
        print("Tiny sizes: these numbers say nothing.")
        batches, size, repeats, model_size, maps = (1,), (64, 96), 1, "laptop", sampling.SMALL
        short, pixels = ["--overfit", 2, "--steps", 2], 64
        ways = ways_for_photos = [["--no-amp"]]  # not every CPU has bfloat16
    else:
        batches, size, repeats = args.batch, (800, 1066), args.repeats
        model_size, maps = "paper", sampling.PAPER
        short, pixels = [], 512
        ways, ways_for_photos = [[], ["--amp"], ["--amp", "--compile"]], [["--amp"]]
    deformable = ["--model", "deformable_detr", "--preset", "laptop"]
    for part in [part for part in PARTS if part in args.parts]:
        if part in ("models", "compiled"):
            models(args.only, batches, size, repeats, rates, model_size, compiled=part == "compiled")
        elif part == "sampling":
            for compiled in (False,) if args.tiny else (False, True):
                sampling.compare(batches, maps, repeats, compiled)
        elif part == "train":
            training("shapes", [*deformable, "--eval-every", 100, *short], ways, 0.6)
        elif args.data:
            flags = [*deformable, "--data", args.data, "--size", pixels, "--eval-every", 240]
            training("your folder", [*flags, *(short or ["--steps", 2400])], ways_for_photos, 0.5)


if __name__ == "__main__":
    main()
