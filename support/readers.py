"""The three readers. Each turns the annotations of one split into a Table with boxes in pixels.

`known` are the classes of train, {id: name}. Without `wanted` only the classes are read.
"""
import contextlib
import json
import os
import re
import reprlib
from collections import Counter
from xml.etree import ElementTree

import numpy as np
import yaml
from pycocotools import mask

from support import UserError, reason, visible
from support.data_files import Source, Table, image_row, key_of, number, read_text
from support.images import IMAGE_SUFFIXES, OTHER_SUFFIXES

MOST_JSON = 5 * 10 ** 9  # bytes
FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd", "id", "from_outline")  # of COCO's annotations
OTHER_FORMS = {  # a key that JSON files of other forms have: whose form that is
    "caption": "captions, take instances_*.json", "segments_info": "panoptic, take instances_*.json",
    "shapes": "labelme's file of one image", "assets": "VoTT's own form", "asset": "VoTT's own form",
    "_via_settings": "a project of VIA", "regions": "VIA's own form", "objects": "Supervisely's form",
    "items": "Datumaro's own form", "data": "Label Studio's own form", "score": "a file of results",
    "image": "CreateML's form",
}
NO_LABELS = re.compile(r"(?i)(classes|readme|predefined|train|training|val|valid|validation|test|images)\b.*")


# ---- COCO --------------------------------------------------------------------------------------------------
def compact(entry):
    """A JSON object; an annotation as a tuple of FIELDS, which is small. A missing box is computed."""
    if "image_id" not in entry or "category_id" not in entry:
        return entry
    box, outline = entry.get("bbox"), entry.get("segmentation")
    if outline and (not box or isinstance(box, list) and box[2:] == [0, 0]):
        with contextlib.suppress(Exception):  # then there is no box, and that is an error later
            entry["bbox"], entry["from_outline"] = box_around(outline), True
    return tuple(map(entry.get, FIELDS))


def box_around(outline):
    """COCO's [x, y, width, height] around polygons or a mask."""
    if isinstance(outline, dict):
        plain = isinstance(outline["counts"], list)
        return mask.toBbox(mask.frPyObjects(outline, *outline["size"]) if plain else outline).tolist()
    points = np.concatenate(outline if isinstance(outline[0], list) else [outline]).reshape(-1, 2)
    return [*points.min(0).tolist(), *np.ptp(points, 0).tolist()]


def parse_coco(path):
    """A COCO file as a dict, its three lists checked to be lists of objects. UserError, without the path."""
    text = read_text(path, MOST_JSON)
    try:
        contents = json.loads(text, object_hook=compact)
    except (ValueError, RecursionError) as error:  # ValueError: it says line and column
        raise UserError("is empty" if not text.strip() else f"cannot be read as JSON: {error}") from None
    lists = [contents.get(key) if isinstance(contents, dict) else None
             for key in ("images", "categories", "annotations")]
    are_lists = all(isinstance(one, list) and all(isinstance(e, (dict, tuple)) for e in one) for one in lists)
    if not are_lists or any("caption" in entry or "segments_info" in entry for entry in lists[2][:1]):
        guess = next((f"; this is {form}" for key, form in OTHER_FORMS.items() if f'"{key}"' in text), "")
        raise UserError("is no COCO file of objects, which has the lists images, annotations and categories"
                        f"{guess}. Export the data as COCO")
    contents["annotations"] = [entry if isinstance(entry, tuple) else tuple(map(entry.get, FIELDS))
                               for entry in lists[2]]
    return contents


def as_id(value):
    """An id as a whole number if it says one ("1", 1.0), another text as it is, otherwise None."""
    if isinstance(value, str) and value.isdecimal() or isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int or isinstance(value, str) and value else None


def by_id(entries, what, told_by, reading):
    """({id: entry}, {id: whole number below 2**63}), which is the id if all of them are such numbers."""
    found = {}
    for k, entry in enumerate(entries):
        i = as_id(entry.get("id"))
        if i is None:
            where = f"{what} number {k + 1}: {reprlib.repr(entry.get('id'))}"
            reading.errors.add(f"{what} ids that are not whole numbers", where)
        elif found.setdefault(i, entry).get(told_by) != entry.get(told_by):
            reading.errors.add(f"{what} ids that occur twice", f"{what} id {i}")
        elif type(entry["id"]) is not int:
            reading.notes.add(f"{what} ids that are text or fractions, read as numbers", repr(entry["id"]))
    if not entries:
        reading.errors.add(f"the list of {what} entries is empty")
    whole = all(type(i) is int and abs(i) < 2 ** 63 for i in found)
    return found, {i: i if whole else k for k, i in enumerate(found, 1)}


