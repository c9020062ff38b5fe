"""What is in a data set, and all that is wrong with it: `python -m support.check_data DIR`."""
import argparse
import hashlib
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from tqdm import tqdm

from support.annotations import already_in, problem_lines, read_splits
from support.images import DataError, SizeDataError, load_image, one_line


def check_files(readings):
    """Opens every image file and adds to the Readings what only the files can tell."""
    originals = {}  # fingerprint of a file: the first path it was found at, and the split
    images = [(split, reading, image) for split, reading in readings.items() for image in reading.images]
    for split, reading, annotated in tqdm(images, "images", dynamic_ncols=True, leave=False, disable=None):
        try:
            load_image(annotated)
        except DataError as error:
            fault = "are of another size" if isinstance(error, SizeDataError) else "cannot be used"
            reading.errors[f"image files that {fault}"].append(str(error))
            continue
        with Image.open(annotated.path) as raw:
            if raw.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                turned = "photos to be turned (EXIF), used as they were annotated"
                reading.notes[turned].append(annotated.path)
        fingerprint = hashlib.sha256(Path(annotated.path).read_bytes()).digest()
        original, home = originals.setdefault(fingerprint, (annotated.path, split))
        if original != annotated.path:  # equal paths have been noted when they were read
            reading.notes[already_in(home, split)].append(f"{annotated.path} is {original}")


def summarise(images, classes):
    """Rows (what, number or text) about the images of one split. Pixels as annotated; without crowds."""
    def spread(values):
        return f"{min(values):.0f} / {np.median(values):.0f} / {max(values):.0f}" if len(values) else "-"

    counts = [int((~image.crowd).sum()) for image in images]
    labels, boxes, areas = (np.concatenate([getattr(image, name)[~image.crowd] for image in images])
                            for name in ("labels", "boxes_xyxy", "areas"))
    shares = np.bincount(np.digitize(areas, (32 ** 2, 96 ** 2)), minlength=3) / max(1, len(areas))
    return [
        ("images", len(images)),
        ("  without boxes", counts.count(0)),
        ("  boxes in one: min / median / max", spread(counts)),
        ("  width: min / median / max", spread([image.width for image in images])),
        ("  height: min / median / max", spread([image.height for image in images])),
        ("boxes", len(labels)),
        ("  width: min / median / max", spread(boxes[:, 2] - boxes[:, 0])),
        ("  height: min / median / max", spread(boxes[:, 3] - boxes[:, 1])),
        ("  area to 32 x 32 / to 96 x 96 / above", " / ".join(f"{share:.0%}" for share in shares)),
        *[(f"  {name}", (labels == label).sum()) for label, name in classes.items()],
    ]


def format_table(categories, readings):
    """The Readings in numbers, a column for each, as text. Of many classes it shows the most common ones."""
    counts = Counter(label for reading in readings.values() for image in reading.images
                     for label in image.labels[~image.crowd].tolist())
    classes = {label: list(categories.values())[label] for label, _ in counts.most_common(15)}
    readings = {split: reading for split, reading in readings.items() if reading.images}
    rows = [("", *readings)]
    for cells in zip(*(summarise(reading.images, classes) for reading in readings.values())):
        rows.append((cells[0][0], *(text for _, text in cells)))
    if len(counts) > len(classes):
        rows.append((f"  and {len(counts) - len(classes)} more classes",))
    return "\n".join(f"{what[:40]:<40}" + "".join(f"{text:>22}" for text in texts) for what, *texts in rows)


def main(argv=None):
    """Checks the data set that the command line names. Returns 1 if train.py would refuse it, else 0."""
    p = argparse.ArgumentParser(description="What is in a data set, and all that is wrong with it.")
    p.add_argument("data", nargs="?", metavar="DIR", help="folder with COCO or VOC annotations")
    for name in ("train-json", "train-images", "val-json", "val-images"):
        p.add_argument(f"--{name}", metavar="PATH", help="instead of DIR: the four paths one by one")
    args = p.parse_args(argv)
    if not any(vars(args).values()):
        p.error("which folder?")
    given = {"train": (args.train_json, args.train_images), "val": (args.val_json, args.val_images)}
    categories, readings = read_splits(args.data, given, ("train", "val"))
    check_files(readings)
    sys.stdout.reconfigure(errors="backslashreplace")  # a file name may hold what the terminal cannot show
    print(format_table(categories, readings))
    for split, reading in readings.items():
        found = [f"  error: {line}" for line in problem_lines(reading.errors)]
        found += [f"  note: {line}" for line in problem_lines(reading.notes)]
        print(f"\n{split}: {reading.path or 'not found'}", *found or ["  nothing wrong"], sep="\n")
    refused = any(reading.errors for reading in readings.values())
    print("\ntrain.py will not train on this: mend the errors and check again." if refused else
          "\nThis can be trained on.")
    return int(refused)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DataError as error:
        sys.exit(f"data: {one_line(error)}")
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; nothing was changed.")
