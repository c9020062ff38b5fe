"""Small data sets written on the spot, for tests of any topic."""
import json

import numpy as np
import torch
from PIL import Image
from torchvision.ops import box_convert

from support import one_line

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
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(contents))


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


# ---- VOC -------------------------------------------------------------------------------------------------
def voc_box(x0, y0, x1, y1):
    return f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymin>{y0}</ymin><ymax>{y1}</ymax></bndbox>"


def voc_text(objects, filename="b.png", width=64, height=48):
    """One VOC file; objects: (class, xmin, ymin, xmax, ymax), perhaps "difficult". Each also has a part."""
    part = f"<part><name>head</name>{voc_box(1, 1, 3, 3)}</part>"
    items = [f"<object><name>{name}</name><difficult>{len(rest)}</difficult>{voc_box(*box)}{part}</object>"
             for name, *box, rest in ((*thing[:5], thing[5:]) for thing in objects)]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>{filename}</filename>{size}{''.join(items)}</annotation>"


VOC_TRAIN = {
    "b": [("dog", 11, 9, 30, 24)],
    "a.x": [("cat", 1, 1, 64, 48), ("dog", 3, 3, 9, 9, "difficult")],
    "c": [],
}
VOC_VAL = {"d": [("cat", 5, 6, 14, 25)]}


def write_voc(xml_folder, image_folder, contents):
    for stem, objects in contents.items():
        write_image(image_folder / f"{stem}.png", box=[10, 8, 20, 16] if stem == "b" else None)
        xml_folder.mkdir(parents=True, exist_ok=True)
        (xml_folder / f"{stem}.xml").write_text(voc_text(objects, f"{stem}.png"))


# ---- YOLO ------------------------------------------------------------------------------------------------
def yolo_folder(folder, train="images/train", val="images/val", data_yaml="names: [dog, cat]"):
    """The data set of coco_folder as YOLO's; train, val: where the images are, None: not at all."""
    for place, boxes in ((train, TRAIN), (val, VAL)):
        for k, box in enumerate(boxes if place else (), 1):
            write_image(folder / place / f"{k}.png", box=box)
            if box:
                x, y, w, h = box
                shares = (x + w / 2) / 64, (y + h / 2) / 48, w / 64, h / 48
                write_label(folder / place.replace("images", "labels") / f"{k}.txt", [(k + 1) % 2, *shares])
    (folder / "data.yaml").write_text(data_yaml)
    return folder


def write_label(path, *lines):
    """A label file of these lines, each a list of numbers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(" ".join(map(str, line)) + "\n" for line in lines))


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
    """A UserError is one line that any terminal shows, and holds these words."""
    message = one_line(error)
    assert str(error).isprintable(), f"one line, please: {error!r}"
    for word in words:
        assert word in message, f"the message should name {word!r}: {message}"


def mutate_bytes(content, rng):
    """Cut short, a part left out or repeated, some bytes replaced, or nothing but zeros."""
    kind, a, b = rng.random(), *sorted(rng.randrange(len(content) + 1) for _ in range(2))
    if kind < 0.6:
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 2, 5, 50])):
            changed[rng.randrange(len(content))] = rng.randrange(256)
        return bytes(changed)
    return content[:a] if kind < 0.75 else content[:a] + content[b:] if kind < 0.85 else \
        content[:b] + content[a:] if kind < 0.97 else bytes(len(content))
