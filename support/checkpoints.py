"""Model files, and checkpoints, which are written whole or not at all and read with checksums.

A model file is any .py file with RECIPE and build(num_classes, **options), see docs/contract.md. --model
takes the name of one of ours (the top level and relatives/), or the path of your own, such as work/mine.py.
"""
import argparse
import importlib.util
import inspect
import os
import re
import sys
import traceback
import zipfile
from pathlib import Path

import torch

from support import UserError, one_line, shorten

ROOT = Path(__file__).parents[1]
FIVE = ("detr", "conditional_detr", "deformable_detr", "sam_detr", "sqr")
FORMAT = 1  # changes with the content of checkpoints


# ---- Model files -------------------------------------------------------------------------------------------
def known_files():
    """{name: path} of our model files; in relatives/ a file is one if it has a build()."""
    relatives = sorted((ROOT / "relatives").glob("*.py"))
    paths = [ROOT / f"{name}.py" for name in FIVE] + [
        path for path in relatives if re.search(r"^def build\(", path.read_text(encoding="utf-8"), re.M)]
    return {path.stem: path for path in paths}


def load_model_file(name):
    """The module behind --model: one of our names, or the path of any .py file. Raises UserError."""
    path = known_files().get(str(name)) or Path(name)
    if not path.is_file() or path.suffix != ".py":
        raise UserError(f"--model {name}: no such .py file; give one, or one of {', '.join(known_files())}")
    # At the end, because a neighbour called torch.py must not hide torch
    sys.path += [str(f) for f in (ROOT, path.resolve().parent) if str(f) not in sys.path]
    # Under another name if the file is called torch.py, or like any other module that is loaded already
    module_name = path.stem if path.stem not in sys.modules else f"model_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"--model {name}: importing it fails; {describe(error, path)}")
    if missing := [key for key in ("RECIPE", "build") if not hasattr(module, key)]:
        raise UserError(f"--model {path}: the file has no {' and no '.join(missing)}; see detr.py for them")
    return module


def load_model_of(checkpoint, name=None):
    """The module that made a checkpoint, or the one called `name`. Raises UserError."""
    saved = checkpoint["args"]["model"]
    if name is None and saved not in known_files():  # anybody may have made it, so it runs no file of theirs
        raise UserError(f"{checkpoint['path']}: made with the file {saved}, which is not one of ours. If you "
                        f"trust it, add --model {saved}; the run's folder has a copy")
    return load_model_file(name or saved)


def describe(error, path):
    """An exception as "FILE, line N: TypeError: ...", N being the last line of this file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).name == Path(path).name]
    where = f"{Path(path).name}{f', line {lines[-1]}' if lines else ''}"
    return f"{where}: {type(error).__name__}: {shorten(one_line(error), 400)}"


# ---- Options and the model ---------------------------------------------------------------------------------
def default_options(module):
    """{option: default} of the model that the file's build() makes; {} if they are not visible."""
    classes = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
               and issubclass(c, torch.nn.Module) and hasattr(c, "recipe")]
    defaults = {}
    for base in reversed(classes[-1].__mro__ if classes else ()):
        if "__init__" in vars(base) and hasattr(base, "recipe"):
            parameters = inspect.signature(base.__init__).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults


def check_options(module, options):
    """Raises UserError for an option that the model does not have, or a value of the wrong type."""
    defaults = default_options(module)
    for name, value in options.items() if defaults else ():
        if name not in defaults:
            raise UserError(f"--option {name}: {Path(module.__file__).stem} has no such option; it has "
                            f"{', '.join(defaults)}")
        default, kind = defaults[name], type(defaults[name])
        if not (type(value) is kind or (kind is float and type(value) is int) or default is None):
            raise UserError(f"--option {name}={value}: it must be {kind.__name__}, such as {default}")


def without_download(module, options):
    """The options of a model whose backbone gets its weights from a checkpoint, if it has that option."""
    has_it = "pretrained_backbone" in (default_options(module) or ["pretrained_backbone"])
    return {**options, "pretrained_backbone": False} if has_it else options


def build_model(module, num_classes, options):
    """module.build(num_classes, **options); any error in it becomes a UserError."""
    check_options(module, options)
    file = Path(module.__file__).name
    try:
        model = module.build(num_classes, **options)
    except ValueError as error:
        raise UserError(f"--option: {error}")
    except OSError as error:  # urllib's errors are OSErrors
        raise UserError(f"The backbone's ImageNet weights could not be downloaded ({error}). Connect once, "
                        "or train it too: --option pretrained_backbone=false --option backbone_norm=batch")
    except Exception as error:
        raise UserError(f"build() fails; {describe(error, file)}")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "recipe"):
        raise UserError(f"{file}: build() must return an nn.Module with the attribute recipe = RECIPE")
    if missing := {"class_loss", "w_class", "w_l1", "w_giou"} - set(model.recipe):
        raise UserError(f"{file}: RECIPE has no {', '.join(sorted(missing))}; see detr.py for them")
    if (kind := model.recipe["class_loss"]) not in ("softmax", "focal"):
        raise UserError(f'{file}: class_loss in RECIPE must be "softmax" or "focal", but it is {kind!r}')
    return model


