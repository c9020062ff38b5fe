"""The embedded data set: nothing to download, drawn when asked for, learned in minutes on a laptop."""
import colorsys
import functools
import math

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from support.evaluation import to_coco
from support.images import AnnotatedImage, to_input_and_target

SHAPE_NAMES = ["circle", "square", "triangle", "cross"]
DIAMETERS = (24, 76)  # pixels in an image of 128; log-uniform, so half of the objects are below 43
MAX_OBJECTS = 4
TILT = 0.35  # radians to either side; turned freely, small crosses and squares take long to tell apart
EMPTY_SHARE = 0.06  # images without any object: a detector must be able to say "nothing"
LEAST_VISIBLE = 0.75  # share of every object that the later ones leave uncovered
CROSS = [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1),
         (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]  # its 12 corners


class Shapes(Dataset):
    """Coloured shapes over clutter. An image depends on seed, split and its number, so it never changes.

    Both sides are 3/4 of `size` to `size` pixels, so batches need padding. CocoFolder explains the methods.
    """
    class_names, category_ids, max_boxes, held_out = SHAPE_NAMES, [1, 2, 3, 4], MAX_OBJECTS, None

    def __init__(self, num_images, size=96, seed=0, split="train"):
        self.numbers = range(num_images)  # of the images: a subset has some of them
        self.size, self.seed, self.split = size, seed, split
        self.name, self.notes = f"shapes {split}", []

    def __len__(self):
        return len(self.numbers)

    def __getitem__(self, key):
        image, annotated, _ = self.draw(key[1] if isinstance(key, tuple) else key)
        image = torch.from_numpy(image).permute(2, 0, 1)  # [3, H, W]
        return to_input_and_target(image, annotated.boxes_xyxy, annotated.labels, annotated)

    def draw(self, index):
        """Returns image, uint8 [H, W, 3]; AnnotatedImage; owner [H, W], the object a pixel shows (-1: none).

        A box is tight around what is still visible of its object, as in COCO.
        """
        number = self.numbers[index]
        rng = np.random.default_rng([self.seed, self.split == "val", number])
        height, width = (int(side) for side in rng.integers(self.size * 3 // 4, self.size + 1, 2))
        image = draw_background(rng, height, width)  # [H, W, 3]
        owner = np.full((height, width), -1)
        labels, areas = [], []
        wanted = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS + 1))
        for _ in range(4 * wanted):  # some attempts find no room, so a few images have fewer objects
            if len(labels) == wanted:
                break
            label = int(rng.integers(len(SHAPE_NAMES)))
            diameter = max(4, self.size / 128 * math.exp(rng.uniform(*np.log(DIAMETERS))))
            alpha = draw_shape(SHAPE_NAMES[label], diameter, rng.uniform(-TILT, TILT))  # [h, w]
            h, w = alpha.shape
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            here, solid = np.s_[top:top + h, left:left + w], alpha > 0.5
            below = np.bincount(owner[here][solid] + 1, minlength=len(labels) + 1)[1:]  # pixels it would hide
            visible = np.bincount(owner.ravel() + 1, minlength=len(labels) + 1)[1:] - below
            if any((below > 0) & (visible < LEAST_VISIBLE * np.array(areas))):
                continue
            colour = pick_colour(rng, label, image[here].mean((0, 1)))
            paint = colour * draw_texture(rng, h, w)[:, :, None]  # [h, w, 3]
            image[here] += alpha[:, :, None] * (paint - image[here])
            owner[here][solid] = len(labels)
            labels.append(label)
            areas.append(solid.sum())
        boxes_xyxy = np.zeros((len(labels), 4), np.float32)
        for k in range(len(labels)):
            ys, xs = np.nonzero(owner == k)
            boxes_xyxy[k] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
        annotated = AnnotatedImage(
            number, "", height, width, np.array(labels, np.int64), boxes_xyxy, areas, crowd=areas < 0)
        return image.clip(0, 255).astype(np.uint8), annotated, owner

    def path_of(self, index):
        return f"shapes-{self.numbers[index]}"

    def count_boxes(self, index):
        return len(self.draw(index)[1].labels)

    def subset(self, indices):
        some = Shapes(0, self.size, self.seed, self.split)
        some.numbers = [self.numbers[index] for index in indices]
        return some

    @property
    def num_boxes(self):
        """Exact for up to 250 images, otherwise an estimate from the first 250: counting means drawing."""
        some = range(min(250, len(self)))
        return round(len(self) / max(1, len(some)) * sum(map(self.count_boxes, some)))

    @functools.cached_property
    def coco(self):
        return to_coco(self, (self.draw(index)[1] for index in range(len(self))))


