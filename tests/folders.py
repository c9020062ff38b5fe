"""Data sets written on the spot: small ones for tests of any topic, large ones to measure.

    python -m tests.folders COCO DIR    writes a set of COCO's size and measures how it is read; or YOLO
"""
import json
import resource
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert

from support import data, one_line

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]  # not sorted, not from 0, not without gaps
TRAIN = [[10, 8, 20, 16], [30, 4, 12, 30], None]  # the box of each image, [x, y, width, height]
VAL = [[5, 5, 40, 40], [1, 2, 6, 5]]


# ---- COCO ------------------------------------------------------------------------------------------------
def write_image(path, width=64, height=48, box=None):
    """A black image with a white rectangle: box = [x, y, width, height] in pixels, as COCO writes it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    if box:
        x, y, w, h = box
        pixels[y:y + h, x:x + w] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_noise(path, width=64, height=48, seed=0, **save):
    """An image that no compression makes small: cut off anywhere, it is damaged."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, **save)


def annotations_of(boxes):
    """COCO contents, one image per box (None: an image without boxes); ids from 1, classes in turn."""
    images = [{"id": k, "file_name": f"{k}.png", "width": 64, "height": 48} for k in range(1, len(boxes) + 1)]
    annotations = [{"id": k, "image_id": k, "category_id": (7, 3)[k % 2], "bbox": box, "iscrowd": 0,
                    "area": box[2] * box[3]} for k, box in enumerate(boxes, 1) if box]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_split(json_path, image_folder, boxes):
    contents = annotations_of(boxes)
    for image, box in zip(contents["images"], boxes):
        write_image(image_folder / image["file_name"], box=box)
    write_json(json_path, contents)


def coco_folder(folder, train=TRAIN, val=VAL):
    """annotations/instances_{train,val}.json with train/ and val/: three images (one without box) and two."""
    for split, boxes in (("train", train), ("val", val)):
        write_split(folder / f"annotations/instances_{split}.json", folder / split, boxes)
    return folder


def change(folder, how, split="train"):
    """Applies how(contents) to an annotation file; what it returns, if anything, replaces the contents."""
    path = folder / f"annotations/instances_{split}.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps(how(contents) or contents))


def edit(key, index, **values):
    """A change to one entry of an annotation file; a value of ... deletes the field."""
    def how(contents):
        entry = contents[key][index]
        entry.update(values)
        for name in [name for name, value in values.items() if value is ...]:
            del entry[name]
    return how


def small_coco(folder, images=3, bbox=(4, 4, 20, 20), **changes):
    """A folder of noise images with one box each; the annotations of train and val are the same."""
    contents = {
        "categories": [{"id": 7, "name": "thing"}],
        "images": [{"id": i, "file_name": f"{i}.png", "width": 48, "height": 40} for i in range(images)],
        "annotations": [{"id": i, "image_id": i, "category_id": 7, "bbox": list(bbox)}
                        for i in range(images)],
    }
    contents.update(changes)
    (folder / "annotations").mkdir(parents=True)
    for k, split in enumerate(("train", "val")):
        (folder / f"annotations/instances_{split}.json").write_text(json.dumps(contents))
        for i in range(images):
            write_noise(folder / split / f"{i}.png", 48, 40, seed=2 * i + k)
    return folder


# ---- What comes out --------------------------------------------------------------------------------------
def bright(image):
    """(x0, y0, x1, y1) around the pixels that are nearer to white than to black; None without any."""
    grey = image.mean(0)
    if grey.max() - grey.min() < 1:
        return None
    ys, xs = torch.nonzero(grey > (grey.max() + grey.min()) / 2, as_tuple=True)
    return torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()


def pixel_boxes(image, target):
    """The target's boxes as xyxy in pixels of the image it came with."""
    height, width = image.shape[1:]
    return box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])


def assert_same(a, b, why):
    """Two (image, target) are equal."""
    assert torch.equal(a[0], b[0]), f"{why}: the images differ"
    assert torch.equal(a[1]["boxes"], b[1]["boxes"]), f"{why}: the boxes differ"
    assert torch.equal(a[1]["labels"], b[1]["labels"]), f"{why}: the labels differ"


def assert_one_line(error, *words):
    """A UserError is one line that any terminal shows, with these words in it."""
    message = one_line(error)
    assert str(error).isprintable(), f"one line, please: {error!r}"
    for word in words:
        assert word in message, f"the message should name {word!r}: {message}"


# ---- As large as COCO ------------------------------------------------------------------------------------
def write_large(folder, form):
    """COCO: as many images, boxes and outlines as train2017 has. YOLO: 50,000 images with 7 boxes each."""
    sizes = {"COCO": (118_000, 860_000, "{}2017"), "YOLO": (50_000, 350_000, "images/{}")}
    images, boxes, place = sizes[form]
    write_image(folder / "x.jpg")
    photo, draw = (folder / "x.jpg").read_bytes(), np.random.default_rng(0)
    corners = draw.uniform(0, 20, (boxes, 4)).round(2).tolist()
    outline = draw.uniform(100, 480, 50).round(2).tolist()
    for split, n in (("train", images), ("val", 1)):
        (folder / place.format(split)).mkdir(parents=True)
        for i in range(n):
            (folder / place.format(split) / f"{i:012d}.jpg").write_bytes(photo)
        some = list(enumerate(corners if split == "train" else corners[:1]))
        if form == "COCO":
            write_json(folder / f"annotations/instances_{split}2017.json", {
                "images": [{"id": i, "file_name": f"{i:012d}.jpg", "width": 64, "height": 48,
                            "coco_url": f"http://images.cocodataset.org/{i:012d}.jpg"} for i in range(n)],
                "annotations": [{"segmentation": [outline], "area": 9.5, "iscrowd": 0, "image_id": k % n,
                                 "bbox": [*box[:2], box[2] + 1, box[3] + 1], "category_id": k % 80, "id": k}
                                for k, box in some],
                "categories": [{"id": k, "name": f"class {k}"} for k in range(80)]})
            continue
        lines = [[] for _ in range(n)]
        for k, (x, y, w, h) in some:
            lines[k % n].append([k % 80, 0.2 + x / 64, 0.2 + y / 48, w / 64 + 0.01, h / 48 + 0.01])
        for i, found in enumerate(lines):
            write_label(folder / f"labels/{split}/{i:012d}.txt", *found)
    if form == "YOLO":
        (folder / "data.yaml").write_text(f"names: {[f'class {k}' for k in range(80)]}")


def write_json(path, contents):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(contents))


def write_label(path, *lines):
    """A label file of YOLO: each line a list of numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))


if __name__ == "__main__":
    form, folder = sys.argv[1], Path(sys.argv[2])
    if not folder.exists():
        write_large(folder, form)
    start = time.process_time()
    count, seconds = len(data.load(folder)["train"]), time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"{count} images in {seconds:.1f} CPU seconds, at most {memory:.2f} GB of memory")
