"""Where the annotations and images of a split are, in the layouts of folders that tools write."""
import contextlib
import os
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import unquote

from support import UserError, readers, shorten, visible
from support.images import IMAGE_SUFFIXES, OTHER_SUFFIXES

ANY_IMAGE = (*IMAGE_SUFFIXES, *OTHER_SUFFIXES)
JUNK = ("._", ".ipynb_checkpoints", "__MACOSX")  # systems and notebooks make them
NAMES = {"train": ["train", "training", "trainval"], "val": ["val", "valid", "validation", "test"]}
ALIKE = [["train", "train2017", "training"], ["val", "val2017", "valid", "validation"], ["test", "test2017"]]
LAYOUTS = {  # in any case, the first fit is taken; {} is one of NAMES, and a layout without it is for --split
    "COCO": ["annotations/instances_{}2017.json", "annotations/instances_{}.json", "annotations/*{}*.json",
             "annotations*/annotations/instances_{}*.json", "{}/_annotations.coco.json", "{}/*.json",
             "{}/annotations/*.json", "images/{}/*.json", "annotations/{}/*.json", "labels/*{}*.json",
             "*{}*.json", "*{}*/*.json", "*.json", "annotations/*.json", "labels/*.json"],
    "VOC": ["imagesets/main/{}.txt", "imagesets/{}.txt",  # lists of names; the boxes are in Annotations/*.xml
            "imagesets/main/*_{}.txt",  # VoTT: a list for each class, and all images in each
            "annotations/{}", "labels/{}", "images/{}", "{}",  # folders with XML files in them or below
            "imagesets/main/default.txt", "annotations", "labels", "images", "."],
    "YOLO": ["images/{}", "images/{}2017", "{}/images", "data/{}", "obj_{}_data",  # data.yaml may name others
             "{}.txt", "{}", "images", "obj_train_data", "data", "."],  # folders or a list of images
}
IMAGE_PLACES = ["{}", "images/{}", "{}/images", "{}/data", "data/{}", "{}/jpegimages", "jpegimages/{}",
                "images", "images/default", "jpegimages", "data", "."]
CLASS_FILES = ["classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt", "data.yaml"]
CLASS_PLACES = ["", "labels/", "labels/{}/", "{}/", "{}/labels/", "data/", "images/", "images/{}/"]
ELSEWHERE = "image files in another folder than the annotations say"
OTHER_TASKS = ("person_keypoints", "captions", "stuff", "panoptic", "image_info", "_annotations.createml")


class Problems(dict):
    """{kind of problem: [count, first place]}. A kind that speaks for itself has no place."""

    def add(self, kind, where="", count=1):
        self.setdefault(kind, [0, where])[0] += count

    def lines(self):
        texts = [f"{kind}: {n} (first: {where})" if where else kind for kind, (n, where) in self.items()]
        return [shorten(visible(text), 500) for text in texts]


class Tree:
    """The files below a folder and linked ones. Any spelling finds them, and images also without ending."""

    def __init__(self, top):
        self.top, self.files, self.folders, self.junk = os.path.abspath(top), {}, {}, []  # {key: path}
        self.start, self.stems = readers.key_of(os.path.join(self.top, "")), {}  # stems: keys without ending
        self.called = defaultdict(list)  # {key of a bare name, with or without ending: [images]}
        for folder, folders, names in os.walk(self.top, followlinks=True):
            self.junk += [os.path.join(folder, name) for name in folders + names if name.startswith(JUNK)]
            folders[:] = sorted(name for name in folders if not name.startswith((".", *JUNK)) and not (
                os.path.islink(link := os.path.join(folder, name))  # to a folder that it lies in
                and (os.path.realpath(folder) + os.sep).startswith(os.path.join(os.path.realpath(link), ""))))
            self.folders[readers.key_of(folder)] = folder
            for path in (os.path.join(folder, name) for name in sorted(names) if not name.startswith(JUNK)):
                key = readers.key_of(path)
                self.files[key] = path
                if key.endswith(IMAGE_SUFFIXES):
                    stem = os.path.splitext(key)[0]
                    self.stems[stem] = "" if stem in self.stems else path  # "": several are called so
                    for name in (key, stem):
                        self.called[os.path.basename(name)].append(path)

    def find(self, path):
        """The file at a path, or None. A device or a FIFO is none."""
        path = os.path.normpath(path)
        places = path, self.files.get(key := readers.key_of(path)), self.stems.get(key)
        return next((place for place in places if place and os.path.isfile(place)), None)

    def match(self, pattern):
        """The files and folders below the top that a pattern in small letters fits, such as train/*.json."""
        if "*" not in pattern:
            key = os.path.normpath(self.start + pattern)
            return [found for found in (self.files.get(key), self.folders.get(key)) if found]
        ending, depth = os.path.splitext(pattern)[1], (self.start + pattern).count(os.sep)
        return sorted(path for key, path in self.files.items() if key.endswith(ending)
                      and key.count(os.sep) == depth and fnmatchcase(key[len(self.start):], pattern))

    def inside(self, folder, *endings):
        """The paths of the files with one of these endings in a folder and below."""
        start = readers.key_of(os.path.join(folder, ""))
        if not start.startswith(self.start):
            return Tree(folder).inside(folder, *endings)
        return sorted(path for key, path in self.files.items()
                      if key.startswith(start) and key.endswith(endings) and os.path.isfile(path))


