"""Checkpoints: written whole or not at all, read without trust, and weights that another run starts from."""
import argparse
import os
import shutil
import sys
import zipfile
from pathlib import Path

import torch

# What a checkpoint must hold to use its weights, and to go on with its run
NEEDED = dict(model=dict, args=dict, model_options=dict, class_names=list, category_ids=list)
NEEDED_TO_RESUME = dict(optimizer=dict, step=int, best=(int, float), seconds=(int, float), window=list)
# Parameters of old runs, by the beginning of their names
RENAMED = {"decoder.spatial_query.scale.": "decoder.query_scale.", "reference.head.": "reference."}


# ---- Write and read ----------------------------------------------------------------------------------------
def save(path, content, keep=None):
    """Atomic: a crash at any moment leaves a whole file, old or new. `keep` names a copy of the old one."""
    try:
        with open(f"{path}.tmp", "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # what torch makes of a full disk
                raise OSError(f"{path}: cannot be written, is the disk full") from error
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            shutil.copyfile(path, f"{keep}.tmp")
            os.replace(f"{keep}.tmp", keep)
        os.replace(f"{path}.tmp", path)
    except BaseException:
        for name in filter(None, (path, keep)):
            Path(f"{name}.tmp").unlink(missing_ok=True)  # a full disk needs the room
        raise


def read_file(path):
    """What torch.save wrote: tensors, plain values, the Namespace of official checkpoints; no code is run.

    torch.load does not look at the checksums in the file: a flipped bit would pass. Raises SystemExit.
    """
    if not path.is_file():
        raise SystemExit(f"{path}: no such checkpoint.")
    try:
        if zipfile.is_zipfile(path):  # older files, such as some official ones, are none
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"wrong checksum of {damaged}")
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(f"{path}: not a readable checkpoint ({type(error).__name__}); "
                         "cut off, damaged, or not ours?")


def load_checkpoint(path):
    """A checkpoint of train.py: a file, or the last of a run's folder, or if that is damaged the one before.

    The returned dict also has "path", the file it came from. Raises SystemExit.
    """
    path = Path(path)
    if path.is_dir():
        last, previous = path / "last.pt", path / "previous.pt"
        try:
            return load_checkpoint(last)
        except SystemExit as error:
            if not previous.exists():
                raise
            print(f"{error} Taking {previous}, the one before it.", file=sys.stderr)
            return load_checkpoint(previous)
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict):
        raise SystemExit(f"{path}: holds a {type(checkpoint).__name__}, not a checkpoint.")
    wrong = wrong_entries(checkpoint, NEEDED)
    if not wrong and not isinstance(checkpoint["args"].get("model"), str):
        wrong = ["args['model']"]
    if not wrong:
        needed_args = ("preset", "size", "data")
        wrong = [f"args[{name!r}]" for name in needed_args if name not in checkpoint["args"]]
    if wrong:
        raise SystemExit(f"{path}: not a checkpoint of train.py (look at its {', '.join(wrong)}). "
                         "To start a new run from official weights use --init.")
    return {**checkpoint, "model": with_new_names(checkpoint["model"]), "path": str(path)}


def wrong_entries(checkpoint, kinds):
    """Names of entries that are missing or of another kind than train.py writes."""
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    contents = {name: checkpoint[name] for name in kinds if name not in wrong}
    for name in ("model", "args", "model_options", "class_names"):  # names, or entries that have names
        if not all(isinstance(key, str) for key in contents.get(name, ())):
            wrong.append(name)
    if contents.get("step", 0) < 0:
        wrong.append("step")
    for losses in contents.get("window", ()):
        values = losses.values() if isinstance(losses, dict) else [None]
        if not all(isinstance(value, (int, float)) for value in values):
            return [*wrong, "window"]
    return wrong


def with_new_names(state):
    """Weights of an old run under today's names of the parameters."""
    renamed = {}
    for name, value in state.items():
        old = next((old for old in RENAMED if name.startswith(old)), "")
        renamed[RENAMED.get(old, "") + name[len(old):]] = value
    return renamed


