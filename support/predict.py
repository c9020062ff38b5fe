"""A trained model as a detector for photos: from Python, and behind visualize.py.

    from support.predict import load
    detector = load("runs/deformable_detr-shapes")            # a run's folder, or a checkpoint
    for name, score, box in detector.predict("photo.jpg"):    # box: x1, y1, x2, y2 in pixels of the photo
        print(name, score, box)
    detector = load("detr-r50-e632da11.pth", model="detr")    # weights of the official repository

Everything that is wrong with what it is given ends in a UserError of one line.
"""
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from support import UserError, data, machine
from support.checkpoints import load_checkpoint, load_weights, read_init
from support.evaluation import is_softmax, postprocess
from support.model_files import build_model, load_model_file, load_model_of, without_download

PATHS = ("train_json", "train_images", "val_json", "val_images")


def load(source, model=None, device="cpu", **options):
    """A Detector from a run's folder (its last checkpoint), from a checkpoint, or from official weights.

    model: a name or a .py file; official weights need it, a run knows its own. options: of the model, as in
    train.py, e.g. two_stage=True for such official weights. Raises UserError.
    """
    try:
        checkpoint = load_checkpoint(source) if Path(source).is_dir() else read_init(source)
        if "model_options" in checkpoint:
            detector = of_run(checkpoint, model, options)
        elif model is None:
            raise SystemExit(f'{source}: official weights; of which model? Say so: model="detr"')
        else:
            detector = of_official(checkpoint, source, model, options)
    except SystemExit as error:
        raise UserError(error) from None
    except OSError as error:
        raise UserError(f"{source}: {error.strerror}") from None
    return detector.to(device)


# ---- Photos in, boxes out ----------------------------------------------------------------------------------
@dataclass
class Found:
    """What a model finds on one photo, best first; iterating gives (name, score, box as a list)."""
    file: str
    size: tuple  # (height, width) of the photo as viewers show it
    boxes: torch.Tensor  # [n, 4] xyxy in its pixels
    scores: torch.Tensor  # [n]
    labels: torch.Tensor  # [n]
    names: list  # [n]

    def __len__(self):
        return len(self.names)

    def __iter__(self):
        return iter(zip(self.names, self.scores.tolist(), self.boxes.tolist()))


@dataclass
class Detector:
    """A model in evaluation mode, and how its photos are prepared."""
    model: torch.nn.Module
    class_names: list  # by label
    trained: dict  # settings of its training, as train.py keeps them: here preset and size count
    device: str = "cpu"

    def to(self, device):
        """Moves it to a device: "auto", or any that torch knows. Raises UserError."""
        self.device = machine.choose_device(str(device))
        self.model = self.model.to(self.device)
        return self

    def dataset(self, photos):
        """Photos, as data.from_images takes them, prepared as for evaluation."""
        return data.from_images(photos, self.trained["preset"], trained_size(self.trained))

    @torch.no_grad()
    def predict(self, what, threshold=0.3, batch_size=8):
        """Found on one photo, or a list of Found on several, scored over the threshold. Raises UserError.

        what: a path; a PIL image; a numpy array [H, W, 3], RGB (of OpenCV's BGR: array[:, :, ::-1]); a tensor
        [3, H, W]; both uint8, or floats from 0 to 1. Several: a folder, a list, an array or a tensor with one
        dimension more. Those of one size share a batch, so that there is no padding, which changes numbers.
        """
        if not 0 <= threshold < 1:
            raise UserError(f"threshold {threshold}: it must be at least 0 and less than 1")
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: it must be at least 1")
        several = isinstance(what, (list, tuple)) or getattr(what, "ndim", 3) == 4
        photos = [to_photo(one, f"image {i}") for i, one in enumerate(what if several else [what])]
        dataset, by_size, found = self.dataset(photos), {}, {}
        for index, image in enumerate(dataset.images):
            by_size.setdefault((image.height, image.width), []).append(index)
        for size, indices in by_size.items():
            for start in range(0, len(indices), batch_size):
                chosen = indices[start:start + batch_size]
                found.update(zip(chosen, self.predict_batch(dataset, chosen, size, threshold)))
        is_folder = isinstance(what, (str, Path)) and Path(what).is_dir()
        return [found[i] for i in range(len(dataset))] if several or is_folder else found[0]

    def predict_batch(self, dataset, indices, size, threshold):
        """Found on each of these images, which are all of this (height, width)."""
        images, mask, _ = data.collate([dataset[index] for index in indices])
        files = [dataset.path_of(index) for index in indices]
        out, batch = self.model(images.to(self.device), mask.to(self.device)), []
        all_found = answers(self.model, out, files, [size] * len(files), len(self.class_names))
        for file, one in zip(files, all_found):
            one = {key: values.cpu() for key, values in keep(one, threshold).items()}
            names = [self.class_names[label] for label in one["labels"]]
            batch.append(Found(file, size, **one, names=names))
        return batch


def answers(model, out, files, sizes, num_classes):
    """Scored boxes of each image in a batch, as postprocess returns them. Raises UserError for nan."""
    for b, file in enumerate(files):
        if not all(out[key][:, b].isfinite().all() for key in ("logits", "boxes")):
            raise UserError(f"{file}: what the model predicts is not finite; it has diverged")
    return postprocess(out["logits"][-1], out["boxes"][-1], sizes, is_softmax(model), num_classes)


