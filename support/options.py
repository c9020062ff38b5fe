"""The command line of train.py: flags, presets, and what may change when a run goes on.

parse() returns one Namespace `args` with everything that was typed, else said by the checkpoint, else by the preset.
"""
import argparse
import json
import math
import os
from pathlib import Path

import torch

from support import data, processes
from support.checkpoints import NEEDED_TO_RESUME, load_checkpoint, read_init
from support.model_files import check_options, default_options, file_with_options, known_files, load_model_file

# --preset laptop: learns from random weights on two CPU cores. LAPTOP of a model file goes on top.
LAPTOP = dict(
    steps=3600,
    batch_size=16,
    lr=3e-4,
    lr_backbone=3e-4,  # from scratch the backbone learns like the rest
    warmup=100,
    schedule="cosine",
    clip_norm=1.0,
    backbone="resnet18",
    backbone_norm="batch",
    pretrained_backbone=False,
    hidden_dim=128,
    enc_layers=2,
    dec_layers=3,
    dim_feedforward=512,
    dropout=0.0,
)
TRAINING = ("steps", "epochs", "lr_drop", "batch_size", "lr", "lr_backbone", "warmup", "schedule",
            "clip_norm", "weight_decay")  # the rest of a preset are options of the model
PATHS = ("data", "train_json", "train_images", "val_json", "val_images")
# What makes a run what it is. Everything else may be changed by --resume.
FIXED = ("model", "preset", "option", "out", "size", "seed", "batch_size", "overfit", "init")
DEFAULTS = dict(
    model="detr", preset="laptop", option=[], data=None, train_json=None, train_images=None, val_json=None,
    val_images=None, size=None, out=None, resume=None, init=None, eval=False, weights=None, overfit=None, steps=None,
    epochs=None, batch_size=None, accumulate=1, eval_batch_size=None, lr=None, lr_backbone=None, weight_decay=None,
    clip_norm=None, schedule=None, lr_drop=None, warmup=None, eval_every=None, log_every=20, amp=False, compile=False,
    device="cuda" if torch.cuda.is_available() else "cpu", workers=1 if (os.cpu_count() or 1) < 4 else 4, seed=0)