def read_init(path):
    """The file behind --init, ours or official; of a run's folder best.pt. Raises SystemExit."""
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    checkpoint = read_file(path)
    if isinstance(checkpoint, dict) and "model_options" in checkpoint:
        return load_checkpoint(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", {}), dict):
        raise SystemExit(f"{path}: holds no weights by name, so it is no checkpoint.")
    return checkpoint


def check_data(checkpoint, datasets):
    """Raises SystemExit unless the data are those of the checkpoint, wherever they lie now."""
    for dataset in datasets.values():
        if checkpoint["class_names"] != dataset.class_names:
            known, given = (", ".join(names) for names in (checkpoint["class_names"], dataset.class_names))
            raise SystemExit(f"the checkpoint knows the classes {known}, but the data has {given}")
        if dataset.held_out and checkpoint.get("held_out") not in (None, dataset.held_out):
            raise SystemExit("--split would hold out other images than when the run began: were some added, "
                             "removed or renamed? To evaluate on others give --val-json and --val-images")
    count = checkpoint.get("num_images")  # runs from before do not say
    if "train" in datasets and count not in (None, len(datasets["train"])):
        raise SystemExit(f"the run was trained on {count} images, but there are {len(datasets['train'])} "
                         "here; to go on with other images start a new run with --init")


def load_weights(model, checkpoint):
    """The weights of a checkpoint of ours into its model. Raises SystemExit if they are those of another."""
    try:
        model.load_state_dict(checkpoint["model"])
    except (RuntimeError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"{checkpoint['path']}: its weights are not those of this model; "
                         f"has the file changed since the run began? {reason}")


def load_optimizer(optimizer, model, checkpoint):
    """The optimiser's memory from a checkpoint; rates and all other settings stay. Raises SystemExit."""
    fresh = optimizer.state_dict()
    try:
        saved = checkpoint["optimizer"]
        if not all("part" in group for group in saved["param_groups"]):
            saved = regroup(saved, optimizer, model, checkpoint["args"])
        parts, expected = ([(group["part"], group["params"]) for group in groups]
                           for groups in (saved["param_groups"], fresh["param_groups"]))
        if parts != expected:
            raise ValueError("other groups of parameters")
        optimizer.load_state_dict({**fresh, "state": saved["state"]})
        for parameter, memory in optimizer.state.items():
            if not parameter.shape == memory["exp_avg"].shape == memory["exp_avg_sq"].shape:
                raise ValueError("other shapes")
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise SystemExit(f"{checkpoint['path']}: its optimiser does not fit this model ({error}); "
                         "to start a new run from its weights use --init.")


def regroup(saved, optimizer, model, old_args):
    """The optimiser's state of a run from before groups had names, when all of one rate were one group.

    State is kept by the number of the parameter, counted through the groups; here they are numbered anew.
    """
    lr, lr_backbone = old_args["lr"], old_args["lr_backbone"]
    rate_of = {"rest": lr, "backbone": lr_backbone, "slow": lr * 0.1}
    part_of = {id(p): group["part"] for group in optimizer.param_groups for p in group["params"]}
    trained = [p for p in model.parameters() if id(p) in part_of]
    rates = list(dict.fromkeys((lr, lr_backbone, lr * 0.1)))
    # sorted() is stable: within a group parameters keep the model's order
    old_order = sorted(trained, key=lambda p: rates.index(rate_of[part_of[id(p)]]))
    new_order = [id(p) for group in optimizer.param_groups for p in group["params"]]
    number = {p: i for i, p in enumerate(new_order)}
    state = {number[id(p)]: saved["state"][i] for i, p in enumerate(old_order) if i in saved["state"]}
    return {**optimizer.state_dict(), "state": state}


# ---- Weights of another run --------------------------------------------------------------------------------
def in_our_names(module, checkpoint):
    """The tensors of a checkpoint, ours or official, under our names and of any shape: {name: tensor}."""
    if "model_options" in checkpoint:
        state = with_new_names(checkpoint["model"])
    elif hasattr(module, "rename_official"):
        state = module.rename_official(checkpoint.get("model", checkpoint))
    else:
        raise SystemExit(f"--init: {module.__name__} has no rename_official(), which official weights need")
    return {name: tensor for name, tensor in state.items()
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided}


def initialise(model, module, checkpoint, class_names):
    """Copy all that fits into the model and say what does not. As many queries are copied as both have.

    A class head is copied only if it is known to be for the same classes. Those who fine-tune DETR on their
    own data do the same: they delete the class head and keep everything else. Raises SystemExit.
    """
    given, left = in_our_names(module, checkpoint), []
    queries = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    state, copied = model.state_dict(), 0
    for name, tensor in state.items():
        source = given.pop(name, None)
        if source is None:
            if not name.endswith("num_batches_tracked"):  # frozen BatchNorm has none
                left.append(f"{name}: not in the file, keeps its random start")
        elif name.startswith("class_head.") and checkpoint.get("class_names") != class_names:
            left.append(f"{name}: for other classes, made anew")
        elif source.shape == tensor.shape:
            tensor.copy_(source)
            copied += 1
        elif name in queries and source.shape[1:] == tensor.shape[1:]:
            n = min(len(source), len(tensor))
            tensor[:n] = source[:n]
            copied += 1
            left.append(f"{name}: the first {n} of the file's {len(source)} queries, for {len(tensor)} here")
        else:
            left.append(f"{name}: {list(source.shape)} in the file, {list(tensor.shape)} here; "
                        "keeps its random start")
    given = [name for name in given if not name.endswith("num_batches_tracked")]
    left += [f"{name}: only in the file, not used" for name in given]
    print(f"init     {copied} of {len(state)} tensors copied" + (", except:" if left else ""))
    for line in left[:12] + [f"and {len(left) - 12} more"] * (len(left) > 12):
        print(f"         {line}")
    if copied < len(state) / 2:
        raise SystemExit("--init: most of it does not fit. Is it the same --model, --preset and --option?")
