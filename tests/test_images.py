"""Image files: every kind becomes RGB, photos are turned as they were annotated, damage is one line."""
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from support import UserError, data, one_line, shorten, visible
from support.images import AnnotatedImage, load_image
from tests.folders import (
    assert_one_line,
    bright,
    change,
    coco_folder,
    edit,
    pixel_boxes,
    write_image,
    write_noise,
)


@pytest.fixture
def folder(tmp_path):
    return coco_folder(tmp_path)


def load_single(tmp_path, image, name="x.png", size=None, **save):
    """Saves a PIL image and reads it back as training does; returns uint8 [H, W, 3]."""
    image.save(tmp_path / name, **save)
    width, height = size or image.size
    annotated = AnnotatedImage(1, str(tmp_path / name), height, width, *[np.zeros(0)] * 4)
    loaded = load_image(annotated)
    assert loaded.mode == "RGB"
    return np.asarray(loaded)


def palette_image(transparent=None):
    image = Image.new("P", (8, 6), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    if transparent is not None:
        image.info["transparency"] = transparent
    return image


@pytest.mark.parametrize("image, name, expected", [
    (Image.new("RGB", (8, 6), (200, 100, 50)), "x.png", (200, 100, 50)),
    (Image.new("L", (8, 6), 77), "x.png", (77, 77, 77)),
    (Image.new("1", (8, 6), 1), "x.png", (255, 255, 255)),
    (palette_image(), "x.png", (200, 100, 50)),
    (palette_image(transparent=0), "x.png", (200, 100, 50)),
    (palette_image(transparent=1), "x.png", (255, 255, 255)),
    (Image.new("RGBA", (8, 6), (200, 100, 50, 255)), "x.png", (200, 100, 50)),
    (Image.new("RGBA", (8, 6), (200, 100, 50, 0)), "x.png", (255, 255, 255)),
    (Image.new("LA", (8, 6), (77, 255)), "x.png", (77, 77, 77)),
    (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "x.jpg", (255, 0, 0)),
    (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "x.tif", (255, 0, 0)),
    (Image.fromarray(np.full((6, 8), 30000, np.uint16)), "x.png", (117, 117, 117)),
    (Image.fromarray(np.full((6, 8), 30000, np.int32)), "x.tif", (117, 117, 117)),
    (Image.fromarray(np.full((6, 8), 65535, np.uint16)), "x.tif", (255, 255, 255)),
], ids=lambda value: getattr(value, "mode", None))
def test_every_kind_of_image_becomes_rgb(tmp_path, image, name, expected):
    pixels = load_single(tmp_path, image, name)
    assert pixels.shape == (6, 8, 3)
    assert np.abs(pixels.astype(int) - expected).max() <= 2, \
        f"{image.mode} gave {pixels[0, 0]}, not {expected}; 30000 of 65535 is 117 of 255; clear is white"


TO_STORED = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
             6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # makes an upright image what a camera stores


@pytest.mark.parametrize("orientation", TO_STORED)
@pytest.mark.parametrize("name", ["1.jpg", "1.png"])
def test_box_lands_on_the_object_of_an_exif_rotated_image(folder, orientation, name):
    box = [6, 5, 22, 10]  # off centre in both directions: any wrong turn shows
    write_image(folder / "upright.png", box=box)
    upright = Image.open(folder / "upright.png")
    stored = upright.transpose(Image.Transpose[TO_STORED[orientation]]) if TO_STORED[orientation] else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "train" / name, exif=exif)
    change(folder, edit("annotations", 0, bbox=box))
    for size in ({"width": 64, "height": 48}, {"width": ..., "height": ...}):  # in the file, or left out
        change(folder, edit("images", 0, **({"file_name": name} | size)))
        image, target = data.load(folder, size=64, augment="none")["train"][0]
        assert image.shape[1:] == (48, 64), "boxes were drawn on the upright image"
        assert torch.allclose(bright(image), pixel_boxes(image, target)[0], atol=1), \
            f"EXIF orientation {orientation}: the box misses the white rectangle"


def test_exif_is_ignored_where_the_annotations_ignore_it(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "train/1.png").save(folder / "train/1.png", exif=exif)  # viewers show 48 x 64
    image, target = data.load(folder, size=64, augment="none")["train"][0]  # the file says 64 x 48, as stored
    assert image.shape[1:] == (48, 64)
    assert torch.allclose(bright(image), pixel_boxes(image, target)[0], atol=1)


def test_an_image_of_another_size_than_annotated_is_refused(folder):
    write_image(folder / "train/2.png", width=100, height=80)
    with pytest.raises(UserError) as error:
        data.load(folder)["train"][1]
    assert_one_line(error.value, "2.png", "image id 2", "100 x 80", "64 x 48")


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:-60]), []),
    (lambda path: path.write_bytes(b"not an image"), []),
    (lambda path: path.write_bytes(b""), []),
    (lambda path: Image.new("F", (64, 48)).save(path, format="TIFF"), ["floating-point"]),
])
def test_a_damaged_image_gives_one_line(folder, spoil, words):
    write_noise(folder / "train/1.png")
    spoil(folder / "train/1.png")
    with pytest.raises(UserError) as error:
        data.load(folder)["train"][0]
    assert_one_line(error.value, str(folder / "train/1.png"), "image id 1", *words)
    assert "repair or remove it; python -m support.check_data DIR finds all" in str(error.value)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"not an image"),
                                   lambda path: write_image(path, width=100)])
def test_an_error_in_a_worker_is_still_one_line(folder, spoil):
    spoil(folder / "train/1.png")
    dataset = data.first_with_boxes(data.load(folder)["train"], 1)
    batches = iter(DataLoader(dataset, num_workers=1, collate_fn=data.collate))
    with pytest.raises(UserError) as error:
        next(batches)
    assert next(batches, None) is None  # the end: lets the worker go
    message = one_line(error.value)
    assert message.startswith(f"{folder}/train/1.png (image id 1)") and "\n" not in message, message


def test_a_hair_thin_image_is_refused(folder):
    write_image(folder / "train/1.png", width=640, height=2)
    change(folder, edit("images", 0, width=640, height=2))
    change(folder, edit("annotations", 0, bbox=[0, 0, 5, 2]))
    with pytest.raises(UserError, match="too thin"):
        data.load(folder)["train"][0]


@pytest.mark.parametrize("orientation", [0, 9, 255, 65535])
def test_an_exif_orientation_that_does_not_exist_turns_nothing(folder, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(folder / "train/1.png").save(folder / "train/1.png", exif=exif)
    for size in ({"width": 64, "height": 48}, {"width": ..., "height": ...}):  # in the file, or left out
        change(folder, edit("images", 0, **size))
        image, target = data.load(folder, size=64, augment="none")["train"][0]
        assert image.shape[1:] == target["size"] == (48, 64), "no viewer turns this photo"
        assert torch.allclose(bright(image), pixel_boxes(image, target)[0], atol=1)


def test_an_error_is_one_line_that_any_terminal_shows():
    assert visible("a\nb\tc\u00a0\x1b[2J\ud800\u202e\u00fc") == "a b c \\x1b[2J\\ud800\\u202e\u00fc"
    error = UserError("two\nlines of " + "x" * 5000)
    assert str(error).startswith("two lines of xx") and len(str(error)) < 2000
    assert one_line(error) == str(error) and shorten("abcdefgh", 6) == "abc ... fgh"