def read_coco(source, tree, reading, known, wanted):
    """The Table of a COCO file; without images and boxes unless they are wanted."""
    contents = parse_coco(source.path)
    found, whole = by_id(contents["categories"], "category", "name", reading)
    table, category_of = Table({}), {i: k for k, i in enumerate(found)}
    for i, entry in found.items():
        table.names[whole[i]] = visible(str(entry.get("name") or "").strip()) or str(i)
    if not wanted:
        return table
    found, id_of = by_id(contents["images"], "image", "file_name", reading)
    for i, entry in found.items():
        name = entry.get("file_name") or entry.get("coco_url")  # LVIS has the second
        path = tree.image(name, source, reading, f"image id {i}") if name else \
            reading.errors.add("images without a file_name", f"image id {i}")
        size = entry.get("height"), entry.get("width")
        table.images.append(path and image_row(id_of[i], path, *size, reading))

    index, annotations = {i: k for k, i in enumerate(found)}, contents.pop("annotations")
    if others := len(annotations) - len({entry[5] for entry in annotations if type(entry[5]) is int}):
        reading.notes.add(f"annotation ids that are missing, text or given twice, not used: {others}")

    def where(place):
        image_id, i, k = place
        row = table.images[index[as_id(image_id)]] if as_id(image_id) in index else None
        name = f"annotation number {k + 1}" if i is None else f"annotation id {i}"
        return f"{os.path.basename(row[1])}, image id {image_id}, {name}" if row else name

    table.where = where
    for k, (image_id, category_id, bbox, area, crowd, i, computed) in enumerate(annotations):
        image = index.get(image_id if type(image_id) is int else as_id(image_id))
        category = category_of.get(category_id if type(category_id) is int else as_id(category_id))
        box = [number(v) for v in bbox] if isinstance(bbox, list) and len(bbox) == 4 else [None]
        place = image_id, i, k
        if image is None or category is None or None in box:
            kind, value = (("image_id is not among the images", image_id) if image is None else
                           ("category_id is not among the categories", category_id) if category is None else
                           ("bbox is not four numbers", bbox))
            reading.errors.add(f"annotations whose {kind}", f"{where(place)}: {reprlib.repr(value)}")
            continue
        x, y, w, h = box
        table.add(image, category, (x, y, x + w, y + h), place, area, crowd)
        if computed:
            reading.notes.add("boxes computed from outlines, because there is no bbox", where(place))
    return table


# ---- VOC ---------------------------------------------------------------------------------------------------
def read_xml(path):
    """The root of a VOC file. UserError, without the path."""
    try:
        root = ElementTree.fromstring(read_text(path, as_bytes=True))
    except (ValueError, LookupError, SyntaxError) as error:  # LookupError: unknown encoding
        read_text(path)  # that it is not in UTF-8 says more
        raise UserError(f"cannot be read: {reason(error)}") from None
    if root.tag != "annotation":
        raise UserError("is in CVAT's own form: export as COCO 1.0 or Pascal VOC 1.1"
                        if root.tag == "annotations" else f"has no VOC annotations, but <{root.tag}>")
    return root


def voc_files(source, tree):
    """{path below their folder, without ending: XML file} of a folder, or of a list with a name a line."""
    folder, listed = source.path, not os.path.isdir(source.path)
    if listed:
        above = [source.path.rsplit(os.sep, k)[0] for k in (1, 2, 3)]
        likely = [os.path.join(place, name) for place in above for name in ("Annotations", "annotations")]
        folder = next(filter(os.path.isdir, likely), above[-1])
    found = {key_of(xml[len(folder) + 1:-4]): xml for xml in tree.inside(folder, ".xml")}
    if not found:
        raise UserError(f"no XML files in {folder}")
    if not listed:
        return found
    bare, chosen = {os.path.basename(key): key for key in found}, {}
    for line in read_text(source.path).splitlines():
        line = line.strip().strip('"')  # Datumaro puts names with spaces in quotes, VoTT writes a.jpg 1
        names = [key_of(name) for name in (line, os.path.splitext(line)[0], line.split(" ")[0])]
        key = next((bare.get(name, name) for name in names if name in found or name in bare), line)
        if line and line[0] != "#":
            chosen[key] = found.get(key)
    if not any(chosen.values()):
        raise UserError(f"no name in this list has an XML file in {folder}")
    return chosen