def keep(found, threshold):
    """Of one image's scored boxes those over the threshold, the best first."""
    order = found["scores"].argsort(descending=True, stable=True)
    order = order[found["scores"][order] > threshold]
    return {key: values[order] for key, values in found.items()}


def to_photo(what, place):
    """Paths and PIL images as they are; an array or a tensor becomes a PIL image. Raises UserError."""
    if isinstance(what, (str, Path, Image.Image)):
        return what
    if not isinstance(what, (np.ndarray, torch.Tensor)):
        raise UserError(f"{place}: a {type(what).__name__} is no path, PIL image, numpy array or tensor")
    shape, dtype, is_tensor = list(what.shape), what.dtype, isinstance(what, torch.Tensor)
    if is_tensor:
        what = what.detach().cpu()
        what = (what.float() if what.is_floating_point() else what).numpy()
        what = what.transpose(1, 2, 0) if what.ndim == 3 else what
    if what.ndim == 2:  # grey
        what = what[:, :, None]
    if what.ndim != 3 or what.shape[2] not in (1, 3, 4) or not what.size:
        raise UserError(f"{place}: shape {shape}; " + ("a tensor is [3, H, W]" if is_tensor else
                                                       "a numpy array is [H, W, 3]"))
    if what.dtype.kind == "f":
        if not (what.min() >= 0 and what.max() <= 1):  # also catches nan
            raise UserError(f"{place}: floats from {what.min():.3g} to {what.max():.3g}; give uint8, or "
                            "floats from 0 to 1, before any normalisation")
        what = (what * 255).round().astype(np.uint8)
    if what.dtype != np.uint8:
        raise UserError(f"{place}: {dtype}; give uint8 from 0 to 255, or floats from 0 to 1")
    return Image.fromarray(np.ascontiguousarray(what if what.shape[2] > 1 else what[:, :, 0]))


def trained_size(trained):
    """Pixels as make_transform takes them: --size of the training, or what data.load took in its place."""
    if trained["size"]:
        return trained["size"]
    return data.default_size(trained["preset"], data.is_shapes(trained["data"], trained["train_json"]))


# ---- Models. These raise SystemExit, as all that reads a command line --------------------------------------
def of_run(checkpoint, model=None, options=None):
    """A Detector of what load_checkpoint returns; `model` takes the place of its run's."""
    trained, names = checkpoint["args"], checkpoint["class_names"]
    check_args(checkpoint["path"], trained)
    module = load_model_of(checkpoint, model)
    known = without_download(module, {**checkpoint["model_options"], **(options or {})})
    network = build_model(module, len(names), known).eval()
    load_weights(network, checkpoint)
    return Detector(network, names, trained)


def of_official(checkpoint, source, model, options=None):
    """A Detector of what read_init returns for a file of the official repository."""
    module = load_model_file(model)
    if not hasattr(module, "load_official"):
        raise SystemExit(f"--init: {model} has no load_official() that could read official weights")
    names = official_names(checkpoint, module.RECIPE)
    network = build_model(module, len(names), {**(options or {}), "pretrained_backbone": False}).eval()
    try:
        module.load_official(network, checkpoint)
    except (RuntimeError, AttributeError, TypeError) as error:  # the latter two: entries that are no tensors
        reason = " ".join(str(error).split())[:300]
        raise SystemExit(f"{source}: of another model, or needs an --option: {reason}")
    return Detector(network, names, {"preset": "paper", "size": 800})


def check_args(source, args):
    """SystemExit unless those args of a training that are used here are what train.py writes."""
    path, size = (str, type(None)), args["size"]
    kinds = {"model": str, "preset": str, "size": (int, type(None)), **dict.fromkeys(("data", *PATHS), path),
             "split": (float, type(None)), "seed": (int, type(None))}
    wrong = [name for name, kind in kinds.items() if not isinstance(args.get(name), kind)]
    if not wrong and size is not None and size < 32:
        wrong = ["size"]
    if wrong:
        found = ", ".join(f"args[{name!r}]" for name in wrong)
        raise SystemExit(f"{source}: not a checkpoint of train.py (look at its {found})")


def official_names(checkpoint, recipe):
    """Class names for an official checkpoint, whose class head tells how many there are. Raises SystemExit.

    It has a row for each, and with softmax (and in SMCA) one more for "no object". 91 are COCO's category
    ids, as in all published weights; torchvision knows their names.
    """
    state = checkpoint.get("model", checkpoint)
    heads = ("class_embed.weight", "class_embed.0.weight") if isinstance(state, dict) else ()
    rows = [len(state[name]) for name in heads if getattr(state.get(name), "ndim", 0)]
    if not rows:
        raise SystemExit("--init: not official weights (no class_embed.weight); for our own use --weights")
    count = rows[0] - (recipe["class_loss"] == "softmax" or recipe.get("extra_logit", False))
    coco = torchvision.models.get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    return coco if count == len(coco) else [f"class {i}" for i in range(count)]