# ---- Checkpoints -------------------------------------------------------------------------------------------
def save(path, content):
    """Atomic: a crash at any moment leaves a whole file, old or new. Raises UserError if the disk is full."""
    part = Path(f"{path}.tmp")
    try:
        with open(part, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        part.unlink(missing_ok=True)
        raise UserError(f"{path}: cannot be written, is the disk full? ({shorten(one_line(error), 100)}) The "
                        "last checkpoint is still there. Make room, then continue with --resume")


def read_file(path):
    """Tensors, plain values and Namespaces (of official checkpoints) from torch.save; no code is run."""
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint")
    try:
        if zipfile.is_zipfile(path):  # older files, such as some official ones, are no zip files
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():  # torch.load does not check the checksums
                    raise ValueError(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{path}: not a readable checkpoint ({type(error).__name__}), perhaps cut off or "
                        "damaged. Try the other one in the run's folder, best.pt or last.pt")


def load_checkpoint(path):
    """A checkpoint of train.py: a file, or the last one of a run's folder. Its "path" is added."""
    path = Path(path, "last.pt") if Path(path).is_dir() else Path(path)
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of train.py. To start a new run from "
                        "official weights, give --init")
    return {**checkpoint, "path": str(path)}


def read_init(path, in_folder="best.pt"):
    """The file behind --init, ours or official; of a run's folder best.pt. Raises UserError."""
    path = Path(path, in_folder) if Path(path).is_dir() else Path(path)
    checkpoint = read_file(path)
    return load_checkpoint(path) if "model_options" in checkpoint else checkpoint


def check_data(checkpoint, datasets):
    """Raises UserError unless the data are those of the checkpoint, in whatever folder they are now."""
    for dataset in datasets.values():
        if checkpoint["class_names"] != dataset.class_names:
            raise UserError(f"the checkpoint has the classes {', '.join(checkpoint['class_names'])}, but the "
                            f"data has {', '.join(dataset.class_names)}")
        if dataset.held_out and checkpoint["held_out"] not in (None, dataset.held_out):
            raise UserError("--split selects other images than when the run began, because images changed. "
                            "To evaluate on others, give --val-json and --val-images")
    if "train" in datasets and checkpoint["num_images"] != len(datasets["train"]):
        raise UserError(f"the run was trained on {checkpoint['num_images']} images, but here are "
                        f"{len(datasets['train'])}. To train on other images, start a new run with --init")


def load_weights(model, checkpoint):
    """The weights of a checkpoint of ours into its model. Raises UserError if they are those of another."""
    try:
        model.load_state_dict(checkpoint["model"])
    except RuntimeError as error:
        raise UserError(f"{checkpoint['path']}: its weights are not those of this model; has the model file "
                        f"changed since the run began? {shorten(one_line(error), 300)}")


def load_optimizer(optimizer, checkpoint):
    """The optimiser's state from a checkpoint; rates and all other settings are those of this command."""
    fresh, saved = optimizer.state_dict(), checkpoint["optimizer"]
    groups = [[(g["part"], g["params"]) for g in state["param_groups"]] for state in (saved, fresh)]
    if groups[0] != groups[1]:
        raise UserError(f"{checkpoint['path']}: its optimiser is for other groups of parameters; has the "
                        "model file changed? --init starts a new run with its weights")
    optimizer.load_state_dict({**fresh, "state": saved["state"]})


# ---- Weights of another run --------------------------------------------------------------------------------
def in_our_names(module, checkpoint):
    """The tensors of a checkpoint, ours or official, under our names and of any shape: {name: tensor}."""
    if "model_options" in checkpoint:
        return checkpoint["model"]
    if not hasattr(module, "rename_official"):
        raise UserError(f"--init: {module.__name__} has no rename_official(), which official weights need")
    state = module.rename_official(checkpoint.get("model", checkpoint))
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def initialise(model, module, checkpoint, class_names):
    """Copies all tensors that fit, those of a class head only for the same classes; prints the others."""
    given, left, copied = dict(in_our_names(module, checkpoint)), {}, 0
    queries = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    state = model.state_dict()
    for name, tensor in state.items():
        source = given.pop(name, None)
        if source is None:
            left[name] = "not in the file, keeps its random values"
        elif name.startswith("class_head.") and checkpoint.get("class_names") != class_names:
            left[name] = "for other classes, keeps its random values"
        elif source.shape == tensor.shape:
            tensor.copy_(source)
            copied += 1
        elif name in queries and source.shape[1:] == tensor.shape[1:]:  # as many queries as both have
            n = min(len(source), len(tensor))
            tensor[:n] = source[:n]
            copied += 1
            left[name] = f"the first {n} of the file's {len(source)} queries, for {len(tensor)} here"
        else:
            left[name] = f"{list(source.shape)} in the file, {list(tensor.shape)} here; keeps random values"
    left |= dict.fromkeys(given, "only in the file, not used")
    lines = [f"{name}: {why}" for name, why in left.items()
             if not name.endswith("num_batches_tracked")]  # frozen BatchNorm has none
    print(f"init     {copied} of {len(state)} tensors copied" + (", except:" if lines else ""))
    for line in lines[:12] + [f"and {len(lines) - 12} more"] * (len(lines) > 12):
        print(f"         {line}")
    if copied < len(state) / 2:
        raise UserError("--init: most of it does not fit. Give --model, --preset and --option of its run")