@dataclass
class Reading:
    """One split: where it is, and what was read. A problem does not stop it: check_data prints all."""
    form: str = None  # "COCO", "VOC" or "YOLO"
    path: str = None  # a file of annotations or of classes, or a folder of XML files
    tree: Tree = None
    places: list = ()  # folders that images may be in, likely ones first; of YOLO, the folders and lists
    avoid: set = frozenset()  # names of folders of the other split, where no lost image is looked for
    images: list = field(default_factory=list)  # of AnnotatedImage
    errors: Problems = field(default_factory=Problems)  # need a person: data.load refuses
    notes: Problems = field(default_factory=Problems)  # were dealt with; the texts tell how
    from_zero: bool = False  # of VOC: an xmin or ymin is 0
    held_out: str | None = None  # of a val that --split made: tells these images from any others

    def find_image(self, name, where, places=None):
        """The path of an image: `name` as written, or its last part anywhere. None, and an error, if lost."""
        places = places or self.places
        plain = unquote(re.sub(r"^.*\?d=|\?.*$", "", name)).replace("\\", "/")  # Label Studio, S3, Windows
        for spelling in (name, plain):
            for k, place in enumerate(places):
                if found := self.tree.find(os.path.join(place, spelling)):
                    places.insert(0, places.pop(k))  # the next one is probably here, too
                    if not found.startswith(self.tree.top + os.sep):
                        self.notes.add("image files outside of the data folder", found)
                    return found
        parts = readers.key_of(plain).split("/")[::-1]
        ends = {path: readers.key_of(path[len(self.tree.top):]).split(os.sep)[::-1]
                for path in self.tree.called.get(parts[0], ()) if os.path.isfile(path)}
        same = {path: len(os.path.commonprefix([end, parts])) for path, end in ends.items()
                if not self.avoid & {*end[1:]} - {*parts[1:2]}}  # LVIS has images of val in train2017
        found = [path for path, count in same.items() if count == max(same.values())]  # most in common
        if len(found) == 1:
            self.notes.add(ELSEWHERE, f"{name} is {found[0]}")
            return found[0]
        kind = "are lost, with several of that name elsewhere" if found else "do not exist"
        lost = [os.path.join(places[0], name), where, *(found[:2] or [f"copy it below {self.tree.top}"])]
        self.errors.add(f"image files that {kind}", ", ".join(lost))


def mentions(path, *words):
    """Whether all of these bytes are in a file."""
    with contextlib.suppress(UserError):
        content = readers.read_text(path, readers.MOST_JSON, as_bytes=True)
        return all(word in content for word in words)


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
    places = [place.format(name) + file for place in CLASS_PLACES for name in names for file in CLASS_FILES]
    for pattern in ("data.yaml", "*.yaml", "*.yml", "*.data", *places):
        for path in tree.match(pattern):
            if "*" not in pattern or mentions(path, b"names"):
                return path


def in_places(tree, form, path, name):
    """A Reading: the places are the folders of `tree` for images of a split that is called `name`."""
    alike = next((words for words in ALIKE if name in words), [])
    found = [tree.match(place.format(word)) for word in (name, *alike) for place in IMAGE_PLACES]
    places = [*filter(os.path.isdir, sum(found, [])), path if os.path.isdir(path) else os.path.dirname(path)]
    own = any(word in os.path.basename(key[len(tree.start):]) for key in tree.folders for word in alike)
    avoid = {word for words in ALIKE if own and words != alike for word in words}  # or one folder has all
    return Reading(form, path, tree, list(dict.fromkeys(places)), avoid)


