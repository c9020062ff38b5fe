"""Finds the annotations of train and val and reads both, whatever their format."""
import os
from pathlib import Path

from support.annotations import Reading, compare_categories, read_annotated_images, read_categories
from support.coco import read_coco
from support.images import DataError
from support.voc import read_voc

# A reader takes (path of the annotations, folder of the images, {id: name} of the training set or {},
# Reading) and returns COCO's form, see annotations.py. Another format is one more file with one more reader.
LAYOUTS = [  # (reader, annotations, images) below the folder; {} is one of SPLIT_NAMES
    (read_coco, "annotations/instances_{}2017.json", "{}2017"),
    (read_coco, "annotations/instances_{}.json", "{}"),
    (read_coco, "{}/_annotations.coco.json", "{}"),  # as Roboflow exports it
    (read_voc, "ImageSets/Main/{}.txt", "JPEGImages"),  # the boxes are in Annotations/*.xml
    (read_voc, "{}/*.xml", "{}"),  # as Roboflow exports it: every .xml beside its image
]
SPLIT_NAMES = {"train": ["train", "trainval"], "val": ["val", "valid", "test"]}  # the first that is there


def find_split(split, folder, json_path, image_folder):
    """(reader, annotations, image folder) of a split: as given, or the first of LAYOUTS that `folder` has."""
    if folder is None:
        if not (json_path and image_folder):
            raise DataError(f"without a data folder, --{split}-json and --{split}-images are both needed")
        if str(json_path).lower().endswith(".xml"):
            raise DataError(f"{json_path}: one VOC file; give the folder of all, or a list of names")
        voc = os.path.isdir(json_path) or str(json_path).endswith(".txt")
        return read_voc if voc else read_coco, Path(json_path), Path(image_folder)
    for name in SPLIT_NAMES[split]:
        for reader, pattern, images in LAYOUTS:
            for path in Path(folder).glob(pattern.format(name)):
                path = path.parent if "*" in pattern else path
                return reader, path, Path(folder, images.format(name))
    looked_for = ", ".join(pattern.format(split) for _, pattern, _ in LAYOUTS)
    others = " or ".join(SPLIT_NAMES[split][1:])
    raise DataError(f"{folder}: no {split} annotations here; looked for {looked_for}, also with {others} "
                    f"instead of {split}. For another layout give --train-json, --train-images, --val-json "
                    "and --val-images")


def read_splits(folder, given, splits, class_names=()):
    """({category id: name}, {split: Reading}), as far as they can be read.

    given: the paths of data.load as {split: (json, images)}. DataError only for paths that make no sense.
    """
    if folder is not None and any(path is not None for pair in given.values() for path in pair):
        raise DataError("give a data folder or the four paths (--train-json, ...), not both")
    if folder is not None and not os.path.isdir(folder):
        what = "a file, not a" if os.path.isfile(folder) else "no such"
        raise DataError(f'{folder or repr(folder)}: {what} folder; the embedded data set is called "shapes"')
    categories, readings = {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):
        # classes are those of the training set even if only val is asked for: a model knows no others
        reading = Reading()
        try:
            read, reading.path, image_folder = find_split(split, folder, *given[split])
            if read is read_voc and class_names and not categories:
                categories = dict(enumerate(class_names, 1))  # VOC has no list of classes
            contents = read(reading.path, image_folder, categories, reading)
            own = read_categories(contents, reading)
            categories = categories or own
            compare_categories(own, categories, reading.errors)
            if split in splits and not os.path.isdir(image_folder):
                raise DataError(f"{image_folder}: no such folder; it should hold the images")
            if split in splits:
                reading.images = read_annotated_images(contents, image_folder, categories, reading)
        except DataError as error:
            reading.errors[str(error)] = []
        if split in splits or reading.path or any(given[split]):  # no training set: val has its own classes
            readings[split] = reading
    compare_splits(categories, readings)
    return categories, readings


def compare_splits(categories, readings):
    """Adds to the Readings what shows only when all of their images are known."""
    earlier = {}  # identity of a file: the first path it was found at, and the split
    for split, reading in readings.items():
        present = {label for image in reading.images for label in image.labels[~image.crowd].tolist()}
        absent = [name for label, name in enumerate(categories.values()) if label not in present]
        if reading.images and absent:
            more = f" and {len(absent) - 10} more" if len(absent) > 10 else ""
            reading.notes[f"no box of class {', '.join(absent[:10])}{more}"] = []
        if split == "train" and reading.images and not present and not reading.errors:
            reading.errors[f"not a single usable box to train on in {len(reading.images)} images"] = []
        for image in reading.images:
            key = identity(image.path)
            if key in earlier:
                path, home = earlier[key]
                where = image.path if image.path == path else f"{image.path} is {path}"
                reading.notes[already_in(home, split)].append(where)
            else:
                earlier[key] = image.path, split


def identity(path):
    """The same for all paths to one file, be it through links or `..`."""
    status = os.stat(path)
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def already_in(home, split):
    """The kind of problem that an image is when it has been in `home` before."""
    return f"images that are in {home} already, " + ("kept" if home == split else "so val is too easy")
