"""Prints what is in a data set, and all that is wrong with it: `python -m support.check_data DIR`."""
import argparse
import hashlib
import sys

import numpy as np
from tqdm import tqdm

from support import UserError, visible
from support.data import read_splits
from support.images import load_image, nearly_black
from support.report import one_line_errors


def check_files(readings):
    """Opens every image file and adds to the Readings what only the files can tell."""
    originals = {}  # fingerprint of a file: the first path it was found at, and the split
    images = [(split, reading, image) for split, reading in readings.items() for image in reading.images]
    for split, reading, image in tqdm(images, "images", dynamic_ncols=True, leave=False, disable=None):
        try:
            load_image(image)
            with open(image.path, "rb") as file:
                fingerprint = hashlib.sha256(file.read()).digest()
        except (UserError, OSError) as error:
            reading.errors.add("image files that cannot be used", str(error))
            continue
        if dark := nearly_black(image):
            reading.notes.add(dark, image.path)
        original, home = originals.setdefault(fingerprint, (image.path, split))
        if original != image.path:  # the same path was noted when it was read
            reading.notes.add(f"images that are in {home} already, kept", f"{image.path} is {original}")


def format_table(categories, readings):
    """The Readings in numbers, a column for each, as text. It shows the first 20 classes."""
    def spread(values):
        return f"{min(values):.0f} / {np.median(values):.0f} / {max(values):.0f}" if len(values) else "-"

    def column(images):  # pixels as annotated, without crowds
        counts = [int((~image.crowd).sum()) for image in images]
        labels, boxes, areas = (np.concatenate([getattr(image, name)[~image.crowd] for image in images])
                                for name in ("labels", "boxes_xyxy", "areas"))
        shares = np.bincount(np.digitize(areas, (32 ** 2, 96 ** 2)), minlength=3) / max(1, len(areas))
        return {
            "images": len(images),
            "  without boxes": counts.count(0),
            "  boxes in one: min / median / max": spread(counts),
            "  width: min / median / max": spread([image.width for image in images]),
            "  height: min / median / max": spread([image.height for image in images]),
            "boxes": len(labels),
            "  their width: min / median / max": spread(boxes[:, 2] - boxes[:, 0]),
            "  their height: min / median / max": spread(boxes[:, 3] - boxes[:, 1]),
            "  area to 32 x 32 / to 96 x 96 / above": " / ".join(f"{share:.0%}" for share in shares),
        } | {f"  {name}": (labels == label).sum() for label, name in [*enumerate(categories.values())][:20]}

    columns = {split: column(reading.images) for split, reading in readings.items() if reading.images}
    keys = next(iter(columns.values()), ())
    rows = [("", *columns)] + [(key, *(one[key] for one in columns.values())) for key in keys]
    return "\n".join(f"{key[:40]:<40}" + "".join(f"{cell:>22}" for cell in cells) for key, *cells in rows)


def main(argv=None):
    """Checks the data set that the command line names. Returns 1 if train.py would refuse it, otherwise 0."""
    p = argparse.ArgumentParser(prog="python -m support.check_data", description=__doc__)
    p.add_argument("folder", nargs="?", metavar="DIR", help="with COCO, VOC or YOLO annotations")
    for name in ("train-json", "train-images", "val-json", "val-images"):
        p.add_argument(f"--{name}", metavar="PATH", help="instead of DIR: the four paths, or the two of val")
    p.add_argument("--split", type=float, metavar="SHARE", help="as in train.py: held out as val, e.g. 0.2")
    p.add_argument("--seed", type=int, default=0, help="of the split; default 0, as in train.py")
    p.add_argument("--no-images", action="store_true", help="opens no image, except YOLO's for their size")
    args = p.parse_args(argv)
    given = {"train": (args.train_json, args.train_images), "val": (args.val_json, args.val_images)}
    only_val = args.folder is None and not any(given["train"])
    splits = ("val",) if only_val else ("train", "val")
    categories, readings = read_splits(args.folder, given, splits, share=args.split, seed=args.seed)
    if not args.no_images:
        check_files(readings)
    print(format_table(categories, readings))
    for split, reading in readings.items():
        print(f"\n{split}: {visible(reading.path or 'not found')}")
        for kind, problems in (("error", reading.errors), ("note", reading.notes)):
            for line in problems.lines():
                print(f"  {kind}: {line}")
    if any(reading.errors for reading in readings.values()):
        print("\ntrain.py will not use this: correct the errors and check again.")
        return 1
    print(f"\nThis can be {'evaluated' if only_val else 'trained'} on.")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
