"""COCO's annotation files, checked entry by entry, boxes cleaned. Other formats are turned into this one."""
import json
import os
import reprlib
from collections import defaultdict

import numpy as np

from support.images import AnnotatedImage, DataError, file_size

SMALLEST_SIDE = 0.1  # pixels; float32 arithmetic leaves nothing of a box that is thinner


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


def is_whole(value):
    return type(value) is int and abs(value) < 2 ** 53  # not isinstance: True is an int as well


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


def read_categories(contents, errors):
    """{category id: name} sorted by id: the position is the class index that models see."""
    categories = index_by_id(contents["categories"], "category", errors)
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
    for i, entry in index_by_id(contents["images"], "image", errors).items():
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


def describe(entry, k, images):
    """What messages call the annotation at index k, so that somebody finds it again."""
    if isinstance(entry.get("place"), str):  # of read_voc
        return entry["place"]
    # ids of annotations serve messages only, so one without is as good
    name = f"annotation id {entry['id']}" if is_whole(entry.get("id")) else f"annotation number {k + 1}"
    image = images.get(entry["image_id"]) if is_whole(entry.get("image_id")) else None
    return f"{os.path.basename(image[0])}, image id {entry['image_id']}, {name}" if image else name


def read_annotated_images(contents, folder, categories, errors, notes):
    """An AnnotatedImage for every usable image, its boxes cleaned. Adds to a Reading's `errors` and `notes`."""
    images = read_images(contents, folder, errors)
    label_of = {category_id: label for label, category_id in enumerate(categories)}
    with_id = [entry for entry in contents["annotations"] if entry.get("id") is not None]
    index_by_id(with_id, "annotation", errors)
    objects, seen = defaultdict(list), set()
    for k, entry in enumerate(contents["annotations"]):
        where = describe(entry, k, images)
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
    annotated_images = []
    for image_id, (file, height, width) in ((i, image) for i, image in images.items() if image):
        columns = zip(*objects[image_id]) if objects[image_id] else [(), (), (), ()]
        labels, boxes, areas, crowd = map(np.array, columns, (np.int64, np.float32, float, bool))
        annotated_images.append(AnnotatedImage(
            image_id, file, height, width, labels, boxes.reshape(-1, 4), areas, crowd))
        if len(labels) == 0:
            notes["images without boxes, kept"].append(f"{os.path.basename(file)}, image id {image_id}")
    return annotated_images