def draw_background(rng, height, width):
    """Soft blobs of similar colours, up to 4 thin lines, grain: float32 [H, W, 3] in about 0..255."""
    coarse = (rng.integers(50, 206, 3) + rng.normal(0, 22, (5, 5, 3))).clip(0, 255).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(rng.integers(5)):
        ends = rng.integers(-20, max(height, width) + 20, 4).tolist()
        pen.line(ends, fill=tuple(rng.integers(0, 256, 3).tolist()))
    grain = rng.normal(0, 6) * rng.standard_normal((height, width, 1), np.float32)
    return np.asarray(image, np.float32) + grain


def draw_shape(name, diameter, angle):
    """The share of each pixel that the shape covers: float32 [h, w], cropped to the pixels above 0.5."""
    if name == "cross":
        cos, sin = np.cos(angle), np.sin(angle)
        corners = np.array(CROSS) / 10 ** 0.5 @ [(cos, sin), (-sin, cos)]
    else:
        count, start = {"triangle": (3, -np.pi / 2), "square": (4, np.pi / 4)}.get(name, (40, 0))  # upright
        turns = angle + start + np.linspace(0, 2 * np.pi, count, endpoint=False)
        corners = np.stack([np.cos(turns), np.sin(turns)], 1)
    corners = corners * diameter / 2  # [corners, 2], pixels from the centre
    zoom, side = 3, int(diameter) + 3  # drawn three times as large, then averaged: smooth edges
    canvas = Image.new("L", (side * zoom, side * zoom))
    ImageDraw.Draw(canvas).polygon([tuple(xy) for xy in ((corners + side / 2) * zoom).tolist()], fill=255)
    alpha = np.asarray(canvas.reduce(zoom), np.float32) / 255
    ys, xs = np.nonzero(alpha > 0.5)
    return alpha[ys.min():ys.max() + 1, xs.min():xs.max() + 1]


def pick_colour(rng, label, background):
    """A colour around the hue of its class, float32 [3] in 0..255: of 8, the one furthest from `background`.

    Class and hue go together, as with apples and bananas. Otherwise DETR would need more than minutes.
    """
    hue = (label / len(SHAPE_NAMES) + rng.normal(0, 0.05, 8)) % 1
    saturation, value = rng.uniform(0.5, 1, (2, 8))
    colours = np.array([colorsys.hsv_to_rgb(*hsv) for hsv in zip(hue, saturation, value)], np.float32) * 255
    return colours[np.abs(colours - background).max(1).argmax()]


def draw_texture(rng, h, w):
    """Plain, striped, shaded or speckled: a factor per pixel, float32 [h, w] in [0.65, 1]."""
    angle = rng.uniform(0, 2 * np.pi)
    ramp = (np.cos(angle) * np.arange(w) + np.sin(angle) * np.arange(h)[:, None]).astype(np.float32)
    kind = rng.integers(4)
    if kind == 0:
        return np.ones_like(ramp)
    if kind == 1:
        return np.where(ramp % 6 < 3, np.float32(1), np.float32(0.65))
    if kind == 2:
        return 0.65 + 0.35 * (ramp - ramp.min()) / np.ptp(ramp)
    return rng.uniform(0.65, 1, (h, w)).astype(np.float32)
