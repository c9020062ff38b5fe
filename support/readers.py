"""Finds and reads the annotations of train and val: COCO, VOC and YOLO, as tools really write them.

Each format has a reader, which returns a Table with boxes in pixels. `read_splits` joins the classes of both
splits and turns the Tables into AnnotatedImages. Repairs are notes; whatever needs a person is an error.
"""
import contextlib
import functools
import gc
import hashlib
import json
import math
import mmap
import os
import re
import reprlib
import unicodedata
from array import array
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import unquote
from xml.etree import ElementTree
from xml.sax.saxutils import escape

import numpy as np
import yaml
from pycocotools import mask

from support import UserError, reason, shorten, visible
from support.images import IMAGE_SUFFIXES, OTHER_SUFFIXES, AnnotatedImage, file_size

NAMES = {"train": ["train", "training", "trainval"], "val": ["val", "valid", "validation", "test"]}
ALIKE = [["train", "training"], ["val", "valid", "validation"], ["test"]]
LAYOUTS = [  # (format, annotations below the folder, in any case); {} is one of NAMES; the first fit is taken
    ("COCO", "annotations/instances_{}2017.json"),
    ("COCO", "annotations/instances_{}.json"),
    ("COCO", "annotations/*{}*.json"),
    ("COCO", "{}/_annotations.coco.json"),  # Roboflow
    ("COCO", "{}/*.json"),  # FiftyOne: labels.json
    ("COCO", "{}/annotations/*.json"),
    ("COCO", "images/{}/*.json"),
    ("COCO", "labels/*{}*.json"),
    ("COCO", "*{}*.json"),
    ("VOC", "imagesets/main/{}.txt"),  # a list of names; the boxes are in Annotations/*.xml
    ("VOC", "imagesets/{}.txt"),
    ("VOC", "imagesets/main/*_{}.txt"),  # VoTT: a list for each class, and all images in each
    ("VOC", "annotations/{}"),  # a folder with XML files in it or below
    ("VOC", "labels/{}"),
    ("VOC", "images/{}"),
    ("VOC", "{}"),
    ("YOLO", "images/{}"),  # a folder or a list of images; data.yaml may name others
    ("YOLO", "images/{}2017"),
    ("YOLO", "{}/images"),
    ("YOLO", "data/{}"),
    ("YOLO", "obj_{}_data"),
    ("YOLO", "{}.txt"),
    ("YOLO", "{}"),
]
UNSPLIT = [  # all images together, for --split
    ("COCO", "*.json"), ("COCO", "annotations/*.json"), ("COCO", "labels/*.json"),
    ("VOC", "imagesets/main/default.txt"), ("VOC", "annotations"), ("VOC", "labels"), ("VOC", "images"),
    ("VOC", "."),
    ("YOLO", "images"), ("YOLO", "obj_train_data"), ("YOLO", "data"), ("YOLO", "."),
]
IMAGE_PLACES = ["{}2017", "{}", "images/{}", "images/{}2017", "{}/images", "{}/data", "data/{}",
                "{}/jpegimages", "jpegimages/{}", "images", "images/default", "jpegimages", "data", "."]
CLASS_FILES = ["classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt", "data.yaml"]
CLASS_PLACES = ["", "labels/", "labels/{}/", "{}/", "{}/labels/", "data/", "images/", "images/{}/"]
OTHER_TASKS = ("person_keypoints", "captions", "stuff", "panoptic", "image_info", "_annotations.createml")
OTHER_FORMS = {  # a key in JSON files that are not COCO's: whose it is
    "shapes": "labelme's file of one image", "_via_settings": "a project of VIA", "regions": "VIA's own form",
    "assets": "VoTT's own form", "asset": "VoTT's own form", "objects": "Supervisely's form",
    "items": "Datumaro's own form", "score": "a file of results", "data": "Label Studio's own form",
    "caption": "captions, take instances_*.json", "segments_info": "panoptic, take instances_*.json",
    "image": "CreateML's form",
}
FIELDS = ("image_id", "category_id", "bbox", "area", "iscrowd", "id", "from_outline")  # of COCO's annotations
JUNK = ("._", ".ipynb_checkpoints", "__MACOSX")  # systems and notebooks make them
NO_LABELS = re.compile(r"(?i)(classes|readme|predefined|train|training|val|valid|validation|test|images)\b.*")
CROWD, NO_CROWD = (1, "1", "true", "True"), (0, "0", "", None, "false", "False")
SHARES = "most boxes are from 0 to 1: are they shares of the image, as in YOLO's files? Pixels are expected"
SMALLEST_SIDE = 0.1  # pixels; float32 arithmetic leaves nothing of a box that is thinner
CROWDED = 1000  # boxes in one image; every box needs a query, and memory grows with their square
MOST_FILES, MOST_JSON, MOST_TEXT = 3 * 10 ** 6, 5 * 10 ** 9, 10 ** 8  # below a folder; bytes


class Problems(dict):
    """{kind of problem: [count, first place]}. A kind that speaks for itself has no place."""

    def add(self, kind, where="", count=1):
        self.setdefault(kind, [0, where])[0] += count

    def lines(self):
        return [shorten(visible(f"{kind}: {count} (first: {where})" if where else kind), 500)
                for kind, (count, where) in self.items()]


