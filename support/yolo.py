"""YOLO's folders: a data.yaml that names the classes, and beside the images a text file of boxes for each."""
import contextlib
import json
import os
import re
import reprlib
from pathlib import Path

from support import UserError, reason
from support.annotations import is_whole
from support.images import IMAGE_SUFFIXES, file_size
from support.voc import parse_number

COMMENT = re.compile(r"""("(?:\\.|[^"\\])*"|'(?:''|[^'])*')|(?:^|\s)#.*""")  # not within quotes
QUOTED = r"""\"(?:\\.|[^"\\])*\"|'(?:''|[^'])*'"""
ITEM = re.compile(  # of [cat, dog] or {0: cat, 1: dog}
    rf"""\s*(?:["']?(\d+)["']?\s*:\s+)?({QUOTED}|[^,"'\[\]{{}}\s][^,\[\]{{}}]*)\s*(?:,|$)""")
LINE = re.compile(r"""\s*(?:-|["']?(\d+)["']?\s*:)\s+(.*)""")  # the same, a line each
MOST = 10_000  # classes
FORM = "label lines that are neither class, x, y, width, height nor a class and a polygon"


# ---- data.yaml ---------------------------------------------------------------------------------------------
def read_lines(path):
    """The lines of a text file. UserError, without the path."""
    try:
        return path.read_text("utf-8-sig").split("\n")
    except (OSError, ValueError) as error:  # ValueError: not text
        raise UserError(f"cannot be read: {reason(error)}") from None


def read_yaml(path):
    """{key: (line number, lines of its value)} of the keys at the left margin: what we need of YAML."""
    found, key = {}, None
    for number, line in enumerate(read_lines(path), 1):
        line = COMMENT.sub(r"\1", line).rstrip()
        start = re.match(r"""["']?(\w+)["']?\s*:(?:\s+|$)""", line)
        if start and start[1] in found:
            raise UserError(f"line {number}: {start[1]} stands here for the second time")
        if start:
            key = start[1]
            found[key] = number, [line[start.end():]]
        elif key and line.strip() and not line.startswith(("---", "...")):
            found[key][1].append(line)
    return found


def unquote(text):
    """A YAML word without its quotes."""
    text = text.strip()
    if re.fullmatch(QUOTED, text):
        with contextlib.suppress(ValueError):
            return text[1:-1].replace("''", "'") if text[0] == "'" else json.loads(text)
        return text[1:-1]
    return "" if text in ("~", "null") else text


def text_of(keys, name):
    """The value of a key that is one word, "" if it is not there."""
    number, lines = keys.get(name, (0, [""]))
    value = " ".join(lines).strip()
    if value.startswith(("[", "{", "- ")):
        raise UserError(f"line {number}: {name} should be one folder or list, it is {reprlib.repr(value)}")
    return unquote(value)


def read_names(number, lines):
    """{class id: name} of a list or a dict, in brackets or with a line for each."""
    text, pairs = " ".join(lines).strip(), []
    if text[:1] + text[-1:] in ("[]", "{}"):
        inside, position = text[1:-1].strip(), 0
        while position < len(inside) and (item := ITEM.match(inside, position)):
            pairs.append(item.groups())
            position = item.end()
        understood = position >= len(inside) and (text[0] == "[" or all(key for key, _ in pairs))
    else:
        items = [LINE.fullmatch(line) for line in lines[1:]]
        understood = not lines[0].strip() and all(items)
        pairs = [item.groups() for item in items if item]
    numbered = [key is not None for key, _ in pairs]
    ids = [int(key) for key, _ in pairs] if all(numbered) else list(range(len(pairs)))
    if not (pairs and understood and any(numbered) == all(numbered) and len(set(ids)) == len(ids)):
        raise UserError(f"line {number}: names should be a list such as [cat, dog] or numbered such as "
                        f"{{0: cat, 1: dog}}, it is {reprlib.repr(text)}")
    return {i: unquote(name) for i, (_, name) in zip(ids, pairs)}


def read_classes(path, keys, notes):
    """{class id: name}; keys: of a data.yaml, or None for a classes.txt, which has a name in each line."""
    if keys is None:
        return dict(enumerate(line.strip() for line in read_lines(path) if line.strip()))
    nc = parse_number(text_of(keys, "nc"))
    if "names" in keys:
        names = read_names(*keys["names"])
        if "nc" in keys and nc != len(names):
            notes[f"line {keys['nc'][0]}: nc is {nc}, but there are {len(names)} names; the names count"] = []
        return names
    if not (is_whole(nc) and 0 < nc <= MOST):
        raise UserError("names no classes; it needs a line such as names: [cat, dog]")
    return dict.fromkeys(range(nc))


# ---- Where things are --------------------------------------------------------------------------------------
def find_yolo(folder, split_names, unsplit):
    """(file that names the classes, images) of a split, None if this is no YOLO folder or has no such split.

    images: a folder, or a text file that lists them. unsplit: or those of all splits, if they lie together.
    """
    folder = Path(folder)
    beside = [path for name in split_names for path in (f"images/{name}", f"{name}/images")]
    beside += ["images", "."] if unsplit else []
    path = find_classes(folder)
    if path is None:
        for labels in (folder / place.replace("images", "labels") for place in beside if place != "."):
            if any(labels.glob("*.txt")):
                raise UserError(f"{labels}: YOLO's labels, but no {folder / 'data.yaml'} to name the classes")
        return None
    try:
        keys = read_yaml(path) if path.suffix != ".txt" else {}
        for name in split_names:
            if text_of(keys, name):
                return path, locate(path.parent, keys, name)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return next(((path, folder / place) for place in beside if (folder / place).is_dir()), None)


