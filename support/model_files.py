"""Model files: where they are, what build() of one takes, and whether what it builds keeps the contract.

A model file is any .py file with RECIPE and build(num_classes, **options), see the README. Names are those of
the files at the top level and in relatives/; there is no list of them.
"""
import importlib.util
import inspect
import re
import sys
import traceback
from pathlib import Path

import torch

from support.evaluation import is_softmax

ROOT = Path(__file__).parents[1]


def known_files():
    """{name: path} of the model files of this repository, recognised by their build()."""
    paths = sorted(ROOT.glob("*.py")) + sorted((ROOT / "relatives").glob("*.py"))
    return {path.stem: path for path in paths if re.search(r"^def build\(", path.read_text(), re.M)}


def load_model_file(name, spare=None):
    """The module behind --model: one of our names, or the path of any .py file that keeps the contract.

    spare: a copy that takes the place of a file that is gone (a run keeps one). Raises SystemExit.
    """
    path = known_files().get(name) or Path(name)
    if not path.is_file() and spare and Path(spare).is_file():
        print(f"{path} is gone; taking the copy that the run keeps, {spare}", file=sys.stderr)
        path = Path(spare)
    if not path.is_file() or path.suffix != ".py":
        problem = "not a .py file" if path.is_file() else "no such file"
        raise SystemExit(f"--model {name}: {problem}. Give one of {', '.join(known_files())} or a .py file.")
    for folder in (ROOT, path.resolve().parent):
        if str(folder) not in sys.path:
            sys.path.append(str(folder))  # at the end: a neighbour called torch.py must not hide the library
    # Under a name of its own if somebody's file is called torch.py, or as a module that is there already
    module_name = path.stem if path.stem not in sys.modules else f"model_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:  # also an encoding that is not UTF-8
        raise SystemExit(f"--model {name}: {path}, line {error.lineno}: {error.msg}")
    except Exception as error:
        raise SystemExit(f"--model {name}: importing it fails; {describe(error, path)}")
    missing = [key for key in ("RECIPE", "build") if not hasattr(module, key)]
    if missing:
        raise SystemExit(f"--model {path}: the file has no {' and no '.join(missing)}; see detr.py for them.")
    for key in ("RECIPE", "LAPTOP", "PAPER"):
        if not isinstance(getattr(module, key, {}), dict):
            raise SystemExit(f"--model {path}: {key} must be a dict")
    return module


def describe(error, path):
    """An exception as "FILE, line N: TypeError: ...", N being the last line of this file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if Path(frame.filename).name == Path(path).name]
    text = " ".join(str(error).split())[:400]
    return f"{Path(path).name}{f', line {lines[-1]}' if lines else ''}: {type(error).__name__}: {text}"


def copy_in_run(checkpoint, name):
    """Where the run of a checkpoint keeps its copy of a model file."""
    return Path(checkpoint["path"]).with_name(f"{Path(name).stem}.py")


# ---- Options -----------------------------------------------------------------------------------------------
def default_options(module):
    """{option: default} of what the file's build() passes on to its model; {} if that cannot be seen."""
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    classes = [c for c in own if issubclass(c, torch.nn.Module) and hasattr(c, "recipe")]
    defaults = {}
    for base in reversed(classes[-1].__mro__ if classes else ()):
        if "__init__" in vars(base) and hasattr(base, "recipe"):
            parameters = inspect.signature(base.__init__).parameters.values()
            defaults |= {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults


def is_the_file(option, name):
    """Whether a file is what an option was in old runs: multiscale of sam_detr is sam_detr_multiscale now."""
    return name.endswith(f"_{option}")


def files_with_option(option):
    """Names of our files whose model takes this option, or that are the option."""
    return [name for name in known_files()
            if is_the_file(option, name) or option in default_options(load_model_file(name))]


def model_of_run(checkpoint, name=None):
    """(name, module, options) of the model that made a checkpoint; `name` takes the place of its run's model.

    An option of an old run may be in another file now, or be that file. Raises SystemExit.
    """
    name, options = name or checkpoint["args"]["model"], dict(checkpoint["model_options"])
    known = default_options(load_model_file(name)) if name in known_files() else options
    for option in [option for option in options if option not in known]:
        files = [file for file in files_with_option(option) if file.startswith(f"{name}_")]
        if files and options[option] is False:
            del options[option]  # the option that became a file was not wanted
        elif files:
            print(f"note     --option {option} of {name} is in the file {files[0]} now; taking that")
            name = files[0]
            break
    module = load_model_file(name, spare=copy_in_run(checkpoint, name))
    defaults = default_options(module)
    for option, value in options.items():
        if isinstance(value, str) and isinstance(defaults.get(option), bool):
            options[option] = bool(value)  # what it meant in old runs: they took "False" for true
    return name, module, {option: value for option, value in options.items() if not is_the_file(option, name)}


def check_options(module, options):
    """Raises SystemExit for an option that the model does not have, and for a value of the wrong type."""
    defaults, name_of_model = default_options(module), Path(module.__file__).stem
    for name, value in options.items() if defaults else ():
        if name not in defaults:
            others = files_with_option(name)
            hint = f"it belongs to {', '.join(others)}" if others else f"it has {', '.join(defaults)}"
            raise SystemExit(f"--option {name}: {name_of_model} has no such option; {hint}.")
        kind = type(defaults[name])
        fits = type(value) is kind or (kind is float and type(value) is int) or defaults[name] is None
        if not fits:
            raise SystemExit(f"--option {name}={value}: it must be {kind.__name__}, such as {defaults[name]}")


# ---- The model ---------------------------------------------------------------------------------------------
def build_model(module, num_classes, options):
    """module.build(num_classes, **options); whatever goes wrong in it becomes a SystemExit of one line."""
    check_options(module, options)
    try:
        model = module.build(num_classes, **options)
    except ValueError as error:
        raise SystemExit(f"--option: {error}")
    except OSError as error:  # urllib's errors are OSErrors
        raise SystemExit(f"The backbone's ImageNet weights could not be downloaded ({error}). Connect once, "
                         "or train it too: --option pretrained_backbone=false --option backbone_norm=batch")
    except Exception as error:
        raise SystemExit(f"build() fails; {describe(error, module.__file__)}")
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "recipe"):
        raise SystemExit(f"{Path(module.__file__).name}: build() must return an nn.Module whose attribute "
                         "recipe is the file's RECIPE")
    check_recipe(model.recipe, Path(module.__file__).name)
    return model


