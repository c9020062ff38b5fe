"""From an image file to the input of a model: what is annotated, its pixels, augmentation."""
import contextlib
import functools
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torchvision.ops import box_convert
from torchvision.transforms import v2

from support import UserError, reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp",
                  ".avif", ".jp2", ".j2k", ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".mpo", ".tga", ".pcx")
OTHER_SUFFIXES = (".heic", ".heif", ".jxl", ".dng", ".cr2", ".nef", ".arw", ".svg", ".exr", ".dcm")
SIGNS = {  # at the start of files that are not images, or not such as Pillow reads
    b"version https://git-lfs": "a pointer of Git LFS, run git lfs pull",
    b"ftyphe": "HEIC, whatever its name is; save it as JPEG",
    b"ftypmif1": "HEIC, whatever its name is; save it as JPEG",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SMALLEST_SIDE = 0.1  # pixels; float32 arithmetic leaves nothing of a box that is thinner
PAPER_SIZE, PAPER_LONGEST = 800, 1333  # DETR's: the short side, and the most for the long one
THINNEST = 30  # an image longer than this many times its short side may have no pixels left when made small


@dataclass
class AnnotatedImage:
    """Where one image is and what is on it, in pixels of the image as it was annotated."""
    id: int
    path: str
    height: int
    width: int
    labels: np.ndarray  # [n] int64, 0..C-1
    boxes_xyxy: np.ndarray  # [n, 4] float32, inside the image
    areas: np.ndarray  # [n], square pixels: of the object's outline if it is known, otherwise of its box
    crowd: np.ndarray  # [n] bool: one box around many objects; not trained on, ignored by the evaluation
    pixels: object = None  # a PIL image, if it is in no file

    @property
    def classes(self):
        return set(self.labels[~self.crowd].tolist())


def number(value):
    """A number, or a text with one, as a float; otherwise None."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def true_size(path, height, width, image_id):
    """(height, width) as annotated, or of the file if they are left out. UserError if it cannot be used."""
    if path.lower().endswith(OTHER_SUFFIXES):
        raise UserError(f"{path}: a format that Pillow does not read, save it as .jpg or .png")
    sides = [number(side or 0) for side in (height, width)]
    if None in sides or min(sides) < 0:
        raise UserError(f"{path} (image id {image_id}): height and width cannot be {height!r} and {width!r}")
    return file_size(path, image_id) if 0 in sides else map(int, sides)


def clean(images, labels, first, reading):
    """The AnnotatedImages of what a reader yields (readers.py), boxes cut to their image. Changes are noted.

    labels: {category id: label}; first: number of the first pixel (VOC's 1 to 640 is 0 to 640 elsewhere).
    """
    found, note, shares, over, total = [], reading.notes.add, [], 0, 0
    for (i, path, height, width), boxes in images:
        if path is None:
            continue
        try:
            height, width = true_size(path, height, width, i)
        except UserError as error:
            reading.errors.add("image files that cannot be used", str(error))
            continue
        rows = []
        for category, box, area, crowd, where in boxes:
            if reading.form == "YOLO":  # shares of the image
                box = box[0] * width, box[1] * height, box[2] * width, box[3] * height
            x0, y0, x1, y1 = box[0] - first, box[1] - first, box[2], box[3]
            cut = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
            w, h = cut[2] - cut[0], cut[3] - cut[1]
            crosses = max(-x0, -y0, x1 - width, y1 - height) > 0.5  # less is rounding, common in COCO
            total, over = total + 1, over + crosses
            if max(box) <= 1.01 and min(box) >= -0.01 and any(value % 1 for value in box):
                shares.append(where)
            if not math.isfinite(sum(box)) or min(x1 - x0, y1 - y0) < SMALLEST_SIDE:
                note("boxes that are not finite or have no width or height, dropped", where)
                continue
            if min(w, h) < SMALLEST_SIDE:
                note("boxes outside their image, dropped", where)
                continue
            if crosses:
                note("boxes reaching over the image edge, clipped", where)
            if crowd := crowd in (1, "1", "true", "True"):
                note("crowd regions (VOC: difficult), neither trained on nor evaluated", where)
            area = area if area and area > 0 else math.inf
            rows.append((labels[category], cut, min(area, w * h), crowd))  # outlines cross edges
        if len({row[:2] for row in rows}) < len(rows):
            note("images with the same box and class more than once, kept", path)
        if not rows:
            note("images without boxes, kept", f"{path}, image id {i}")
        label, cut, area, crowd = zip(*rows) if rows else ((),) * 4
        found.append(AnnotatedImage(
            i, path, height, width, np.array(label, np.int64), np.array(cut, np.float32).reshape(-1, 4),
            np.array(area, float), np.array(crowd, bool)))
    if not found and not reading.errors:
        reading.errors.add("there are no images")
    if len(shares) > total / 2:
        kind = "most boxes are from 0 to 1: shares of the image? Pixels are expected"
        reading.errors.add(kind, shares[0], len(shares))
    if over > max(2, total / 2):
        note(f"most boxes reach over the edge of their image: are their four numbers {reading.form}'s?")
    return found


@contextlib.contextmanager
def opened(path, image_id, pixels=None):
    """The PIL image of a file, or `pixels`. Whatever PIL raises becomes a UserError: SyntaxError, ..."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of half of what is refused as a bomb, of a damaged EXIF block
            with contextlib.nullcontext(pixels) if pixels else Image.open(path) as raw:
                yield raw
    except Exception as error:
        what = reason(error)
        if isinstance(error, Image.DecompressionBombError):
            what = f"more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; cut it into tiles"
        elif isinstance(error, UnidentifiedImageError):
            start = np.fromfile(path, np.uint8, 64).tobytes()
            what = next((what for sign, what in SIGNS.items() if sign in start), "not an image, or damaged")
        raise UserError(f"{path} (image id {image_id}): {what}; repair or remove it") from None


def size_shown(raw):
    """(width, height) of an open PIL image as viewers show it, only from its header."""
    turned = raw.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # above 8: no viewer turns it
    return raw.size[::-1] if turned and raw.format != "TIFF" else raw.size  # PIL has turned a TIFF's size


def file_size(path, image_id, pixels=None):
    """(height, width) of an image file, or of `pixels`, as a viewer shows it."""
    with opened(path, image_id, pixels) as raw:
        return size_shown(raw)[::-1]


def bare_images(paths):
    """Image files, all images in folders, and PIL images as AnnotatedImages without boxes."""
    found, nothing = [], (np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, bool))
    for path in [paths] if isinstance(paths, (str, Path)) else paths:
        if isinstance(path, Image.Image) or os.path.isfile(path):
            found.append(path)
        elif not os.path.isdir(path):
            raise UserError(f"{path}: no such image or folder")
        elif inside := [file for file in Path(path).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES]:
            found += sorted(filter(os.path.isfile, inside))
        else:
            raise UserError(f"{path}: no images in this folder")
    for i, path in enumerate(found):
        pixels = path if isinstance(path, Image.Image) else None
        name = f"image {i}" if pixels else str(path)
        found[i] = AnnotatedImage(i, name, *file_size(name, i, pixels), *nothing, pixels)
    return found


def load_image(annotated):
    """An AnnotatedImage's pixels as a PIL image in RGB. UserError if damaged or not of the annotated size.

    Tools that obey a camera's EXIF note "turn me" draw boxes on the turned image, others on the raw one: the
    annotated size tells which. Where it does not (half a turn, a mirror, a square) we obey.
    """
    with opened(annotated.path, annotated.id, annotated.pixels) as raw:
        size, shown = (annotated.width, annotated.height), size_shown(raw)
        if size not in (shown, raw.size):
            raise UserError("the file has %d x %d pixels, its annotations say %d x %d" % (*shown, *size))
        if max(size) > THINNEST * min(size):
            raise UserError(f"{annotated.width} x {annotated.height} pixels are too thin to be resized")
        return to_rgb(ImageOps.exif_transpose(raw) if size == shown else raw)


def nearly_black(annotated):
    """A note on an image of 16 bits that are hardly used, as of 12-bit sensors; None for others."""
    with contextlib.suppress(UserError), opened(annotated.path, annotated.id, annotated.pixels) as raw:
        if raw.mode.startswith("I") and np.asarray(raw).max() < 2 ** 14:
            return "16-bit images with values below 16384: (nearly) black, scale all of them to 65535"


def to_rgb(image):
    """Any PIL image -> RGB. 16 bits are scaled to 8, not clipped; transparent parts become white."""
    if image.mode == "F":
        raise UserError("floating-point pixels have no agreed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):  # "I;16", or "I": 32 bits, which some versions of PIL use for 16
        values = np.asarray(image).clip(0).astype(float)
        image = Image.fromarray((values * 255 / max(65535, values.max())).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---- Augmentation ------------------------------------------------------------------------------------------
def random_size_crop(smallest, largest, image, target):
    """Cuts out a window with sides of smallest..largest pixels. Objects outside go with their labels."""
    sides = [int(torch.randint(min(smallest, side), min(largest, side) + 1, ())) for side in image.shape[-2:]]
    return v2.SanitizeBoundingBoxes()(*v2.RandomCrop(sides)(image, target))


def make_transform(train, augment, size, flip=True):
    """A function (image, target) -> (image, target). Without `flip` nothing is mirrored.

    "none"    the image is resized to just fit into size x size pixels, its shape kept
    "laptop"  the same; in training also mirrored, lighter or darker, and half the time magnified and cut
    "paper"   DETR's: short side 800 (training: 480 to 800), long side up to 1333; in training also mirrored,
              and half the time cut to 384 to 600 before. `size` stands for the 800 and scales all of these.
    """
    mirror = [v2.RandomHorizontalFlip()] if flip else []
    if augment == "paper":
        scale = size / PAPER_SIZE
        longest, _ = largest_canvas(size, augment)
        if not train:
            return v2.RandomShortestSize([size], longest)
        resize = v2.RandomShortestSize([round(side * scale) for side in range(480, 801, 32)], longest)
        cut = [v2.RandomShortestSize([round(side * scale) for side in (400, 500, 600)]),
               functools.partial(random_size_crop, round(384 * scale), round(600 * scale)), resize]
        return v2.Compose([*mirror, v2.RandomChoice([resize, v2.Compose(cut)])])

    fit = v2.Resize(size=None, max_size=size)
    if augment == "none" or not train:
        return fit
    magnify = [v2.Resize(size=None, max_size=round(size * zoom)) for zoom in (1.0, 1.2, 1.4, 1.6)]
    cut = [v2.RandomChoice(magnify), functools.partial(random_size_crop, round(size * 0.7), size)]
    return v2.Compose([
        *mirror,  # not upside down: right for cells, wrong for people and most of the world
        v2.RandomChoice([fit, v2.Compose(cut)]),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),  # not hue: it may tell classes apart
    ])


def largest_canvas(size, augment):
    """(height, width) of the largest batch that can occur: one image may be wide and another one high."""
    side = round(PAPER_LONGEST * size / PAPER_SIZE) if augment == "paper" else size
    return side, side


def to_input_and_target(image, boxes_xyxy, labels, annotated):
    """uint8 image [3, H, W] and boxes in its pixels -> what model and losses expect (see CocoFolder)."""
    height, width = image.shape[-2:]
    image = v2.functional.to_dtype(image.as_subclass(torch.Tensor), torch.float32, scale=True)
    image = v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
    boxes_xyxy = torch.as_tensor(boxes_xyxy) / torch.tensor([width, height, width, height])
    boxes = box_convert(boxes_xyxy.clamp(0, 1), "xyxy", "cxcywh")  # clamp: rounding errors only
    return image, {"labels": torch.as_tensor(labels), "boxes": boxes,
                   "image_id": annotated.id, "size": (annotated.height, annotated.width)}