def voc_image(stem, name, times, source, tree, reading):
    """The image of a VOC file: its <filename>, which so many files have, or the one called like the file."""
    def at(name):
        paths = (os.path.join(place, inside, name) for inside in (os.path.dirname(stem), "")
                 for place in source.places)
        return next(filter(None, map(tree.find, paths)), None) if name else None

    named, alike = at(name) or at(re.split(r"[\\/]", name)[-1]), at(os.path.basename(stem))
    used = named if named and (times == 1 or not alike) else alike
    if name and alike and named != alike:
        kind = "XML files whose <filename> is not the image called like them"
        reading.notes.add(kind, f"{stem}.xml: {name}, {used} is used")
    return used or tree.image(name or stem, source, reading, f"{stem}.xml")


def read_voc(source, tree, reading, known, wanted):
    """The Table of VOC's XML files, boxes as they are written. Classes that are `known` keep their ids."""
    def text(element, tag):
        return visible((element.findtext(tag) or "").strip())

    roots = {}  # {path below the folder, without ending: (XML file, root)}
    for stem, xml in voc_files(source, tree).items():
        if not xml:  # Datumaro and CVAT write none
            reading.notes.add("listed images without an XML file, taken as images without objects", stem)
        try:
            roots[stem] = xml, read_xml(xml) if xml else ElementTree.Element("annotation")
        except UserError as error:
            reading.errors.add("XML files that cannot be used", f"{xml} {error}")
    times = Counter(text(root, "filename") for _, root in roots.values())
    names = {text(thing, "name") for _, root in roots.values() for thing in root.findall("object")}
    new = sorted(names - {"", *known.values()})
    table = Table(known | dict(enumerate(new, max(known, default=0) + 1)), from_one=True,
                  where="{0[0]}, object {0[1]}".format)
    category_of = {name: k for k, name in enumerate(table.names.values())}
    for i, (stem, (xml, root)) in enumerate(roots.items() if wanted else ()):
        name = text(root, "filename")
        path = voc_image(stem, name, times[name], source, tree, reading)
        size = text(root, "size/height"), text(root, "size/width")
        table.images.append(path and image_row(i + 1, path, *size, reading))
        for k, thing in enumerate(root.findall("object"), 1):
            category = category_of.get(text(thing, "name"))
            corners = [text(thing, f"bndbox/{key}") for key in ("xmin", "ymin", "xmax", "ymax")]
            box = [number(corner) for corner in corners]
            if category is None or None in box:
                lacks = "name" if category is None else "four numbers xmin, ymin, xmax, ymax"
                reading.errors.add(f"objects without {lacks}", f"{xml}, object {k}: {', '.join(corners)}")
            else:
                table.add(i, category, box, (xml, k), crowd=text(thing, "difficult"))
    return table


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


