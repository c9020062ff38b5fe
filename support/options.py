"""The command line of train.py: flags, presets, and the changes that --resume allows."""
import argparse
import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from support import UserError, checkpoints, machine, shorten

# --preset laptop: learns from random weights on two CPU cores. LAPTOP of a model file overrides it.
LAPTOP = dict(
    lr=3e-4, lr_backbone=3e-4,  # from scratch the backbone learns like the rest
    steps=6000, batch_size=8, warmup=100, schedule="cosine", clip_norm=1.0,
    backbone="resnet18", backbone_norm="batch", pretrained_backbone=False,
    last_stage=2, temperature=20,  # C3, which has 12 x 12 cells for images of 96 pixels
    hidden_dim=128, enc_layers=1, dec_layers=3, dim_feedforward=512, dropout=0.0,
)
TRAINING = ("steps", "epochs", "lr_drop", "batch_size", "lr", "lr_backbone", "warmup", "schedule",
            "clip_norm", "weight_decay")  # the rest of a preset are options of the model
PATHS = ("data", "train_json", "train_images", "val_json", "val_images")
# These flags define a run. --resume may change all others.
FIXED = "model preset option out size seed batch_size overfit init split no_flip".split()


@dataclass
class Request:
    """The settings of a command line, with all defaults filled in."""
    args: argparse.Namespace  # every flag: as typed, otherwise as in the checkpoint or the preset
    module: ModuleType  # the model file
    model_options: dict  # of its build()
    checkpoint: dict | None  # of --resume or --eval --weights
    init: dict  # the checkpoint of --init, or {}

    def build_model(self, num_classes):
        return checkpoints.build_model(self.module, num_classes, self.model_options)


# ---- Flags -------------------------------------------------------------------------------------------------
def between(kind, low, high, what):
    """A type for argparse: a number from low to high, which `what` describes."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # not for nan
            raise argparse.ArgumentTypeError(f"{shorten(text, 40)}: it must be {what}")
        return value
    return read


COUNT = between(int, 1, 10**9, "a whole number greater than 0")
POSITIVE = between(float, math.ulp(0.0), 1e38, "a number greater than 0")
NOT_NEGATIVE = between(float, 0, 1e38, "a number, 0 or greater")


def make_parser(description):
    """Every flag. Those that depend on preset or run have no default here: parse() sets these."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                                usage="train.py [--FLAG VALUE ...]; --help explains every flag")
    add, one_of = p.add_argument, p.add_mutually_exclusive_group().add_argument
    add("--model", help=f"a .py file, or {', '.join(checkpoints.known_files())}; default detr")
    add("--preset", choices=("laptop", "paper"), default="laptop", help="default laptop: small, from scratch")
    add("--option", action="append", default=[], metavar="NAME=VALUE", help="of the model; may be repeated")
    add("--data", metavar="DIR", help="folder in COCO, VOC or YOLO format; default: shapes")
    for path in ("train-json", "train-images", "val-json", "val-images"):
        add(f"--{path}", metavar="PATH", help="instead of --data: the four paths one by one")
    add("--split", type=between(float, 1e-9, 1 - 1e-9, "between 0 and 1, for example 0.2"), metavar="SHARE",
        help="take this share of the training images as val, e.g. 0.2; --seed determines which")
    add("--no-flip", action="store_true", help="never mirror images: for text and classes such as left hand")
    add("--size", type=between(int, 32, 8192, "32 to 8192 pixels"), help="pixels; laptop: longest side "
        "(96 for shapes, 256 for folders), paper: shortest side (800)")
    add("--out", help="folder for results; default runs/MODEL-DATA")
    one_of("--resume", metavar="RUN", help="continue a run exactly: its folder or a checkpoint")
    one_of("--init", metavar="FILE", help="start from weights: official ones, or a run (its best.pt)")
    one_of("--eval", action="store_true", help="only evaluate --weights")
    add("--weights", metavar="FILE", help="for --eval: a checkpoint, or a run's folder: last.pt")
    add("--overfit", type=COUNT, metavar="N", help="train and evaluate on the same N images")
    add("--steps", type=COUNT, help="length of the run in optimiser steps")
    add("--epochs", type=COUNT, help="or in passes over the training images")
    add("--batch-size", type=COUNT, help="images per optimiser step, all parts together")
    add("--accumulate", type=COUNT, default=1, help="parts a batch is split into, to save memory")
    add("--eval-batch-size", type=COUNT, help="default 1 in paper, because padding changes predictions")
    add("--lr", type=POSITIVE, help="peak learning rate; it is not scaled with the batch size")
    add("--lr-backbone", type=NOT_NEGATIVE, help="the same for the backbone")
    add("--weight-decay", type=NOT_NEGATIVE)
    add("--clip-norm", type=POSITIVE, help="gradients are scaled down to this norm")
    add("--schedule", choices=("step", "cosine"), help="one drop to a tenth, or cosine to zero")
    add("--lr-drop", type=COUNT, help="epoch of the drop (--schedule step)")
    add("--warmup", type=between(int, 0, 10**9, "0 or greater"), help="steps of growing learning rate")
    add("--eval-every", type=COUNT, help="steps; default a tenth of the run, in paper an epoch")
    add("--log-every", type=COUNT, default=20, help="steps between lines in log.jsonl; default 20")
    add("--amp", action=argparse.BooleanOptionalAction, default=False,
        help="autocast to bfloat16, on older CUDA cards to float16; matching and losses stay in float32")
    add("--compile", action="store_true", help="torch.compile the model")
    add("--device", default="auto", help="auto (default), cpu, mps, cuda or cuda:1")
    add("--workers", type=between(int, 0, 256, "0 to 256"), default=machine.default_workers(),
        help="processes that load images; 0: the main process does it")
    add("--seed", type=between(int, 0, 2**31, "0 to 2**31"), default=0, help="of all randomness; default 0")
    return p


