"""Pictures of a run, which train.py draws at every evaluation, and a Scene: one image with all predictions.

Boxes are xyxy in pixels of the original photo. They are drawn on this photo, not on the small copy that the
network sees. Names of classes and files may be any text: a character that the font lacks becomes \\u732b.
"""
import functools
import json
import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torchvision.ops import box_convert, box_iou, nms

from support import UserError, data, shorten
from support.evaluation import boxes_to_pixels
from support.images import load_image
from support.predict import answers, best_class, look

if "inline" in os.environ.get("MPLBACKEND", "") and not find_spec("matplotlib_inline"):
    del os.environ["MPLBACKEND"]  # a notebook passed it on to a Python that lacks it: matplotlib would raise
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from matplotlib.patches import Rectangle

TRUE, PREDICTED, REFERENCE = "#00c853", "#ff1744", "#40c4ff"  # green, red, blue


@functools.cache
def drawable(text):
    """The text as matplotlib can draw it: without formulas, and with codes for characters it lacks."""
    glyphs = font_manager.get_font(font_manager.findfont(font_manager.FontProperties())).get_charmap()
    text = "".join(c if ord(c) in glyphs else ascii(c)[1:-1] for c in shorten(text, 60))
    return text.replace("$", r"\$")  # $x$ is mathematics, and {$ or $\oops$ is a traceback


def save(figure, path, title=""):
    """Writes the file. The title is put above that of the figure."""
    if title:
        figure.suptitle(f"{drawable(title)}\n{figure.get_suptitle()}", fontsize=11, wrap=True)
    figure.savefig(path, dpi=110, bbox_inches="tight")


# ---- Photos, boxes and labels ------------------------------------------------------------------------------
def photo_and_truth(dataset, index, longest=1200):
    """(uint8 [h, w, 3], of a large photo every n-th pixel; AnnotatedImage; [(class name, box [4] xyxy)])."""
    if hasattr(dataset, "draw"):  # the embedded shapes are in no file
        photo, annotated, _ = dataset.draw(index)
    else:
        annotated = dataset.images[index]
        photo = np.asarray(load_image(annotated))
    step = math.ceil(max(photo.shape[:2]) / longest)
    names = [dataset.class_names[label] for label in annotated.labels[~annotated.crowd]]
    objects = list(zip(names, torch.as_tensor(annotated.boxes_xyxy[~annotated.crowd])))
    return photo[::step, ::step], annotated, objects


def photo_panels(sizes, columns, width):
    """A figure of `width` inches and axes for photos of these sizes (height, width), in rows."""
    rows = [sizes[i:i + columns] for i in range(0, len(sizes), columns)] or [[(1, 4)]]
    shares = [min(2, max(h / w for h, w in row)) for row in rows]  # height of a row, in widths of a photo
    figure = Figure((width, sum(shares) * width / columns + 1), layout="compressed")
    panels = figure.subplots(len(rows), columns, squeeze=False, height_ratios=shares).ravel()
    for axes in panels:
        axes.axis("off")
    return figure, panels


def show(axes, photo, size, title="", grey=False):
    """A photo [h, w, 3], in axes that count the pixels of the original of this size (height, width)."""
    height, width = size
    axes.imshow(photo.mean(2) if grey else photo, cmap="gray", extent=(0, width, height, 0))
    axes.set_autoscale_on(False)  # a box that reaches over the edge is cut off there
    axes.set_title(title, fontsize=9)
    axes.axis("off")


def draw_box(axes, box_xyxy, colour, style="-", alpha=1.0, width=1.5):
    x1, y1, x2, y2 = box_xyxy.tolist()
    outline = dict(fill=False, edgecolor=colour, linestyle=style, linewidth=width, alpha=alpha)
    axes.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, **outline))


def draw_label(axes, box_xyxy, text, colour, size, below=False):
    """A text above or below a box, or at the same edge inside of it where the photo ends."""
    (x1, y1, x2, y2), (height, width) = box_xyxy.tolist(), size
    y, at_edge = (y2, y2 > 0.94 * height) if below else (y1, y1 < 0.06 * height)
    x, ha = (max(x1, 0), "left") if x1 < 0.7 * width else (min(x2, width), "right")
    va = "top" if below != at_edge else "bottom"
    axes.text(x, min(max(y, 0), height), drawable(text), ha=ha, va=va, fontsize=7, color="white",
              clip_on=True, bbox=dict(fc=colour, ec="none", alpha=0.8, pad=1))


