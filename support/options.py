"""The command line of train.py: flags, presets, and what may change when a run goes on."""
import argparse
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from support import data, devices, processes
from support.checkpoints import NEEDED_TO_RESUME, load_checkpoint, read_init, wrong_entries
from support.model_files import (
    check_options,
    copy_in_run,
    default_options,
    known_files,
    load_model_file,
    model_of_run,
)

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
    enc_layers=1,
    dec_layers=3,
    dim_feedforward=512,
    dropout=0.0,
)
TRAINING = ("steps", "epochs", "lr_drop", "batch_size", "lr", "lr_backbone", "warmup", "schedule",
            "clip_norm", "weight_decay")  # the rest of a preset are options of the model
# Options that a model is taken to have if its file does not show them, see default_options
LAPTOP_OPTIONS = (*(name for name in LAPTOP if name not in TRAINING), "num_queries")
PATHS = ("data", "train_json", "train_images", "val_json", "val_images")
# What makes a run what it is. Everything else may be changed by --resume.
FIXED = ("model", "preset", "option", "out", "size", "seed", "batch_size", "overfit", "init", "split",
         "no_flip")
DEFAULTS = dict(
    model="detr", preset="laptop", option=[], data=None, train_json=None, train_images=None, val_json=None,
    val_images=None, size=None, out=None, resume=None, init=None, eval=False, weights=None, overfit=None,
    steps=None, epochs=None, batch_size=None, accumulate=1, eval_batch_size=None, lr=None, lr_backbone=None,
    weight_decay=None, clip_norm=None, schedule=None, lr_drop=None, warmup=None, eval_every=None,
    log_every=20, amp=False, compile=False, device="auto", workers=processes.default_workers(), seed=0,
    split=None, no_flip=False)


@dataclass
class Request:
    """What a command line asks for, with everything it leaves out filled in."""

    args: argparse.Namespace  # every flag: as typed, otherwise as in the checkpoint, otherwise by the preset
    module: ModuleType  # the model file
    model_options: dict  # of its build()
    checkpoint: dict | None  # of --resume or --eval --weights
    init: dict  # the checkpoint of --init, or {}


