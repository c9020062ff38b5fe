"""Pictures of a run: predictions beside the truth, and curves. train.py draws both at every evaluation.

Boxes are xyxy in pixels of the original photo, and it is the photo that they are drawn on, not the small copy
that the network sees. Names of classes and files may hold anything: what the font lacks becomes \\u732b.
"""
import functools
import json
import math
from pathlib import Path

import numpy as np
from matplotlib import colormaps, font_manager
from matplotlib.figure import Figure  # not pyplot: no window system, no global state
from matplotlib.patches import Rectangle
from torchvision.ops import box_convert

from support.images import load_image

TRUE, PREDICTED, REFERENCE = "#00c853", "#ff1744", "#40c4ff"  # green, red, blue
LONGEST_NAME = 40  # characters of a class name that are drawn
DPI = 110


# ---- Text --------------------------------------------------------------------------------------------------
@functools.cache
def font():
    return font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))


def drawable(text):
    """The text as matplotlib can draw it: without mathematics, and with codes for what the font lacks."""
    glyphs = font().get_charmap()
    text = "".join(c if ord(c) in glyphs else ascii(c)[1:-1] for c in text)
    return text.replace("$", r"\$")  # $x$ is mathematics, and {$ or $\oops$ is a traceback


def shorten(name):
    return name if len(name) <= LONGEST_NAME else f"{name[:LONGEST_NAME - 3]}..."


def text_size(text, fontsize):
    """(width, height) of one line of text, in points."""
    face = font()
    face.set_size(fontsize, 72)
    face.set_text(text.replace(r"\$", "$"), 0)
    return face.get_width_height()[0] / 64 + 2, fontsize * 1.3


# ---- Photos, boxes and labels ------------------------------------------------------------------------------
def photo_grid(sizes, columns, width, tallest=math.inf, top=0.35, bottom=0.05, title=0.0):
    """A figure of `width` inches and an axes for each photo, in rows that fill it without blank bands.

    sizes: (height, width) of the photos. tallest: inches, the most that a row may have. top, bottom, title:
    inches above all rows, below them and above each row.
    """
    gap = 0.06
    rows = [sizes[i:i + columns] for i in range(0, len(sizes), columns)]
    heights = []
    for row in rows:
        fills = (width - gap * (len(row) + 1)) / sum(w / h for h, w in row)
        heights.append(min(fills, tallest))
    total = sum(heights) + (gap + title) * len(rows) + top + bottom
    figure, panels, y = Figure((width, total)), [], total - top
    for row, height in zip(rows, heights):
        x, y = gap, y - height - title
        for h, w in row:
            panel_width = height * w / h
            panels.append(figure.add_axes((x / width, y / total, panel_width / width, height / total)))
            panels[-1].points_per_pixel = 72 * height / h
            x += panel_width + gap
        y -= gap
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


def overlap(a, b):
    """Area that two rectangles (x1, y1, x2, y2) share."""
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def label_place(box, label, size, taken):
    """Where a label of (width, height) covers the fewest others: (x1, y1, x2, y2), in or at the box.

    Tried in this order: over the box, under it, inside it at the top and at the bottom; each at the left and
    at the right. size: (height, width) of the image, in which it stays. taken: places of other labels.
    """
    (x1, y1, x2, y2), (w, h) = box, label
    places = [(x, y) for y in (y1 - h, y2, y1, y2 - h) for x in (x1, x2 - w)]
    places = [(max(0, min(x, size[1] - w)), max(0, min(y, size[0] - h))) for x, y in places]
    places = [(x, y, x + w, y + h) for x, y in places]
    return min(places, key=lambda place: sum(overlap(place, other) for other in taken))  # the first of equals


def draw_labels(axes, labels, size, fontsize):
    """labels: [(box [4], text, colour)], the most important first. Labels that would cover others move."""
    taken = []
    for box, text, colour in labels:
        text = drawable(text)
        width, height = (points / axes.points_per_pixel for points in text_size(text, fontsize))
        place = label_place(box.tolist(), (width, height), size, taken)
        taken.append(place)
        axes.add_patch(Rectangle(place[:2], width, height, fc=colour, ec="none", alpha=0.8))
        middle = (place[0] + place[2]) / 2, (place[1] + place[3]) / 2
        axes.text(*middle, text, fontsize=fontsize, color="white", ha="center", va="center", clip_on=True)