@dataclass
class Reading:
    """What was read of one split. A problem does not stop the reading: check_data prints all of them."""
    path: str = None
    images: list = field(default_factory=list)  # of AnnotatedImage
    errors: Problems = field(default_factory=Problems)  # need a person: data.load refuses
    notes: Problems = field(default_factory=Problems)  # were dealt with, each says how
    held_out: str | None = None  # of a val that --split made: tells these images from any others

    def error(self, kind, where="", count=1):
        self.errors.add(kind, where, count)

    def note(self, kind, where="", count=1):
        self.notes.add(kind, where, count)


@dataclass
class Source:
    """Where one split is."""
    form: str  # "COCO", "VOC" or "YOLO"
    path: str  # a file of annotations or of classes, or a folder of XML files
    places: list  # folders that images may be in, likely ones first; of YOLO, the folders and lists of images
    avoid: set = frozenset()  # names of folders of the other split, where no lost image is looked for


@dataclass
class Table:
    """One split as it is written. `from_one`: VOC's pixels 1 to 640 are COCO's 0 to 640."""
    names: dict  # {category id: name}
    images: list = field(default_factory=list)  # (id, path, height, width), None for one that cannot be used
    numbers: array = field(default_factory=lambda: array("d"))  # 8 of each box, see add
    places: list = field(default_factory=list)  # of each box
    where: object = str  # turns a place into text
    from_one: bool = False
    from_shares: bool = False  # YOLO's boxes are shares of the image

    def add(self, image, category, box, place, area=None, crowd=None):
        """image, category: positions in `images` and `names`; box: xyxy; area, crowd: as they are written."""
        area = math.inf if area is None else number(area) or -1
        crowd = 1 if crowd in CROWD else 0 if crowd in NO_CROWD else 2
        self.numbers.extend((image, category, *box, area, crowd))
        self.places.append(place)


