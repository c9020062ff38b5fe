"""A trained model in Python: what it finds on photos, and where it looks, both without pictures.

    from support.predict import load, look
    detector = load("runs/deformable_detr-shapes")            # a run's folder, or a checkpoint
    for name, score, box in detector.predict("photo.jpg"):    # box: x1, y1, x2, y2 in pixels of the photo
        print(name, score, box)
    detector = load("detr-r50-e632da11.pth", model="detr")    # weights of the official repository
    out, seen = look(detector.model, images, mask)            # seen["decoder.layers.5.cross_attn"]["weights"]

Legend as in the model files: B images, Q queries, M heads, L levels, K points, T tokens, S stages.
"""
import contextlib
import inspect
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image

from support import UserError, checkpoints, data, machine, one_line
from support.evaluation import postprocess


def load(source, model=None, device="cpu", **options):
    """A Detector from a run's folder (its last.pt), from a checkpoint, or from official weights.

    model: a name or a .py file, which official weights need. options: of the model, e.g. two_stage=True.
    """
    device, checkpoint = machine.choose_device(device), checkpoints.read_init(source, in_folder="last.pt")
    if "model_options" in checkpoint:  # of a run
        module, fill = checkpoints.load_model_of(checkpoint, model), checkpoints.load_weights
        names, trained = checkpoint["class_names"], checkpoint["args"]
        options = {**checkpoint["model_options"], **options}
        title = f"{Path(trained['model']).stem}, {checkpoint['step']:,} steps"
        if checkpoint["metrics"]:  # a run that was stopped early has none
            title += f", AP {checkpoint['metrics']['AP']:.3f}"
    elif model is None:
        raise UserError(f'{source}: official weights need the name of a model, such as model="detr"')
    else:
        module, trained = checkpoints.load_model_file(model), {"preset": "paper", "size": 800}
        if not hasattr(module, "load_official"):
            raise UserError(f"{model} has no load_official() that could read official weights")
        names, fill = official_names(checkpoint, module.RECIPE), module.load_official
        title = f"{Path(model).stem}, {Path(source).name}"
    net = checkpoints.build_model(module, len(names), checkpoints.without_download(module, options)).eval()
    try:
        fill(net, checkpoint)
    except RuntimeError as error:
        raise UserError(f"{source}: of another model, or needs an --option: {one_line(error)}") from None
    return Detector(net.to(device), names, trained, device, title)


def official_names(checkpoint, recipe):
    """Class names for an official checkpoint: torchvision's for COCO's 91 category ids. Raises UserError."""
    state = checkpoint.get("model", checkpoint)
    rows = [len(state[name]) for name in ("class_embed.weight", "class_embed.0.weight") if name in state]
    if not rows:
        raise UserError("not official weights: there is no class_embed.weight in the file")
    # A row for each class, and with softmax (and in SMCA) one more for "no object"
    count = rows[0] - (recipe["class_loss"] == "softmax" or recipe.get("extra_logit", False))
    coco = torchvision.models.get_weight("FasterRCNN_ResNet50_FPN_Weights.COCO_V1").meta["categories"]
    return coco if count == len(coco) else [f"class {i}" for i in range(count)]


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
    title: str = ""  # of pictures: model, steps and AP

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
        if not 0 <= threshold < 1:
            raise UserError(f"threshold {threshold}: it must be a number, at least 0 and less than 1")
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
            found.update(zip(indices, answers(self.model, out, files, size, self.class_names, threshold)))
        several = several or isinstance(what, (str, Path)) and Path(what).is_dir()
        return [found[i] for i in range(len(dataset))] if several else found[0]


def answers(model, out, files, size, class_names, threshold):
    """[Found] of a batch of images, which all have this size, scored over the threshold. Raises UserError."""
    logits, boxes, kept = out["logits"][-1], out["boxes"][-1], []
    softmax, sizes = model.recipe["class_loss"] == "softmax", [size] * len(files)
    most = max(100, boxes.shape[1])  # an image may have as many objects as there are queries
    scored = postprocess(logits, boxes, sizes, softmax, len(class_names), most)
    for b, (file, one) in enumerate(zip(files, scored)):
        if not (logits[b].isfinite().all() and boxes[b].isfinite().all()):
            raise UserError(f"{file}: the model predicts numbers that are not finite; it has diverged")
        order = one["scores"].argsort(descending=True, stable=True)
        order = order[one["scores"][order] > threshold]
        one = {key: values[order].cpu() for key, values in one.items()}
        kept.append(Found(file, size, **one, names=[class_names[label] for label in one["labels"]]))
    return kept


def best_class(model, logits, num_classes):
    """Logits [..., C or more] of a model -> the score of the best class and its label, both [...]."""
    softmax = model.recipe["class_loss"] == "softmax"
    probabilities = logits.softmax(-1) if softmax else logits.sigmoid()
    return probabilities[..., :num_classes].max(-1)  # without "no object"


