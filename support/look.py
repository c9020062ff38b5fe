"""Where a model looks, as arrays; and a Scene, which is one image with all predictions of the model.

    out, seen = look(model.eval(), images, mask)
    seen["decoder.layers.5.cross_attn"]["weights"]  # [B, M, Q, T]

Legend as in the model files: B images, Q queries, M heads, L levels, K points, T tokens, S stages.
"""
import contextlib
import inspect
import math
from dataclasses import dataclass

import torch
from torchvision.ops import box_convert, box_iou, nms

from support import data
from support.evaluation import boxes_to_pixels
from support.pictures import photo_and_truth, true_objects
from support.predict import answers, is_softmax


# ---- Arrays ------------------------------------------------------------------------------------------------
def read_attention(nheads, q, k, v, mask=None, bias=None, **_):
    # [B, T, E] -> [B, T, M, E/M] -> [B, M, T, E/M]; a key that all heads share, E/M wide, -> [B, 1, T, E/M]
    width = q.shape[-1] // nheads
    q, k = (x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k))
    scale = q.shape[-1] ** -0.5  # for halves as well, so that content * spatial is proportional to weights

    def softmax(q, k, bias=None):
        scores = q @ k.mT * scale + (0 if bias is None else bias)  # [B, M, Q, T]
        scores = scores if mask is None else scores.masked_fill(mask[:, None, None], -math.inf)
        return scores.softmax(-1)

    found = {"weights": softmax(q, k, bias)}
    if q.shape[-1] * nheads == 2 * v.shape[-1]:  # [content | position] inside every head
        (c_q, p_q), (c_k, p_k) = q.chunk(2, dim=-1), k.chunk(2, dim=-1)  # [B, M, ., D/M]
        found.update(content=softmax(c_q, c_k), spatial=softmax(p_q, p_k))
    elif bias is not None and q.shape[2] != k.shape[2]:  # in self-attention a bias is no map of the image
        found.update(content=softmax(q, k), prior=bias.exp().expand_as(found["weights"]))
    return found


def read(name, module, given, output):
    """{name: tensor} of one module after its forward, see look(); given: the arguments by their names."""
    kind = type(module).__name__
    if name.endswith("reference_head"):
        return {"reference": output.sigmoid()}
    if kind in ("Attention", "SharedKeyAttention"):
        return read_attention(module.nheads, **given)
    if kind == "MSDeformAttn":
        query, reference, shapes = (given[key] for key in ("query", "reference", "spatial_shapes"))
        locations, weights = module.locations_and_weights(query, reference, shapes)
        return {"locations": locations, "weights": weights, "reference": reference,
                "shapes": torch.tensor([tuple(shape) for shape in shapes])}
    if kind == "SemanticsAligner":  # SAM-DETR
        return {"points": output[2], "reference": given["reference"]}
    if kind == "Sampler":  # AdaMixer
        (h, w), stride = given["maps"][0].shape[-2:], given["strides"][0]
        samples = module.samples(given["tgt"], given["xyzr"])
        return {"samples": samples / samples.new_tensor([w * stride, h * stride, 1])}
    if kind == "BoxPositions":  # DAB-DETR
        return {"reference": given["box"]}
    if kind == "Denoising":  # DN-DETR and DINO, in training
        return {"noisy": output[1][:, :output[3]["target"].shape[1]]}
    return {}


