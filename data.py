"""Data for all five detectors: images in, padded batches out, COCO numbers at the end.

    load()                      the embedded data set `shapes`: nothing to download, drawn when asked for
    load("my/folder")           your own images with COCO or VOC annotations; LAYOUTS: how a folder may look
    python data.py my/folder    one screen about such a folder: what is in it, and all that is wrong with it
    dataset[index]              one image and its target; dataset[epoch, index] also chooses the augmentation
    collate(batch)              images of different sizes -> one padded tensor and its mask
    postprocess, coco_eval      what the model says -> scored boxes in pixels -> the 12 COCO numbers

Legend: B images, Q queries, C classes, n objects in one image, k scored boxes in one image, H x W pixels.
Boxes are (cx, cy, w, h) in [0, 1] of the unpadded image; `boxes_xyxy` are two corners in pixels.
Whatever is wrong with somebody's data ends in a DataError, a single line for the person who runs the program.
"""
import argparse
import colorsys
import contextlib
import copy
import hashlib
import io
import json
import math
import os
import reprlib
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw, ImageOps
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.ops import box_convert
from torchvision.transforms import v2
from tqdm import tqdm

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DataError(Exception):
    """Something is wrong with the data: what, where (file, image id, annotation id), and what to do."""


class SizeDataError(DataError):
    """An image file has another size than its annotations say."""


def one_line(error):
    """The message of a DataError. From a DataLoader worker it comes as a traceback, whose last line it is."""
    return str(error).strip().splitlines()[-1].split("DataError: ", 1)[-1]


@dataclass
class Picture:
    """One image and what is on it, in pixels of the image as it was annotated."""
    id: int
    path: str
    height: int
    width: int
    labels: np.ndarray  # [n] int64, 0..C-1
    boxes_xyxy: np.ndarray  # [n, 4] float32, inside the image
    areas: np.ndarray  # [n], square pixels: of the object's outline if the file knows it, else of its box
    crowd: np.ndarray  # [n] bool: one box around many objects; not trained on, ignored by the evaluation


# ---- Shapes: the embedded data set -------------------------------------------------------------------------
SHAPE_NAMES = ["circle", "square", "triangle", "cross"]
DIAMETERS = (24, 76)  # pixels in an image of 128; log-uniform, so half of the objects are below 43
MAX_OBJECTS = 4
TILT = 0.35  # radians to either side; turned freely, small crosses and squares take long to tell apart
EMPTY_SHARE = 0.06  # images without any object: a detector must be able to say "nothing"
LEAST_VISIBLE = 0.75  # share of every object that the later ones leave uncovered
CROSS = [(1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1),
         (-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1)]  # its 12 corners


