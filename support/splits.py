"""Finds the annotations of train and val and reads both, whatever their format."""
import contextlib
import hashlib
import os
from collections import Counter
from pathlib import Path

from support import UserError
from support.annotations import Reading, compare_categories, read_annotated_images, read_categories
from support.coco import read_coco, read_coco_beside
from support.voc import read_voc
from support.yolo import find_yolo, read_yolo

# A reader takes (path of the annotations, folder of the images, {id: name} of the training set or {},
# Reading) and returns COCO's form, see annotations.py. Another format is one more file with one more reader.
LAYOUTS = [  # (reader, annotations, images) below the folder; {} is one of SPLIT_NAMES
    (read_coco, "annotations/instances_{}2017.json", "{}2017"),
    (read_coco, "annotations/instances_{}.json", "{}"),
    (read_coco, "{}/_annotations.coco.json", "{}"),  # as Roboflow exports it
    (read_voc, "ImageSets/Main/{}.txt", "JPEGImages"),  # the boxes are in Annotations/*.xml
    (read_voc, "{}/*.xml", "{}"),  # as Roboflow exports it: every .xml beside its image
]  # and YOLO's, see find_yolo
UNSPLIT = [  # all images together, for --split
    (read_coco_beside, "*.json", "."),
    (read_coco_beside, "annotations/*.json", "."),
    (read_voc, "Annotations/*.xml", "images"),  # if there is such a folder
    (read_voc, "Annotations/*.xml", "JPEGImages"),
    (read_voc, "*.xml", "."),
]
SPLIT_NAMES = {"train": ["train", "trainval"], "val": ["val", "valid", "test"]}  # the first that is there


def find_split(split, folder, json_path=None, image_folder=None, unsplit=False):
    """(reader, annotations, image folder) of a split: as given, or the first of LAYOUTS that `folder` has.

    unsplit: or of all images, where they lie together.
    """
    if folder is None:
        if not (json_path and image_folder):
            raise UserError(f"without a data folder, --{split}-json and --{split}-images are both needed")
        suffix = Path(json_path).suffix.lower()
        if suffix == ".xml":
            raise UserError(f"{json_path}: one VOC file; give the folder of all, or a list of names")
        voc = os.path.isdir(json_path) or suffix == ".txt"
        reader = read_voc if voc else read_yolo if suffix in (".yaml", ".yml") else read_coco
        return reader, Path(json_path), Path(image_folder)
    names = SPLIT_NAMES[split]
    layouts = [(reader, pattern.format(name), images.format(name))
               for name in names for reader, pattern, images in LAYOUTS]
    if found := first_layout(folder, layouts):
        return found
    if found := find_yolo(folder, names, unsplit):
        return read_yolo, *found
    if unsplit and (found := first_layout(folder, UNSPLIT)):
        return found
    looked_for = ", ".join(pattern for _, pattern, _ in (*layouts[:len(LAYOUTS)], *UNSPLIT * unsplit))
    others = " or ".join(names[1:])
    hint = "" if unsplit else "If all images lie together, hold some out with --split 0.2. "
    raise UserError(f"{folder}: no {split} annotations here; looked for {looked_for}, data.yaml, also with "
                    f"{others} instead of {split}. {hint}For another layout give --train-json, "
                    "--train-images, --val-json and --val-images")


def first_layout(folder, layouts):
    """(reader, annotations, image folder) of the first of these layouts that a folder has, otherwise None."""
    for reader, pattern, images in layouts:
        paths = sorted(Path(folder).glob(pattern))
        if not paths or images == "images" and not Path(folder, images).is_dir():
            continue
        if reader is read_coco_beside and len(paths) > 1:
            raise UserError(f"{folder}: several {pattern} here; which? Give --train-json and --train-images")
        return reader, paths[0].parent if pattern.endswith("*.xml") else paths[0], Path(folder, images)
    return None


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
    if share is not None:
        check_unsplit(folder, given, share)
        splits = ("train",)
    categories, readings = {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):
        # classes are those of the training set even if only val is asked for: a model knows no others
        reading = Reading()
        try:
            read, reading.path, image_folder = find_split(split, folder, *given[split], share is not None)
            if read is read_yolo and split not in splits:
                image_folder = None  # data.yaml has the classes
            if read is read_voc and class_names and not categories:
                categories = dict(enumerate(class_names, 1))  # VOC has no list of classes
            contents = read(reading.path, image_folder, categories, reading)
            own = read_categories(contents, reading)
            categories = categories or own
            compare_categories(own, categories, reading.errors)
            if split in splits and not os.path.exists(image_folder):
                raise UserError(f"{image_folder}: no such folder; it should hold the images")
            if split in splits:
                reading.images = read_annotated_images(contents, image_folder, categories, reading)
        except UserError as error:
            reading.errors[str(error)] = []
        if split in splits or reading.path or any(given[split]):  # no training set: val has its own classes
            readings[split] = reading
    if share is not None and not readings["train"].errors:
        readings["val"] = hold_out(readings["train"], share, seed)
    compare_splits(categories, readings)
    return categories, readings


def check_unsplit(folder, given, share):
    """UserError unless there is one set of images, and a share to take from it."""
    if not 0 < share < 1:
        raise UserError(f"--split {share}: it must be a share between 0 and 1, for example 0.2")
    if any(path is not None for path in given["val"]):
        raise UserError("--split takes val from the training images: leave out --val-json and --val-images")
    found = []
    with contextlib.suppress(UserError):  # there is no val, or what is wrong will be said when it is read
        found = [find_split(split, folder, *given[split])[1:] for split in ("train", "val")]
    if len(found) == 2 and found[0] != found[1]:
        raise UserError(f"{folder} has a val of its own, {found[1][1]}: leave out --split")


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
    val.notes[f"{n} of {total} images, held out of the training set by --split {share}, seed {seed}"] = []
    val.held_out = hashlib.sha256(b"/".join(sorted(map(name, val.images)))).hexdigest()[:16]
    return val


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
