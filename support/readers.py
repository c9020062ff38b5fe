"""Reads the annotations of one split: read_coco, read_voc, read_yolo.

Each takes `reading`, the split (layouts.py), and `known`, the classes of train. It yields the classes of the
split, {category id: name}, and then image after image, so nobody waits for images that are not needed:
(id, path, height, width), [(category id, (x0, y0, x1, y1), area, crowd, where this is written), ...]
Numbers are as they are written; the path is None if there is no such file. See clean in images.py.
"""
import contextlib
import gc
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml
from pycocotools import mask

from support import UserError, reason, visible
from support.images import IMAGE_SUFFIXES, OTHER_SUFFIXES, number

MOST_TEXT, MOST_JSON = 10 ** 8, 5 * 10 ** 9  # bytes
FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd", "id", "from_outline")  # of COCO's annotations
OTHER_FORMS = {  # a key that JSON files of other forms have: whose form that is
    "caption": "captions, take instances_*.json", "segments_info": "panoptic, take instances_*.json",
    "shapes": "labelme's file of one image", "assets": "VoTT's own form", "asset": "VoTT's own form",
    "_via_settings": "a project of VIA", "regions": "VIA's own form", "objects": "Supervisely's form",
    "items": "Datumaro's own form", "data": "Label Studio's own form", "score": "a file of results",
    "annotator": "Label Studio's own form", "image": "CreateML's form",
}
NO_LABELS = re.compile(r"(?i)(classes|readme|predefined|train|training|val|valid|validation|test|images)\b")