class Shapes(Dataset):
    """Coloured shapes over clutter. A picture depends on seed, split and its number alone: it never changes.

    Height and width are each between 3/4 of `size` and `size` pixels, so batches need padding. Attributes and
    items are those of CocoFolder, which explains them.
    """
    class_names, category_ids, max_boxes = SHAPE_NAMES, [1, 2, 3, 4], MAX_OBJECTS

    def __init__(self, num_images, size=96, seed=0, split="train"):
        self.items = range(num_images)  # picture numbers
        self.size, self.seed, self.split = size, seed, split
        self.name, self.notes = f"shapes {split}", []
        self._coco = None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        image, picture, _ = self.draw(self.items[key[1] if isinstance(key, tuple) else key])
        image = torch.from_numpy(image).permute(2, 0, 1)  # [3, H, W]
        return finish(image, picture.boxes_xyxy, picture.labels, picture)

    def draw(self, number):
        """Returns image, uint8 [H, W, 3]; Picture; owner [H, W], the object that a pixel shows (-1: none).

        A box is tight around what is still visible of its object, as in COCO.
        """
        rng = np.random.default_rng([self.seed, self.split == "val", number])
        height, width = (int(side) for side in rng.integers(self.size * 3 // 4, self.size + 1, 2))
        image = draw_background(rng, height, width)  # [H, W, 3]
        owner = np.full((height, width), -1)
        labels, areas = [], []
        wanted = 0 if rng.random() < EMPTY_SHARE else int(rng.integers(1, MAX_OBJECTS + 1))
        for _ in range(4 * wanted):  # some attempts find no room, so a few pictures have fewer objects
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
            paint = colour * texture(rng, h, w)[:, :, None]  # [h, w, 3]
            image[here] += alpha[:, :, None] * (paint - image[here])
            owner[here][solid] = len(labels)
            labels.append(label)
            areas.append(solid.sum())
        boxes_xyxy = np.zeros((len(labels), 4), np.float32)
        for k in range(len(labels)):
            ys, xs = np.nonzero(owner == k)
            boxes_xyxy[k] = xs.min(), ys.min(), xs.max() + 1, ys.max() + 1
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)
        picture = Picture(number, "", height, width, np.array(labels, np.int64), boxes_xyxy, areas, areas < 0)
        return image.clip(0, 255).astype(np.uint8), picture, owner

    def count_boxes(self, number):
        return len(self.draw(number)[1].labels)

    @property
    def num_boxes(self):
        """Exact for up to 250 images, else an estimate from the first 250: counting means drawing."""
        some = self.items[:250]
        return round(len(self) / len(some) * sum(map(self.count_boxes, some)))

    @property
    def coco(self):
        if self._coco is None:
            self._coco = to_coco(self, (self.draw(number)[1] for number in self.items))
        return self._coco


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
    pen = ImageDraw.Draw(canvas)
    pen.polygon([tuple(xy) for xy in ((corners + side / 2) * zoom).tolist()], fill=255)
    alpha = np.asarray(canvas.reduce(zoom), np.float32) / 255
    rows, columns = np.nonzero((alpha > 0.5).any(1))[0], np.nonzero((alpha > 0.5).any(0))[0]
    return alpha[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]


def pick_colour(rng, label, background):
    """A colour around the hue of its class, float32 [3] in 0..255: of 8, the one furthest from `background`.

    Class and hue go together, as with apples and bananas: without this, telling small shapes apart is most of
    the work, and minutes are not enough for DETR.
    """
    hue = (label / len(SHAPE_NAMES) + rng.normal(0, 0.05, 8)) % 1
    saturation, value = rng.uniform(0.5, 1, (2, 8))
    colours = np.array([colorsys.hsv_to_rgb(*hsv) for hsv in zip(hue, saturation, value)], np.float32) * 255
    return colours[np.abs(colours - background).max(1).argmax()]


def texture(rng, h, w):
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


# ---- Folders: read and clean the annotations ---------------------------------------------------------------
LAYOUTS = [  # (annotations, images) below the folder; {} is one of SPLIT_NAMES
    ("annotations/instances_{}2017.json", "{}2017"),  # COCO
    ("annotations/instances_{}.json", "{}"),
    ("{}/_annotations.coco.json", "{}"),  # COCO as Roboflow exports it
    ("ImageSets/Main/{}.txt", "JPEGImages"),  # VOC; the boxes are in Annotations/*.xml
    ("{}/*.xml", "{}"),  # VOC as Roboflow exports it: every .xml beside its image
]
SPLIT_NAMES = {"train": ["train", "trainval"], "val": ["val", "valid", "test"]}  # the first that is there
SMALLEST_SIDE = 0.1  # pixels; float32 arithmetic leaves nothing of a box that is thinner
THINNEST = 30  # an image longer than this many times its short side may have no pixels left when made small


class CocoFolder(Dataset):
    """Images with COCO annotations, or with VOC's, which read_voc turns into COCO's.

    class_names, category_ids   lists by class index 0..C-1: the name, and the id in the annotation file
    name, notes                 for messages; `notes` says what was repaired or left out, a line each
    num_boxes, max_boxes        in all images; in the fullest one. Without crowds.
    coco                        the ground truth as a pycocotools object, in original pixels and ids

    dataset[key], key an index or (epoch, index), returns the image, float32 [3, H, W] with ImageNet's mean
    and std taken out, and a target: labels int64 [n]; boxes float32 [n, 4]; image_id; size, the original
    (height, width). Random numbers depend on (seed, epoch, index) alone, whichever worker draws them, and no
    global generator moves. Raises DataError for an image that cannot be used.
    """

    def __init__(self, name, pictures, categories, notes, train, augment, size, seed):
        self.name, self.items, self.notes = name, pictures, notes
        self.category_ids, self.class_names = list(categories), list(categories.values())
        self.augment, self.size, self.seed = augment, size, seed
        self.transform = make_transform(train, augment, size)
        self._coco = None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        picture = self.items[index]
        image = tv_tensors.Image(v2.functional.pil_to_tensor(load_image(picture)))  # uint8 [3, H, W]
        boxes = tv_tensors.BoundingBoxes(picture.boxes_xyxy[~picture.crowd], format="XYXY",
                                         canvas_size=(picture.height, picture.width))  # [n, 4]
        target = {"boxes": boxes, "labels": torch.from_numpy(picture.labels[~picture.crowd])}
        seed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):  # v2 draws from torch's global generator; this puts it back
            torch.default_generator.manual_seed(int(seed[0]))  # torch.manual_seed would reseed the GPUs, too
            image, target = self.transform(image, target)
        return finish(image, target["boxes"], target["labels"], picture)

    def count_boxes(self, picture):
        return int((~picture.crowd).sum())

    @property
    def num_boxes(self):
        return sum(map(self.count_boxes, self.items))

    @property
    def max_boxes(self):
        return max(map(self.count_boxes, self.items))

    @property
    def coco(self):
        if self._coco is None:
            self._coco = to_coco(self, self.items)
        return self._coco


@dataclass
class Split:
    """What was read of one annotation file and what is wrong with it, {kind of problem: [places]}.

    One problem does not stop the reading, so that all can be told at once: by `load` the first error, by
    `python data.py` everything.
    """
    path: Path = None
    pictures: list = field(default_factory=list)
    errors: dict = field(default_factory=lambda: defaultdict(list))  # need a person: not trained until mended
    notes: dict = field(default_factory=lambda: defaultdict(list))  # were dealt with, each says how


def to_lines(problems):
    """{kind: [places]} -> a line per kind. A kind without places speaks for itself."""
    texts = [f"{kind}: {len(places)} (first: {places[0]})" if places else kind
             for kind, places in problems.items()]
    return [" ".join(text.splitlines())[:500] for text in texts]  # names may hold line breaks and have no end