# ---- A run -------------------------------------------------------------------------------------------------
def draw_predictions(dataset, predictions, path, count=8, threshold=0.3):
    """The first `count` images with objects: true boxes green, predictions scored over the threshold red.

    predictions: {image id: {"boxes" [n, 4] xyxy in pixels of the original, "labels" [n], "scores" [n]}}.
    """
    chosen = []
    for index in range(len(dataset)):
        target = dataset[index][1]
        if len(target["labels"]) and len(chosen) < count:
            chosen.append((index, target))
        if len(chosen) == count:
            break
    figure, panels = photo_grid([target["size"] for _, target in chosen], columns=4, width=13, tallest=4.5)
    for axes, (index, target) in zip(panels, chosen):
        size, names = target["size"], dataset.class_names
        show(axes, small_photo(dataset, index), size)
        truth = to_pixels_xyxy(target["boxes"], size)
        labels = [(box, shorten(names[i]), TRUE) for box, i in zip(truth, target["labels"])]
        found = predictions[target["image_id"]]
        for k in (found["scores"] > threshold).nonzero()[:, 0].tolist():
            label, score = found["labels"][k], found["scores"][k]
            labels.append((found["boxes"][k], f"{shorten(names[label])} {score:.2f}", PREDICTED))
        for box, _, colour in labels:
            draw_box(axes, box, colour, width=3 if colour == TRUE else 1.5)  # seen under a box that fits it
        draw_labels(axes, labels, size, fontsize=6)
    figure.suptitle(f"held-out images: truth green, predictions scored over {threshold} red", fontsize=10)
    figure.savefig(path, dpi=DPI)


def to_pixels_xyxy(boxes, size):
    """Boxes [..., 4], cxcywh in [0, 1] -> xyxy in pixels of an image of (height, width)."""
    height, width = size
    return box_convert(boxes, "cxcywh", "xyxy") * boxes.new_tensor([width, height, width, height])


def small_photo(dataset, index, longest=1200):
    """uint8 [h, w, 3]: the photo as it is, or if it is very large every n-th pixel of it."""
    is_drawn = hasattr(dataset, "draw")  # the embedded shapes have no files
    photo = dataset.draw(index)[0] if is_drawn else np.asarray(load_image(dataset.images[index]))
    step = math.ceil(max(photo.shape[:2]) / longest)
    return photo[::step, ::step]


def read_log(path):
    """The lines of a run's log.jsonl as dicts. Others are left out: a killed run cuts one off."""
    lines = []
    for text in Path(path).read_text(errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and "step" in line:
            lines.append(line)
    return lines


def draw_curves(log, path):
    """Losses of the last stage and AP against steps, from a run's log.jsonl."""
    lines = read_log(log)
    losses, evals = [line for line in lines if "total" in line], [line for line in lines if "eval" in line]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    kinds = {"class": "C0", "l1": "C1", "giou": "C2"}
    for name in losses[-1] if losses else ():  # also proposal_class and the like, dashed
        kind = name.split("_")[-1]
        if kind in kinds:
            points = [(line["step"], line[name]) for line in losses if name in line]
            left.plot(*zip(*points), "-" if name == kind else "--", color=kinds[kind], label=name)
    left.set(title="losses of the last stage, un-weighted", xlabel="step", ylabel="loss", yscale="log")
    for name in ("AP", "AP50", "AP75") if evals else ():
        values = [line["eval"][name] for line in evals]
        right.plot([line["step"] for line in evals], values, "o-", ms=3, label=name)
    right.set(title="held-out images", xlabel="step", ylabel="average precision", ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    figure.savefig(path, dpi=DPI)


# ---- One image ---------------------------------------------------------------------------------------------
def draw_detections(scene, found):
    """Predictions {"boxes", "labels", "scores"}, a colour for each class; beside them the truth, if known."""
    order = found["scores"].argsort(descending=True, stable=True).tolist()
    predicted = [(scene.name_of(found["labels"][k]), found["boxes"][k], f"{found['scores'][k]:.2f}")
                 for k in order]
    truth = [(name, box, "") for name, box in scene.truth]
    present = list(dict.fromkeys(name for name, _, _ in predicted + truth))
    names = [name for name in scene.class_names if name in present]
    names = list(dict.fromkeys(names + present))
    many = colormaps["hsv"](np.linspace(0, 0.95, len(names)))
    colours = dict(zip(names, colormaps["tab10"].colors if len(names) <= 10 else many))
    panels = 2 if truth else 1
    per_row = 6 * panels
    legend = 0.15 + 0.3 * math.ceil(len(colours) / per_row)  # inches
    figure, axes = photo_grid([scene.size] * panels, panels, width=8 * panels, tallest=12, top=0.1,
                              bottom=legend, title=0.25)
    for panel, kind, objects in zip(axes, ("predicted", "truth"), (predicted, truth)):
        show(panel, scene.photo, scene.size, f"{kind}: {len(objects)}")
        for name, box, _ in objects:
            draw_box(panel, box, colours[name])
        draw_labels(panel, [(box, text, colours[name]) for name, box, text in objects if text], scene.size, 9)
    keys = [Rectangle((0, 0), 1, 1, color=colour, label=drawable(shorten(name)))
            for name, colour in colours.items()]
    if keys:
        columns = min(per_row, len(keys))
        figure.legend(handles=keys, loc="lower center", ncols=columns, fontsize=9, frameon=False)
    return figure
