"""Data for all detectors: `load` gives the sets of a folder or the embedded shapes, `collate` a padded batch.

Legend as in support/evaluation.py; n objects in one image, H x W pixels.
"""
import copy
import functools
import hashlib
import itertools
import os
import shlex
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from support import UserError, visible
from support.evaluation import to_coco
from support.images import bare_images, clean, load_image, make_transform, nearly_black, to_input_and_target
from support.layouts import ELSEWHERE, NAMES, Reading, Tree, find_source, given_source, search
from support.readers import READERS, join_names
from support.shapes import Shapes

SIZES = {"laptop": 256, "none": 256, "paper": 800}  # pixels, without --size: see make_transform in images.py
SHAPES_SIZE = 96  # longest side in pixels


class CocoFolder(Dataset):
    """The images of one split of a folder, in any of the three formats.

    class_names, category_ids   lists by class index 0..C-1: the name, and the id in the annotation file
    name, notes                 for messages; `notes` lists what was repaired or left out, a line each
    num_boxes, max_boxes        in all images; in the fullest one. Without crowds, as count_boxes(index)
    held_out                    of a val that --split made: tells these images from any others; or None
    path_of(index)              the image file; of shapes, which have none, "shapes-7"
    coco                        the ground truth as a pycocotools object, in original pixels and ids

    dataset[key], key an index or (epoch, index), returns the image, float32 [3, H, W] with ImageNet's mean
    and std taken out, and a target: labels int64 [n]; boxes float32 [n, 4]; image_id; size, the original
    (height, width). Random numbers depend on (seed, epoch, index) only, and no global generator moves.
    """

    def __init__(self, name, images, categories, notes, train, augment, size, seed, flip=True, held_out=None):
        self.name, self.images, self.notes, self.held_out = name, images, notes, held_out
        self.category_ids, self.class_names = list(categories), list(categories.values())
        self.augment, self.seed = augment, seed
        self.size = size or SIZES[augment]
        self.transform = make_transform(train, augment, self.size, flip)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, key):
        epoch, index = key if isinstance(key, tuple) else (0, key)
        annotated = self.images[index]
        try:
            image = tv_tensors.Image(v2.functional.pil_to_tensor(load_image(annotated)))  # uint8 [3, H, W]
        except UserError as error:
            more = "; python -m support.check_data DIR finds all such images" if self.class_names else ""
            raise UserError(f"{error}{more}") from None
        boxes = tv_tensors.BoundingBoxes(annotated.boxes_xyxy[~annotated.crowd], format="XYXY",
                                         canvas_size=(annotated.height, annotated.width))  # [n, 4]
        target = {"boxes": boxes, "labels": torch.from_numpy(annotated.labels[~annotated.crowd])}
        seed = np.random.SeedSequence([self.seed, epoch, index]).generate_state(1)
        with torch.random.fork_rng(devices=[]):  # v2 draws from torch's global generator; this puts it back
            torch.default_generator.manual_seed(int(seed[0]))  # torch.manual_seed would reseed the GPUs, too
            image, target = self.transform(image, target)
        return to_input_and_target(image, target["boxes"], target["labels"], annotated)

    def path_of(self, index):
        return self.images[index].path

    def count_boxes(self, index):
        return int((~self.images[index].crowd).sum())

    def subset(self, indices):
        some = copy.copy(self)
        some.images = [self.images[index] for index in indices]
        some.__dict__.pop("coco", None)
        return some

    @property
    def num_boxes(self):
        return sum(map(self.count_boxes, range(len(self))))

    @property
    def max_boxes(self):
        return max(map(self.count_boxes, range(len(self))), default=0)

    @functools.cached_property
    def coco(self):
        return to_coco(self, self.images)


# ---- Batches -----------------------------------------------------------------------------------------------
def collate(batch):
    """List of (image, target) -> images [B, 3, H, W], mask [B, H, W] bool, list of B targets.

    Each image is in the top left corner of a common canvas. The rest is zeros, where the mask is True.
    """
    images, targets = zip(*batch)
    height, width = max(image.shape[1] for image in images), max(image.shape[2] for image in images)
    padded = torch.zeros(len(images), 3, height, width)  # [B, 3, H, W]
    mask = torch.ones(len(images), height, width, dtype=torch.bool)  # [B, H, W]
    for image, canvas, padding in zip(images, padded, mask):
        h, w = image.shape[1:]
        canvas[:, :h, :w], padding[:h, :w] = image, False
    return padded, mask, list(targets)


