"""What is annotated in the images of one split, checked entry by entry, boxes cleaned.

Every format is first brought into COCO's form, a dict of three lists of dicts:

    images        id, file_name, width, height in pixels (0 or nothing: taken from the file)
    categories    id, name
    annotations   image_id, category_id, bbox [x, y, width, height] in pixels, perhaps id, area and iscrowd;
                  from_shares if it was computed from shares of the image, so that it may be tiny

For another format, `places` is a fourth list: what messages call each annotation, so that somebody finds it.
"""
import math
import os
import reprlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from support import UserError, shorten, visible
from support.images import AnnotatedImage, file_size

SMALLEST_SIDE = 0.1  # pixels; float32 arithmetic leaves nothing of a box that is thinner
CROWDED = 1000  # boxes in one image; every box needs a query, and memory grows with their square
SHARES = "boxes from 0 to 1, shares of the image as in YOLO's files; here they must be pixels"


@dataclass
class Reading:
    """What was read of the annotations of one split and what is wrong with it, {kind of problem: [places]}.

    One problem does not stop the reading, so that all can be told at once: by data.load the first error, by
    `python -m support.check_data` everything.
    """
    path: Path = None
    images: list = field(default_factory=list)  # of AnnotatedImage
    errors: dict = field(default_factory=lambda: defaultdict(list))  # need a person: not trained until mended
    notes: dict = field(default_factory=lambda: defaultdict(list))  # were dealt with, each says how
    held_out: str | None = None  # of a val that --split made: tells these images from any others


def problem_lines(problems):
    """{kind: [places]} -> a line per kind. A kind without places speaks for itself."""
    texts = [f"{kind}: {len(places)} (first: {places[0]})" if places else kind
             for kind, places in problems.items()]
    return [shorten(visible(text), 500) for text in texts]


def is_whole(value):
    return type(value) is int and abs(value) < 2 ** 53  # not isinstance: True is an int as well


def is_shares(numbers):
    """Whether these are shares of the image and not pixels; a little beyond 0 and 1 is rounding."""
    return all(-0.01 <= v <= 1.01 for v in numbers) and any(v != round(v) for v in numbers)


def index_by_id(entries, what, errors):
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


def read_categories(contents, reading):
    """{category id: name} sorted by id: the position is the class index that models see."""
    categories = index_by_id(contents["categories"], "category", reading.errors)
    if not contents["categories"]:
        reading.errors["the list of categories is empty"] = []
    names = {}
    for i in sorted(categories):
        name = categories[i].get("name")
        if not (isinstance(name, str) and name.strip()):
            reading.notes["categories without a name, called by their id"].append(f"category id {i}")
            name = str(i)
        names[i] = visible(name)
    counts = Counter(names.values())
    for i, name in names.items():
        if counts[name] > 1:
            reading.notes["categories of the same name, kept apart"].append(f"category id {i}: {name}")
    return names


def compare_categories(own, categories, errors):
    """The same id must mean the same class in both files, and val may have no class that was not trained."""
    for i, name in own.items():
        if categories.get(i) != name:
            known = f"is {categories[i]!r}" if i in categories else "does not exist"
            errors["categories that differ from those of the training set"].append(
                f"id {i} is {name!r}, in train it {known}")


def read_images(contents, folder, errors):
    """{image id: (file, height, width)}; None for an image that cannot be used, its error being noted.

    Every file must exist. Sizes that the annotations lack come from the files.
    """
    images = {}
    for i, entry in index_by_id(contents["images"], "image", errors).items():
        images[i] = None
        name, height, width = (entry.get(key) for key in ("file_name", "height", "width"))
        file = os.path.join(folder, name) if isinstance(name, str) else None
        if file and "\\" in name and not os.path.isfile(file):
            file = os.path.join(folder, name.replace("\\", "/"))  # written on Windows
        if file is None:
            errors["images without a file_name"].append(f"image id {i}")
        elif not os.path.isfile(file):
            errors["image files that do not exist"].append(f"{file}, image id {i}")
        elif not (height and width):
            try:
                images[i] = file, *file_size(file, i)
            except UserError as error:
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
    if is_shares(bbox) and not entry.get("from_shares"):
        return SHARES, bbox
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