def read_json(path):
    """A COCO file as a dict, its three lists checked to be lists of dicts. DataError, without the path."""
    try:
        contents = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # ValueError: bad JSON; it says line and column
        raise DataError(f"cannot be read as JSON: {error}") from None
    if not isinstance(contents, dict):
        raise DataError(f"is a {type(contents).__name__}, but COCO annotations are an object with images, "
                        "annotations and categories (is this a file of results?)")
    for key in ("images", "annotations", "categories"):
        entries = contents.get(key)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise DataError(f'"{key}" should be a list of objects, it is {reprlib.repr(entries)}')
    return contents


def read_voc(path, folder, known, errors):
    """VOC's XML files in the form of a COCO file. Class ids are 1..C in the order of the names.

    path    list of image names in ImageSets/Main, or a folder of XML files
    folder  of the images; each has the name of its XML file up to the ending
    known   {id: name} of the training set, or empty; names that are not among them get further ids
    """
    try:
        listed = [] if path.is_dir() else path.read_text("utf-8-sig").split("\n")
        files = os.listdir(folder) if folder.is_dir() else []
    except (OSError, ValueError) as error:  # ValueError: not text
        raise DataError(f"cannot be read: {error}") from None
    image_of = {Path(file).stem: file for file in files if not file.endswith((".xml", ".txt", ".json"))}
    below = path.parent.parent.parent / "Annotations"
    xmls = [below / f"{line.strip()}.xml" for line in listed if line.strip()] or sorted(path.glob("*.xml"))
    images, annotations = [], []
    for xml in xmls:
        try:
            root = ElementTree.parse(xml).getroot()
        except (OSError, ValueError, LookupError, SyntaxError) as error:  # SyntaxError: malformed
            errors["XML files that cannot be read"].append(f"{xml}: {error}")
            continue
        if root.tag != "annotation":
            errors["XML files without VOC annotations"].append(f"{xml}: <{root.tag}>")
            continue
        images.append({
            "id": len(images) + 1,
            "file_name": image_of.get(xml.stem) or root.findtext("filename") or f"{xml.stem}.jpg",
            "width": number(root.findtext("size/width")),
            "height": number(root.findtext("size/height")),
        })
        annotations += voc_objects(root, xml, len(images))
    id_of = {name: i for i, name in known.items()}
    for name in sorted({entry["class"] for entry in annotations} - {*id_of, ""}):
        id_of[name] = max(id_of.values(), default=0) + 1
    for entry in annotations:
        entry["category_id"] = id_of.get(entry["class"])
    categories = [{"id": i, "name": name} for name, i in id_of.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def voc_objects(root, xml, image_id):
    """The objects of one VOC file as COCO's annotations, except that a class is still a name."""
    for k, entry in enumerate(root.findall("object"), 1):
        box = [number(entry.findtext(f"bndbox[1]/{key}")) for key in ("xmin", "ymin", "xmax", "ymax")]
        if all(isinstance(v, (int, float)) for v in box):  # else find_fault complains
            x0, y0, x1, y1 = box  # VOC numbers the pixels from 1 and includes both: 1..640 is COCO's 0 to 640
            box = [x0 - 1, y0 - 1, x1 - x0 + 1, y1 - y0 + 1]
        yield {
            "image_id": image_id,
            "class": (entry.findtext("name") or "").strip(),
            "bbox": box,
            "iscrowd": int(number(entry.findtext("difficult")) == 1),  # in VOC, too, nobody has to find it
            "place": f"{xml}, object {k}",
        }


def number(text):
    """The int or float that a text says. What is no number comes back as it is, to be shown in a message."""
    try:
        value = float(text)
    except (TypeError, ValueError):
        return text
    return int(value) if value.is_integer() else value


def is_whole(value):
    return type(value) is int and abs(value) < 2 ** 53  # not isinstance: True is an int as well


def by_id(entries, what, errors):
    """{id: entry}, in the order of the file, of entries whose id is a whole number not seen before."""
    found = {}
    for k, entry in enumerate(entries):
        i = entry.get("id")
        if not is_whole(i):
            errors[f"{what} ids that are not whole"].append(f"{what} number {k + 1}: {reprlib.repr(i)}")
        elif i in found:
            errors[f"{what} ids that occur twice"].append(f"{what} id {i}")
        else:
            found[i] = entry
    return found


def read_categories(contents, errors):
    """{category id: name} sorted by id: the position is the class index that models see."""
    categories = by_id(contents["categories"], "category", errors)
    if not contents["categories"]:
        errors["the list of categories is empty"] = []
    names = {i: categories[i].get("name", i) for i in sorted(categories)}
    return {i: name if isinstance(name, str) else reprlib.repr(name) for i, name in names.items()}


def compare_categories(own, categories, errors):
    """The same id must mean the same class in both files, and val may have no class that was not trained."""
    for i, name in own.items():
        if categories.get(i) != name:
            known = f"is {categories[i]!r}" if i in categories else "does not exist"
            errors["categories that differ from train's"].append(f"id {i} is {name!r}, in train it {known}")


def read_images(contents, folder, errors):
    """{image id: (file, height, width)}; None for an image that cannot be used, its error being noted.

    Every file must exist. Sizes that the annotations lack come from the files.
    """
    images = {}
    for i, entry in by_id(contents["images"], "image", errors).items():
        images[i] = None
        name, height, width = (entry.get(key) for key in ("file_name", "height", "width"))
        file = os.path.join(folder, name) if isinstance(name, str) else None
        if file is None:
            errors["images without a file_name"].append(f"image id {i}")
        elif not os.path.isfile(file):
            errors["image files that do not exist"].append(f"{file}, image id {i}")
        elif not (height and width):
            try:
                images[i] = file, *file_size(file, i)
            except DataError as error:
                errors["image files that cannot be used"].append(str(error))
        elif not (is_whole(height) and is_whole(width) and min(height, width) > 0):
            errors["images whose width and height are not whole numbers above 0 (may be left out)"].append(
                f"{file}, image id {i}: {reprlib.repr([width, height])}")
        else:
            images[i] = file, height, width
    if not contents["images"]:
        errors["the list of images is empty"] = []
    return images


def find_fault(entry, images, label_of):
    """(kind of error, value at fault) of an annotation that cannot be understood, otherwise (None, None)."""
    image_id, category_id, bbox = (entry.get(key) for key in ("image_id", "category_id", "bbox"))
    if not is_whole(image_id) or image_id not in images:
        return "annotations whose image_id is not among the images", image_id
    if not is_whole(category_id) or category_id not in label_of:
        return "annotations whose category_id is not among the categories", category_id
    if not (isinstance(bbox, list) and len(bbox) == 4 and all(type(v) in (int, float) for v in bbox)):
        return "annotations whose bbox is not four numbers", bbox
    return None, None


def clean_box(bbox, height, width):
    """COCO's [x, y, width, height] -> (x0, y0, x1, y1) within the image or None; what was wrong or None."""
    x, y, w, h = bbox
    if not all(abs(v) < 1e9 for v in bbox) or min(w, h) < SMALLEST_SIDE:  # "not <" and not ">=": NaN
        return None, "boxes that are not finite or have no width or height, dropped"
    x0, y0, x1, y1 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
    if min(x1 - x0, y1 - y0) < SMALLEST_SIDE:
        return None, "boxes outside their image, dropped"
    excess = max(x0 - x, y0 - y, x + w - x1, y + h - y1)  # up to half a pixel is rounding, common in COCO
    return (x0, y0, x1, y1), "boxes reaching over the image edge, clipped" if excess > 0.5 else None


def place(entry, k, images):
    """What messages call the annotation at index k, so that somebody finds it again."""
    if isinstance(entry.get("place"), str):  # of read_voc
        return entry["place"]
    # ids of annotations serve messages only, so one without is as good
    name = f"annotation id {entry['id']}" if is_whole(entry.get("id")) else f"annotation number {k + 1}"
    image = images.get(entry["image_id"]) if is_whole(entry.get("image_id")) else None
    return f"{os.path.basename(image[0])}, image id {entry['image_id']}, {name}" if image else name


def read_pictures(contents, folder, categories, errors, notes):
    """A Picture for every usable image, its boxes cleaned. Adds to `errors` and `notes`, see Split."""
    images = read_images(contents, folder, errors)
    label_of = {category_id: label for label, category_id in enumerate(categories)}
    by_id([entry for entry in contents["annotations"] if entry.get("id") is not None], "annotation", errors)
    objects, seen = defaultdict(list), set()
    for k, entry in enumerate(contents["annotations"]):
        where = place(entry, k, images)
        fault, value = find_fault(entry, images, label_of)
        if fault:
            errors[fault].append(f"{where}: {reprlib.repr(value)}")
            continue
        image_id, label = entry["image_id"], label_of[entry["category_id"]]
        if images[image_id] is None:
            continue
        box, problem = clean_box(entry["bbox"], *images[image_id][1:])
        if problem:
            notes[problem].append(where)
        if box is None:
            continue
        if (image_id, label, box) in seen:
            notes["boxes given more than once, with the same class, kept"].append(where)
        seen.add((image_id, label, box))
        crowd = entry.get("iscrowd") == 1
        if crowd:
            notes["crowd regions (VOC: difficult), neither trained on nor evaluated"].append(where)
        area, whole_box = entry.get("area"), (box[2] - box[0]) * (box[3] - box[1])
        if type(area) not in (int, float) or not 0 < area < whole_box:  # missing, nonsense, not clipped
            area = whole_box
        objects[image_id].append((label, box, area, crowd))
    pictures = []
    for image_id, (file, height, width) in ((i, image) for i, image in images.items() if image):
        columns = zip(*objects[image_id]) if objects[image_id] else [(), (), (), ()]
        labels, boxes, areas, crowd = map(np.array, columns, (np.int64, np.float32, float, bool))
        pictures.append(Picture(image_id, file, height, width, labels, boxes.reshape(-1, 4), areas, crowd))
        if len(labels) == 0:
            notes["images without boxes, kept"].append(f"{os.path.basename(file)}, image id {image_id}")
    return pictures


# ---- Read images -------------------------------------------------------------------------------------------
@contextlib.contextmanager
def readable(path, image_id):
    """Whatever PIL raises for a damaged file becomes a DataError: OSError, SyntaxError, struct.error, ..."""
    try:
        yield
    except Exception as error:
        reason = one_line(error) if str(error) else repr(error)
        kind = SizeDataError if isinstance(error, SizeDataError) else DataError
        raise kind(f"{path} (image id {image_id}): {reason}; repair or remove it") from None


def size_shown(raw):
    """(width, height) of an open PIL image as viewers show it, from its header alone."""
    quarter_turn = raw.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return raw.size[::-1] if quarter_turn else raw.size


def file_size(path, image_id):
    """(height, width) of an image file as a viewer shows it."""
    with readable(path, image_id), Image.open(path) as raw:
        return size_shown(raw)[::-1]


def load_image(picture):
    """The picture as a PIL image in RGB. DataError if it is damaged or not of the size it was annotated at.

    A camera stores what its sensor saw, plus an EXIF note "turn me". Tools that obey the note draw boxes on
    the turned image, others on the raw one: the annotated size tells which. Where it does not (half a turn, a
    mirror, a square) we obey, as nearly all tools do.
    """
    with readable(picture.path, picture.id), Image.open(picture.path) as raw:
        size, shown = (picture.width, picture.height), size_shown(raw)
        if size not in (shown, raw.size):
            raise SizeDataError(f"the file has {shown[0]} x {shown[1]} pixels, its annotations say "
                            f"{picture.width} x {picture.height}")
        if max(size) > THINNEST * min(size):
            raise DataError(f"{picture.width} x {picture.height} pixels are too thin to be resized")
        return to_rgb(ImageOps.exif_transpose(raw) if size == shown else raw)


def to_rgb(image):
    """Any PIL image -> RGB. 16 bits are scaled to 8, not clipped; transparent parts become white."""
    if image.mode == "F":
        raise DataError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16", or "I": 32 bits, in which some versions of PIL hold 16
        values = np.asarray(image).clip(0).astype(float)
        image = Image.fromarray((values * 255 / max(65535, values.max())).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- Augmentation ------------------------------------------------------------------------------------------
class RandomSizeCrop(torch.nn.Module):
    """Cuts out a window with sides of smallest..largest pixels, each uniform, as far as the image reaches.

    An object of which less than a pixel is left disappears together with its label.
    """

    def __init__(self, smallest, largest):
        super().__init__()
        self.smallest, self.largest = smallest, largest

    def forward(self, image, target):
        height, width = (int(torch.randint(min(self.smallest, side), min(self.largest, side) + 1, ()))
                         for side in image.shape[-2:])
        return v2.SanitizeBoundingBoxes()(*v2.RandomCrop((height, width))(image, target))


def make_transform(train, augment, size):
    """What happens to an image before the network: a function (image, target) -> (image, target).

    "none"    the image is resized to just fit into size x size pixels, its shape kept
    "laptop"  the same; in training also mirrored, lighter or darker, and half the time magnified and cut
    "paper"   DETR's: short side 800 (training: 480 to 800), long side up to 1333; in training also mirrored,
              and half the time cut to 384 to 600 before. `size` stands for the 800 and scales all of these.
    """
    if augment == "paper":
        scale = size / 800
        longest = round(1333 * scale)
        if not train:
            return v2.RandomShortestSize([size], longest)
        resize = v2.RandomShortestSize([round(side * scale) for side in range(480, 801, 32)], longest)
        cut = [v2.RandomShortestSize([round(side * scale) for side in (400, 500, 600)]),
               RandomSizeCrop(round(384 * scale), round(600 * scale)), resize]
        return v2.Compose([v2.RandomHorizontalFlip(), v2.RandomChoice([resize, v2.Compose(cut)])])

    fit = v2.Resize(size=None, max_size=size)
    if augment == "none" or not train:
        return fit
    magnify = [v2.Resize(size=None, max_size=round(size * zoom)) for zoom in (1.0, 1.2, 1.4, 1.6)]
    cut = [v2.RandomChoice(magnify), RandomSizeCrop(round(size * 0.7), size)]
    return v2.Compose([
        v2.RandomHorizontalFlip(),  # not upside down: right for cells, wrong for people and most of the world
        v2.RandomChoice([fit, v2.Compose(cut)]),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),  # not hue: it may tell classes apart
    ])


def finish(image, boxes_xyxy, labels, picture):
    """uint8 image [3, H, W] and boxes in its pixels -> what model and losses expect (see CocoFolder)."""
    height, width = image.shape[-2:]
    image = v2.functional.to_dtype(image.as_subclass(torch.Tensor), torch.float32, scale=True)
    image = v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
    boxes_xyxy = torch.as_tensor(boxes_xyxy) / torch.tensor([width, height, width, height])
    boxes = box_convert(boxes_xyxy.clamp(0, 1), "xyxy", "cxcywh")  # clamp: rounding errors only
    return image, {"labels": torch.as_tensor(labels), "boxes": boxes,
                   "image_id": picture.id, "size": (picture.height, picture.width)}


# ---- Batches -----------------------------------------------------------------------------------------------
def collate(batch):
    """List of (image, target) -> images [B, 3, H, W], mask [B, H, W] bool, list of B targets.

    Each image sits in the top left corner of a common canvas. The rest is zeros (ImageNet's mean colour),
    where the mask is True: without it the network could not tell padding from a grey wall.
    """
    images, targets = zip(*batch)
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    padded = torch.zeros(len(images), 3, height, width)  # [B, 3, H, W]
    mask = torch.ones(len(images), height, width, dtype=torch.bool)  # [B, H, W]
    for image, canvas, padding in zip(images, padded, mask):
        canvas[:, :image.shape[1], :image.shape[2]] = image
        padding[:image.shape[1], :image.shape[2]] = False
    return padded, mask, list(targets)


def first(dataset, n, augment=False):
    """The first n images that have boxes, as a data set of their own; not augmented unless asked for."""
    small = copy.copy(dataset)
    small.items, small._coco = [], None
    for item in dataset.items:
        if len(small.items) == n:
            break
        if dataset.count_boxes(item):
            small.items.append(item)
    if not augment and isinstance(dataset, CocoFolder):  # shapes never are
        small.transform = make_transform(False, dataset.augment, dataset.size)
    return small


# ---- Evaluation --------------------------------------------------------------------------------------------
@torch.no_grad()
def postprocess(logits, boxes, sizes, softmax):
    """Outputs of one stage -> scored boxes. Low scores stay: AP is about the ranking, without a threshold.

    logits [B, Q, C] (with softmax C + 1, the last is no-object) and boxes [B, Q, 4] as the model gives them;
    sizes: B pairs (height, width) of the original images. Returns B dicts: scores [k], labels [k], boxes [k,
    4] xyxy in original pixels. softmax: the best class of each query, k = Q. Else the best 100 of all Q * C
    pairs, so that a query may give two answers.
    """
    logits, boxes = logits.float(), boxes.float()
    if softmax:
        scores, labels = logits.softmax(-1)[..., :-1].max(-1)  # [B, Q]
    else:
        B, Q, C = logits.shape
        scores, pairs = logits.sigmoid().flatten(1).topk(min(100, Q * C))  # [B, k]
        labels = pairs % C
        boxes = boxes.take_along_dim((pairs // C)[:, :, None], 1)  # [B, k, 4]
    scale = torch.tensor([(w, h, w, h) for h, w in sizes], dtype=torch.float32, device=boxes.device)  # [B, 4]
    boxes_xyxy = box_convert(boxes, "cxcywh", "xyxy") * scale[:, None]
    return [{"scores": s, "labels": l, "boxes": b} for s, l, b in zip(scores, labels, boxes_xyxy)]


def to_coco(dataset, pictures, scores=None):
    """pycocotools' form of a list of pictures; with `scores`, one list per picture, they are detections."""
    images, annotations = [], []
    for k, picture in enumerate(pictures):
        images.append({"id": picture.id, "height": picture.height, "width": picture.width})
        boxes = box_convert(torch.as_tensor(picture.boxes_xyxy), "xyxy", "xywh").tolist()
        for i, (label, box) in enumerate(zip(picture.labels.tolist(), boxes)):
            annotations.append({
                "id": len(annotations) + 1,  # not the file's: COCOeval takes a match with id 0 for no match
                "image_id": picture.id,
                "category_id": dataset.category_ids[label],
                "bbox": box,
                "area": float(picture.areas[i]),
                "iscrowd": int(picture.crowd[i]),
                "score": scores[k][i] if scores else 1.0,
            })
    coco = COCO()
    coco.dataset = {"images": images, "annotations": annotations, "categories": [
        {"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.class_names)]}
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        coco.createIndex()
    return coco


METRICS = {
    "AP": "average precision, mean over IoU 0.50, 0.55, ... 0.95: the number that papers call AP",
    "AP50": "the same if a box counts as right from IoU 0.50 on",
    "AP75": "from IoU 0.75 on: needs tight boxes",
    "AP_small": "AP of objects up to 32 x 32 pixels in area",
    "AP_medium": "from 32 x 32 to 96 x 96",
    "AP_large": "from 96 x 96 on",
    "AR1": "average recall, same IoUs, when only the best box per image and class counts",
    "AR10": "the best 10",
    "AR100": "the best 100",
    "AR_small": "AR100 of small objects",
    "AR_medium": "of medium ones",
    "AR_large": "of large ones",
}


def coco_eval(dataset, predictions, image_ids=None):
    """METRICS as {name: number} for {image id: dict from `postprocess`}, over `image_ids` or else all images.

    An image without an entry counts as one in which nothing was found.
    """
    truth, found = dataset.coco, []
    for image_id, one in predictions.items():
        boxes_xyxy, size = one["boxes"].cpu(), truth.imgs[image_id]
        areas = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(1)  # [k]
        found.append(Picture(image_id, "", size["height"], size["width"], one["labels"], boxes_xyxy, areas,
                             torch.zeros_like(areas)))
    scores = [one["scores"].tolist() for one in predictions.values()]
    judge = COCOeval(truth, to_coco(dataset, found, scores), "bbox")
    judge.params.imgIds = sorted(truth.imgs if image_ids is None else image_ids)
    with contextlib.redirect_stdout(io.StringIO()):
        judge.evaluate()
        judge.accumulate()
        judge.summarize()
    return dict(zip(METRICS, judge.stats.tolist()))


def explain(metrics):
    """The 12 numbers as a table in words."""
    rows = [f"{name:<10} {metrics[name]:6.3f}  {meaning}" for name, meaning in METRICS.items()]
    return "\n".join(rows + ["-1 = no ground truth of that size. Pixels are those of the original images."])


# ---- Load --------------------------------------------------------------------------------------------------
def find(split, data, json_path, image_folder):
    """(annotation file, image folder) of a split: as given, or the first of LAYOUTS that exists in `data`."""
    if data is None:
        if json_path is None or image_folder is None:
            raise DataError(f"without a data folder, --{split}-json and --{split}-images are both needed")
        return Path(json_path), Path(image_folder)
    tried = [(pattern.format(name), folder.format(name)) for name in SPLIT_NAMES[split]
             for pattern, folder in LAYOUTS]
    for pattern, folder in tried:
        for path in Path(data).glob(pattern):
            return path.parent if "*" in pattern else path, Path(data, folder)
    looked_for = ", ".join(pattern for pattern, _ in tried[:len(LAYOUTS)])
    others = " or ".join(SPLIT_NAMES[split][1:])
    raise DataError(f"{data}: no {split} annotations here; looked for {looked_for}, also with {others} "
                    f"instead of {split}. For another layout give --train-json, --train-images, --val-json "
                    "and --val-images")


def read_sets(data, given, splits):
    """({category id: name}, {split: Split}), as far as they can be read.

    given: the four paths of `load` as {split: (json, images)}. DataError only for paths that make no sense.
    """
    if data is not None and any(path is not None for pair in given.values() for path in pair):
        raise DataError("give a data folder or the four paths (--train-json, ...), not both")
    if data is not None and not Path(data).is_dir():
        raise DataError(f'{data}: no such folder; the embedded data set is called "shapes"')
    categories, sets = {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):
        # classes are those of the training set even if only val is asked for: a model knows no others
        one = Split()
        try:
            one.path, folder = find(split, data, *given[split])
            voc = one.path.is_dir() or one.path.suffix == ".txt"
            contents = read_voc(one.path, folder, categories, one.errors) if voc else read_json(one.path)
            own = read_categories(contents, one.errors)
            categories = categories or own
            compare_categories(own, categories, one.errors)
            if split in splits and not folder.is_dir():
                raise DataError(f"{folder}: no such folder; it should hold the images")
            if split in splits:
                one.pictures = read_pictures(contents, folder, categories, one.errors, one.notes)
        except DataError as error:
            one.errors[str(error)] = []
        if split in splits or one.path:  # where there is no training set, val has its own classes
            sets[split] = one
    compare_sets(categories, sets)
    return categories, sets


def compare_sets(categories, sets):
    """Adds to the Splits what shows only when all of their pictures are known."""
    split_of = {}
    for split, one in sets.items():
        present = {label for picture in one.pictures for label in picture.labels[~picture.crowd].tolist()}
        absent = [name for label, name in enumerate(categories.values()) if label not in present]
        if one.pictures and absent:
            one.notes[f"no box of class {', '.join(absent)}"] = []
        if split == "train" and one.pictures and not present and not one.errors:
            one.errors[f"not a single usable box to train on in {len(one.pictures)} images"] = []
        for picture in one.pictures:
            if picture.path in split_of:
                one.notes[already_in(split_of[picture.path], split)].append(picture.path)
            split_of.setdefault(picture.path, split)


def already_in(home, split):
    """The kind of problem that an image is when it has been in `home` before."""
    return f"images that are in {home} already, " + ("kept" if home == split else "so val is too easy")


def load(data=None, *, train_json=None, train_images=None, val_json=None, val_images=None, size=None,
         augment="laptop", seed=0, splits=("train", "val")):
    """{"train": data set, "val": data set}, or only those that `splits` names. Raises DataError.

    data      None or "shapes": the embedded set. Else a folder in one of LAYOUTS; or give the four paths (of
              VOC, a list in ImageSets/Main or a folder of XML files takes the place of the JSON file)
    size      pixels, see make_transform. By default 96 for shapes; for folders 256, with "paper" 800
    augment   "laptop", "paper" or "none", see make_transform; not for shapes, of which there are enough
    seed      of the augmentation, and of the shapes to train on. The shapes to validate on never change: runs
              with different seeds compare.
    """
    if augment not in ("laptop", "paper", "none"):
        raise DataError(f'augment can be "laptop", "paper" or "none", not {augment!r}')
    if size is not None and size < 32 or seed < 0:
        raise DataError(f"size must be at least 32 pixels (it is {size}) and seed at least 0 (it is {seed})")
    given = {"train": (train_json, train_images), "val": (val_json, val_images)}
    explicit = any(path is not None for pair in given.values() for path in pair)
    if data in (None, "shapes") and not explicit:
        size = size or 96
        shapes = {"train": Shapes(20000, size, seed, "train"), "val": Shapes(250, size, 0, "val")}
        return {split: shapes[split] for split in splits}

    categories, sets = read_sets(data, given, splits)
    for one in sets.values():
        if one.errors:
            message, *others = to_lines(one.errors)
            more = "; python data.py lists more errors" if others else ""
            raise DataError((f"{one.path}: " if one.path else "") + message + more)
    datasets = {}
    for split in splits:
        one = sets[split]
        name = f"{one.path.stem if data is None else Path(data).resolve().name} {split}"
        notes = [f"{one.path}: {line}" for line in to_lines(one.notes)]
        datasets[split] = CocoFolder(name, one.pictures, categories, notes, split == "train", augment,
                                     size or (800 if augment == "paper" else 256), seed)
    return datasets


# ---- Check a folder ----------------------------------------------------------------------------------------
def check_files(sets):
    """Opens every image file and adds to the Splits what only the files can tell."""
    originals = {}  # fingerprint of a file: the first path it was found at, and the split
    pictures = [(split, one, picture) for split, one in sets.items() for picture in one.pictures]
    for split, one, picture in tqdm(pictures, "images", dynamic_ncols=True, leave=False, disable=None):
        try:
            load_image(picture)
        except DataError as error:
            fault = "are of another size" if isinstance(error, SizeDataError) else "cannot be used"
            one.errors[f"image files that {fault}"].append(str(error))
            continue
        with Image.open(picture.path) as raw:
            if raw.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                one.notes["photos to be turned (EXIF), used as they were annotated"].append(picture.path)
        fingerprint = hashlib.sha256(Path(picture.path).read_bytes()).digest()
        original, home = originals.setdefault(fingerprint, (picture.path, split))
        if original != picture.path:  # equal paths have been noted when they were read
            one.notes[already_in(home, split)].append(f"{picture.path} is {original}")


def summarize(pictures, classes):
    """Rows (what, number or text) about the pictures of one Split. Pixels as annotated; without crowds."""
    def spread(values):
        return f"{min(values):.0f} / {np.median(values):.0f} / {max(values):.0f}" if len(values) else "-"

    counts = [int((~picture.crowd).sum()) for picture in pictures]
    labels, boxes, areas = (np.concatenate([getattr(picture, name)[~picture.crowd] for picture in pictures])
                            for name in ("labels", "boxes_xyxy", "areas"))
    shares = np.bincount(np.digitize(areas, (32 ** 2, 96 ** 2)), minlength=3) / max(1, len(areas))
    return [
        ("images", len(pictures)),
        ("  without boxes", counts.count(0)),
        ("  boxes in one: min / median / max", spread(counts)),
        ("  width: min / median / max", spread([picture.width for picture in pictures])),
        ("  height: min / median / max", spread([picture.height for picture in pictures])),
        ("boxes", len(labels)),
        ("  width: min / median / max", spread(boxes[:, 2] - boxes[:, 0])),
        ("  height: min / median / max", spread(boxes[:, 3] - boxes[:, 1])),
        ("  area to 32 x 32 / to 96 x 96 / above", " / ".join(f"{share:.0%}" for share in shares)),
        *[(f"  {name}", (labels == label).sum()) for label, name in classes.items()],
    ]


def table(categories, sets):
    """The Splits in numbers, a column for each, as text. Of many classes it shows the most common ones."""
    counts = Counter(label for one in sets.values() for picture in one.pictures
                     for label in picture.labels[~picture.crowd].tolist())
    classes = {label: list(categories.values())[label] for label, _ in counts.most_common(15)}
    sets = {split: one for split, one in sets.items() if one.pictures}
    rows = [("", *sets)]
    for cells in zip(*(summarize(one.pictures, classes) for one in sets.values())):
        rows.append((cells[0][0], *(text for _, text in cells)))
    if len(counts) > len(classes):
        rows.append((f"  and {len(counts) - len(classes)} more classes",))
    return "\n".join(f"{what[:40]:<40}" + "".join(f"{text:>22}" for text in texts) for what, *texts in rows)


def main(argv=None):
    """Checks the data set that the command line names. Returns 1 if train.py would refuse it, else 0."""
    p = argparse.ArgumentParser(description="What is in a data set, and all that is wrong with it.")
    p.add_argument("data", nargs="?", metavar="DIR", help="folder with COCO or VOC annotations")
    for name in ("train-json", "train-images", "val-json", "val-images"):
        p.add_argument(f"--{name}", metavar="PATH", help="instead of DIR: the four paths one by one")
    args = p.parse_args(argv)
    if not any(vars(args).values()):
        p.error("which folder?")
    given = {"train": (args.train_json, args.train_images), "val": (args.val_json, args.val_images)}
    categories, sets = read_sets(args.data, given, ("train", "val"))
    check_files(sets)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    print(table(categories, sets))
    for split, one in sets.items():
        found = [f"  error: {line}" for line in to_lines(one.errors)]
        found += [f"  note: {line}" for line in to_lines(one.notes)]
        print(f"\n{split}: {one.path or 'not found'}", *found or ["  nothing wrong"], sep="\n")
    refused = any(one.errors for one in sets.values())
    print("\ntrain.py will not train on this: mend the errors and check again." if refused else
          "\nThis can be trained on.")
    return int(refused)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        sys.exit(f"data: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing was changed.")