def find_classes(folder):
    """The data.yaml of a folder, or the first file like it, or a classes.txt; None if there is none."""
    for path in (folder / "data.yaml", *sorted(folder.glob("*.y*ml")), folder / "classes.txt"):
        if path.is_file() and (path.name in ("data.yaml", "classes.txt")
                               or re.search(r"(?m)^names\s*:", path.read_text("utf-8", "replace"))):
            return path
    return None


def locate(folder, keys, name):
    """The images that a key of data.yaml names, relative to its `path` or to itself."""
    root, value = (text_of(keys, key).replace("\\", "/") for key in ("path", name))
    inside = re.sub(r"^(\.\./)+", "", value)  # Roboflow writes ../train/images and means train/images
    for place in (folder / root / value, folder / value, folder / root / inside, folder / inside):
        if os.path.exists(place):  # Path.exists raises for names that are too long
            return place
    where = f"line {keys[name][0]}, {name}"
    raise UserError(f"{where}: {folder / inside} does not exist; paths are relative to this file")


def images_of(place):
    """The image files in a folder and below, or in a list, whose paths are those seen from it."""
    if os.path.isdir(place):
        return sorted(path for path in place.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    return [place.parent / line.strip() for line in read_lines(place) if line.strip()]


def labels_of(image):
    """Where the labels of an image may be: in labels/ in place of images/, or beside it."""
    beside = Path(os.path.splitext(image)[0] + ".txt")
    *folders, name = beside.parts
    if "images" in folders:
        last = len(folders) - 1 - folders[::-1].index("images")
        yield Path(*folders[:last], "labels", *folders[last + 1:], name)
    yield beside


# ---- Labels ------------------------------------------------------------------------------------------------
def read_yolo(path, image_folder, known, reading):
    """A YOLO folder in COCO's form; ids of classes are YOLO's.

    path            data.yaml, or a classes.txt
    image_folder    the images of the split, or a list of them; None: only the classes are wanted
    """
    keys = read_yaml(path) if path.suffix != ".txt" else None
    names = read_classes(path, keys, reading.notes)
    contents = {"images": [], "annotations": [], "places": [],
                "categories": [{"id": i, "name": name} for i, name in names.items()]}
    if image_folder and not os.path.exists(image_folder):
        raise UserError(f"{image_folder}: no such folder; it should hold the images")
    files, used = images_of(image_folder) if image_folder else [], set()
    for i, file in enumerate(files, 1):
        entry = {"id": i, "file_name": os.path.abspath(file)}
        with contextlib.suppress(UserError):  # read_images will say it
            entry["height"], entry["width"] = file_size(file, i)
        contents["images"].append(entry)
        labels = next((labels for labels in labels_of(file) if os.path.isfile(labels)), None)
        if labels is None:
            reading.notes["images without a label file, taken as images without objects"].append(str(file))
        elif "width" in entry:
            for where, class_id, box in read_labels(labels, "kpt_shape" in (keys or ()), reading):
                contents["annotations"].append(to_annotation(entry, class_id, box))
                contents["places"].append(where)
        used.add(labels)
    if files and used == {None}:
        raise UserError(f"no image has labels; looked for {' and '.join(map(str, labels_of(files[0])))}, ...")
    for folder in sorted({labels.parent for labels in used - {None}}):
        for labels in sorted({*folder.glob("*.txt")} - used):
            if labels.name != "classes.txt":
                reading.notes["label files without an image, not used"].append(str(labels))
    return contents


def read_labels(file, keypoints, reading):
    """(place, class id, (cx, cy, w, h) as shares of the image) of each line of a label file."""
    try:
        lines = read_lines(file)
    except UserError as error:
        reading.errors["label files that cannot be read"].append(f"{file}: {error}")
        return
    for number, line in enumerate(lines, 1):
        where, values = f"{file}, line {number}", [parse_number(word) for word in line.split()]
        corners = values[1:5] if keypoints else values[1:]
        if not all(isinstance(value, (int, float)) for value in values):
            reading.errors["label lines with more than numbers"].append(f"{where}: {reprlib.repr(line)}")
        elif values and len(corners) != 4 and (len(corners) < 6 or len(corners) % 2):
            reading.errors[FORM].append(f"{where}: {len(values)} numbers")
        elif any(abs(value) > 2 for value in corners):
            kind = "labels in pixels; YOLO's are shares of the image, from 0 to 1"
            reading.errors[kind].append(f"{where}: {reprlib.repr(line)}")
        elif len(corners) == 4:
            yield where, values[0], corners
        elif values:
            reading.notes["polygons, the boxes around them are used"].append(where)
            x0, y0, x1, y1 = (side(corners[i::2]) for side in (min, max) for i in (0, 1))
            yield where, values[0], ((x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0)
    if keypoints:
        reading.notes["keypoints (kpt_shape in data.yaml) are not used"] = []


def to_annotation(image, class_id, box):
    """COCO's annotation of a box (cx, cy, w, h) in shares of the image."""
    (cx, cy, w, h), width, height = box, image["width"], image["height"]
    box = [(cx - w / 2) * width, (cy - h / 2) * height, w * width, h * height]
    return {"image_id": image["id"], "category_id": class_id, "bbox": box, "from_shares": True}
