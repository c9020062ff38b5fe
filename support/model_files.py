"""Model files: loading them, checking the options of build(), and checking that a model keeps the contract.

A model file is any .py file with RECIPE and build(num_classes, **options), see docs/contract.md. --model
takes the name of one of ours (the top level and relatives/), or the path of your own, such as work/mine.py.
"""
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path

import torch

from support import UserError, one_line, shorten

ROOT = Path(__file__).parents[1]
FIVE = ("detr", "conditional_detr", "deformable_detr", "sam_detr", "sqr")


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
    for folder in (ROOT, path.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # at the end: a neighbour called torch.py must not hide torch
    # Under another name if the file is called torch.py, or like any other module that is loaded already
    module_name = path.stem if path.stem not in sys.modules else f"model_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:  # also an encoding that is not UTF-8
        raise UserError(f"--model {path}, line {error.lineno}: {error.msg}")
    except Exception as error:
        raise UserError(f"--model {name}: importing it fails; {describe(error, path)}")
    missing = [key for key in ("RECIPE", "build") if not hasattr(module, key)]
    if missing:
        raise UserError(f"--model {path}: the file has no {' and no '.join(missing)}; see detr.py for them")
    return module


def load_model_of(checkpoint, name=None):
    """The module that made a checkpoint, or the one called `name`.

    A checkpoint may come from anybody. So a file that it names runs only if it is one of ours; another file
    runs only if the user names it. Raises UserError.
    """
    saved = checkpoint["args"]["model"]
    if name is None and saved not in known_files():
        raise UserError(f"{checkpoint['path']}: made with the file {saved}, which is not one of ours. If you "
                        f"trust it, add --model {saved}; the run's folder has a copy")
    return load_model_file(name or saved)


def describe(error, path):
    """An exception as "FILE, line N: TypeError: ...", N being the last line of this file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).name == Path(path).name]
    where = f"{Path(path).name}{f', line {lines[-1]}' if lines else ''}"
    return f"{where}: {type(error).__name__}: {shorten(one_line(error), 400)}"


# ---- Options -----------------------------------------------------------------------------------------------
def default_options(module):
    """{option: default} of the model that the file's build() makes; {} if they are not visible."""
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    classes = [c for c in own if issubclass(c, torch.nn.Module) and hasattr(c, "recipe")]
    defaults = {}
    for base in reversed(classes[-1].__mro__ if classes else ()):
        if "__init__" in vars(base) and hasattr(base, "recipe"):
            parameters = inspect.signature(base.__init__).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults


def check_options(module, options):
    """Raises UserError for an option that the model does not have, or a value of the wrong type or size."""
    defaults = default_options(module)
    for name, value in options.items() if defaults else ():
        if name not in defaults:
            raise UserError(f"--option {name}: {Path(module.__file__).stem} has no such option; it has "
                            f"{', '.join(defaults)}")
        default, shown = defaults[name], shorten(str(value), 40)
        kind = type(default)
        if not (type(value) is kind or (kind is float and type(value) is int) or default is None):
            raise UserError(f"--option {name}={shown}: it must be {kind.__name__}, such as {default}")
        if kind in (int, float) and not 0 <= value <= 1_000_000:  # not for nan
            raise UserError(f"--option {name}={shown}: it must be from 0 to 1000000, such as {default}")


def without_download(module, options):
    """The options of a model whose backbone gets its weights from a checkpoint, if it has that option."""
    has_it = "pretrained_backbone" in (default_options(module) or ["pretrained_backbone"])
    return {**options, "pretrained_backbone": False} if has_it else options


# ---- The model ---------------------------------------------------------------------------------------------
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
    for name in ("class_loss", "w_class", "w_l1", "w_giou"):
        value, needed = model.recipe.get(name), '"softmax" or "focal"' if name == "class_loss" else "a number"
        if value not in ("softmax", "focal") if name == "class_loss" else not isinstance(value, (int, float)):
            raise UserError(f"{file}: RECIPE's {name} is {value!r}, it must be {needed}")
    return model


def check_output(out, model, num_images, num_classes):
    """Raises UserError unless `out` keeps the contract for so many images and classes."""
    def check(right, what):
        if not right:
            raise UserError(f"{type(model).__name__} breaks the contract: {what}")

    check(isinstance(out, dict) and {"logits", "boxes"} <= set(out),
          'forward must return a dict with "logits" and "boxes"')
    logits, boxes, recipe = out["logits"], out["boxes"], model.recipe
    check(all(isinstance(x, torch.Tensor) and x.is_floating_point() for x in (logits, boxes)),
          "logits and boxes must be floating point tensors")
    check(logits.ndim == 4 and boxes.shape == (*logits.shape[:3], 4) and logits.shape[1] == num_images
          and 0 not in logits.shape, f"logits {list(logits.shape)} and boxes {list(boxes.shape)} must be "
          f"[S, B, Q, C] and [S, B, Q, 4] with B = {num_images}, and not empty")
    columns = num_classes + (recipe["class_loss"] == "softmax")
    check(logits.shape[3] in (columns, columns + bool(recipe.get("extra_logit"))),
          f'{logits.shape[3]} logits for {num_classes} classes; class_loss "{recipe["class_loss"]}" needs '
          f'{columns}{" (the last one is no-object)" if columns > num_classes else ""}')
    check(recipe.get("free_boxes") or -1e-4 <= boxes.min() and boxes.max() <= 1 + 1e-4,
          f"boxes reach from {boxes.min():.3g} to {boxes.max():.3g}, they must be (cx, cy, w, h) in [0, 1] "
          "of the image")