def make_parser(description):
    """Every flag. None has a default here, so that it is known what was typed; see DEFAULTS."""
    p = argparse.ArgumentParser(
        description=description, argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ", ".join(known_files())
    p.add_argument("--model", help=f"one of {names} (default: detr), or a path to a .py file")
    p.add_argument("--preset", choices=("laptop", "paper"),
                   help="small and from scratch (default), or as in the paper")
    p.add_argument("--option", action="append", metavar="NAME=VALUE",
                   help="an option of the model, as in its build(); may be given several times")
    p.add_argument("--data", metavar="DIR",
                   help="folder in COCO, VOC or YOLO format; default: the embedded shapes")
    for name in ("train-json", "train-images", "val-json", "val-images"):
        p.add_argument(f"--{name}", metavar="PATH", help="instead of --data: the four paths one by one")
    p.add_argument("--split", type=float, metavar="SHARE",
                   help="hold this share of the training images out as val, e.g. 0.2; --seed says which")
    p.add_argument("--no-flip", action="store_true",
                   help="mirror no image: for text, and where left and right are different classes")
    p.add_argument("--size", type=int, help="pixels; laptop: longest side (96 for shapes, 256 for folders), "
                   "paper: shortest side (800)")
    p.add_argument("--out", help="folder for results; default runs/MODEL-DATA")
    p.add_argument("--resume", metavar="RUN", help="continue a run exactly: its folder or a checkpoint")
    p.add_argument("--init", metavar="FILE", help="start from the weights of another run (file or folder) or "
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
    p.add_argument("--eval-every", type=int, help="steps between evaluations and checkpoints; default a "
                   "tenth of the run, in paper an epoch")
    p.add_argument("--log-every", type=int, help="steps between lines in log.jsonl; default 20")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, help="autocast to bfloat16, on older CUDA "
                   "cards to float16; matching and losses stay in float32")
    p.add_argument("--compile", action="store_true", help="torch.compile the model")
    p.add_argument("--device", help="auto (default: cuda, mps or xpu if there is one, otherwise cpu), or as "
                   "torch writes it: cuda:1")
    p.add_argument("--workers", type=int, help="processes that load images; 0: the main process does it")
    p.add_argument("--seed", type=int,
                   help="of initial weights, data order, augmentation and dropout; default 0")
    return p


def parse(description, argv=None):
    """The Request of a command line. Raises SystemExit."""
    parser = make_parser(description)
    typed = vars(parser.parse_args(argv))
    check_combination(parser, typed)
    if "eval" in typed or "resume" in typed:
        return parse_old_run(parser, typed)
    return parse_new_run(parser, typed)


def parse_new_run(parser, typed):
    """A run that begins, perhaps with the weights (and then the model) of another."""
    init = read_init(typed["init"]) if "init" in typed else {}
    name, inherited = typed.get("model", DEFAULTS["model"]), {}
    if "model_options" in init:  # a run of ours says what its model was
        name, module, inherited = model_of_run(init, typed.get("model"))
        check_options(module, inherited)
        inherited.pop("num_queries", None)  # depends on the data, see choose_num_queries
    else:
        module = load_model_file(name)
    preset = preset_values(typed.get("preset", "laptop"), module)
    defaults = {key: preset.pop(key) for key in TRAINING if key in preset}
    args = make_args(parser, typed, defaults, name, module)
    options = parse_model_options(args.option)
    check_options(module, options)
    options = {**preset, **inherited, **options}
    return Request(args, module, without_download(module, options) if init else options, None, init)


def parse_old_run(parser, typed):
    """A run that goes on, or one that is evaluated."""
    source = typed["weights"] if "eval" in typed else typed["resume"]
    checkpoint = load_checkpoint(source)
    wrong = wrong_entries(checkpoint, NEEDED_TO_RESUME)
    if "resume" in typed and wrong:
        parser.error(f"--resume {source}: cannot go on from its {', '.join(wrong)}; "
                     "--init starts a new run from its weights")
    name, module, options = model_of_run(checkpoint)
    defaults = dict(checkpoint["args"])
    if "asked_device" in defaults:  # auto is what there is now, not what there was; old runs do not say
        defaults["device"] = defaults.pop("asked_device")
    share = defaults.get("split")
    if share is not None and ("seed" in typed or typed.get("split", share) != share):
        parser.error(f"the run was trained on what --split {share} --seed {defaults.get('seed')} left; with "
                     "others it would be evaluated on images that it has seen")
    if any(path in typed for path in PATHS):  # the new place replaces the old one, however it is told
        defaults = {**defaults, **dict.fromkeys(PATHS)}
        if "eval" in typed:
            defaults["split"] = None  # of other images all count; a --split that is typed is compared
    args = make_args(parser, typed, defaults, name, module)
    if "resume" in typed:
        note_changed_file(module, copy_in_run(checkpoint, name))
    return Request(args, module, without_download(module, options), checkpoint, {})


def without_download(module, options):
    """The options of a model whose backbone gets its weights from a checkpoint."""
    known = default_options(module) or LAPTOP_OPTIONS
    return {**options, "pretrained_backbone": False} if "pretrained_backbone" in known else options


def make_args(parser, typed, defaults, name, module):
    """All flags: what was typed wins over `defaults`, these win over DEFAULTS. Raises SystemExit."""
    once = dict(eval=False, weights=None, resume=None)  # only typed, never inherited
    args = argparse.Namespace(**{**DEFAULTS, **defaults, **once, **typed})
    if "epochs" in typed and "steps" not in typed:
        args.steps = None  # follows from the epochs
    args.model = name if name in known_files() else os.path.abspath(module.__file__)  # found from any folder
    check_values(parser, args)
    return args


def check_combination(parser, typed):
    """Refuses flags that make no sense together, and those that cannot change when a run goes on."""
    for name, value in typed.items():
        if value in ("", []) or name == "option" and [] in value:  # [] is what argparse makes of "--out=--"
            parser.error(f"--{name.replace('_', '-')} is empty")
    if "eval" in typed and "weights" not in typed:
        parser.error("--eval needs --weights FILE")
    if "weights" in typed and "eval" not in typed:
        parser.error("--weights goes with --eval; --resume goes on with a run, "
                     "--init starts a new one from weights")
    if "init" in typed and ("resume" in typed or "eval" in typed) or {"resume", "eval"} <= set(typed):
        parser.error("--init starts a new run from weights, --resume goes on with an old one, --eval trains "
                     "nothing: give only one of them")
    allowed = {"eval": ("size", "batch_size", "seed", "split"), "resume": ()}
    for mode in allowed:
        wrong = [name for name in FIXED if name in typed and name not in allowed[mode]]
        if mode in typed and wrong:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in wrong)
            source = "weights" if mode == "eval" else "resume"
            parser.error(f"{flags}: that is decided by the run that --{source} names; "
                         "for other values start a new run (--init takes its weights along)")