def to_photo(what, place):
    """Paths and PIL images as they are; an array or a tensor becomes a PIL image. Raises UserError."""
    if isinstance(what, (str, Path, Image.Image)):
        return what
    if not isinstance(what, (np.ndarray, torch.Tensor)):  # OpenCV gives None for a file that it cannot read
        raise UserError(f"{place}: a {type(what).__name__} is not a path, PIL image, numpy array or tensor")
    array = what.detach().cpu().numpy() if isinstance(what, torch.Tensor) else what
    if isinstance(what, torch.Tensor) and what.ndim == 3:
        array = np.moveaxis(array, 0, -1)
    array = array[:, :, 0] if array.shape[2:] == (1,) else array  # grey
    if array.dtype.kind == "f" and 0 <= array.min() and array.max() <= 1:  # not for nan
        array = (array * 255).round().astype(np.uint8)
    if array.dtype != np.uint8 or array.ndim != 2 and array.shape[2:] not in ((3,), (4,)):
        raise UserError(f"{place}: {list(what.shape)}, {what.dtype}; give an array [H, W, 3] or a tensor "
                        "[3, H, W], uint8 or floats from 0 to 1, before any normalisation")
    return Image.fromarray(np.ascontiguousarray(array))


# ---- Where it looks ----------------------------------------------------------------------------------------
@torch.no_grad()
def look(model, *inputs):
    """Runs the model and keeps where its parts look: (out, seen), `out` is model(*inputs).

    images [B, 3, H, W], mask [B, H, W] bool, True on padding. seen: {name of the module: {name of the array:
    tensor on the CPU}}, in the order in which modules ran; the last run of a module counts. See read() for
    the classes of modules and their arrays. In an encoder Q is T.
    """
    seen = {}

    def keep(module, inputs, kwargs, output):
        given = inspect.signature(module.forward).bind(*inputs, **kwargs).arguments
        with contextlib.suppress(KeyError, AttributeError, TypeError):  # another class with this name
            if arrays := read(names[module], module, given, output):
                seen[names[module]] = {key: value.detach().cpu() for key, value in arrays.items()}

    names = {module: name for name, module in model.named_modules()}
    with contextlib.ExitStack() as hooks:
        for module in names:
            hooks.enter_context(module.register_forward_hook(keep, with_kwargs=True))
        return model(*inputs), seen


def read(name, module, given, output):
    """{name: array} of one module after its forward; given: the arguments by their names.

    Points (x, y) and boxes are in [0, 1] of the image, or of the padded image where a comment has "padded".
    """
    kind = type(module).__name__
    if name.endswith("reference_head"):
        return {"reference": output.sigmoid()}  # [B, Q, 2]
    if kind in ("Attention", "SharedKeyAttention"):
        return read_attention(module.nheads, **given)
    if kind == "MSDeformAttn":
        query, reference, shapes = (given[key] for key in ("query", "reference", "spatial_shapes"))
        locations, weights = module.locations_and_weights(query, reference, shapes)
        return {"locations": locations,  # [B, Q, M, L, K, 2], padded, like reference: [B, Q, L, 2 or 4]
                "weights": weights, "reference": reference,  # weights [B, Q, M, L, K] sum to 1 over L and K
                "shapes": torch.tensor([tuple(shape) for shape in shapes])}  # [L, 2] as (h, w)
    if kind == "SemanticsAligner":  # SAM-DETR
        return {"points": output[2], "reference": given["reference"]}  # [B, Q, M, 2] and [B, Q, 4]
    if kind == "Sampler":  # AdaMixer; padded, and the third number is log2 of the stride
        (h, w), stride = given["maps"][0].shape[-2:], given["strides"][0]
        samples = module.samples(given["tgt"], given["xyzr"])
        return {"samples": samples / samples.new_tensor([w * stride, h * stride, 1])}  # [B, Q, M, K, 3]
    if kind == "BoxPositions":  # DAB-DETR: the box of each query in this layer
        return {"reference": given["box"]}  # [B, Q, 4]
    if kind == "Denoising":  # DN-DETR and DINO, in training: the boxes of objects with noise
        return {"noisy": output[1][:, :output[3]["target"].shape[1]]}  # [B, N, 4]
    return {}


def read_attention(nheads, q, k, v, mask=None, bias=None, **_):
    """{name: [B, M, Q, T]}: weights, whose rows sum to 1 and are 0 on padding, and what they consist of.

    These are content and spatial, by one half of q and k each, if every head has [content | position]; or, if
    a bias is added, prior = exp(bias) and content without it.
    """
    # [B, T, E] -> [B, T, M, E/M] -> [B, M, T, E/M]; a key that all heads share, E/M wide, -> [B, 1, T, E/M]
    width = q.shape[-1] // nheads
    q, k = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5  # for halves as well, so that content * spatial is proportional to weights

    def softmax(q, k, bias=0):
        scores = q @ k.mT * scale + bias  # [B, M, Q, T]
        scores = scores if mask is None else scores.masked_fill(mask[:, None, None], -math.inf)
        return scores.softmax(-1)

    found = {"weights": softmax(q, k, 0 if bias is None else bias)}
    if q.shape[-1] * nheads == 2 * v.shape[-1]:
        (c_q, p_q), (c_k, p_k) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # [B, M, ., D/M]
        found.update(content=softmax(c_q, c_k), spatial=softmax(p_q, p_k))
    elif bias is not None and q.shape[2] != k.shape[2]:  # in self-attention a bias is no map of the image
        found.update(content=softmax(q, k), prior=bias.exp().expand_as(found["weights"]))
    return found
