"""Where the annotations and images of a split are, in the layouts of folders that tools write."""
import contextlib
import os
import re
from collections import Counter

from support import UserError
from support.data_files import Reading, Source, Tree, key_of, read_text
from support.images import IMAGE_SUFFIXES
from support.readers import MOST_JSON, locate, parse_coco, read_config, read_labels, read_xml

NAMES = {"train": ["train", "training", "trainval"], "val": ["val", "valid", "validation", "test"]}
ALIKE = [["train", "training"], ["val", "valid", "validation"], ["test"]]
LAYOUTS = {  # in any case, the first fit is taken; {} is one of NAMES, and a layout without it is for --split
    "COCO": ["annotations/instances_{}2017.json", "annotations/instances_{}.json", "annotations/*{}*.json",
             "{}/_annotations.coco.json", "{}/*.json", "{}/annotations/*.json", "images/{}/*.json",
             "labels/*{}*.json", "*{}*.json", "*.json", "annotations/*.json", "labels/*.json"],
    "VOC": ["imagesets/main/{}.txt", "imagesets/{}.txt",  # lists of names; the boxes are in Annotations/*.xml
            "imagesets/main/*_{}.txt",  # VoTT: a list for each class, and all images in each
            "annotations/{}", "labels/{}", "images/{}", "{}",  # folders with XML files in them or below
            "imagesets/main/default.txt", "annotations", "labels", "images", "."],
    "YOLO": ["images/{}", "images/{}2017", "{}/images", "data/{}", "obj_{}_data",  # data.yaml may name others
             "{}.txt", "{}", "images", "obj_train_data", "data", "."],  # folders or a list of images
}
IMAGE_PLACES = ["{}2017", "{}", "images/{}", "images/{}2017", "{}/images", "{}/data", "data/{}",
                "{}/jpegimages", "jpegimages/{}", "images", "images/default", "jpegimages", "data", "."]
CLASS_FILES = ["classes.txt", "obj.names", "_darknet.labels", "predefined_classes.txt", "data.yaml"]
CLASS_PLACES = ["", "labels/", "labels/{}/", "{}/", "{}/labels/", "data/", "images/", "images/{}/"]
OTHER_TASKS = ("person_keypoints", "captions", "stuff", "panoptic", "image_info", "_annotations.createml")


def mentions(path, *words):
    """Whether all of these bytes are in a file."""
    with contextlib.suppress(UserError):
        content = read_text(path, MOST_JSON, as_bytes=True)
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
    configs = [path for pattern in ("data.yaml", "*.yaml", "*.yml", "*.data") for path in tree.match(pattern)
               if pattern == "data.yaml" or mentions(path, b"names")]
    places = [place.format(name) + file for place in CLASS_PLACES for name in names for file in CLASS_FILES]
    return next(iter(configs + [path for place in places for path in tree.match(place)]), None)


def in_places(tree, form, path, name):
    """A Source: the places are the folders of `tree` for images of a split that is called `name`."""
    alike = next((words for words in ALIKE if name in words), [])
    others = [word for words in ALIKE if alike and words != alike for word in words]
    patterns = [place.format(word) for word in (name, *alike) for place in IMAGE_PLACES]
    places = [folder for pattern in patterns for folder in tree.match(pattern) if os.path.isdir(folder)]
    places.append(path if os.path.isdir(path) else os.path.dirname(path))
    avoid = {word + year for word in others for year in ("", "2014", "2017")}
    return Source(form, path, list(dict.fromkeys(places)), avoid)


def search(tree, split, unsplit=False):
    """The Source of a split by the first of LAYOUTS that a folder has, None if it has none."""
    rows = [(name, form, layout.format(name)) for name in [*NAMES[split], *[""] * unsplit]
            for form, layouts in LAYOUTS.items() for layout in layouts if bool(name) == ("{}" in layout)]
    config = None
    for name, form, layout in rows:
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
                try:
                    config = read_config(classes) if classes else {}
                    if key := next((key for key in NAMES[split] if config.get(key)), None):
                        values = config[key] if isinstance(config[key], list) else [config[key]]
                        places = [locate(key, value, config, classes) for value in values]
                        return Source(form, classes, places)
                except UserError as error:
                    raise UserError(f"{classes}: {error}") from None
            if classes and found and (os.path.isfile(found[0]) or tree.inside(found[0], *IMAGE_SUFFIXES)):
                return Source(form, classes, found)
    return None


def find_source(tree, split, unsplit):
    """The Source of a split. UserError with what is there and what to do if there is none."""
    if source := search(tree, split, unsplit):
        return source
    endings = Counter(os.path.splitext(path)[1].lower() for path in {*tree.files.values()})
    here = sorted({key[len(tree.top) + 1:].split(os.sep)[0] + "/" for key in tree.folders} - {"/"})[:9]
    here += [f"{count} {ending or 'without ending'}" for ending, count in endings.most_common(6)]
    raise UserError(
        f"{tree.top}: no {split} annotations here. Expected annotations/instances_{split}.json (COCO), "
        f"ImageSets/Main/{split}.txt (VOC), data.yaml (YOLO) or another layout of docs/options.md. "
        f"Found {', '.join(here) or 'nothing'}. {find_hint(tree, split, unsplit)}")


def find_hint(tree, split, unsplit):
    """What to do about a folder in which a split was not found."""
    def source(*where):
        with contextlib.suppress(UserError):
            return search(*where)

    if split == "val" and (train := source(tree, "train")):
        return f"{train.path} has no val: add --split 0.2 to hold some images out"
    for folder in list(tree.folders.values())[1:50]:
        if folder[len(tree.top):].count(os.sep) < 3 and source(Tree(folder), split):
            return f"Did you mean {folder}?"
    together = None if unsplit else source(tree, split, True)
    jsons, xmls = tree.inside(tree.top, ".json")[:1], tree.inside(tree.top, ".xml")[:1]
    likely = {"COCO": [together.path], "VOC": xmls, "YOLO": []}[together.form] if together else jsons + xmls
    for path in likely:
        try:
            parse_coco(path) if path.lower().endswith("json") else read_xml(path)
        except UserError as error:
            return f"{path} {error}"
    if together:
        return "All images lie together: add --split 0.2 to hold some of them out"
    if class_file(tree, NAMES[split]):
        return "There are no images where YOLO's layouts have them"
    for path in tree.inside(tree.top, ".txt")[:20]:
        if read_labels(path, False, Reading()):
            return f"{path} is a YOLO label file: write the names of its classes into {tree.top}/classes.txt"
    return f"Export the data as COCO, or give --{split}-json and --{split}-images"


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
