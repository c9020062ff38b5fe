"""Image files, augmentation, batches, and the embedded shapes."""
import pickle
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors

from support import UserError, check_data, data, images, one_line, shapes, shorten, visible
from support.images import AnnotatedImage, load_image
from support.shapes import Shapes
from tests.folders import (
    TRAIN,
    assert_same,
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


# ---- Image files -------------------------------------------------------------------------------------------
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
    (Image.new("RGBA", (8, 6), (200, 100, 50, 0)), "x.png", (255, 255, 255)),
    (Image.new("LA", (8, 6), (77, 255)), "x.png", (77, 77, 77)),
    (Image.new("CMYK", (8, 6), (0, 255, 255, 0)), "x.jpg", (255, 0, 0)),
    (Image.fromarray(np.full((6, 8), 30000, np.uint16)), "x.png", (117, 117, 117)),
    (Image.fromarray(np.full((6, 8), 30000, np.int32)), "x.tif", (117, 117, 117)),
    (Image.new("L", (8, 6), 77), "x.jp2", (77, 77, 77)),
    (Image.new("L", (8, 6), 77), "x.pgm", (77, 77, 77)),
], ids=lambda value: getattr(value, "mode", None))
def test_every_kind_of_image_becomes_rgb(tmp_path, image, name, expected):
    image.save(tmp_path / name)
    loaded = load_image(AnnotatedImage(1, str(tmp_path / name), 6, 8, *[np.zeros(0)] * 4))
    assert loaded.mode == "RGB"
    assert np.abs(np.asarray(loaded).astype(int) - expected).max() <= 2, "30000 of 65535 is 117 of 255"


TO_STORED = {1: None, 2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE",
             6: "ROTATE_90", 7: "TRANSVERSE", 8: "ROTATE_270"}  # makes an upright image what a camera stores


@pytest.mark.parametrize("orientation", TO_STORED)
@pytest.mark.parametrize("name", ["1.jpg", "1.png", "1.tif"])
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


@pytest.mark.parametrize("orientation, annotated", [(6, {"width": 64, "height": 48}), (9, {}), (0, {})])
def test_exif_is_ignored_where_the_annotations_ignore_it_or_it_is_none(folder, orientation, annotated):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(folder / "train/1.png").save(folder / "train/1.png", exif=exif)
    change(folder, edit("images", 0, **(annotated or {"width": ..., "height": ...})))
    image, target = data.load(folder, size=64, augment="none")["train"][0]
    assert image.shape[1:] == target["size"] == (48, 64), "as it is stored"
    assert torch.allclose(bright(image), pixel_boxes(image, target)[0], atol=1)