def check_recipe(recipe, file):
    """Raises SystemExit unless the losses that a model asks for are there."""
    if recipe.get("class_loss") not in ("softmax", "focal"):
        raise SystemExit(f'{file}: RECIPE\'s class_loss is {recipe.get("class_loss")!r}, '
                         'it must be "softmax" or "focal"')
    for name in ("w_class", "w_l1", "w_giou"):
        if not isinstance(recipe.get(name), (int, float)):
            raise SystemExit(f"{file}: RECIPE's {name} is {recipe.get(name)!r}, it must be a number")


def check_output(out, model, num_images, num_classes):
    """Raises SystemExit unless `out` is what the contract promises for so many images and classes."""
    def refuse(what):
        raise SystemExit(f"{type(model).__name__} breaks the contract: {what}")

    if not isinstance(out, dict) or not {"logits", "boxes"} <= set(out):
        refuse('forward must return a dict with "logits" and "boxes"')
    logits, boxes, softmax = out["logits"], out["boxes"], is_softmax(model)
    if not (isinstance(logits, torch.Tensor) and isinstance(boxes, torch.Tensor)):
        refuse(f"logits are {type(logits).__name__} and boxes {type(boxes).__name__}, both must be tensors")
    if logits.ndim != 4 or boxes.shape != (*logits.shape[:3], 4) or logits.shape[1] != num_images:
        refuse(f"logits {list(logits.shape)} and boxes {list(boxes.shape)} must be [S, B, Q, C] and "
               f"[S, B, Q, 4] with B = {num_images}")
    if 0 in logits.shape:
        refuse(f"logits {list(logits.shape)} are empty")
    columns = num_classes + 1 if softmax else num_classes
    allowed = (columns, columns + 1) if model.recipe.get("extra_logit") else (columns,)
    if logits.shape[3] not in allowed:
        kind = model.recipe["class_loss"]
        refuse(f'{logits.shape[3]} logits for {num_classes} classes; class_loss "{kind}" needs {columns}'
               + (" (the last one is no-object)" if softmax else ""))
    if not (logits.is_floating_point() and boxes.is_floating_point()):
        refuse(f"logits are {logits.dtype} and boxes {boxes.dtype}, both must be floating point")
    if not model.recipe.get("free_boxes") and (boxes.min() < -1e-4 or boxes.max() > 1 + 1e-4):
        refuse(f"boxes reach from {boxes.min():.3g} to {boxes.max():.3g}, they must be (cx, cy, w, h) "
               "in [0, 1] of the image")