def key_of(name):
    """The same for all spellings of a path: capitals, and accents in one character or in two."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def read_text(path, most=MOST_TEXT, as_bytes=False):
    """A text file in UTF-8, or in UTF-16 with its mark. UserError, without the path."""
    if not os.path.isfile(path):
        raise UserError("is not a file" if os.path.exists(path) else "does not exist")
    if os.path.getsize(path) > most:
        raise UserError(f"has {os.path.getsize(path) / 1e9:.1f} GB: too large for such a file")
    content = Path(path).read_bytes()
    if content.startswith(b"version https://git-lfs"):
        raise UserError("is a pointer of Git LFS, not the file itself: run git lfs pull")
    try:
        return content if as_bytes else content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        raise UserError("is not in UTF-8: unpack it, or save it as UTF-8 in an editor") from None


# ---- Classes -----------------------------------------------------------------------------------------------
def join_names(names, own, reading):
    """{own id: id in names}. Classes are the same if their names are; `names` gets those that it lacks."""
    ids, before = {}, dict(names)
    id_of = {name: i for i, name in before.items()}
    spelling = {key_of(name): name for name in id_of}
    for i, name in own.items():
        ids[i] = i if before.get(i) == name else id_of.get(name)
        if ids[i] is None:
            ids[i] = i if i not in names else max(names) + 1
            names[ids[i]] = name
            if (known := spelling.setdefault(key_of(name), name)) in id_of:
                reading.errors.add("classes written in another way than in train", f"{name!r}, {known!r}")
            elif known != name:
                reading.notes.add("classes that differ only in capitals, kept apart", f"{known}, {name}")
            elif before:
                reading.notes.add("classes that train does not have", name)
        elif ids[i] != i:
            kind = "classes with another id than in train, matched by name"
            reading.notes.add(kind, f"{name}, {i} and {ids[i]}")
    if before and not id_of.keys() & own.values():
        reading.errors.add(f"none of train's classes is here: {', '.join(id_of)}")
    return ids


# ---- COCO --------------------------------------------------------------------------------------------------
def compact(entry):
    """A JSON object; an annotation as a tuple of FIELDS, which is small. A missing box is computed."""
    if "image_id" not in entry or "category_id" not in entry:
        return entry
    box, outline = entry.get("bbox"), entry.get("segmentation")
    if outline and (not box or isinstance(box, list) and box[2:] == [0, 0]):
        with contextlib.suppress(Exception):  # then there is no box, and that is an error later
            if isinstance(outline, dict):  # a mask, its counts as a text or as a list
                packed = isinstance(outline["counts"], str)
                outline = outline if packed else mask.frPyObjects(outline, *outline["size"])
                entry["bbox"] = mask.toBbox(outline).tolist()
            else:
                polygons = outline if isinstance(outline[0], list) else [outline]
                points = np.concatenate(polygons).reshape(-1, 2)
                entry["bbox"] = [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]
            entry["from_outline"] = True
    return tuple(map(entry.get, FIELDS))


def parse_coco(path):
    """A COCO file as a dict, its annotations as tuples. UserError, without the path."""
    text = read_text(path, MOST_JSON)
    gc.disable()  # it would look through millions of new objects again and again: a fifth of the time
    try:
        contents = json.loads(text, object_hook=compact)
    except (ValueError, RecursionError) as error:  # ValueError: with line and column
        raise UserError(f"cannot be read as JSON: {error}" if text.strip() else "is empty") from None
    finally:
        gc.enable()
    kinds = {"images": dict, "categories": dict, "annotations": tuple}  # captions are no tuples
    if not (isinstance(contents, dict) and all(isinstance(contents.get(key), list) and {
            *map(type, contents[key])} <= {kind} for key, kind in kinds.items())):
        guess = next((f"; this is {form}" for key, form in OTHER_FORMS.items() if f'"{key}"' in text), "")
        raise UserError("is no COCO file of objects, which has the lists images, categories and annotations, "
                        f"these with image_id and category_id{guess}. Export the data as COCO")
    return contents


def as_id(value):
    """An id as a whole number if it is one, also as "1" or 1.0, otherwise as it is."""
    whole = isinstance(value, str) and value.isdecimal() or isinstance(value, float) and value.is_integer()
    return int(value) if whole else value


def by_id(entries, what, told_by, reading):
    """({id: entry}, {id: whole number}), which is the id or, for a text, its place in the list."""
    found = {}
    for entry in entries:
        i = as_id(entry.get("id"))
        if found.setdefault(i, entry).get(told_by) != entry.get(told_by):
            reading.errors.add(f"{what} ids that occur twice", f"{what} id {i}")
        if not isinstance(entry.get("id"), int):
            reading.notes.add(f"{what} ids that are text or fractions, read as numbers", repr(i))
    return found, {i: i if isinstance(i, int) else k for k, i in enumerate(found, 1)}


def read_coco(reading, known):
    """See the top of this file."""
    contents = parse_coco(reading.path)
    found, classes = by_id(contents["categories"], "category", "name", reading)
    yield {classes[i]: visible(str(entry.get("name") or "").strip()) or str(i) for i, entry in found.items()}

    found, ids = by_id(contents["images"], "image", "file_name", reading)
    annotations, of_image = contents.pop("annotations"), defaultdict(list)  # {image id: its annotations}
    for annotation in annotations:
        of_image[as_id(annotation[0])].append(annotation)
    if others := len(annotations) - len({entry[5] for entry in annotations if type(entry[5]) is int}):
        reading.notes.add(f"annotation ids that are missing, text or given twice, not used: {others}")
    del annotations
    for i, entry in found.items():
        file, boxes = str(entry.get("file_name") or entry.get("coco_url") or ""), []  # LVIS has the second
        path = reading.find_image(file, f"image id {i}")
        for image_id, category_id, bbox, area, crowd, k, computed in of_image.pop(i, ()):
            where = f"{file}, image id {image_id}, annotation id {k}"
            category = classes.get(as_id(category_id))
            box = [number(value) for value in bbox] if isinstance(bbox, list) else []
            if category is None:
                reading.errors.add("category_id not among the categories", f"{where}: {category_id}")
            elif len(box) != 4 or None in box:
                reading.errors.add("annotations whose bbox is not four numbers", f"{where}: {bbox!r}")
            else:
                x, y, w, h = box
                boxes.append((category, (x, y, x + w, y + h), number(area), crowd, where))
                if computed:
                    reading.notes.add("boxes computed from outlines, because there is no bbox", where)
        yield (ids[i], path, entry.get("height"), entry.get("width")), boxes
    for image_id, lost in of_image.items():
        where = f"annotation id {lost[0][5]}: {image_id}"
        reading.errors.add("annotations whose image_id is not among the images", where, len(lost))


# ---- VOC ---------------------------------------------------------------------------------------------------
def read_xml(path):
    """The root of a VOC file. UserError, without the path."""
    try:
        root = ElementTree.fromstring(read_text(path, as_bytes=True))
    except (ValueError, LookupError, SyntaxError) as error:  # the first two: an encoding such as GBK
        read_text(path)  # its message is better if the file is not in UTF-8
        raise UserError(f"cannot be read: {reason(error)}; expected UTF-8, also in its first line") from None
    if root.tag != "annotation":
        raise UserError("is in CVAT's own form: export as COCO 1.0 or Pascal VOC 1.1"
                        if root.tag == "annotations" else f"has no VOC annotations, but <{root.tag}>")
    return root


def voc_files(reading):
    """{path below their folder, without ending: XML file} of a folder, or of a list with a name a line."""
    folder, listed = reading.path, not os.path.isdir(reading.path)
    if listed:
        above = [str(place) for place in Path(folder).parents[:3]]
        likely = [os.path.join(place, name) for place in above for name in ("Annotations", "annotations")]
        folder = next(filter(os.path.isdir, likely), above[-1])
    found = chosen = {key_of(xml[len(folder) + 1:-4]): xml for xml in reading.tree.inside(folder, ".xml")}
    if listed:
        chosen, known = {}, {os.path.basename(key): key for key in found} | {key: key for key in found}
        for line in read_text(reading.path).splitlines():
            line = line.strip().strip('"')  # Datumaro puts names with spaces in quotes, VoTT writes a.jpg 1
            keys = [key_of(name) for name in (line, os.path.splitext(line)[0], line.split(" ")[0])]
            if line and line[0] != "#":
                key = next((known[key] for key in keys if key in known), line)
                chosen[key] = found.get(key)
    if not any(chosen.values()):
        raise UserError(f"no {'name in this list has an XML file' if listed else 'XML files'} in {folder}")
    return chosen


def voc_image(stem, name, times, reading):
    """The image of a VOC file: its <filename>, which so many files have, or the one called like the file."""
    def at(name):
        paths = (os.path.join(place, inside, name) for inside in (os.path.dirname(stem), "")
                 for place in reading.places)
        return next(filter(None, map(reading.tree.find, paths)), None) if name else None

    named, alike = at(name) or at(re.split(r"[\\/]", name)[-1]), at(os.path.basename(stem))
    used = named if named and (times == 1 or not alike) else alike
    if name and alike and named != alike:
        kind = "XML files whose <filename> is not the image called like them"
        reading.notes.add(kind, f"{stem}.xml: {name}, {used} is used")
    return used or reading.find_image(name or stem, f"{stem}.xml")


def read_voc(reading, known):
    """See the top of this file. Boxes are as they are written; classes that are `known` keep their ids."""
    def text(element, tag):
        return visible((element.findtext(tag) or "").strip())

    files = {}  # {path below the folder, without ending: (XML file, <filename>, size, objects)}
    for stem, xml in voc_files(reading).items():
        if not xml:  # Datumaro and CVAT write none
            reading.notes.add("listed images without an XML file, taken as images without objects", stem)
        try:
            root = read_xml(xml) if xml else ElementTree.Element("annotation")
        except UserError as error:
            reading.errors.add("XML files that cannot be used", f"{xml} {error}")
            continue
        objects = [(text(thing, "name"), text(thing, "difficult"),
                    [text(thing, f"bndbox/{side}") for side in ("xmin", "ymin", "xmax", "ymax")])
                   for thing in root.findall("object")]
        size = text(root, "size/height"), text(root, "size/width")
        files[stem] = xml, text(root, "filename"), size, objects
    all_objects = [thing for *_, objects in files.values() for thing in objects]
    starts = [number(corner) for _, _, corners in all_objects for corner in corners[:2]]
    reading.from_zero = any(value is not None and 0 <= value < 1 for value in starts)
    new = sorted({name for name, _, _ in all_objects} - {"", *known.values()})
    names = known | dict(enumerate(new, max(known, default=0) + 1))
    yield names

    id_of, times = {name: i for i, name in names.items()}, Counter(name for _, name, _, _ in files.values())
    for i, (stem, (xml, name, size, objects)) in enumerate(files.items(), 1):
        boxes = []
        for k, (category, difficult, corners) in enumerate(objects, 1):
            where, box = f"{xml}, object {k}", [number(corner) for corner in corners]
            if not category or None in box:
                lacks = "four numbers xmin, ymin, xmax, ymax" if category else "name"
                reading.errors.add(f"objects without {lacks}", f"{where}: {', '.join(corners)}")
            else:
                boxes.append((id_of[category], box, None, difficult, where))
        yield (i, voc_image(stem, name, times[name], reading), *size), boxes


# ---- YOLO --------------------------------------------------------------------------------------------------
def read_config(path):
    """data.yaml, darknet's obj.data or a file with a class in each line, as a dict of texts."""
    text = read_text(path)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if path.lower().endswith(".data"):
        return dict(re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if "=" in line)
    if not path.lower().endswith((".yaml", ".yml")):
        return {"names": lines}
    try:
        contents = yaml.load(text, yaml.BaseLoader)  # safe_load would read the class "no" as False
    except yaml.YAMLError as error:
        raise UserError(f"cannot be read as YAML: {error}") from None
    if not isinstance(contents, dict):
        raise UserError("should have lines such as train: images/train and names: [cat, dog]")
    return contents