SPOILT = {  # what is done to an image file, and what is said of it
    "cut off": (lambda path: path.write_bytes(path.read_bytes()[:-60]), ""),
    "no image": (lambda path: path.write_bytes(b"not an image"), "not an image, or damaged"),
    "empty": (lambda path: path.write_bytes(b""), "not an image, or damaged"),
    "Git LFS": (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
    "HEIC": (lambda path: path.write_bytes(b"\0\0\0\x18ftypheic" + bytes(99)), "HEIC, .*save it as JPEG"),
    "floating point": (lambda path: Image.new("F", (64, 48)).save(path, format="TIFF"), "floating-point"),
    "another size": (lambda path: write_image(path, width=100), "100 x 48 .*annotations say 64 x 48"),
    "lost": (lambda path: path.unlink(), "No such file"),
}


@pytest.mark.parametrize("what", SPOILT)
def test_a_damaged_image_is_one_line_from_a_worker_too(folder, what):
    spoil, words = SPOILT[what]
    write_noise(folder / "train/1.png")
    dataset = data.first_with_boxes(data.load(folder)["train"], 1)
    spoil(folder / "train/1.png")
    with pytest.raises(UserError, match=f"train/1.png .image id 1.: .*{words}.*check_data DIR finds all"):
        dataset[0]
    if what in ("no image", "another size"):
        batches = iter(DataLoader(dataset, num_workers=1, collate_fn=data.collate))
        with pytest.raises(UserError) as error:
            next(batches)
        assert next(batches, None) is None  # the end: lets the worker go
        assert one_line(error.value).startswith(f"{folder}/train/1.png (image id 1)")


def test_thin_and_giant_images_are_refused_without_a_raw_warning(folder, monkeypatch):
    write_image(folder / "train/1.png", width=640, height=2)
    change(folder, edit("images", 0, width=640, height=2))
    change(folder, edit("annotations", 0, bbox=[0, 0, 5, 2]))
    with pytest.raises(UserError, match="too thin"):
        data.load(folder)["train"][0]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # of 3072
    with warnings.catch_warnings(record=True) as said:
        data.load(folder)["train"][1]
    assert not said
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(UserError, match="million pixels; cut it into tiles"):
        data.load(folder)["train"][1]


def test_images_of_12_bits_in_16_are_noted_as_nearly_black(folder, capsys):
    Image.fromarray(np.full((48, 64), 4000, np.uint16)).save(folder / "train/1.png")
    assert "values below 16384: (nearly) black" in " ".join(data.load(folder)["train"].notes)
    check_data.main([str(folder)])
    assert f"black, scale all of them to 65535: 1 (first: {folder}/train/1.png)" in capsys.readouterr().out


def test_image_files_without_annotations(folder):
    bare = data.from_images([folder / "train/2.png", folder / "val"], size=64)
    assert [bare.path_of(i)[-9:] for i in range(3)] == ["ain/2.png", "val/1.png", "val/2.png"]
    assert bare[2][0].shape == (3, 48, 64) and bare.count_boxes(2) == 0 and bare.class_names == []
    (folder / "val/notes.txt").write_text("not an image")
    for wrong, words in ((folder / "gone.png", "no such image"), (folder, "no images in this folder"),
                         (folder / "val/notes.txt", "not an image"), ("a\0b", "no such image")):
        with pytest.raises(UserError, match=words):
            data.from_images(wrong)


def test_an_error_is_one_line_that_any_terminal_shows():
    assert visible("a\nb\tc\u00a0\x1b[2J\ud800\u202e\u00fc") == "a b c \\x1b[2J\\ud800\\u202e\u00fc"
    error = UserError("two\nlines of " + "x" * 5000)
    assert str(error).startswith("two lines of xx") and len(str(error)) < 2000
    assert one_line(error) == str(error) and shorten("abcdefgh", 6) == "abc ... fgh"


def test_check_data_sees_in_the_files_what_annotations_cannot_tell(folder, capsys):
    (folder / "val/2.png").write_bytes((folder / "train/2.png").read_bytes())
    assert check_data.main([str(folder)]) == 0
    text = capsys.readouterr().out
    assert f"in train already, kept: 1 (first: {folder}/val/2.png is {folder}/train/2.png)" in text
    rows = [line.split("  ") for line in text.splitlines()]
    assert ["images", "3", "2"] in [[cell.strip() for cell in row if cell.strip()] for row in rows]
    (folder / "train/1.png").write_bytes(b"x")
    assert check_data.main([str(folder), "--no-images"]) == 0
    assert check_data.main([str(folder)]) == 1 and "cannot be used: 1 (first: " in capsys.readouterr().out


# ---- Augmentation and batches ------------------------------------------------------------------------------
@pytest.mark.parametrize("augment, size", [("laptop", 96), ("paper", 160), ("none", 96)])
def test_box_and_pixels_go_the_same_way(folder, augment, size):
    dataset = data.load(folder, augment=augment, size=size)["train"]
    mirrored, cut = set(), set()
    for epoch in range(40):
        for index, (x, y, w, h) in enumerate(TRAIN[:2]):
            image, target = dataset[epoch, index]
            boxes, seen = pixel_boxes(image, target), bright(image)
            assert len(boxes) == len(target["labels"]) <= 1
            assert boxes.isfinite().all() and (target["boxes"] >= 0).all() and (target["boxes"] <= 1).all()
            if len(boxes) == 0:
                assert seen is None or (seen[2:] - seen[:2]).min() <= 3, "an object in sight has lost its box"
                continue
            assert (seen - boxes[0]).abs().max() < 2, f"epoch {epoch}: box {boxes[0]}, white pixels {seen}"
            whole = abs((seen[2] - seen[0]) / (seen[3] - seen[1]) / (w / h) - 1) < 0.1
            cut.add(not whole)
            if whole and image.shape[2] * 48 == image.shape[1] * 64:
                mirrored.add(bool(abs(target["boxes"][0, 0] - (x + w / 2) / 64) > 0.05))
    assert mirrored == cut == ({False} if augment == "none" else {True, False}), "80 draws hold all kinds"


@pytest.mark.parametrize("augment", ["laptop", "paper"])
def test_without_flips_no_image_is_mirrored(tmp_path, augment):
    coco_folder(tmp_path, train=[[4, 4, 12, 40]])
    for flip, expected in ((False, {True}), (True, {True, False})):
        dataset = data.load(tmp_path, augment=augment, size=64, flip=flip)["train"]
        boxes = torch.cat([dataset[epoch, 0][1]["boxes"] for epoch in range(40)])
        whole = boxes[(boxes[:, 2] - 12 / 64).abs() < 0.01]  # the image was not cut
        assert set((whole[:, 0] < 0.3).tolist()) == expected


def test_an_object_cut_away_takes_its_label_along():
    image = tv_tensors.Image(torch.zeros(3, 40, 40, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0., 0, 9, 9], [31, 31, 40, 40]], format="XYXY", canvas_size=(40, 40))
    torch.manual_seed(0)
    counts = set()
    for _ in range(50):
        _, target = images.random_size_crop(15, 25, image, {"boxes": boxes, "labels": torch.tensor([5, 6])})
        counts.add(len(target["boxes"]))
        assert len(target["labels"]) == len(target["boxes"]) and (target["boxes"][:, 2:] > 0).all()
    assert counts == {0, 1}, "a window of at most 25 pixels holds one of the two or none, never both"


