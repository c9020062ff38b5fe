"""Checkpoints, which are written whole or not at all and read with checksums; weights for other runs."""
import argparse
import os
import zipfile
from pathlib import Path

import torch

from support import UserError, one_line, shorten

FORMAT = 1  # changes with the content of checkpoints


# ---- Write and read ----------------------------------------------------------------------------------------
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
        raise UserError(f"{path}: cannot be written, is the disk full? ({shorten(one_line(error), 100)}) "
                        "The previous checkpoint is still there. Make room, then continue with --resume")


def read_file(path):
    """What torch.save wrote: tensors, plain values, the Namespace of official checkpoints; no code is run."""
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
    path = Path(path)
    path = path / "last.pt" if path.is_dir() else path
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or checkpoint.get("format") != FORMAT:
        raise UserError(f"{path}: not a checkpoint of this version of train.py. To start a new run from "
                        "official weights, give --init")
    return {**checkpoint, "path": str(path)}


def read_init(path):
    """The file behind --init, ours or official; of a run's folder best.pt. Raises UserError."""
    path = Path(path)
    path = path / "best.pt" if path.is_dir() else path
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model", {}), dict):
        raise UserError(f"{path}: not a checkpoint, because it has no weights by name")
    return load_checkpoint(path) if "model_options" in checkpoint else checkpoint


# ---- Resume ------------------------------------------------------------------------------------------------
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
    parts, expected = ([(group["part"], group["params"]) for group in groups]
                       for groups in (saved["param_groups"], fresh["param_groups"]))
    if parts != expected:
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
    """Copies all tensors that fit into the model and prints the others; of queries as many as both have.

    It copies a class head only if the checkpoint names the same classes. Raises UserError.
    """
    given, left = dict(in_our_names(module, checkpoint)), {}
    queries = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, torch.nn.Embedding)}
    state, copied = model.state_dict(), 0
    for name, tensor in state.items():
        source = given.pop(name, None)
        if source is None:
            left[name] = "not in the file, keeps its random values"
        elif name.startswith("class_head.") and checkpoint.get("class_names") != class_names:
            left[name] = "for other classes, keeps its random values"
        elif source.shape == tensor.shape:
            tensor.copy_(source)
            copied += 1
        elif name in queries and source.shape[1:] == tensor.shape[1:]:
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