def make_parser(description):
    """Every flag. None has a default here, so that what was typed can be told from what was not; see DEFAULTS."""
    p = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter, argument_default=argparse.SUPPRESS)
    p.add_argument("--model", help=f"one of {', '.join(known_files())} (default: detr), or a path to a .py file")
    p.add_argument("--preset", choices=("laptop", "paper"), help="small and from scratch (default), or as in the paper")
    p.add_argument("--option", action="append", metavar="NAME=VALUE",
                   help="an option of the model, as in its build(); may be given several times")
    p.add_argument("--data", metavar="DIR", help="folder in COCO or VOC format; default: the embedded shapes")
    for name in ("train-json", "train-images", "val-json", "val-images"):
        p.add_argument(f"--{name}", metavar="PATH", help="instead of --data: the four paths one by one")
    p.add_argument("--size", type=int, help="pixels; laptop: longest side (96 for shapes, 256 for folders), "
                   "paper: shortest side (800)")
    p.add_argument("--out", help="folder for results; default runs/MODEL-DATA")
    p.add_argument("--resume", metavar="RUN", help="continue a run exactly: its folder or a checkpoint")
    p.add_argument("--init", metavar="FILE", help="start a new run from the weights of another (file or folder), or "
                   "from an official checkpoint; other classes and number of queries are fine")
    p.add_argument("--eval", action="store_true", help="only evaluate --weights")
    p.add_argument("--weights", metavar="FILE", help="checkpoint or run folder for --eval")
    p.add_argument("--overfit", type=int, metavar="N", help="train and evaluate on the same N images")
    p.add_argument("--steps", type=int, help="length of the run in optimiser steps")
    p.add_argument("--epochs", type=int, help="or in passes over the training images")
    p.add_argument("--batch-size", type=int, help="images per optimiser step, all parts together")
    p.add_argument("--accumulate", type=int, help="parts a batch is split into, to save memory")
    p.add_argument("--eval-batch-size", type=int, help="default 1 in paper: padding changes numbers a little")
    p.add_argument("--lr", type=float, help="peak learning rate, for exactly this batch size: not scaled")
    p.add_argument("--lr-backbone", type=float, help="the same for the backbone")
    p.add_argument("--weight-decay", type=float)
    p.add_argument("--clip-norm", type=float, help="gradients are scaled down to this norm")
    p.add_argument("--schedule", choices=("step", "cosine"), help="one drop to a tenth, or cosine to zero")
    p.add_argument("--lr-drop", type=int, help="epoch of the drop (--schedule step)")
    p.add_argument("--warmup", type=int, help="steps over which the learning rate grows from zero")
    p.add_argument("--eval-every", type=int, help="steps between evaluations and checkpoints; default a tenth "
                   "of the run, in paper an epoch")
    p.add_argument("--log-every", type=int, help="steps between lines in log.jsonl; default 20")
    p.add_argument("--amp", action="store_true", help="bfloat16 autocast; matching and losses in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    p.add_argument("--workers", type=int, help="processes that load images; 0: the main process does it")
    p.add_argument("--seed", type=int, help="of initial weights, data order, augmentation and dropout; default 0")
    return p


def parse(description, argv=None):
    """(args, model file, options of the model, checkpoint to go on from or None, --init's checkpoint or {})."""
    parser = make_parser(description)
    typed = vars(parser.parse_args(argv))
    check_combination(parser, typed)
    source = typed.get("weights" if "eval" in typed else "resume")
    checkpoint = load_checkpoint(source) if source else None
    missing = [name for name in NEEDED_TO_RESUME if "resume" in typed and name not in checkpoint]
    if missing:
        parser.error(f"--resume {source}: no {', '.join(missing)} in it; --init starts a new run from its weights")
    init = read_init(typed["init"]) if "init" in typed else {}
    parent = checkpoint or (init if "model_options" in init else {})  # a run of ours says what its model was
    name = typed.get("model") or parent.get("args", {}).get("model") or DEFAULTS["model"]
    if checkpoint:
        name = file_with_options(name, checkpoint["model_options"])
    module = load_model_file(name, spare=copy_in_run(checkpoint, name))
    preset = preset_values(typed.get("preset", "laptop"), module)
    defaults = checkpoint["args"] if checkpoint else {k: preset.pop(k) for k in TRAINING if k in preset}
    if "epochs" in typed and "steps" not in typed:
        defaults = {**defaults, "steps": None}
    if checkpoint and any(name in typed for name in PATHS):  # the new place replaces the old one, however it is told
        defaults = {**defaults, **dict.fromkeys(PATHS)}
    # What was typed wins over the checkpoint, and that over the preset
    args = argparse.Namespace(**{**DEFAULTS, **defaults, "model": name, "eval": False, "weights": None, "resume": None,
                                 **typed})
    if checkpoint and "resume" in typed:
        note_changed_file(module, copy_in_run(checkpoint, name))
    if name not in known_files():
        args.model = os.path.abspath(module.__file__)  # found again from any folder
    check_values(parser, args)
    if checkpoint:
        options = {k: v for k, v in checkpoint["model_options"].items() if not name.endswith(f"_{k}")}  # multiscale
        return args, module, options, checkpoint, init
    inherited = {k: v for k, v in init.get("model_options", {}).items() if k != "num_queries"}
    options = parse_model_options(args.option)
    check_options(module, options)
    return args, module, {**preset, **inherited, **options}, None, init


def check_combination(parser, typed):
    """Refuses flags that make no sense together, and those that cannot change when a run goes on."""
    for name in ("resume", "weights", "init", "out", "data", "model"):
        if typed.get(name) == "":
            parser.error(f"--{name} is empty")
    if "eval" in typed and "weights" not in typed:
        parser.error("--eval needs --weights FILE")
    if "weights" in typed and "eval" not in typed:
        parser.error("--weights goes with --eval; --resume goes on with a run, --init starts a new one from weights")
    if "init" in typed and ("resume" in typed or "eval" in typed) or {"resume", "eval"} <= set(typed):
        parser.error("--init starts a new run from weights, --resume goes on with an old one, --eval trains nothing: "
                     "give only one of them")
    allowed = {"eval": ("size", "batch_size", "seed"), "resume": ()}
    for mode in allowed:
        wrong = [name for name in FIXED if name in typed and name not in allowed[mode]]
        if mode in typed and wrong:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            parser.error(f"{flags}: that is decided by the run that --{'weights' if mode == 'eval' else mode} names; "
                         "for other values start a new run (--init takes its weights along)")


def copy_in_run(checkpoint, name):
    """Where the run of a checkpoint keeps its copy of a model file; None without a checkpoint."""
    if checkpoint:
        return Path(checkpoint["path"]).with_name(f"{Path(name).stem}.py")


def note_changed_file(module, copy):
    if copy.is_file() and copy.read_bytes() != Path(module.__file__).read_bytes():
        print(f"note     {module.__file__} has changed since this run began; {copy} is what it began with")


def preset_values(preset, module):
    """All that a preset decides: how to train (the names in TRAINING) and options of the model (the rest)."""
    recipe = {name: value for name, value in module.RECIPE.items() if name in TRAINING}
    if preset == "laptop":
        known = default_options(module) or LAPTOP
        small = {name: value for name, value in LAPTOP.items() if name in TRAINING or name in known}  # not all have an encoder
        return {**recipe, "epochs": None, **small, **getattr(module, "LAPTOP", {})}
    return {**recipe, "steps": None, "warmup": 0, "schedule": "step", **getattr(module, "PAPER", {})}


def parse_model_options(pairs):
    """["num_queries=50", "smca=True"] -> {"num_queries": 50, "smca": True}; what is no JSON is a string."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"--option {pair}: write NAME=VALUE, for example --option num_queries=50")
        try:
            options[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except (ValueError, RecursionError):
            options[name] = value
    return options


def check_values(parser, args):
    """Ranges of everything that was typed or came from a checkpoint."""
    def check(names, low, high, what):
        for name in names:
            value = getattr(args, name)
            if value is not None and not low <= value <= high:  # also catches nan
                parser.error(f"--{name.replace('_', '-')} {value}: it must be {what}")

    smallest = math.ulp(0.0)
    check(("steps", "epochs", "batch_size", "accumulate", "overfit", "eval_every", "log_every", "eval_batch_size",
           "lr_drop"), 1, 10**9, "a whole number greater than 0")
    check(("lr", "clip_norm"), smallest, 1e38, "a number greater than 0")
    check(("lr_backbone", "weight_decay"), 0, 1e38, "a number, 0 or greater")
    check(("warmup",), 0, 10**9, "0 or greater")
    check(("size",), 32, 8192, "32 to 8192 pixels")
    check(("workers",), 0, 256, "0 to 256")
    check(("seed",), 0, 2**31, "0 to 2**31")
    parts = args.accumulate * processes.WORLD
    if args.batch_size % parts:
        parser.error(f"--batch-size {args.batch_size} is the total: a multiple of {parts}, --accumulate "
                     f"{args.accumulate} times {processes.WORLD} processes")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: this torch sees no CUDA device; leave the flag out")


def load_datasets(args, splits):
    """{split: data set} as the flags say; with --overfit both are the same few images."""
    paths = {name: getattr(args, name) for name in PATHS[1:]}
    splits = ("train",) if args.overfit else splits  # evaluated on what it is trained on
    datasets = data.load(args.data, **paths, size=args.size, augment=args.preset, seed=args.seed, splits=splits)
    if args.overfit:
        datasets["train"] = datasets["val"] = data.first_with_boxes(datasets["train"], args.overfit)
    return datasets


def fill_in(args, train_set):
    """What depends on the data: the batch cannot exceed the images; steps from epochs; when to evaluate."""
    parts = args.accumulate * processes.WORLD
    if len(train_set) < args.batch_size:
        args.batch_size = max(1, len(train_set) // parts) * parts
    if len(train_set) < args.batch_size:
        raise SystemExit(f"a batch of {parts} parts, but there are only {len(train_set)} training images")
    epoch = len(train_set) // args.batch_size
    args.steps = args.steps or args.epochs * epoch
    args.eval_every = args.eval_every or (epoch if args.preset == "paper" else max(args.steps // 10, 1))
    args.eval_batch_size = args.eval_batch_size or (1 if args.preset == "paper" else args.batch_size)


def choose_num_queries(args, model_options, train_set, init):
    """Laptop preset: room for every object and some more. Too few lose boxes, many make learning slow."""
    if args.preset != "laptop" or "num_queries" in model_options:
        return
    room = max(20, 2 * train_set.max_boxes, init.get("model_options", {}).get("num_queries", 0))
    if room > 2000:
        fullest = max(range(len(train_set)), key=train_set.count_boxes)
        raise SystemExit(f"{train_set.path_of(fullest)} has {train_set.max_boxes} boxes, which asks for {room} queries: "
                         "more than memory holds. Is this image right? If so, choose --option num_queries=N yourself.")
    model_options["num_queries"] = room