def is_crowd(entry, where, notes):
    """One box around many objects, which COCO marks with 1."""
    value = entry.get("iscrowd")
    if value not in (1, "1", 0, "0", "", None):
        kind = "iscrowd (VOC: difficult) is neither 0 nor 1, taken as 0"
        notes[kind].append(f"{where}: {reprlib.repr(value)}")
    return value in (1, "1")


def describe(contents, k, images):
    """What messages call the annotation at index k, so that somebody finds it again."""
    if "places" in contents:
        return contents["places"][k]
    entry = contents["annotations"][k]
    # ids of annotations serve messages only, so one without is as good
    name = f"annotation id {entry['id']}" if is_whole(entry.get("id")) else f"annotation number {k + 1}"
    image = images.get(entry["image_id"]) if is_whole(entry.get("image_id")) else None
    return f"{os.path.basename(image[0])}, image id {entry['image_id']}, {name}" if image else name


def read_objects(contents, images, categories, reading):
    """{image id: [(label, box xyxy, area, crowd)]} of all boxes that can be used."""
    label_of = {category_id: label for label, category_id in enumerate(categories)}
    with_id = [entry for entry in contents["annotations"] if entry.get("id") is not None]
    index_by_id(with_id, "annotation", reading.errors)
    objects, seen, beyond = defaultdict(list), set(), 0
    for k, entry in enumerate(contents["annotations"]):
        where = describe(contents, k, images)
        fault, value = find_fault(entry, images, label_of)
        if fault:
            reading.errors[fault].append(f"{where}: {reprlib.repr(value)}")
            continue
        image_id, label = entry["image_id"], label_of[entry["category_id"]]
        if images[image_id] is None:
            continue
        box, problem = clean_box(entry["bbox"], *images[image_id][1:])
        if problem:
            reading.notes[problem].append(where)
            beyond += "image" in problem
        if box is None:
            continue
        if (image_id, label, box) in seen:
            reading.notes["boxes given more than once, with the same class, kept"].append(where)
        seen.add((image_id, label, box))
        crowd = is_crowd(entry, where, reading.notes)
        if crowd:
            reading.notes["crowd regions (VOC: difficult), neither trained on nor evaluated"].append(where)
        area, whole_box = entry.get("area"), (box[2] - box[0]) * (box[3] - box[1])
        if area is not None and not (type(area) in (int, float) and 0 < area < math.inf):
            reading.notes["areas that are not numbers above 0, those of the boxes are used"].append(where)
            area = None
        area = whole_box if area is None else min(area, whole_box)  # it may not have been clipped
        objects[image_id].append((label, box, area, crowd))
    if beyond > max(2, len(contents["annotations"]) / 2):
        reading.notes["most boxes reach over the edge of their image or lie outside: are they written in "
                      "another way (COCO's is x, y, width, height), or was the image larger?"] = []
    return objects


def read_annotated_images(contents, folder, categories, reading):
    """An AnnotatedImage for every image that can be used. What is wrong is added to `reading`."""
    images = read_images(contents, folder, reading.errors)
    objects = read_objects(contents, images, categories, reading)
    annotated_images = []
    for image_id, (file, height, width) in ((i, image) for i, image in images.items() if image):
        columns = zip(*objects[image_id]) if objects[image_id] else [(), (), (), ()]
        labels, boxes, areas, crowd = map(np.array, columns, (np.int64, np.float32, float, bool))
        annotated_images.append(AnnotatedImage(
            image_id, file, height, width, labels, boxes.reshape(-1, 4), areas, crowd))
        where = f"{os.path.basename(file)}, image id {image_id}"
        if len(labels) == 0:
            reading.notes["images without boxes, kept"].append(where)
        if len(labels) > CROWDED:
            kind = f"images with more than {CROWDED} boxes, kept; a model needs as many queries"
            reading.notes[kind].append(f"{where}: {len(labels)}")
    return annotated_images