@torch.no_grad()
def look(model, *inputs):
    """Runs the model and keeps where its parts look: (out, seen), `out` is model(*inputs).

    images [B, 3, H, W], mask [B, H, W] bool, True on padding. seen: {name of the module: {name of the array:
    tensor on the CPU}}, in the order in which modules ran; the last run of a module counts. By class:

    Attention         weights [B, M, Q, T], rows sum to 1, padding gets 0. Also content and spatial, by one
                      half of q and k, if these are [content | position] in every head; or prior = exp(bias)
                      and content without it, if a bias is added (not in self-attention)
    MSDeformAttn      locations [B, Q, M, L, K, 2] as (x, y) and reference [B, Q, L, 2 or 4], in [0, 1] of the
                      padded maps; weights [B, Q, M, L, K], summing to 1 over L and K; shapes [L, 2] as (h, w)
    SemanticsAligner  points [B, Q, M, 2] and reference [B, Q, 4] in [0, 1] of the image
    Sampler           samples [B, Q, M, K, 3]: (x, y) in [0, 1] of the padded image, log2 of the stride
    BoxPositions      reference [B, Q, 4] in [0, 1] of the image: the box of each query in this layer
    Denoising         noisy [B, N, 4] in [0, 1] of the image: the boxes of objects with noise, in training
    "reference_head"  reference [B, Q, 2] in [0, 1] of the image; it is this name that counts

    Other modules are left out, as are classes of these names with other arguments. In an encoder Q is T.
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


# ---- One image and all predictions of the model ------------------------------------------------------------
class CannotDraw(Exception):
    """The model lacks a part that the picture of its attention needs."""


@dataclass
class Scene:
    """A batch of one image, so without padding. All boxes are xyxy in pixels of the original."""
    photo: object  # uint8 [h, w, 3]
    size: tuple  # (height, width) of the original
    image: torch.Tensor  # [3, H, W], as the network gets it
    class_names: list  # the model's
    truth: list  # [(class name, box [4])]; empty if it is not known
    scores: torch.Tensor  # [S, Q], of the best class
    labels: torch.Tensor  # [S, Q]
    boxes: torch.Tensor  # [S, Q, 4]
    seen: dict  # what look() returns
    threshold: float  # queries with a higher score are detections

    def to_pixels(self, xy):
        """Points [..., 2] in [0, 1] of the image -> pixels of the original."""
        return xy * torch.tensor(self.size[::-1])

    def token_at(self, point, map_size):
        """Number of the cell, in a map of (h, w) cells, in which a point [2] in pixels lies."""
        (x, y), (h, w) = (point / torch.tensor(self.size[::-1])).clamp(0, 0.999).tolist(), map_size
        return int(y * h) * w + int(x * w)

    def map_size(self, tokens):
        """(h, w) of the feature map with so many tokens: the image at one of the usual strides."""
        for stride in (4, 8, 16, 32, 64):
            h, w = (math.ceil(side / stride) for side in self.image.shape[1:])
            if h * w == tokens:
                return h, w
        raise CannotDraw(f"{tokens} tokens are no feature map of {list(self.image.shape[1:])} pixels")

    def arrays_with(self, part, array):
        """Arrays of the modules with `part` in their names, of those that have `array`: [{name: tensor}]."""
        return [arrays for name, arrays in self.seen.items() if part in name and array in arrays]

    def last_with(self, part, array):
        if found := self.arrays_with(part, array):
            return found[-1]
        raise CannotDraw(f'look() found no {array} in an "{part}"')

    def detected_queries(self, count):
        """[(query, its last box [4], class and score in words)], at least one, best first, no duplicates."""
        queries = nms(self.boxes[-1], self.scores[-1], 0.5)
        detected = (self.scores[-1, queries] > self.threshold).sum().item()
        queries = queries[:max(1, min(count, detected))].tolist()
        return [(query, self.boxes[-1, query], self.in_words(-1, query)) for query in queries]

    def in_words(self, stage, query):
        return f"{self.class_names[self.labels[stage, query]]} {self.scores[stage, query]:.2f}"

    def objects(self):
        """The true objects as a target, labels [n] and boxes [n, 4]; the detected ones if unknown."""
        known = [(self.class_names.index(name), box) for name, box in self.truth if name in self.class_names]
        known = known or [(self.labels[-1, query], box) for query, box, _ in self.detected_queries(20)]
        labels, boxes = zip(*known)
        boxes = box_convert(torch.stack(boxes).float(), "xyxy", "cxcywh")
        return {"labels": torch.tensor(labels), "boxes": boxes / torch.tensor(self.size[::-1] * 2)}

    def fading_positives(self, query):
        """(true box [4] that the last stage finds with IoU 0.5 or more, or None; IoU [S]; better [S]).

        Better is a stage with the same class, a higher IoU and a higher score than the last (SQR, section 3).
        """
        label, score = self.labels[:, query], self.scores[:, query]
        for name, box in self.truth:
            iou = box_iou(self.boxes[:, query], box[None])[:, 0]  # [S]
            if name == self.class_names[label[-1]] and iou[-1] >= 0.5:
                return box, iou, (label == label[-1]) & (iou > iou[-1]) & (score > score[-1])
        return None, torch.zeros_like(score), torch.zeros_like(label, dtype=torch.bool)


def best_class(logits, softmax, num_classes):
    """Logits [..., C or more] -> the score of the best class and its label, both [...]."""
    probabilities = logits.softmax(-1) if softmax else logits.sigmoid()
    return probabilities[..., :num_classes].max(-1)  # without "no object"


def make_scene(dataset, index, class_names, model, threshold):
    """(Scene of one image of a data set, its boxes with a score over the threshold). Raises UserError."""
    images, mask, _ = data.collate([dataset[index]])
    out, seen = look(model, images, mask)
    photo, annotated = photo_and_truth(dataset, index)
    size = annotated.height, annotated.width
    found, = answers(model, out, [dataset.path_of(index)], size, len(class_names), threshold)
    scores, labels = best_class(out["logits"][:, 0], is_softmax(model), len(class_names))  # [S, Q]
    truth = [(dataset.class_names[label], box) for label, box in true_objects(annotated)]
    boxes = boxes_to_pixels(out["boxes"][:, 0], size)  # [S, Q, 4]
    return Scene(photo, size, images[0], class_names, truth, scores, labels, boxes, seen, threshold), found