@pytest.mark.parametrize("augment, size, shape", [("laptop", 96, (72, 96)), ("paper", None, (800, 1066))])
def test_validation_images_have_one_size_and_training_images_stay_within_it(folder, augment, size, shape):
    sets = data.load(folder, augment=augment, size=size)
    val = sets["val"]
    assert tuple(val[0][0].shape[1:]) == shape and torch.equal(val[5, 0][0], val[0][0])
    largest = images.largest_canvas(sets["train"].size, augment)
    shapes_seen = {sets["train"][epoch, 0][0].shape for epoch in range(12)}
    assert len(shapes_seen) > 3 and max(max(shape[1:]) for shape in shapes_seen) <= largest[0]


def test_augmentation_depends_on_seed_epoch_and_index_only(folder):
    dataset, again = (data.load(folder, size=64, seed=3)["train"] for _ in range(2))
    keys = [(epoch, index) for epoch in range(3) for index in range(2)]
    wanted, before = [dataset[key] for key in keys], torch.get_rng_state()
    for key, item in reversed(list(zip(keys, wanted))):
        assert_same(item, again[key], f"epoch and index {key}, asked for in another order")
    assert torch.equal(before, torch.get_rng_state()), "torch's generator moved: dropout would depend on data"
    assert len({item[0].sum().item() for item in wanted}) == 6, "6 keys, 6 images"
    other = data.load(folder, size=64, seed=4)["train"]
    assert any(not torch.equal(other[key][0], item[0]) for key, item in zip(keys, wanted)), "seed ignored"


def test_the_number_of_workers_changes_nothing(folder):
    keys = [[(epoch, index)] for epoch in range(2) for index in range(3)]
    for dataset in (data.load(folder, size=64)["train"], data.load(size=64)["train"]):
        alone, many = ([batch for batch in DataLoader(dataset, batch_sampler=keys, num_workers=workers,
                                                      collate_fn=data.collate)] for workers in (0, 2))
        for (a, _, s), (b, _, t) in zip(alone, many, strict=True):
            assert_same((a, s[0]), (b, t[0]), "0 workers against 2")
        assert_same(pickle.loads(pickle.dumps(dataset))[1], dataset[1], "to workers on Windows and Mac")


def test_padding_is_zero_and_masked_and_nothing_else_is():
    items = [Shapes(5, 64)[i] for i in range(5)]
    images, mask, targets = data.collate(items)
    assert images.shape == (5, 3, max(i.shape[1] for i, _ in items), max(i.shape[2] for i, _ in items))
    assert mask.shape == images.shape[:1] + images.shape[2:] and mask.dtype == torch.bool
    for (image, target), padded, padding, kept in zip(items, images, mask, targets, strict=True):
        _, height, width = image.shape
        assert torch.equal(padded[:, :height, :width], image), "images belong into the top left corner"
        assert not padding[:height, :width].any() and padding.sum() == padding.numel() - height * width, \
            "the mask is True on padding, and only there"
        assert (padded[:, padding] == 0).all() and kept is target