def read_classes(config, path, notes):
    """{class id: name} of what read_config returns."""
    names, count = config.get("names"), int(number(config.get("nc") or config.get("classes")) or 0)
    if isinstance(names, str) and names:
        names = read_config(locate("names", names, config, path))["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names or map(str, range(count)))
    found = {as_id(i): name for i, name in pairs}
    if not found or not all(type(i) is int and isinstance(name, str) for i, name in found.items()):
        raise UserError("names should be a list such as [cat, dog] or numbered such as {0: cat, 1: dog}, "
                        f"it is {reprlib.repr(names)}")
    if count not in (0, len(found)):
        notes.add(f"nc is {count}, but there are {len(found)} names; the names count")
    return {i: visible(name.strip() or str(i)) for i, name in sorted(found.items())}


def locate(key, value, config, path):
    """The folder or file that data.yaml names, or as much of its path as there is beside data.yaml."""
    folder, root = os.path.dirname(path), config.get("path", "")
    if not isinstance(value, str) or not isinstance(root, str):
        raise UserError(f"{key} should be a path or a list of paths, it is {reprlib.repr(value)}")
    value, root = value.replace("\\", "/"), root.replace("\\", "/")
    parts = [part for part in value.split("/") if part not in ("", ".", "..")]
    for tail in (os.path.join(root, value), value, *("/".join(parts[k:]) for k in range(len(parts)))):
        place = os.path.normpath(os.path.join(folder, tail))
        is_above = folder.startswith(place.rstrip(os.sep) + os.sep)  # train: / would search the whole disk
        if os.path.exists(place) and not is_above:
            return place
    raise UserError(f"{key}: {value} does not exist; paths are relative to this file")


def yolo_images(source, tree, reading):
    """The images in the folders and lists that are a split."""
    found = []
    for place in source.places:
        if os.path.isdir(place):
            others = [path for path in tree.inside(place, *OTHER_SUFFIXES) if labels_of(path, tree)]
            found += sorted(tree.inside(place, *IMAGE_SUFFIXES) + others)
        else:
            here = Source("", "", [os.path.dirname(place), os.path.dirname(source.path)])
            lines = filter(None, map(str.strip, read_text(place).splitlines()))
            found += filter(None, (tree.image(line, here, reading, f"in {place}") for line in lines))
    if not found and not reading.errors:
        raise UserError(f"no images in {', '.join(source.places)}")
    return found


def labels_of(image, tree):
    """The label file of an image: in labels/ in place of images/, beside it, or in labels/ beside that."""
    *parts, name = (os.path.splitext(image)[0] + ".txt").split(os.sep)
    places = [[*parts[:k], "labels", *parts[k + 1:]] for k in reversed(range(len(parts)))
              if parts[k].lower() in ("images", "jpegimages", "data")]
    places += [parts, [*parts[:-1], "labels", *parts[-1:]], [*parts[:-1], "labels"]]
    return next((path for place in places if (path := tree.find(os.sep.join([*place, name])))), None)


def read_labels(path, keypoints, reading):
    """[(line, class id, (x0, y0, x1, y1) as shares of the image)] of a label file; [] without one."""
    found, lines = [], []
    try:
        lines = read_text(path).splitlines() if path else []
    except UserError as error:
        reading.errors.add("label files that cannot be read", f"{path}: {error}")
    for k, line in enumerate(lines, 1):
        if not line.strip():
            continue
        label, *corners = map(number, line.split())
        corners = corners[:4] if keypoints else corners
        fault = ("label lines with more than numbers" if None in (label, *corners) else
                 "label lines that are neither class, x, y, width, height nor a class and a polygon"
                 if len(corners) < 4 or len(corners) % 2 else
                 "labels that are not shares of the image, from 0 to 1; are they pixels?"
                 if max(map(abs, corners)) > 2 else None)
        if fault:
            reading.errors.add(fault, f"{path}, line {k}: {reprlib.repr(line)}")
        elif len(corners) == 4:
            x, y, w, h = corners
            found.append((k, label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
        else:
            reading.notes.add("polygons, the boxes around them are used", f"{path}, line {k}")
            xs, ys = corners[::2], corners[1::2]
            found.append((k, label, (min(xs), min(ys), max(xs), max(ys))))
    return found


def read_yolo(source, tree, reading, known, wanted):
    """The Table of a YOLO folder; without images and boxes unless they are wanted."""
    config = read_config(source.path)
    table = Table(read_classes(config, source.path, reading.notes), where="{0[0]}, line {0[1]}".format,
                  from_shares=True)
    category_of, used, unknown = {i: k for k, i in enumerate(table.names)}, {}, []
    for k, path in enumerate(yolo_images(source, tree, reading) if wanted else ()):
        table.images.append(image_row(k + 1, path, 0, 0, reading))
        labels = labels_of(path, tree)
        if labels is None:
            reading.notes.add("images without a label file, taken as images without objects", path)
        elif labels in used:
            reading.notes.add("images that share a label file, kept; masks?", f"{used[labels]}, {path}")
        used[labels] = path  # {label file: image}
        _, _, height, width = table.images[k] or (0, 0, 0, 0)
        for line, label, (x0, y0, x1, y1) in read_labels(labels, "kpt_shape" in config, reading):
            if label in category_of:
                box = x0 * width, y0 * height, x1 * width, y1 * height
                table.add(k, category_of[label], box, (labels, line))
            else:
                unknown.append((label, f"{labels}, line {line}: {label:g}"))
    if unknown:
        kind = f"labels whose class id is not among the {len(table.names)} names"
        if {label for label, _ in unknown} == {len(table.names)} and 0 not in table.numbers[1::8]:
            kind += "; they seem to count from 1, and YOLO counts from 0"
        reading.errors.add(kind, unknown[0][1], len(unknown))
    if {*used} == {None}:
        raise UserError(f"no image has labels; {used[None]} has no .txt beside it or in labels/ for images/")
    homes = {os.path.dirname(labels): os.path.dirname(image) for labels, image in used.items() if labels}
    for labels in {*tree.files.values()} - {*used}:
        folder, name = os.path.split(labels)
        if folder in homes and name.lower().endswith(".txt") and not NO_LABELS.match(name) \
                and not tree.find(os.path.join(homes[folder], name[:-4])):
            reading.notes.add("label files without an image, not used", labels)
    return table
