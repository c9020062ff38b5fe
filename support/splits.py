"""Reads train and val: joins their classes, cleans the boxes, holds images out for --split, compares both."""
import contextlib
import gc
import hashlib
import os
from collections import Counter

import numpy as np

from support import UserError
from support.data_files import Reading, Tree, key_of
from support.images import AnnotatedImage
from support.layouts import NAMES, find_source, given_source, search
from support.readers import read_coco, read_voc, read_yolo

READERS = {"COCO": read_coco, "VOC": read_voc, "YOLO": read_yolo}
SMALLEST_SIDE = 0.1  # pixels; float32 arithmetic leaves nothing of a box that is thinner


def read_splits(folder, given, splits, class_names=(), share=None, seed=0):
    """({category id: name}, {split: Reading}). UserError only for paths that make no sense.

    given: {split: (json, images)}. share: of the training images, held out as val.
    """
    if folder is not None and any(map(any, given.values())):
        raise UserError("give a data folder or the four paths (--train-json, ...), not both")
    if folder is not None and not os.path.isdir(folder):
        why = "a file, not a folder" if os.path.isfile(folder) else "no such folder"
        raise UserError(f'{folder or repr(folder)}: {why}; the embedded data set is called "shapes"')
    tree = folder and Tree(folder)

    if share is not None:
        if not 0 < share < 1:
            raise UserError(f"--split {share}: it must be a share between 0 and 1, for example 0.2")
        if any(given["val"]):
            raise UserError("--split takes val from train: leave out --val-json and --val-images")
        train = val = None
        with contextlib.suppress(UserError):  # that a val of data.yaml does not exist does not matter here
            train, val = (tree and search(tree, name) for name in NAMES)
        if train and val and (train.path, train.places) != (val.path, val.places):
            raise UserError(f"{folder} has a val of its own, {val.path}: leave out --split")
        splits = ("train",)
    names, readings, tables = {}, {}, {}
    for split in ("train", "val") if "val" in splits else ("train",):  # val alone has train's classes, too
        reading = Reading()
        gc.disable()  # it would look through millions of new objects again and again: a fifth of the time
        try:
            where, source = (tree, find_source(tree, split, share is not None)) if tree else \
                given_source(split, *given[split])
            reading.path = source.path
            for path in where.junk:
                reading.notes.add("files that systems or notebooks make, not used", path)
            known = names or dict(enumerate(class_names, 1))  # VOC has no list of classes
            table = READERS[source.form](source, where, reading, known, split in splits)
            tables[split] = table, join_names(names, table.names, reading)
        except UserError as error:
            reading.errors.add(str(error))
        finally:
            gc.enable()
        if split in splits or reading.path or any(given[split]):  # no training set: val has its own classes
            readings[split] = reading
    names = dict(sorted(names.items()))
    from_zero = any(0 <= value < 1 for table, _ in tables.values() if table.from_one
                    for k in (2, 3) for value in table.numbers[k::8])  # xmin, ymin
    for split, (table, ids) in tables.items():
        if table.from_one and from_zero:
            table.from_one = False
            readings[split].notes.add("an xmin or ymin is 0: pixels counted from 0, nothing is subtracted")
        if split in splits:
            labels = np.array([list(names).index(i) for i in ids.values()], np.int64)
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
        if before.get(i) == name:
            ids[i] = i
        elif len(same) == 1:
            ids[i] = same[0]
            kind = "classes with another id than in train, matched by name"
            reading.notes.add(kind, f"{name}, {i} and {ids[i]}")
        else:
            if alike and not same:
                reading.errors.add("classes written in another way than in train", f"{name!r}, {alike[0]!r}")
            elif before:
                reading.notes.add("classes that train does not have", name)
            ids[i] = i if i not in names else max(names) + 1
            names[ids[i]] = name
    if before and not {*before.values()} & {*own.values()}:
        reading.errors.add(f"none of train's classes is here: {', '.join(before.values())}")
    return ids


def clean(table, labels, reading):
    """The AnnotatedImages of a Table, boxes cut to their image. What is left out or changed is noted."""
    numbers = np.array(table.numbers).reshape(-1, 8)
    image, label = numbers[:, 0].astype(int), labels[numbers[:, 1].astype(int)]  # [n], [n]
    boxes, area, crowd = numbers[:, 2:6], numbers[:, 6], numbers[:, 7] == 1  # [n, 4], [n], [n]

    def note(chosen, kind, problems=reading.notes):
        if found := np.flatnonzero(chosen).tolist():
            problems.add(kind, table.where(table.places[found[0]]), len(found))

    with np.errstate(invalid="ignore"):  # infinite numbers
        shares = (abs(boxes - 0.5) <= 0.51).all(1) & (boxes % 1 != 0).any(1)
    if not table.from_shares and shares.sum() > len(boxes) / 2:
        note(shares, "most boxes are from 0 to 1: shares of the image? Pixels are expected", reading.errors)
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
        reading.notes.add("most boxes reach over the edge of their image: COCO expects x, y, width, height")
    order = np.lexsort((*cut.T, label, image))
    rows = np.column_stack([image, label, cut])[order]
    twice = np.zeros(len(boxes), bool)
    twice[order[1:]] = (rows[1:] == rows[:-1]).all(1)
    note(kept & twice, "boxes given more than once, with the same class, kept")
    note(kept & crowd, "crowd regions (VOC: difficult), neither trained on nor evaluated")
    area = np.minimum(np.where(area > 0, area, np.inf), left.prod(1))  # an outline may not have been clipped

    chosen = np.flatnonzero(kept)
    chosen = chosen[np.argsort(image[chosen], kind="stable")]
    ends = np.searchsorted(image[chosen], np.arange(len(table.images) + 1))
    columns = label[chosen], cut[chosen].astype(np.float32), area[chosen], crowd[chosen]
    found = [AnnotatedImage(*row, *(column[start:end] for column in columns))
             for row, start, end in zip(table.images, ends, ends[1:]) if row]
    for image in found:
        if not len(image.labels):
            reading.notes.add("images without boxes, kept", f"{image.path}, image id {image.id}")
    return found


def hold_out(reading, share, seed):
    """Takes a share of the images out of a Reading, and returns them as that of val.

    Images with the same classes are together in a row, rare classes first, and every n-th is taken.
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
    earlier = {}  # {path: its split}
    for split, reading in readings.items():
        present = {label for image in reading.images for label in image.labels[~image.crowd].tolist()}
        absent = [name for label, name in enumerate(categories.values()) if label not in present]
        if reading.images and absent:
            reading.notes.add(f"no box of class {', '.join(absent)}")
        if split == "train" and reading.images and not present and not reading.errors:
            reading.errors.add(f"not a single usable box to train on in {len(reading.images)} images; "
                               "crowd regions (iscrowd, VOC: difficult) do not count")
        for image in reading.images:
            if image.path in earlier:
                reading.notes.add(f"images that are in {earlier[image.path]} already, kept", image.path)
            earlier.setdefault(image.path, split)