def read_classes(config, path, tree):
    """{class id: name} of what read_config returns."""
    names, count = config.get("names"), int(number(config.get("nc")) or 0)
    if isinstance(names, str) and names:
        names = read_config(locate("names", names, config, path, tree))["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names or map(str, range(count)))
    found = {as_id(i): name for i, name in pairs}
    if not found or not all(type(i) is int and isinstance(name, str) for i, name in found.items()):
        raise UserError("names should be a list such as [cat, dog] or numbered such as {0: cat, 1: dog}, "
                        f"it is {names!r}")
    return {i: visible(name.strip() or str(i)) for i, name in sorted(found.items())}


def locate(key, value, config, path, tree):
    """The folder or file that data.yaml names, or as much of its path as there is next to data.yaml."""
    folder, root = os.path.dirname(path), config.get("path", "")
    if not isinstance(value, str) or not isinstance(root, str):
        raise UserError(f"{key} should be a path or a list of paths, it is {value!r}")
    value, root = value.replace("\\", "/"), root.replace("\\", "/")
    parts = [part for part in os.path.join(root, value).split("/") if part not in ("", ".", "..")]
    for tail in (os.path.join(root, value), value, *("/".join(parts[k:]) for k in range(len(parts)))):
        place = os.path.normpath(os.path.join(folder, tail))
        found = place if os.path.exists(place) else tree.folders.get(key_of(place)) or tree.find(place)
        if found and not folder.startswith(place.rstrip(os.sep) + os.sep):  # train: / would search the disk
            return found
    more = {"names": "; classes are a list such as [cat, dog]", "val": "; without a val, add --split 0.2"}
    raise UserError(f"{key}: {value} does not exist; paths are relative to this file{more.get(key, '')}")


def yolo_files(reading):
    """The images in the folders and lists that are a split."""
    found = []
    for place in reading.places:
        if os.path.isdir(place):
            others = [path for path in reading.tree.inside(place, *OTHER_SUFFIXES)
                      if labels_of(path, reading.tree)]
            found += sorted(reading.tree.inside(place, *IMAGE_SUFFIXES) + others)
        else:
            homes = [os.path.dirname(place), os.path.dirname(reading.path)]
            lines = filter(None, map(str.strip, read_text(place).splitlines()))
            found += filter(None, (reading.find_image(line, f"in {place}", homes) for line in lines))
    if not found and not reading.errors:
        raise UserError(f"no images in {', '.join(reading.places)}")
    return found


def labels_of(image, tree):
    """The label file of an image: in labels/ in place of images/, next to it, or in labels/ next to that."""
    *parts, name = (os.path.splitext(image)[0] + ".txt").split(os.sep)
    places = [[*parts[:k], "labels", *parts[k + 1:]] for k in reversed(range(len(parts)))
              if parts[k].lower() in ("images", "jpegimages", "data")]
    places += [parts, [*parts[:-1], "labels", *parts[-1:]], [*parts[:-1], "labels"]]
    return next((path for place in places if (path := tree.find(os.sep.join([*place, name])))), None)


def read_labels(path, keypoints, reading):
    """Yields (class id, (x0, y0, x1, y1) as shares of the image, place) of a label file; path may be None."""
    lines = []
    try:
        lines = read_text(path).splitlines() if path else []
    except UserError as error:
        reading.errors.add("label files that cannot be read", f"{path}: {error}")
    for k, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, (label, *corners) = f"{path}, line {k}", map(number, line.split()[:5 if keypoints else None])
        fault = ("label lines with more than numbers" if None in (label, *corners) else
                 "label lines that are neither class, x, y, width, height nor a class and a polygon"
                 if len(corners) < 4 or len(corners) % 2 else
                 "labels that are not shares of the image, from 0 to 1: pixels? keypoints, and no kpt_shape?"
                 if max(map(abs, corners)) >= 2 else None)
        if fault:
            reading.errors.add(fault, f"{where}: {line!r}")
        elif len(corners) == 4:
            x, y, w, h = corners
            yield label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2), where
        else:
            reading.notes.add("polygons, the boxes around them are used", where)
            xs, ys = corners[::2], corners[1::2]
            yield label, (min(xs), min(ys), max(xs), max(ys)), where