def first_with_boxes(dataset, n, augment=False):
    """The first n images that have boxes, as a data set of their own; not augmented unless asked for."""
    with_boxes = (index for index in range(len(dataset)) if dataset.count_boxes(index))
    small = dataset.subset(list(itertools.islice(with_boxes, n)))
    if not augment and isinstance(dataset, CocoFolder):  # shapes never are
        small.transform = make_transform(False, dataset.augment, dataset.size)
    return small


# ---- Train and val -----------------------------------------------------------------------------------------
def read_splits(folder, given, splits, share=None, seed=0):
    """({category id: name}, {split: Reading}). UserError only for paths that make no sense.

    given: {split: (json, images)}. share: of the training images, held out as val.
    """
    if folder is not None and any(map(any, given.values())):
        raise UserError("give a data folder or the four paths (--train-json, ...), not both")
    if folder is not None and not os.path.isdir(folder):
        why = "a file, not a folder; give the folder" if os.path.isfile(folder) else "no such folder"
        raise UserError(f'{folder or repr(folder)}: {why}; the embedded data set is called "shapes"')
    tree = folder and Tree(folder)
    if share is not None:
        check_split(tree, share, given)
        splits = ("train",)
    names, readings, found = {}, {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):  # train gives val its classes
        reading = Reading()
        try:
            reading = find_source(tree, split, share is not None) if tree else \
                given_source(split, *given[split])
            for path in reading.tree.junk:
                reading.notes.add("files that systems or notebooks make, not used", path)
            images = READERS[reading.form](reading, names)
            found[split] = images, join_names(names, next(images), reading)
        except UserError as error:
            reading.errors.add(str(error))
        if split in splits or reading.path or any(given[split]):  # no training set: val has its own classes
            readings[split] = reading
    names = dict(sorted(names.items()))
    from_zero = any(reading.from_zero for reading in readings.values())
    for split, (images, ids) in found.items():
        reading, labels = readings[split], {own: [*names].index(i) for own, i in ids.items()}
        if from_zero and reading.form == "VOC":
            reading.notes.add("an xmin or ymin is 0: pixels counted from 0, nothing is subtracted")
        first = 1 if reading.form == "VOC" and not from_zero else 0
        try:
            reading.images = clean(images, labels, first, reading) if split in splits else []
        except UserError as error:
            reading.errors.add(str(error))
    if share is not None and not readings["train"].errors:
        readings["val"] = hold_out(readings["train"], share, seed)
    compare_splits(names, readings)
    return names, readings


def check_split(tree, share, given):
    """UserError if --split cannot be used."""
    if not 0 < share < 1:
        raise UserError(f"--split {share}: it must be a share between 0 and 1, for example 0.2")
    if any(given["val"]):
        raise UserError("--split takes val from train: leave out --val-json and --val-images")
    try:
        train, val = (tree and search(tree, name) for name in NAMES)
    except UserError:  # that a val of data.yaml does not exist does not matter here
        return
    if train and val and (train.path, train.places) != (val.path, val.places):
        raise UserError(f"{tree.top} has a val of its own, {val.path}: leave out --split")