def as_flags(names):
    """["batch_size", "lr"] -> "--batch-size, --lr"."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)


# ---- From a command line to a Request ----------------------------------------------------------------------
def parse(description, argv=None):
    """The Request of a command line. Argparse ends the program if a flag is wrong. Raises UserError."""
    # It is read twice: first to find the preset or the run, and then with the values of that as defaults
    argv = sys.argv[1:] if argv is None else argv
    parser = make_parser(description)
    typed = parser.parse_args(argv)
    if empty := [flag for flag, value in vars(typed).items() if value == ""]:
        parser.error(f"{as_flags(empty)}: it is empty; is a variable of the shell not set?")
    if typed.eval != bool(typed.weights):
        parser.error("--eval and --weights FILE go together. --resume continues a run, and --init starts a "
                     "new one from weights")
    request = (old_run if typed.eval or typed.resume else new_run)(parser, typed, argv)
    if request.checkpoint or request.init:  # they have the backbone's weights as well
        request.model_options = checkpoints.without_download(request.module, request.model_options)
    args, path = request.args, Path(request.module.__file__).resolve()  # found from any folder
    args.model = path.stem if checkpoints.known_files().get(path.stem) == path else str(path)
    if typed.epochs and not typed.steps:
        args.steps = None  # follows from the epochs
    needed = ["batch_size", "lr", "lr_backbone", "weight_decay", "clip_norm", "schedule", "warmup"]
    needed += ["lr_drop"] * (args.schedule == "step") + ["epochs"] * (args.steps is None)
    if missing := [flag for flag in needed if getattr(args, flag) is None]:
        parser.error(f"{as_flags(missing)}: neither given nor in the RECIPE of {args.model}; give a value")
    parts = args.accumulate * machine.WORLD
    if args.batch_size % parts and not args.eval:
        parser.error(f"--batch-size {args.batch_size} is the total: it must be a multiple of {parts}, "
                     f"--accumulate {args.accumulate} times the number of processes, {machine.WORLD}")
    args.asked_device, args.device = args.device, machine.choose_device(args.device)
    if args.amp and not machine.amp_dtype(args.device):
        parser.error("--amp: bfloat16 would be slower than float32 on this CPU, which lacks AVX512_BF16 and "
                     "AMX; leave it out, or give --no-amp")
    return request


def new_run(parser, typed, argv):
    """A new run, perhaps with the weights (and then the model) of another."""
    init = checkpoints.read_init(typed.init) if typed.init else {}
    inherited = dict(init.get("model_options", {}))
    inherited.pop("num_queries", None)  # depends on the data, see resolve
    if "model_options" in init:  # a checkpoint of ours
        module = checkpoints.load_model_of(init, typed.model)
    else:
        module = checkpoints.load_model_file(typed.model or "detr")
    preset = preset_values(typed.preset, module)
    parser.set_defaults(**{key: preset.pop(key) for key in TRAINING if key in preset})
    args = parser.parse_args(argv)
    options = {**preset, **inherited, **parse_model_options(args.option)}
    checkpoints.check_options(module, options)
    return Request(args, module, options, None, init)


def old_run(parser, typed, argv):
    """A run to resume or to evaluate."""
    checkpoint = checkpoints.load_checkpoint(typed.weights or typed.resume)
    module, saved = checkpoints.load_model_of(checkpoint, typed.model), checkpoint["args"]
    once = {"eval": False, "weights": None, "resume": None, "device": saved["asked_device"]}
    moved = any(getattr(typed, path) for path in PATHS)  # then the new place replaces the old one entirely
    parser.set_defaults(**{**saved, **once, **(dict.fromkeys(PATHS) if moved else {})})
    args = parser.parse_args(argv)
    free = {"size": typed.eval, "split": typed.eval and not saved["split"],
            "model": saved["model"] not in checkpoints.known_files()}
    if changed := [flag for flag in FIXED if getattr(args, flag) != saved[flag] and not free.get(flag)]:
        parser.error(f"{as_flags(changed)}: this differs from the run of {checkpoint['path']}. Leave it "
                     "out, or start a new run; --init copies the weights")
    if moved and typed.eval and not typed.split:
        args.split = None  # all other images count
    copy = Path(checkpoint["path"]).with_name(Path(module.__file__).name)
    if typed.resume and copy.is_file() and copy.read_bytes() != Path(module.__file__).read_bytes():
        print(f"note     {module.__file__} has changed since this run began; {copy} is its first version")
    return Request(args, module, checkpoint["model_options"], checkpoint, {})


def preset_values(preset, module):
    """All values of a preset: for training (the names in TRAINING) and options of the model (the rest)."""
    recipe = {name: value for name, value in module.RECIPE.items() if name in TRAINING}
    if preset == "laptop":
        known = checkpoints.default_options(module) or LAPTOP  # not every model has an encoder
        small = {name: value for name, value in LAPTOP.items() if name in TRAINING or name in known}
        return {**recipe, "epochs": None, **small, **getattr(module, "LAPTOP", {})}
    return {**recipe, "steps": None, "warmup": 0, "schedule": "step", **getattr(module, "PAPER", {})}


def parse_model_options(pairs):
    """["num_queries=50", "smca=True"] -> {"num_queries": 50, "smca": True}; no JSON is a string."""
    options = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--option {pair}: write NAME=VALUE, for example --option num_queries=50")
        try:
            options[name] = json.loads(value.lower() if value.lower() in ("true", "false") else value)
        except ValueError:
            options[name] = value
    return options


# ---- What follows from the data ----------------------------------------------------------------------------
def resolve(request, train_set):
    """Fills in values that depend on the data: queries, size, steps, eval_every; args are final after it."""
    args, parts, options = request.args, request.args.accumulate * machine.WORLD, request.model_options
    known = checkpoints.default_options(request.module) or ("num_queries",)
    if args.preset == "laptop" and "num_queries" in known and "num_queries" not in options:
        # Twice the most objects: with fewer queries boxes get lost, with many more learning is slow
        room = max(20, 2 * train_set.max_boxes, request.init.get("model_options", {}).get("num_queries", 0))
        if room > 2000:
            fullest = max(range(len(train_set)), key=train_set.count_boxes)
            raise UserError(f"{train_set.path_of(fullest)} has {train_set.max_boxes} boxes, which would need "
                            f"{room} queries. Is this image right? If so, give --option num_queries=N")
        options["num_queries"] = room
    if len(train_set) < args.batch_size:
        args.batch_size = len(train_set) // parts * parts
    if not args.batch_size:
        raise UserError(f"A batch of {parts} parts needs {parts} training images, and there are "
                        f"{len(train_set)}; lower --accumulate")
    epoch = len(train_set) // args.batch_size
    args.size = train_set.size
    args.steps = args.steps or args.epochs * epoch
    args.eval_every = args.eval_every or (epoch if args.preset == "paper" else max(args.steps // 10, 1))
    args.eval_batch_size = args.eval_batch_size or (1 if args.preset == "paper" else args.batch_size)