def read_yolo(reading, known):
    """See the top of this file."""
    config = read_config(reading.path)
    names = read_classes(config, reading.path, reading.tree)
    yield names

    used, places = {}, {}  # {label file: image}, {class id: its first place}
    for i, path in enumerate(yolo_files(reading), 1):
        labels, boxes = labels_of(path, reading.tree), []
        if labels is None:
            reading.notes.add("images without a label file, taken as images without objects", path)
        elif labels in used:
            reading.notes.add("images that share a label file, kept; masks?", f"{used[labels]}, {path}")
        used[labels] = path
        for label, box, where in read_labels(labels, "kpt_shape" in config, reading):
            places.setdefault(label, where)
            if label in names:
                boxes.append((label, box, None, None, where))
        yield (i, path, None, None), boxes
    if unknown := [label for label in places if label not in names]:
        kind = f"labels whose class id is not among the {len(names)} names"
        if unknown == [len(names)] and 0 not in places:
            kind += "; they seem to count from 1, and YOLO counts from 0"
        reading.errors.add(kind, f"{places[unknown[0]]}: {unknown[0]:g}", len(unknown))
    if {*used} == {None}:
        raise UserError(f"no image has labels; {used[None]} has no .txt next to it or in labels/ for images/")
    homes = {os.path.dirname(labels): os.path.dirname(image) for labels, image in used.items() if labels}
    for labels in {*reading.tree.files.values()} - {*used}:
        folder, name = os.path.split(os.path.splitext(labels)[0])
        if folder in homes and labels.lower().endswith(".txt") and not NO_LABELS.match(name) \
                and not reading.tree.find(os.path.join(homes[folder], name)):
            reading.notes.add("label files without an image, not used", labels)


READERS = {"COCO": read_coco, "VOC": read_voc, "YOLO": read_yolo}