def hold_out(reading, share, seed):
    """Takes a share of the images out of a Reading, and returns them as that of val.

    Images with the same classes are together in a row, rare classes first, and every n-th is taken.
    """
    def name(image):
        return os.fsencode(os.path.basename(image.path))

    def place(image):
        chance = hashlib.sha256(b"%d %s" % (seed, name(image))).digest()
        return sorted((images_with[label], label) for label in image.classes), chance

    total, n = len(reading.images), round(share * len(reading.images))
    if not 0 < n < total:
        raise UserError(f"--split {share} of {total} images leaves none for train or none for val")
    images_with = Counter(label for image in reading.images for label in image.classes)
    row, start = sorted(reading.images, key=place), int(hashlib.sha256(b"%d" % seed).hexdigest(), 16) % total
    chosen = {row[(k * total + start) // n].id for k in range(n)}
    val = Reading(path=reading.path, images=[image for image in reading.images if image.id in chosen])
    reading.images = [image for image in reading.images if image.id not in chosen]
    val.notes.add(f"{n} of {total} images, held out of the training set by --split {share}, seed {seed}")
    val.held_out = hashlib.sha256(b"/".join(sorted(map(name, val.images)))).hexdigest()[:16]
    return val


def compare_splits(names, readings):
    """Adds to the Readings what shows only when all of their images are known."""
    earlier = {}  # {path: its split}
    for split, reading in readings.items():
        present = {label for image in reading.images for label in image.classes}
        absent = [name for label, name in enumerate(names.values()) if label not in present]
        if reading.images and absent:
            reading.notes.add(f"no box of class {', '.join(absent)}")
        if split == "train" and reading.images and not present and not reading.errors:
            reading.errors.add(f"not a single usable box to train on in {len(reading.images)} images; "
                               "crowd regions (iscrowd, VOC: difficult) do not count")
        for image in reading.images:
            if image.path in earlier:
                lost = split != earlier[image.path] and ELSEWHERE in reading.notes  # val has names of train?
                problems, kept = (reading.errors, "") if lost else (reading.notes, ", kept")
                problems.add(f"images that are in {earlier[image.path]} already{kept}", image.path)
            earlier.setdefault(image.path, split)


# ---- Load --------------------------------------------------------------------------------------------------
def from_images(paths, augment="laptop", size=None):
    """Image files, all images in folders, and PIL images as a data set without boxes, as for evaluation."""
    return CocoFolder("images", bare_images(paths), {}, [], False, augment, size, seed=0)


def load(folder=None, *, train_json=None, train_images=None, val_json=None, val_images=None, size=None,
         augment="laptop", seed=0, splits=("train", "val"), split=None, flip=True):
    """{"train": data set, "val": data set}, or only those that `splits` names. Raises UserError.

    folder       None or "shapes": the embedded set. Otherwise a folder in one of LAYOUTS. Or give the four
                 paths (VOC: instead of a JSON file, a list in ImageSets/Main or a folder of XML files)
    size, augment, flip   see make_transform in images.py; augment and flip are not for shapes
    seed         of the augmentation, and of the shapes to train on. The shapes to validate on never change.
    splits       only val needs no training set; if there is one, its classes are those of val
    split        this share of the training images is held out as val, by `seed`; there must be no other val
    """
    if augment not in SIZES:
        raise UserError(f'augment can be "laptop", "paper" or "none", not {augment!r}')
    given = {"train": (train_json, train_images), "val": (val_json, val_images)}
    if folder in (None, "shapes") and not any(map(any, given.values())):
        if split is not None:
            raise UserError("the embedded shapes have a val of their own: leave out --split")
        shapes = {"train": Shapes(20000, size or SHAPES_SIZE, seed, "train"),
                  "val": Shapes(250, size or SHAPES_SIZE, 0, "val")}
        return {part: shapes[part] for part in splits}

    categories, readings = read_splits(folder, given, splits, split, seed)
    for reading in readings.values():
        if reading.errors and reading.path is None:
            raise UserError(reading.errors.lines()[0])
        if reading.errors:
            same = shlex.quote(str(folder)) if folder else "with the same paths"
            same += f" --split {split}" if split else ""
            raise UserError(f"{reading.path}: {reading.errors.lines()[0]}; "
                            f"to see everything: python -m support.check_data {same}")
    datasets = {}
    for part in splits:
        reading = readings[part]
        name = visible(f"{Path(folder).resolve().name if folder else Path(reading.path).stem} {part}")
        if dark := nearly_black(reading.images[0]):
            reading.notes.add(dark, reading.images[0].path)
        notes = [visible(f"{reading.path}: {line}") for line in reading.notes.lines()]
        datasets[part] = CocoFolder(name, reading.images, categories, notes, part == "train", augment, size,
                                    seed, flip, reading.held_out)
    return datasets


def load_datasets(args, splits):
    """{split: data set} for the flags of train.py; with --overfit both are the same few images."""
    paths = {name: getattr(args, name) for name in ("train_json", "train_images", "val_json", "val_images")}
    splits = ("train",) if args.overfit else splits  # evaluated on what it is trained on
    datasets = load(args.data, **paths, size=args.size, augment=args.preset, seed=args.seed, splits=splits,
                    split=args.split, flip=not args.no_flip)
    if args.overfit:
        datasets["train"] = datasets["val"] = first_with_boxes(datasets["train"], args.overfit)
    return datasets
