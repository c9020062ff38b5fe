"""Image files: what annotations say about one, its pixels, and one line if it is damaged."""
import contextlib
import warnings
from dataclasses import dataclass

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
    b"ftyphe": "HEIC, whatever its name says; save it as JPEG",
    b"ftypmif1": "HEIC, whatever its name says; save it as JPEG",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
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


@contextlib.contextmanager
def opened(path, image_id, pixels=None):
    """The PIL image of a file, or `pixels`. Whatever PIL raises becomes a UserError: SyntaxError, ..."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # half of what is refused
            with contextlib.nullcontext(pixels) if pixels else Image.open(path) as raw:
                yield raw
    except Exception as error:
        what = reason(error)
        if isinstance(error, Image.DecompressionBombError):
            what = f"more than {2 * Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels; cut it into tiles"
        elif isinstance(error, UnidentifiedImageError):
            with open(path, "rb") as file:
                start = file.read(64)
            what = next((what for sign, what in SIGNS.items() if sign in start), "not an image, or damaged")
        raise UserError(f"{path} (image id {image_id}): {what}; repair or remove it") from None


def size_shown(raw):
    """(width, height) of an open PIL image as viewers show it, from its header alone."""
    turned = raw.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)  # above 8: no viewer turns it
    return raw.size[::-1] if turned and raw.format != "TIFF" else raw.size  # PIL has turned a TIFF's size


def file_size(path, image_id):
    """(height, width) of an image file as a viewer shows it."""
    with opened(path, image_id) as raw:
        return size_shown(raw)[::-1]


def bare_image(i, image):
    """A PIL image or a file as an AnnotatedImage without boxes."""
    nothing = np.zeros(0, np.int64), np.zeros((0, 4), np.float32), np.zeros(0), np.zeros(0, bool)
    if isinstance(image, Image.Image):
        return AnnotatedImage(i, f"image {i}", *size_shown(image)[::-1], *nothing, image)
    return AnnotatedImage(i, str(image), *file_size(image, i), *nothing)


def load_image(annotated):
    """An AnnotatedImage's pixels as a PIL image in RGB. UserError if damaged or not of the annotated size.

    Tools that obey a camera's EXIF note "turn me" draw boxes on the turned image, others on the raw one: the
    annotated size tells which. Where it does not (half a turn, a mirror, a square) we obey.
    """
    with opened(annotated.path, annotated.id, annotated.pixels) as raw:
        size, shown = (annotated.width, annotated.height), size_shown(raw)
        if size not in (shown, raw.size):
            raise UserError(f"the file has {shown[0]} x {shown[1]} pixels, its annotations say "
                            f"{annotated.width} x {annotated.height}")
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
    if image.mode.startswith("I"):  # "I;16", or "I": 32 bits, in which some versions of PIL hold 16
        values = np.asarray(image).clip(0).astype(float)
        image = Image.fromarray((values * 255 / max(65535, values.max())).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def to_input_and_target(image, boxes_xyxy, labels, annotated):
    """uint8 image [3, H, W] and boxes in its pixels -> what model and losses expect (see CocoFolder)."""
    height, width = image.shape[-2:]
    image = v2.functional.to_dtype(image.as_subclass(torch.Tensor), torch.float32, scale=True)
    image = v2.functional.normalize(image, IMAGENET_MEAN, IMAGENET_STD)
    boxes_xyxy = torch.as_tensor(boxes_xyxy) / torch.tensor([width, height, width, height])
    boxes = box_convert(boxes_xyxy.clamp(0, 1), "xyxy", "cxcywh")  # clamp: rounding errors only
    return image, {"labels": torch.as_tensor(labels), "boxes": boxes,
                   "image_id": annotated.id, "size": (annotated.height, annotated.width)}