def search(tree, split, unsplit=False):
    """The Reading of a split by the first of LAYOUTS that a folder has, None if it has none."""
    rows = [(name, form, layout.format(name)) for name in [*NAMES[split], *[""] * unsplit]
            for form, layouts in LAYOUTS.items() for layout in layouts if bool(name) == ("{}" in layout)]
    config = None
    for name, form, layout in rows:
        found = tree.match(layout)
        if form == "COCO":
            word = re.compile(rf"(?<![a-z]){name}(?![a-z])")
            found = [path for path in found if word.search(readers.key_of(path[len(tree.top):]))]
            if path := one_coco(found, "*" not in layout):
                return in_places(tree, form, path, name)
        elif form == "VOC":
            listed = layout.endswith(".txt") and tree.match("annotations")
            if found and (listed or os.path.isdir(found[0]) and tree.inside(found[0], ".xml")):
                return in_places(tree, form, found[0], name)
        else:
            if config is None:
                classes = class_file(tree, NAMES[split])
                try:
                    config = readers.read_config(classes) if classes else {}
                    if key := next((key for key in NAMES[split] if config.get(key)), None):
                        values = config[key] if isinstance(config[key], list) else [config[key]]
                        places = [readers.locate(key, value, config, classes, tree) for value in values]
                        return Reading(form, classes, tree, places)
                except UserError as error:
                    raise UserError(f"{classes}: {error}") from None
            if classes and found and (os.path.isfile(found[0]) or tree.inside(found[0], *ANY_IMAGE)):
                return Reading(form, classes, tree, found)


def find_source(tree, split, unsplit):
    """The Reading of a split. UserError with what is there and what to do if there is none."""
    if reading := search(tree, split, unsplit):
        return reading
    endings = Counter(os.path.splitext(key)[1] for key in tree.files)
    here = sorted({key[len(tree.start):].split(os.sep)[0] + "/" for key in tree.folders} - {"/"})[:9]
    here += [f"{count} {ending or 'without ending'}" for ending, count in endings.most_common(6)]
    raise UserError(
        f"{tree.top}: no {split} annotations here. Expected annotations/instances_{split}.json (COCO), "
        f"ImageSets/Main/{split}.txt (VOC), data.yaml (YOLO) or another layout of docs/options.md. "
        f"Found {', '.join(here) or 'nothing'}. {find_hint(tree, split, unsplit)}")


def find_hint(tree, split, unsplit):
    """Advice for a folder in which a split was not found."""
    def source(*where):
        with contextlib.suppress(UserError):
            return search(*where)

    if split == "val" and (train := source(tree, "train")):
        return f"{train.path} has no val: add --split 0.2 to hold some images out"
    together = None if unsplit else source(tree, split, True)
    for folder in list(tree.folders.values())[1:50]:
        if folder[len(tree.top):].count(os.sep) < 3 and source(Tree(folder), split, not together):
            return f"Did you mean {folder}?"
    if not together and (classes := class_file(tree, NAMES[split])):
        return f"{classes} is YOLO's, and no images are in its layouts: copy them into {tree.top}/images"
    jsons, xmls = tree.inside(tree.top, ".json")[:1], tree.inside(tree.top, ".xml")[:1]
    likely = {"COCO": [together.path], "VOC": xmls, "YOLO": []}[together.form] if together else jsons + xmls
    for path in likely:
        try:
            readers.parse_coco(path) if path.lower().endswith("json") else readers.read_xml(path)
        except UserError as error:
            return f"{path} {error}"
    if together:
        return "All images lie together: add --split 0.2 to hold some of them out"
    for path in tree.inside(tree.top, ".txt")[:20]:
        if any(readers.read_labels(path, False, Reading())):
            return f"{path} is a YOLO label file: write the names of its classes into {tree.top}/classes.txt"
    return f"Export the data as COCO, or give --{split}-json and --{split}-images"


def given_source(split, path, folder):
    """The Reading of a split whose two paths were given."""
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
    return Reading(form, path, Tree(folder if os.path.isdir(folder) else os.path.dirname(folder)), [folder])
