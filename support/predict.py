"""A trained model as a detector for photos, for Python and for visualize.py.

    from support.predict import load
    detector = load("runs/deformable_detr-shapes")            # a run's folder, or a checkpoint
    for name, score, box in detector.predict("photo.jpg"):    # box: x1, y1, x2, y2 in pixels of the photo
        print(name, score, box)
    detector = load("detr-r50-e632da11.pth", model="detr")    # weights of the official repository

Wrong arguments raise a UserError of one line.
"""
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from support import UserError, checkpoints, data, machine, reason
from support.evaluation import postprocess


def load(source, model=None, device="cpu", **options):
    """A Detector from a run's folder (its last.pt), from a checkpoint, or from official weights.

    model: a name or a .py file; official weights need it, a run has its own. options: of the model, as in
    train.py, e.g. two_stage=True for such official weights. Raises UserError.
    """
    if not all(isinstance(name, (str, Path)) for name in (source, model or "")):
        raise UserError(f"source {source!r} and model {model!r} must be paths or names")
    try:
        read = checkpoints.load_checkpoint if Path(source).is_dir() else checkpoints.read_init
        checkpoint = read(source)
        is_run = "model_options" in checkpoint
        if is_run:
            module, names = checkpoints.load_model_of(checkpoint, model), checkpoint["class_names"]
            trained, options = checkpoint["args"], {**checkpoint["model_options"], **options}
        elif model is None:
            raise UserError(f'{source}: official weights need the name of a model, such as model="detr"')
        else:
            module, trained = checkpoints.load_model_file(model), {"preset": "paper", "size": 800}
            if not hasattr(module, "load_official"):
                raise UserError(f"{model} has no load_official() that could read official weights")
            names = official_names(checkpoint, module.RECIPE)
        options = checkpoints.without_download(module, options)
        network = checkpoints.build_model(module, len(names), options).eval()
        (checkpoints.load_weights if is_run else module.load_official)(network, checkpoint)
    except OSError as error:
        raise UserError(f"{source}: {reason(error)}") from None
    except RuntimeError as error:
        raise UserError(f"{source}: of another model, or needs an --option: {reason(error)}") from None
    return Detector(network, names, trained).to(device)


# ---- Photos in, boxes out ----------------------------------------------------------------------------------
@dataclass
class Found:
    """The objects that a model finds on a photo, best first; iterating gives (name, score, box as a list)."""
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
        """Moves it to a device: "auto", or any of torch. Raises UserError."""
        self.device = machine.choose_device(str(device))
        self.model = self.model.to(self.device)
        return self

    def dataset(self, photos):
        """Photos, as data.from_images takes them, prepared as for evaluation."""
        return data.from_images(photos, self.trained["preset"], self.trained["size"])

    @torch.no_grad()
    def predict(self, what, threshold=0.3, batch_size=8):
        """Found on one photo, or a list of Found on several, scored over the threshold. Raises UserError.

        what: a path; a PIL image; a numpy array [H, W, 3], RGB (of OpenCV's BGR: array[:, :, ::-1]); a tensor
        [3, H, W]; both uint8, or floats from 0 to 1. Several: a folder, a list, an array or a tensor with one
        dimension more. Photos of one size share a batch, because padding would change predictions.
        """
        if not (isinstance(threshold, Real) and 0 <= threshold < 1):
            raise UserError(f"threshold {threshold!r}: it must be a number, at least 0 and less than 1")
        if not (isinstance(batch_size, Integral) and batch_size >= 1):
            raise UserError(f"batch_size {batch_size!r}: it must be a whole number, at least 1")
        several = isinstance(what, (list, tuple)) or getattr(what, "ndim", 3) == 4
        photos = [to_photo(one, f"image {i}") for i, one in enumerate(what if several else [what])]
        dataset, by_size, found = self.dataset(photos), {}, {}
        for index, image in enumerate(dataset.images):
            by_size.setdefault((image.height, image.width), []).append(index)
        batches = [(size, indices[start:start + batch_size]) for size, indices in by_size.items()
                   for start in range(0, len(indices), batch_size)]
        for size, indices in batches:
            images, mask, _ = data.collate([dataset[index] for index in indices])
            out = self.model(images.to(self.device), mask.to(self.device))
            files = [dataset.path_of(index) for index in indices]
            kept = answers(self.model, out, files, size, len(self.class_names), threshold)
            for index, file, one in zip(indices, files, kept):
                found[index] = Found(file, size, **one, names=[self.class_names[i] for i in one["labels"]])
        several = several or isinstance(what, (str, Path)) and Path(what).is_dir()
        return [found[i] for i in range(len(dataset))] if several else found[0]


def is_softmax(model):
    return model.recipe["class_loss"] == "softmax"


def answers(model, out, files, size, num_classes, threshold):
    """Of each image in a batch, all of one size, the boxes scored over the threshold, the best first."""
    for b, file in enumerate(files):
        if not all(out[key][:, b].isfinite().all() for key in ("logits", "boxes")):
            raise UserError(f"{file}: the model predicts numbers that are not finite; it has diverged")
    logits, boxes, kept = out["logits"][-1], out["boxes"][-1], []
    most = max(100, boxes.shape[1])  # an image may have as many objects as there are queries
    for one in postprocess(logits, boxes, [size] * len(files), is_softmax(model), num_classes, most):
        order = one["scores"].argsort(descending=True, stable=True)
        order = order[one["scores"][order] > threshold]
        kept.append({key: values[order].cpu() for key, values in one.items()})
    return kept


def to_photo(what, place):
    """Paths and PIL images as they are; an array or a tensor becomes a PIL image. Raises UserError."""
    if isinstance(what, (str, Path, Image.Image)):
        return what
    if not isinstance(what, (np.ndarray, torch.Tensor)):
        raise UserError(f"{place}: a {type(what).__name__} is not a path, PIL image, numpy array or tensor")
    array = what
    if isinstance(what, torch.Tensor):
        array = (what.detach().cpu().float() if what.is_floating_point() else what.cpu()).numpy()
        array = np.moveaxis(array, 0, -1) if array.ndim == 3 else array
    array = array[:, :, 0] if array.shape[2:] == (1,) else array  # grey
    if array.dtype.kind == "f" and array.size and 0 <= array.min() and array.max() <= 1:  # not for nan
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8 or not array.size or array.ndim != 2 and array.shape[2:] not in ((3,), (4,)):
        raise UserError(f"{place}: {list(what.shape)}, {what.dtype}; give an array [H, W, 3] or a tensor "
                        "[3, H, W], uint8 or floats from 0 to 1, before any normalisation")
    return Image.fromarray(np.ascontiguousarray(array))


def official_names(checkpoint, recipe):
    """Class names for an official checkpoint: torchvision's for COCO's 91 category ids. Raises UserError.

    The class head has a row for each class, and with softmax (and in SMCA) one more for "no object".
    """
    state = checkpoint.get("model", checkpoint)
    rows = [len(state[name]) for name in ("class_embed.weight", "class_embed.0.weight") if name in state]
    if not rows:
        raise UserError("not official weights: there is no class_embed.weight in the file")
    count = rows[0] - (recipe["class_loss"] == "softmax" or recipe.get("extra_logit", False))
    coco = torchvision.models.get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    return coco if count == len(coco) else [f"class {i}" for i in range(count)]