# ---- A run -------------------------------------------------------------------------------------------------
def draw_predictions(dataset, predictions, path, count=8, threshold=0.3):
    """The first `count` images with objects. predictions: {image id: dict of evaluation.postprocess}."""
    some, names = data.first_with_boxes(dataset, count), dataset.class_names
    photos = [photo_and_truth(some, index) for index in range(len(some))]
    sizes = [(annotated.height, annotated.width) for _, annotated, _ in photos]
    figure, panels = photo_panels(sizes, columns=4, width=13)
    for axes, size, (photo, annotated, truth) in zip(panels, sizes, photos):
        show(axes, photo, size)
        for name, box in truth:
            draw_box(axes, box, TRUE, width=3)  # seen under a box that fits it
            draw_label(axes, box, name, TRUE, size)
        found = predictions[annotated.id]
        order = found["scores"].argsort()  # the best on top
        for k in order[found["scores"][order] > threshold].tolist():
            box, text = found["boxes"][k], f"{names[found['labels'][k]]} {found['scores'][k]:.2f}"
            draw_box(axes, box, PREDICTED)
            draw_label(axes, box, text, PREDICTED, size, below=True)
    figure.suptitle(f"Held-out images: truth green, predictions scored over {threshold} red", fontsize=10)
    save(figure, path)


def draw_curves(log, path):
    """Losses of the last stage and AP against steps, from a run's log.jsonl."""
    lines = [json.loads(line) for line in Path(log).read_text().splitlines()]
    losses, evals = [line for line in lines if "total" in line], [line for line in lines if "eval" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in losses[-1] if losses else ():  # also proposal_class and the like, dashed
        if colour := {"class": "C0", "l1": "C1", "giou": "C2"}.get(name.split("_")[-1]):
            points = [(line["step"], line[name]) for line in losses if name in line]
            left.plot(*zip(*points), "--" if "_" in name else "-", color=colour, label=name)
    left.set(title="Losses of the last stage, without weights", xlabel="step", ylabel="loss", yscale="log")
    for name in ("AP", "AP50", "AP75") if evals else ():
        right.plot(*zip(*[(line["step"], line["eval"][name]) for line in evals]), "o-", ms=3, label=name)
    right.set(title="Held-out images", xlabel="step", ylabel="average precision", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    save(figure, path)


# ---- One image and all predictions of the model ------------------------------------------------------------
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
        raise UserError(f"{tokens} tokens are no feature map of {list(self.image.shape[1:])} pixels")

    def last_with(self, part, array):
        """{name: tensor} of the last module with `part` in its name that has `array`. Raises UserError."""
        for name, arrays in reversed(self.seen.items()):
            if part in name and array in arrays:
                return arrays
        raise UserError(f'look() found no {array} in an "{part}"')

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
        """(true box [4] that the last stage finds with IoU 0.5 or more, or None; its IoU [S]; better [S])."""
        label, score = self.labels[:, query], self.scores[:, query]
        for name, box in self.truth:
            iou = box_iou(self.boxes[:, query], box[None])[:, 0]  # [S]
            if name == self.class_names[label[-1]] and iou[-1] >= 0.5:
                # Better than the last stage: the same class, a higher IoU, a higher score (SQR, section 3)
                return box, iou, (label == label[-1]) & (iou > iou[-1]) & (score > score[-1])
        return None, torch.zeros_like(score), torch.zeros_like(label, dtype=torch.bool)


def make_scene(dataset, index, class_names, model, threshold):
    """(Scene of one image of a data set, Found on it with scores over the threshold). Raises UserError."""
    images, mask, _ = data.collate([dataset[index]])
    out, seen = look(model, images, mask)
    photo, annotated, truth = photo_and_truth(dataset, index)
    size = annotated.height, annotated.width
    found, = answers(model, out, [dataset.path_of(index)], size, class_names, threshold)
    scores, labels = best_class(model, out["logits"][:, 0], len(class_names))  # [S, Q]
    boxes = boxes_to_pixels(out["boxes"][:, 0], size)  # [S, Q, 4]
    return Scene(photo, size, images[0], class_names, truth, scores, labels, boxes, seen, threshold), found


def draw_detections(scene, found):
    """Predictions of predict.answers(), a colour for each class; on the right the truth."""
    scores = [f"{score:.2f}" for score in found.scores]
    predicted = list(zip(found.names, found.boxes, scores))
    truth = [(name, box, "") for name, box in scene.truth]
    names = sorted({name for name, _, _ in predicted + truth})
    many = colormaps["hsv"](np.linspace(0, 0.95, len(names)))
    colours = dict(zip(names, colormaps["tab10"].colors if len(names) <= 10 else many))
    columns = 2 if truth else 1
    figure, panels = photo_panels([scene.size] * columns, columns, width=8 * columns)
    for axes, kind, objects in zip(panels, ("Predicted", "Truth"), (predicted, truth)):
        show(axes, scene.photo, scene.size, f"{kind}: {len(objects)}")
        for name, box, text in reversed(objects):  # the best on top
            draw_box(axes, box, colours[name])
            if text:
                draw_label(axes, box, text, colours[name], scene.size)
    if keys := [Rectangle((0, 0), 1, 1, color=c, label=drawable(name)) for name, c in colours.items()]:
        figure.legend(handles=keys, loc="outside lower center", ncols=6 * columns, fontsize=9)
    return figure