def test_first_takes_images_with_boxes_and_stops_augmenting(folder):
    change(folder, lambda c: c | {"annotations": c["annotations"][1:]})  # images 1 and 3 are empty
    dataset = data.load(folder, size=64)["train"]
    small = data.first_with_boxes(dataset, 1)
    assert (len(small), len(dataset), small.num_boxes, list(small.coco.imgs)) == (1, 3, 1, [2])
    assert all(torch.equal(small[epoch, 0][0], small[0][0]) for epoch in range(5)), "should hold still"
    moving = data.first_with_boxes(dataset, 1, augment=True)
    assert any(not torch.equal(moving[epoch, 0][0], small[0][0]) for epoch in range(5))
    assert dataset.subset([]).max_boxes == dataset.subset([]).num_boxes == 0


# ---- Shapes ------------------------------------------------------------------------------------------------
def test_boxes_of_shapes_are_tight_to_the_pixel(monkeypatch):
    monkeypatch.setattr(shapes, "draw_background", lambda rng, h, w: np.zeros((h, w, 3), np.float32))
    monkeypatch.setattr(shapes, "pick_colour", lambda rng, label, background: np.full(3, 255, np.float32))
    monkeypatch.setattr(shapes, "draw_texture", lambda rng, h, w: np.ones((h, w), np.float32))
    monkeypatch.setattr(shapes, "MAX_OBJECTS", 1)
    for image, target in (Shapes(40, size)[i] for size in (32, 128) for i in range(20)):
        if len(target["boxes"]):
            assert torch.allclose(pixel_boxes(image, target)[0], bright(image), atol=1e-3), \
                "the box should touch the outermost white pixels of the only object, none more, none less"


def test_shapes_have_what_a_detector_needs_to_be_tested_on():
    drawn = [Shapes(200, 128).draw(i) for i in range(200)]
    labels = np.concatenate([annotated.labels for _, annotated, _ in drawn])
    sides = np.concatenate([annotated.areas for _, annotated, _ in drawn]) ** 0.5
    counts = [len(annotated.labels) for _, annotated, _ in drawn]
    assert min(np.bincount(labels, minlength=4)) > 0.1 * len(labels), "every class should be common"
    assert sides.min() < 20 and 25 < np.median(sides) < 45 and sides.max() > 65, "sizes: varied, many small"
    assert 4 < counts.count(0) < 30 and max(counts) == 4, "some empty images, at most 4 objects"
    for _, annotated, owner in drawn:
        for k in range(len(annotated.labels)):
            assert (owner == k).sum() > 0.05 * annotated.areas[k], "an object should not vanish behind others"


def test_shapes_are_those_of_all_earlier_runs_and_depend_on_seed_split_and_number_only():
    images, mask, targets = data.collate([Shapes(20, 96, seed=0)[i] for i in range(20)])
    assert images.shape == (20, 3, 96, 96)
    assert images.double().mean().item() == pytest.approx(0.141965, abs=2e-5)
    assert "".join(str(len(target["labels"])) for target in targets) == "41413312331421223344"
    box = targets[1]["boxes"][0].tolist()
    assert box == pytest.approx([0.114458, 0.138298, 0.204819, 0.148936], abs=1e-5)
    one, two = (data.load("shapes", size=64, seed=seed) for seed in (5, 6))
    assert_same(one["train"][0, 2], one["train"][9, 2], "the same shape picture in another epoch")
    assert_same(one["val"][2], two["val"][2], "validation pictures under another seed")
    assert not torch.equal(one["train"][2][0], two["train"][2][0]), "another seed, the same picture"
    assert (len(one["train"]), len(one["val"])) == (20000, 250)


def test_shapes_answer_what_folders_answer():
    dataset = Shapes(30, 64, split="val")
    assert len(dataset.coco.imgs) == 30
    assert dataset.path_of(7) == "shapes-7" and dataset.count_boxes(7) == len(dataset[7][1]["boxes"])
    some = dataset.subset([7, 3])
    assert (len(some), some.path_of(1), list(some.coco.imgs)) == (2, "shapes-3", [7, 3])
    assert_same(some[0], dataset[7], "image 7 of the whole set, 0 of the subset")