def note_changed_file(module, copy):
    """Says so if a model file is no longer what its run began with."""
    if copy.is_file() and copy.read_bytes() != Path(module.__file__).read_bytes():
        print(f"note     {module.__file__} has changed since this run began; {copy} is what it began with")


def preset_values(preset, module):
    """All that a preset decides: how to train (the names in TRAINING) and options of the model (the rest)."""
    recipe = {name: value for name, value in module.RECIPE.items() if name in TRAINING}
    if preset == "laptop":
        known = (*TRAINING, *(default_options(module) or LAPTOP_OPTIONS))  # not every model has an encoder
        small = {name: value for name, value in LAPTOP.items() if name in known}
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
    """Kinds and ranges of everything that was typed or came from a checkpoint."""
    def refuse(name, what):
        parser.error(f"--{name.replace('_', '-')} {getattr(args, name)}: it must be {what}")

    def check(names, low, high, what):
        kinds = (int, float) if what.startswith("a number") else int
        for name in names:
            value = getattr(args, name)
            if not (value is None or isinstance(value, kinds) and low <= value <= high):  # not for nan
                refuse(name, what)

    for name in (*PATHS, "model", "out", "init"):
        if not isinstance(getattr(args, name), (str, type(None))):
            refuse(name, "a name")
    choices = {"preset": ("laptop", "paper"), "schedule": ("step", "cosine"),
               "amp": (False, True), "compile": (False, True), "no_flip": (False, True)}
    for name, allowed in choices.items():
        if getattr(args, name) not in allowed:
            refuse(name, " or ".join(map(str, allowed)))

    smallest = math.ulp(0.0)
    check(("steps", "epochs", "batch_size", "accumulate", "overfit", "eval_every", "log_every",
           "eval_batch_size", "lr_drop"), 1, 10**9, "a whole number greater than 0")
    check(("lr", "clip_norm"), smallest, 1e38, "a number greater than 0")
    check(("lr_backbone", "weight_decay"), 0, 1e38, "a number, 0 or greater")
    check(("split",), smallest, 1 - 1e-9, "a number between 0 and 1, for example 0.2")
    check(("warmup",), 0, 10**9, "0 or greater")
    check(("size",), 32, 8192, "32 to 8192 pixels")
    check(("workers",), 0, 256, "0 to 256")
    check(("seed",), 0, 2**31, "0 to 2**31")
    needed = ["batch_size", "accumulate", "workers", "seed", "log_every", "lr", "lr_backbone", "weight_decay",
              "clip_norm", "schedule", "warmup"]
    needed += ["lr_drop"] * (args.schedule == "step") + ["epochs"] * (args.steps is None)
    missing = [name for name in needed if getattr(args, name) is None]
    if missing:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
        parser.error(f"{flags}: neither given nor in the RECIPE of {args.model}")
    parts = args.accumulate * processes.WORLD
    if args.batch_size % parts:
        parser.error(f"--batch-size {args.batch_size} is the total: a multiple of {parts}, --accumulate "
                     f"{args.accumulate} times {processes.WORLD} processes")
    try:
        args.asked_device, args.device = args.device, devices.choose(args.device)
    except ValueError as error:
        parser.error(f"--device {args.device}: {error}")
    if args.amp and (why := devices.why_no_amp(args.device)):
        parser.error(f"--amp: {why}")


def load_datasets(args, splits):
    """{split: data set} as the flags say; with --overfit both are the same few images."""
    paths = {name: getattr(args, name) for name in PATHS[1:]}
    splits = ("train",) if args.overfit else splits  # evaluated on what it is trained on
    how = dict(size=args.size, augment=args.preset, seed=args.seed, splits=splits,
               split=getattr(args, "split", None), flip=not getattr(args, "no_flip", False))
    datasets = data.load(args.data, **paths, **how)
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


def choose_num_queries(request, train_set):
    """Laptop preset: room for every object and some more. Too few lose boxes, many make learning slow."""
    known = default_options(request.module) or LAPTOP_OPTIONS
    chosen = "num_queries" in request.model_options
    if request.args.preset != "laptop" or chosen or "num_queries" not in known:
        return
    room = max(20, 2 * train_set.max_boxes, request.init.get("model_options", {}).get("num_queries", 0))
    if room > 2000:
        fullest = max(range(len(train_set)), key=train_set.count_boxes)
        raise SystemExit(f"{train_set.path_of(fullest)} has {train_set.max_boxes} boxes, which asks for "
                         f"{room} queries: more than memory holds. Is this image right? If so, choose "
                         "--option num_queries=N yourself.")
    request.model_options["num_queries"] = room
