"""Which annotations a folder has, and reading those of all its splits: in COCO's form or in VOC's."""
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from support.coco import compare_categories, read_annotated_images, read_categories, read_json
from support.images import DataError
from support.voc import read_voc

LAYOUTS = [  # (annotations, images) below the folder; {} is one of SPLIT_NAMES
    ("annotations/instances_{}2017.json", "{}2017"),  # COCO
    ("annotations/instances_{}.json", "{}"),
    ("{}/_annotations.coco.json", "{}"),  # COCO as Roboflow exports it
    ("ImageSets/Main/{}.txt", "JPEGImages"),  # VOC; the boxes are in Annotations/*.xml
    ("{}/*.xml", "{}"),  # VOC as Roboflow exports it: every .xml beside its image
]
SPLIT_NAMES = {"train": ["train", "trainval"], "val": ["val", "valid", "test"]}  # the first that is there


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


def problem_lines(problems):
    """{kind: [places]} -> a line per kind. A kind without places speaks for itself."""
    texts = [f"{kind}: {len(places)} (first: {places[0]})" if places else kind
             for kind, places in problems.items()]
    return [" ".join(text.splitlines())[:500] for text in texts]  # names may hold line breaks and have no end


def find_split(split, folder, json_path, image_folder):
    """(annotation file, image folder) of a split: as given, or the first of LAYOUTS that is in `folder`."""
    if folder is None:
        if json_path is None or image_folder is None:
            raise DataError(f"without a data folder, --{split}-json and --{split}-images are both needed")
        return Path(json_path), Path(image_folder)
    tried = [(pattern.format(name), images.format(name)) for name in SPLIT_NAMES[split]
             for pattern, images in LAYOUTS]
    for pattern, images in tried:
        for path in Path(folder).glob(pattern):
            return path.parent if "*" in pattern else path, Path(folder, images)
    looked_for = ", ".join(pattern for pattern, _ in tried[:len(LAYOUTS)])
    others = " or ".join(SPLIT_NAMES[split][1:])
    raise DataError(f"{folder}: no {split} annotations here; looked for {looked_for}, also with {others} "
                    f"instead of {split}. For another layout give --train-json, --train-images, --val-json "
                    "and --val-images")


def read_splits(folder, given, splits):
    """({category id: name}, {split: Reading}), as far as they can be read.

    given: the four paths of `load` as {split: (json, images)}. DataError only for paths that make no sense.
    """
    if folder is not None and any(path is not None for pair in given.values() for path in pair):
        raise DataError("give a data folder or the four paths (--train-json, ...), not both")
    if folder is not None and not Path(folder).is_dir():
        raise DataError(f'{folder}: no such folder; the embedded data set is called "shapes"')
    categories, readings = {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):
        # classes are those of the training set even if only val is asked for: a model knows no others
        reading = Reading()
        try:
            reading.path, image_folder = find_split(split, folder, *given[split])
            if reading.path.is_dir() or reading.path.suffix == ".txt":
                contents = read_voc(reading.path, image_folder, categories, reading.errors)
            else:
                contents = read_json(reading.path)
            own = read_categories(contents, reading.errors)
            categories = categories or own
            compare_categories(own, categories, reading.errors)
            if split in splits and not image_folder.is_dir():
                raise DataError(f"{image_folder}: no such folder; it should hold the images")
            if split in splits:
                reading.images = read_annotated_images(
                    contents, image_folder, categories, reading.errors, reading.notes)
        except DataError as error:
            reading.errors[str(error)] = []
        if split in splits or reading.path:  # where there is no training set, val has its own classes
            readings[split] = reading
    compare_splits(categories, readings)
    return categories, readings


def compare_splits(categories, readings):
    """Adds to the Readings what shows only when all of their images are known."""
    split_of = {}
    for split, reading in readings.items():
        present = {label for image in reading.images for label in image.labels[~image.crowd].tolist()}
        absent = [name for label, name in enumerate(categories.values()) if label not in present]
        if reading.images and absent:
            reading.notes[f"no box of class {', '.join(absent)}"] = []
        if split == "train" and reading.images and not present and not reading.errors:
            reading.errors[f"not a single usable box to train on in {len(reading.images)} images"] = []
        for image in reading.images:
            if image.path in split_of:
                reading.notes[already_in(split_of[image.path], split)].append(image.path)
            split_of.setdefault(image.path, split)


def already_in(home, split):
    """The kind of problem that an image is when it has been in `home` before."""
    return f"images that are in {home} already, " + ("kept" if home == split else "so val is too easy")