# ---- Files -------------------------------------------------------------------------------------------------
def key_of(name):
    """The same for all spellings of a path: capitals, and accents in one character or in two."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


class Tree:
    """The files below a folder and linked ones. Any spelling finds them, and images also without ending."""

    def __init__(self, top):
        self.top, self.files, self.folders, self.junk = os.path.abspath(top), {}, {}, []  # {key: path}
        for folder, folders, names in os.walk(self.top, followlinks=True):
            self.junk += [os.path.join(folder, name) for name in folders + names if name.startswith(JUNK)]
            folders[:] = sorted(name for name in folders if not name.startswith((".", *JUNK)) and not (
                os.path.islink(link := os.path.join(folder, name))  # to a folder that it lies in
                and os.path.join(os.path.realpath(folder), "").startswith(os.path.realpath(link) + os.sep)))
            self.folders[key_of(folder)] = folder
            for path in (os.path.join(folder, name) for name in sorted(names) if not name.startswith(JUNK)):
                key = key_of(path)
                self.files[key] = path
                if key.endswith(IMAGE_SUFFIXES):
                    stem = os.path.splitext(key)[0]
                    self.files[stem] = "" if stem in self.files else path  # "": several are called so
            if len(self.files) > MOST_FILES:
                raise UserError(f"{self.top}: over {MOST_FILES:,} files; is this the folder of the data?")

    @functools.cached_property
    def called(self):
        """{key of a bare name, with or without ending: [images]}."""
        found = defaultdict(list)
        for key, path in self.files.items():
            if path and path.lower().endswith(IMAGE_SUFFIXES):
                found[os.path.basename(key)].append(path)
        return found

    def find(self, path):
        """The file at a path, or None. A device or a FIFO is none."""
        path = os.path.normpath(path)
        found = path if os.path.isfile(path) else self.files.get(key_of(path))
        return found if found and os.path.isfile(found) else None

    def match(self, pattern):
        """The files and folders below the top that a pattern in small letters fits, such as train/*.json."""
        pattern = os.path.normpath(os.path.join(key_of(self.top), pattern))
        if "*" not in pattern:
            return [found for found in (self.files.get(pattern), self.folders.get(pattern)) if found]
        ending, depth = os.path.splitext(pattern)[1], pattern.count(os.sep)
        return sorted(path for key, path in self.files.items()
                      if key.endswith(ending) and key.count(os.sep) == depth and fnmatchcase(key, pattern))

    def inside(self, folder, *endings):
        """The paths of the files with one of these endings in a folder and below."""
        start = key_of(os.path.join(folder, ""))
        if not start.startswith(key_of(self.top)):
            return Tree(folder).inside(folder, *endings)
        return sorted(path for key, path in self.files.items()
                      if key.startswith(start) and key.endswith(endings) and os.path.isfile(path))

    def image(self, name, source, reading, where):
        """The path of the image that annotations call `name`. None, and an error, if there is none.

        It is looked for as it is written, and then by its name alone anywhere below the top.
        """
        plain = unquote(name.split("?d=")[-1]) if "%" in name or "?d=" in name else name  # Label Studio's
        plain = plain.replace("\\", "/")
        for spelling in (name, plain):
            for k, place in enumerate(source.places):
                if found := self.find(os.path.join(place, spelling)):
                    source.places.insert(0, source.places.pop(k))  # the next one is probably here, too
                    if not found.startswith(self.top + os.sep):
                        reading.note("image files outside of the data folder", found)
                    return found
        parts = key_of(plain).split("/")[::-1]
        found = [path for path in self.called.get(parts[0], ()) if os.path.isfile(path)
                 and not source.avoid & {*key_of(path[len(self.top):]).split(os.sep)[:-1]}]
        same = [len(os.path.commonprefix([key_of(path).split(os.sep)[::-1], parts])) for path in found]
        found = [path for path, count in zip(found, same) if count == max(same)]  # the most folders in common
        if len(found) == 1:
            kind = "image files in another folder than the annotations say, found by their name"
            reading.note(kind, f"{name} is {found[0]}")
            return found[0]
        kind = "image files that are not where the annotations say, with several of that name elsewhere" \
            if found else "image files that do not exist"
        place = ", ".join([os.path.join(source.places[0], name), where, *found[:2]])
        return reading.error(kind, place)


def read_text(path, most=MOST_TEXT, as_bytes=False):
    """A text file in UTF-8, or in UTF-16 with its mark. UserError, without the path."""
    try:
        if not os.path.isfile(path):
            raise UserError("is not a file" if os.path.exists(path) else "does not exist")
        if os.path.getsize(path) > most:
            raise UserError(f"has {os.path.getsize(path) / 1e9:.1f} GB: too large for such a file")
        with open(path, "rb") as file:
            content = file.read()
        if content.startswith(b"version https://git-lfs"):
            raise UserError("is a pointer of Git LFS, not the file itself: run git lfs pull")
        return content if as_bytes else content.decode(json.detect_encoding(content))
    except UnicodeDecodeError:
        raise UserError("is not in UTF-8: open it in an editor and save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise UserError(f"cannot be read: {reason(error)}") from None


def number(value):
    """The float that a number or a text says, otherwise None."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def image_row(i, path, height, width, reading):
    """An entry of Table.images; None and an error for a bad one. A size that is not annotated is the file's."""
    sides = [number(side or 0) for side in (height, width)]
    if path.lower().endswith(OTHER_SUFFIXES):
        return reading.error("image files that Pillow does not read: save them as .jpg or .png", path)
    try:
        if 0 in sides:
            sides = file_size(path, i)
    except UserError as error:
        return reading.error("image files that cannot be used", str(error))
    if None in sides or min(sides) < 1 or any(side % 1 for side in sides):
        kind = "images whose width and height are not whole numbers above 0 (may be left out)"
        return reading.error(kind, f"{path}, image id {i}: {reprlib.repr([width, height])}")
    return i, path, int(sides[0]), int(sides[1])


# ---- COCO --------------------------------------------------------------------------------------------------
def compact(entry):
    """A JSON object; an annotation as a tuple of FIELDS, a missing box being computed from its outline.

    The outline is most of an annotation, and a dict needs twice the memory of a tuple.
    """
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


def keys_in(value, depth=3):
    """The keys in a JSON value, of its lists only those in the first entry."""
    if isinstance(value, dict) and depth:
        return {*value}.union(*(keys_in(inside, depth - 1) for inside in [*value.values()][:20]))
    if isinstance(value, tuple):  # an annotation that is not below "annotations"
        return {"score"}
    return keys_in(value[0], depth - 1) if isinstance(value, list) and value and depth else set()


def parse_coco(path):
    """A COCO file as a dict, its three lists checked to be lists of dicts. UserError, without the path."""
    text = read_text(path, MOST_JSON)
    try:
        contents = json.loads(text, object_hook=compact)
    except (ValueError, RecursionError) as error:  # ValueError: it says line and column
        raise UserError("is empty" if not text.strip() else f"cannot be read as JSON: {error}") from None
    lists = [contents.get(key) if isinstance(contents, dict) else None
             for key in ("images", "annotations", "categories")]
    keys = keys_in(contents)
    are_lists = all(isinstance(one, list) and all(isinstance(entry, (dict, tuple)) for entry in one)
                    for one in lists)
    if not are_lists or keys & {"segments_info", "caption"}:
        guess = next((f"; this is {form}" for key, form in OTHER_FORMS.items() if key in keys), "")
        raise UserError("is no COCO file of objects, which has the lists images, annotations and categories"
                        f"{guess}. Export the data as COCO")
    contents["annotations"] = [entry if isinstance(entry, tuple) else tuple(map(entry.get, FIELDS))
                               for entry in contents["annotations"]]
    return contents


def as_id(value):
    """An id as a whole number if it says one ("1", 1.0), another text as it is, otherwise None."""
    if isinstance(value, str) and value.isdecimal() and len(value) < 99 or \
            isinstance(value, float) and value.is_integer():
        return int(value)
    return value if type(value) is int or isinstance(value, str) and value else None


def by_id(entries, what, told_by, reading):
    """({id: entry}, {id: whole number below 2**63}), which is the id if all of them are such numbers."""
    found = {}
    for k, entry in enumerate(entries):
        i = as_id(entry.get("id"))
        if i is None:
            where = f"{what} number {k + 1}: {reprlib.repr(entry.get('id'))}"
            reading.error(f"{what} ids that are not whole numbers", where)
            continue
        if type(entry["id"]) is not int:
            reading.note(f"{what} ids that are text or fractions, read as numbers", repr(entry["id"]))
        if found.setdefault(i, entry).get(told_by) != entry.get(told_by):
            reading.error(f"{what} ids that occur twice", f"{what} id {i}")
    if not entries:
        reading.error(f"the list of {what} entries is empty")
    whole = all(type(i) is int and abs(i) < 2 ** 63 for i in found)
    return found, {i: i if whole else k for k, i in enumerate(found, 1)}


def read_coco(source, tree, reading, known, wanted):
    """The Table of a COCO file; without images and boxes unless they are wanted."""
    contents = parse_coco(source.path)
    found, whole = by_id(contents["categories"], "category", "name", reading)
    table, category_of = Table({}), {i: k for k, i in enumerate(found)}
    for i, entry in found.items():
        name = visible(str(entry.get("name") or "").strip())
        if not name:
            reading.note("categories without a name, called by their id", f"category id {i}")
        if name in table.names.values():
            reading.note("categories of the same name, kept apart", f"category id {i}: {name}")
        table.names[whole[i]] = name or str(i)
    if not wanted:
        return table
    found, id_of = by_id(contents["images"], "image", "file_name", reading)
    for i, entry in found.items():
        name, path = entry.get("file_name") or entry.get("coco_url"), None  # LVIS has the second
        if isinstance(name, str):
            path = tree.image(name, source, reading, f"image id {i}")
        else:
            reading.error("images without a file_name", f"image id {i}")
        size = entry.get("height"), entry.get("width")
        table.images.append(path and image_row(id_of[i], path, *size, reading))

    index, annotations = {i: k for k, i in enumerate(found)}, contents.pop("annotations")
    others = len(annotations) - len({entry[5] for entry in annotations if type(entry[5]) is int})
    if others:  # they serve messages only
        reading.note(f"annotation ids that are missing, text or given twice, not used: {others}")

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
            reading.error(f"annotations whose {kind}", f"{where(place)}: {reprlib.repr(value)}")
            continue
        x, y, w, h = box
        table.add(image, category, (x, y, x + w, y + h), place, area, crowd)
        if computed:
            reading.note("boxes computed from outlines, because there is no bbox", where(place))
    return table


# ---- VOC ---------------------------------------------------------------------------------------------------
def read_xml(path, reading):
    """The root of a VOC file; None, and an error, if it is none."""
    try:
        content = read_text(path, as_bytes=True)
        if b"<!ENTITY" in content:  # nobody annotates with them, but a few lines of them fill any memory
            raise UserError("declares entities")
        root = ElementTree.fromstring(content)
    except (UserError, ValueError, LookupError, SyntaxError) as error:  # SyntaxError: malformed
        try:
            why = read_text(path) and reason(error)  # that it is not in UTF-8 says more
        except UserError as better:
            why = better
        return reading.error("XML files that cannot be read", f"{path}: {why}")
    kind = "XML files of CVAT's own form: export as COCO 1.0 or Pascal VOC 1.1" if root.tag == "annotations" \
        else "XML files without VOC annotations"
    return root if root.tag == "annotation" else reading.error(kind, f"{path}: <{root.tag}>")


def voc_files(source, tree):
    """{path below their folder, without ending: XML file} of a folder, or of a list with a name in each line."""
    folder, listed = source.path, not os.path.isdir(source.path)
    if listed:
        above = [source.path.rsplit(os.sep, k)[0] for k in (1, 2, 3)]
        folder = next((os.path.join(place, name) for place in above for name in ("Annotations", "annotations")
                       if os.path.isdir(os.path.join(place, name))), above[-1])
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
    if named and (times == 1 or not alike):
        if alike not in (None, named):
            kind = "XML files whose <filename> is not the image called like them: <filename> is used"
            reading.note(kind, f"{stem}.xml: {name}")
        return named
    if alike and alike != named:
        kind = "XML files whose <filename> is lost or given twice: the image called like them is used"
        reading.note(kind, f"{stem}.xml: {name or 'no <filename>'}")
    return alike or tree.image(name or stem, source, reading, f"{stem}.xml")


def read_voc(source, tree, reading, known, wanted):
    """The Table of VOC's XML files, boxes as they are written. Classes that are `known` keep their ids."""
    def text(element, tag):
        return visible((element.findtext(tag) or "").strip())

    roots = {}  # {path below the folder, without ending: (XML file, root)}
    for stem, xml in voc_files(source, tree).items():
        root = read_xml(xml, reading) if xml else ElementTree.fromstring(
            f"<annotation><filename>{escape(stem)}</filename></annotation>")
        if root is not None:
            roots[stem] = xml, root
        if not xml:  # Datumaro and CVAT write none
            reading.note("listed images without an XML file, taken as images without objects", stem)
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
                kind = "objects without a <name>" if category is None else \
                    "objects whose <bndbox> has no four numbers xmin, ymin, xmax, ymax"
                reading.error(kind, f"{xml}, object {k}: {', '.join(corners)}")
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
        mark = getattr(error, "problem_mark", None)
        line = f"line {mark.line + 1}: " if mark else ""
        raise UserError(f"cannot be read as YAML: {line}{getattr(error, 'problem', error)}") from None
    if not isinstance(contents, dict):
        raise UserError("should have lines such as train: images/train and names: [cat, dog]")
    return contents


def read_classes(config, path, notes):
    """{class id: name} of what read_config returns."""
    names, nc = config.get("names"), config.get("nc", config.get("classes"))
    count = int(nc) if isinstance(nc, str) and nc.isdecimal() and len(nc) < 6 else None
    if isinstance(names, str) and names:
        names = read_config(locate("names", names, config, path))["names"]
    pairs = names.items() if isinstance(names, dict) else enumerate(names or map(str, range(count or 0)))
    found = {as_id(i): name for i, name in pairs}
    if not found or not all(type(i) is int and isinstance(name, str) for i, name in found.items()):
        raise UserError("names should be a list such as [cat, dog] or numbered such as {0: cat, 1: dog}, "
                        f"it is {reprlib.repr(names)}")
    if nc is not None and count != len(found):
        notes.add(f"nc is {reprlib.repr(nc)}, but there are {len(found)} names; the names count")
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
            lines = [line.strip() for line in read_text(place).splitlines()]
            found += filter(None, (tree.image(line, here, reading, f"in {place}") for line in lines if line))
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
    """[(line, class id, (x0, y0, x1, y1) as shares of the image)] of a label file."""
    found, lines = [], []
    try:
        lines = read_text(path).splitlines()
    except UserError as error:
        reading.error("label files that cannot be read", f"{path}: {error}")
    for k, words in ((k, line.split()) for k, line in enumerate(lines, 1) if line.strip()):
        label, *corners = map(number, words)
        corners = corners[:4] if keypoints else corners
        fault = ("label lines with more than numbers" if None in (label, *corners) else
                 "label lines that are neither class, x, y, width, height nor a class and a polygon"
                 if len(corners) < 4 or len(corners) == 5 or len(corners) % 2 else
                 "labels that are not shares of the image, from 0 to 1; are they pixels?"
                 if max(map(abs, corners)) > 2 else None)
        if fault:
            reading.error(fault, f"{path}, line {k}: {reprlib.repr(lines[k - 1])}")
        elif len(corners) == 4:
            x, y, w, h = corners
            found.append((k, label, (x - w / 2, y - h / 2, x + w / 2, y + h / 2)))
        else:
            reading.note("polygons, the boxes around them are used", f"{path}, line {k}")
            xs, ys = corners[::2], corners[1::2]
            found.append((k, label, (min(xs), min(ys), max(xs), max(ys))))
    return found


def read_yolo(source, tree, reading, known, wanted):
    """The Table of a YOLO folder; without images and boxes unless they are wanted."""
    config = read_config(source.path)
    table = Table(read_classes(config, source.path, reading.notes), where="{0[0]}, line {0[1]}".format,
                  from_shares=True)
    category_of, used, unknown = {i: k for k, i in enumerate(table.names)}, {}, Problems()
    for k, path in enumerate(yolo_images(source, tree, reading) if wanted else ()):
        table.images.append(image_row(k + 1, path, 0, 0, reading))
        labels = labels_of(path, tree)
        if labels is None:
            reading.note("images without a label file, taken as images without objects", path)
        elif labels in used:
            reading.note("images that share a label file, kept; masks?", f"{used[labels]}, {path}")
        used[labels] = path  # {label file: image}
        _, _, height, width = table.images[k] or (0, 0, 0, 0)
        lines = read_labels(labels, "kpt_shape" in config, reading) if labels else ()
        for line, label, (x0, y0, x1, y1) in lines:
            if label in category_of:
                box = x0 * width, y0 * height, x1 * width, y1 * height
                table.add(k, category_of[label], box, (labels, line))
            else:
                unknown.add(label, f"{labels}, line {line}: {label:g}")
    if unknown:
        last = max(table.names)
        from_one = {*unknown} == {last + 1} and 0 not in table.numbers[1::8]
        hint = f"; they seem to count from 1, and YOLO counts from 0 to {last}" if from_one else ""
        reading.error(f"labels whose class id is not among the {len(table.names)} names{hint}",
                           next(iter(unknown.values()))[1], sum(count for count, _ in unknown.values()))
    if used and set(used) == {None}:
        raise UserError(f"no image has labels; {used[None]} has no .txt beside it or in labels/ for images/")
    if "kpt_shape" in config:
        reading.note("keypoints (kpt_shape in data.yaml) are not used")
    homes = {os.path.dirname(labels): os.path.dirname(image) for labels, image in used.items() if labels}
    for labels in {*tree.files.values()} - {*used}:
        folder, name = os.path.split(labels)
        if folder in homes and name.lower().endswith(".txt") and not NO_LABELS.match(name) \
                and not tree.find(os.path.join(homes[folder], name[:-4])):
            reading.note("label files without an image, not used", labels)
    return table


READERS = {"COCO": read_coco, "VOC": read_voc, "YOLO": read_yolo}


# ---- Where a split is --------------------------------------------------------------------------------------
def mentions(path, *words):
    """Whether all of these bytes are in a file."""
    with contextlib.suppress(OSError, ValueError), open(path, "rb") as file:  # ValueError: an empty file
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return all(content.find(word) >= 0 for word in words)


def one_coco(paths, certain):
    """Of the JSON files that a pattern fits, the one with COCO's objects; None if there is none."""
    paths = [path for path in paths if not os.path.basename(path).lower().startswith(OTHER_TASKS)]
    paths = [path for path in paths if "instances" in os.path.basename(path)] or paths
    if not certain:
        paths = [path for path in paths[:50] if mentions(path, b'"images"', b'"annotations"')]
    if len(paths) > 1:
        raise UserError(f"which of {', '.join(paths[:3])}? Give --train-json and --train-images")
    return paths[0] if paths else None


def class_file(tree, names):
    """The file that names the classes of a YOLO folder, or None."""
    found = tree.match("data.yaml") + [path for pattern in ("*.yaml", "*.yml", "*.data")
                                       for path in tree.match(pattern) if mentions(path, b"names")]
    places = [place.format(name) + file for place in CLASS_PLACES for name in names for file in CLASS_FILES]
    return next(iter(found), None) or next((path for place in places for path in tree.match(place)), None)


def in_places(tree, form, path, name):
    """A Source: the places are the folders of `tree` for images of a split that is called `name`."""
    alike = next((words for words in ALIKE if name in words), [])
    others = [word for words in ALIKE if alike and words != alike for word in words]
    patterns = [place.format(word) for word in dict.fromkeys((name, *alike)) for place in IMAGE_PLACES
                if word or "{}" not in place]
    places = [folder for pattern in patterns for folder in tree.match(pattern) if os.path.isdir(folder)]
    places.append(path if os.path.isdir(path) else os.path.dirname(path))
    return Source(form, path, list(dict.fromkeys(places)),
                  {word + year for word in others for year in ("", "2014", "2017")})


def search(tree, split, unsplit=False):
    """The Source of a split by the first of LAYOUTS that a folder has, None if it has none."""
    rows = [(name, form, layout.format(name)) for name in NAMES[split] for form, layout in LAYOUTS]
    config = None
    for name, form, layout in rows + [("", *row) for row in UNSPLIT if unsplit]:
        found = tree.match(layout)
        if form == "COCO":
            word = re.compile(rf"(?<![a-z]){name}(?![a-z])")
            found = [path for path in found if word.search(key_of(path[len(tree.top):]))]
            if path := one_coco(found, "*" not in layout):
                return in_places(tree, form, path, name)
        elif form == "VOC":
            listed = layout.endswith(".txt") and tree.match("annotations")
            if found and (listed or os.path.isdir(found[0]) and tree.inside(found[0], ".xml")):
                return in_places(tree, form, found[0], name)
        else:
            if config is None:
                classes = class_file(tree, NAMES[split])
                config = read_config(classes) if classes else {}
                key = next((key for key in NAMES[split] if config.get(key)), None)
                if key:
                    values = config[key] if isinstance(config[key], list) else [config[key]]
                    return Source(form, classes, [locate(key, value, config, classes) for value in values])
            if classes and found and (os.path.isfile(found[0]) or tree.inside(found[0], *IMAGE_SUFFIXES)):
                return Source(form, classes, found)
    return None


def find_source(tree, split, unsplit):
    """The Source of a split. UserError with what is there and what to do if there is none."""
    if source := search(tree, split, unsplit):
        return source
    counts = Counter(os.path.splitext(path)[1].lower() for path in {*tree.files.values()})
    here = sorted({key[len(tree.top) + 1:].split(os.sep)[0] + "/" for key in tree.folders} - {"/"})[:9]
    here += [f"{count} {ending or 'without ending'}" for ending, count in counts.most_common(6)]
    raise UserError(
        f"{tree.top}: no {split} annotations here. Expected annotations/instances_{split}.json (COCO), "
        f"ImageSets/Main/{split}.txt (VOC), data.yaml (YOLO) or another layout of docs/options.md. "
        f"Found {', '.join(here) or 'nothing'}. {find_hint(tree, split, unsplit, counts)}")


def find_hint(tree, split, unsplit, counts):
    """What to do about a folder in which a split was not found."""
    if split == "val" and (train := search(tree, "train")):
        return f"{train.path} has no val: add --split 0.2 to hold some images out"
    for folder in list(tree.folders.values())[1:50]:
        if folder[len(tree.top):].count(os.sep) < 3 and search(Tree(folder), split):
            return f"Did you mean {folder}?"
    together = None if unsplit else search(tree, split, unsplit=True)
    jsons, xmls, wrong = tree.inside(tree.top, ".json")[:1], tree.inside(tree.top, ".xml")[:1], Reading()
    likely = {"COCO": [together.path], "VOC": xmls, "YOLO": []}[together.form] if together else jsons + xmls
    for path in likely:
        try:
            parse_coco(path) if path.lower().endswith("json") else read_xml(path, wrong)
        except UserError as error:
            wrong.errors.add(f"{path} {error}")
    if wrong.errors:
        return wrong.errors.lines()[0]
    if together:
        return "All images lie together: add --split 0.2 to hold some of them out"
    if class_file(tree, NAMES[split]):
        return "There are no images where YOLO's layouts have them"
    for path in tree.inside(tree.top, ".txt")[:20]:
        if read_labels(path, False, Reading()):
            return f"{path} is a YOLO label file: write the names of its classes into {tree.top}/classes.txt"
    ending = next((ending for ending in (".csv", ".tfrecord", ".parquet", ".zip") if ending in counts), None)
    return f"{ending} files are not read, export the data as COCO" if ending else \
        f"For another layout give --{split}-json and --{split}-images"


# ---- Both splits -------------------------------------------------------------------------------------------
def given_source(split, path, folder):
    """(Tree, Source) of a split whose two paths were given."""
    if not (path and folder):
        raise UserError(f"without a data folder, --{split}-json and --{split}-images are both needed")
    path, folder = os.path.abspath(path), os.path.abspath(folder)
    ending = os.path.splitext(path)[1].lower()
    if ending == ".xml":
        raise UserError(f"{path}: one VOC file; give the folder of all, or a list of names")
    if not os.path.exists(folder):
        raise UserError(f"{folder}: no such folder; it should hold the images")
    yolo = ending in (".yaml", ".yml", ".data", ".names") or os.path.basename(path) in CLASS_FILES
    form = "YOLO" if yolo else "VOC" if os.path.isdir(path) or ending == ".txt" else "COCO"
    top = folder if os.path.isdir(folder) else os.path.dirname(folder)
    return Tree(top), Source(form, path, [folder])


@contextlib.contextmanager
def without_garbage_collection():
    """It would look through millions of new objects again and again: a fifth of the time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@without_garbage_collection()
def read_splits(folder, given, splits, class_names=(), share=None, seed=0):
    """({category id: name}, {split: Reading}), as far as they can be read.

    given: the paths of data.load as {split: (json, images)}. share: of the training images, held out as val.
    UserError only for paths that make no sense.
    """
    if folder is not None and any(path is not None for pair in given.values() for path in pair):
        raise UserError("give a data folder or the four paths (--train-json, ...), not both")
    if folder is not None and not os.path.isdir(folder):
        if os.path.isfile(folder):
            raise UserError(f"{folder}: a file, not a folder; give the folder of annotations and images")
        raise UserError(f'{folder or repr(folder)}: no such folder; the embedded data set is called "shapes"')
    tree = folder and Tree(folder)

    if share is not None:
        if not 0 < share < 1:
            raise UserError(f"--split {share}: it must be a share between 0 and 1, for example 0.2")
        if any(path is not None for path in given["val"]):
            raise UserError("--split takes val from train: leave out --val-json and --val-images")
        train = val = None
        with contextlib.suppress(UserError):  # that a val of data.yaml does not exist does not matter here
            train, val = search(tree, "train", True), search(tree, "val") if tree else (None, None)
        if val and (train.path, train.places) != (val.path, val.places):
            raise UserError(f"{folder} has a val of its own, {val.path}: leave out --split")
        splits = ("train",)
    names, readings, tables = {}, {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):
        # the classes of the training set count even if only val is asked for: a model knows no others
        reading = Reading()
        try:
            where, source = (tree, find_source(tree, split, share is not None)) if tree else \
                given_source(split, *given[split])
            reading.path = source.path
            if where.junk:
                kind = "files that systems or notebooks make, not used"
                reading.note(kind, where.junk[0], len(where.junk))
            known = names or dict(enumerate(class_names, 1))  # VOC has no list of classes
            table = READERS[source.form](source, where, reading, known, split in splits)
            tables[split] = table, join_names(names, table.names, reading)
        except UserError as error:
            reading.error(str(error))
        if split in splits or reading.path or any(given[split]):  # no training set: val has its own classes
            readings[split] = reading
    names = dict(sorted(names.items()))
    from_zero = any(0 <= value < 1 for table, _ in tables.values() if table.from_one
                    for k in (2, 3) for value in table.numbers[k::8])  # xmin, ymin
    for split, (table, ids) in tables.items():
        if table.from_one and from_zero:
            kind = "some xmin or ymin is 0, so pixels are counted from 0 and nothing is subtracted"
            readings[split].notes.add(kind)
            table.from_one = False
        if split in splits:
            labels = np.array([list(names).index(i) for i in ids.values()])
            readings[split].images = clean(table, labels, readings[split])
    if share is not None and not readings["train"].errors:
        readings["val"] = hold_out(readings["train"], share, seed)
    compare_splits(names, readings)
    return names, readings


def join_names(names, own, reading):
    """{own id: id in names}. Classes are the same if their names are; `names` gets those that it lacks."""
    ids, before = {}, dict(names)
    for i, name in own.items():
        same = [j for j, known in before.items() if known == name]
        alike = [known for known in before.values() if key_of(known) == key_of(name)]
        if before.get(i) == name or len(same) == 1:
            ids[i] = i if before.get(i) == name else same[0]
            if ids[i] != i:
                kind = "classes with another id than in train, matched by name"
                reading.note(kind, f"{name}, {i} and {ids[i]}")
            continue
        if before and alike and not same:
            reading.error("classes written in another way than in train", f"{name!r}, {alike[0]!r}")
        elif before:
            reading.note("classes that train does not have", name)
        ids[i] = i if i not in names else max(names) + 1
        names[ids[i]] = name
    if before and not {*before.values()} & {*own.values()}:
        reading.error(f"none of train's classes is here: {', '.join(before.values())}")
    return ids


def clean(table, labels, reading):
    """The AnnotatedImages of a Table, boxes cut to their image. What is left out or changed is noted."""
    numbers = np.array(table.numbers).reshape(-1, 8)
    image, boxes, area = numbers[:, 0].astype(int), numbers[:, 2:6], numbers[:, 6]  # [n], [n, 4], [n]
    label = labels[numbers[:, 1].astype(int)]

    def note(chosen, kind, problems=reading.notes):
        if found := np.flatnonzero(chosen).tolist():
            problems.add(kind, table.where(table.places[found[0]]), len(found))

    with np.errstate(invalid="ignore"):  # infinite numbers
        shares = (abs(boxes - 0.5) <= 0.51).all(1) & (boxes % 1 != 0).any(1)
    if not table.from_shares and shares.sum() > len(boxes) / 2:
        note(shares, SHARES, reading.errors)
    boxes[:, :2] -= table.from_one
    sizes = np.array([row[:1:-1] if row else (0, 0) for row in table.images]).reshape(-1, 2)[image]  # w, h
    cut = boxes.clip(0, np.tile(sizes, 2))
    sides, left = boxes[:, 2:] - boxes[:, :2], cut[:, 2:] - cut[:, :2]
    usable = sizes[:, 0] > 0
    real = usable & (abs(boxes) < 1e9).all(1) & (sides.min(1) >= SMALLEST_SIDE)  # neither is NaN
    kept = real & (left.min(1) >= SMALLEST_SIDE)
    over = real & (abs(boxes - cut).max(1) > 0.5)  # up to half a pixel is rounding, common in COCO
    note(usable & ~real, "boxes that are not finite or have no width or height, dropped")
    note(real & ~kept, "boxes outside their image, dropped")
    note(kept & over, "boxes reaching over the image edge, clipped")
    if over.sum() > max(2, len(boxes) / 2):
        reading.note("most boxes reach over the edge of their image or lie outside: are they written in "
                          "another way (COCO's is x, y, width, height), or was the image larger?")
    order = np.lexsort((*cut.T, label, image))
    rows = np.column_stack([image, label, cut])[order]
    twice = np.zeros(len(boxes), bool)
    twice[order[1:]] = (rows[1:] == rows[:-1]).all(1)
    note(kept & twice, "boxes given more than once, with the same class, kept")
    note(kept & (numbers[:, 7] == 2), "iscrowd (VOC: difficult) is neither 0 nor 1, taken as 0")
    note(kept & (numbers[:, 7] == 1), "crowd regions (VOC: difficult), neither trained on nor evaluated")
    note(kept & ~(area > 0), "areas that are not numbers above 0, those of the boxes are used")
    area = np.minimum(np.where(area > 0, area, np.inf), left.prod(1))  # an outline may not have been clipped

    chosen = np.flatnonzero(kept)
    chosen = chosen[np.argsort(image[chosen], kind="stable")]
    ends = np.searchsorted(image[chosen], np.arange(len(table.images) + 1))
    columns, found = (label[chosen], cut[chosen].astype(np.float32), area[chosen],
                      numbers[chosen, 7] == 1), []
    for row, start, end in zip(table.images, ends, ends[1:]):
        if row is None:
            continue
        found.append(AnnotatedImage(*row, *(column[start:end] for column in columns)))
        if start == end:
            reading.note("images without boxes, kept", f"{row[1]}, image id {row[0]}")
        if end - start > CROWDED:
            kind = f"images with more than {CROWDED} boxes, kept; a model needs as many queries"
            reading.note(kind, f"{row[1]}, image id {row[0]}: {end - start}")
    return found


def hold_out(reading, share, seed):
    """Takes a share of the images out of a Reading and returns them as that of val.

    Which ones follows from the names of all and the seed, wherever the folder lies. Images with the same
    classes stand together in a row, rare classes first, and every n-th is taken: of a class in 10 images, 2
    at a share of 0.2.
    """
    def name(image):
        return os.fsencode(os.path.basename(image.path))

    total, n = len(reading.images), round(share * len(reading.images))
    if not 0 < n < total:
        raise UserError(f"--split {share} of {total} images leaves none for train or none for val")
    classes = [set(image.labels[~image.crowd].tolist()) for image in reading.images]
    images_with = Counter(label for present in classes for label in present)

    def place(k):
        chance = hashlib.sha256(b"%d %s" % (seed, name(reading.images[k]))).digest()
        return sorted((images_with[label], label) for label in classes[k]), chance

    row, start = sorted(range(total), key=place), int(hashlib.sha256(b"%d" % seed).hexdigest(), 16) % total
    chosen = {row[(k * total + start) // n] for k in range(n)}
    val = Reading(reading.path, [image for k, image in enumerate(reading.images) if k in chosen])
    reading.images = [image for k, image in enumerate(reading.images) if k not in chosen]
    val.notes.add(f"{n} of {total} images, held out of the training set by --split {share}, seed {seed}")
    val.held_out = hashlib.sha256(b"/".join(sorted(map(name, val.images)))).hexdigest()[:16]
    return val


def compare_splits(categories, readings):
    """Adds to the Readings what shows only when all of their images are known."""
    real, earlier = functools.cache(os.path.realpath), {}  # {path without links: (path as found, split)}
    for split, reading in readings.items():
        present = {label for image in reading.images for label in image.labels[~image.crowd].tolist()}
        absent = [name for label, name in enumerate(categories.values()) if label not in present]
        if reading.images and absent:
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            reading.note(f"no box of class {', '.join(absent[:10])}{more}")
        if split == "train" and reading.images and not present and not reading.errors:
            crowds = any(image.crowd.any() for image in reading.images)
            reading.error(f"not a single usable box to train on in {len(reading.images)} images"
                               + ": all are crowd regions (iscrowd, VOC: difficult)" * crowds)
        for image in reading.images:
            path = os.path.realpath(image.path) if os.path.islink(image.path) else image.path
            folder, name = os.path.split(path)
            first, home = earlier.setdefault(os.path.join(real(folder), name), (image, split))
            if first is not image:
                reading.note(already_in(home, split), f"{image.path} is {first.path}")


def already_in(home, split):
    """The kind of problem that an image is when it has been in `home` before."""
    return f"images that are in {home} already, " + ("kept" if home == split else "so val is too easy")
