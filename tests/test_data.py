"""Data: what goes in, right or wrong, and what comes out. All data sets here are made on the spot."""
import json
import pickle

import numpy as np
import pytest
import torch
from golden import TOLERANCES, Case
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.ops import box_convert

from support import data, shapes
from support.evaluation import coco_eval, explain, postprocess
from support.images import AnnotatedImage, DataError, load_image, one_line
from support.shapes import Shapes

CATEGORIES = [{"id": 7, "name": "cat"}, {"id": 3, "name": "dog"}]  # not sorted, not from 0, not without gaps


# ---- Small data sets -------------------------------------------------------------------------------------
def write_image(path, width=64, height=48, box=None):
    """A black image with a white rectangle: box = [x, y, width, height] in pixels, as COCO writes it."""
    pixels = np.zeros((height, width, 3), np.uint8)
    if box:
        x, y, w, h = box
        pixels[y:y + h, x:x + w] = 255
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def annotations_of(boxes, **size):
    """COCO contents, one image per box (None: an image without boxes); ids from 1, classes in turn."""
    images = [{"id": k, "file_name": f"{k}.png", "width": 64, "height": 48} | size
              for k in range(1, len(boxes) + 1)]
    annotations = [{"id": k, "image_id": k, "category_id": (7, 3)[k % 2], "bbox": box, "iscrowd": 0,
                    "area": box[2] * box[3]} for k, box in enumerate(boxes, 1) if box]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}


def write_split(json_path, image_folder, boxes):
    contents = annotations_of(boxes)
    for image, box in zip(contents["images"], boxes):
        write_image(image_folder / image["file_name"], box=box)
    json_path.parent.mkdir(parents=True, exist_ok=True)
    json_path.write_text(json.dumps(contents))


TRAIN = [[10, 8, 20, 16], [30, 4, 12, 30], None]
VAL = [[5, 5, 40, 40], [1, 2, 6, 5]]


@pytest.fixture
def folder(tmp_path):
    """annotations/instances_{train,val}.json with train/ and val/: three images (one empty) and two."""
    for split, boxes in (("train", TRAIN), ("val", VAL)):
        write_split(tmp_path / f"annotations/instances_{split}.json", tmp_path / split, boxes)
    return tmp_path


def change(folder, how, split="train"):
    """Applies how(contents) to an annotation file; what it returns, if anything, replaces the contents."""
    path = folder / f"annotations/instances_{split}.json"
    contents = json.loads(path.read_text())
    path.write_text(json.dumps(how(contents) or contents))


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
    assert torch.equal(a[0], b[0]), f"{why}: the images differ"
    assert torch.equal(a[1]["boxes"], b[1]["boxes"]), f"{why}: the boxes differ"
    assert torch.equal(a[1]["labels"], b[1]["labels"]), f"{why}: the labels differ"


# ---- Shapes ----------------------------------------------------------------------------------------------
def test_shapes_box_is_tight_around_the_pixels_drawn(monkeypatch):
    monkeypatch.setattr(shapes, "draw_background", lambda rng, h, w: np.zeros((h, w, 3), np.float32))
    monkeypatch.setattr(shapes, "pick_colour", lambda rng, label, background: np.full(3, 255, np.float32))
    monkeypatch.setattr(shapes, "draw_texture", lambda rng, h, w: np.ones((h, w), np.float32))
    monkeypatch.setattr(shapes, "MAX_OBJECTS", 1)
    for size in (32, 128):
        dataset = Shapes(40, size)
        for image, target in (dataset[i] for i in range(40)):
            if len(target["boxes"]):
                assert torch.allclose(pixel_boxes(image, target)[0], bright(image), atol=1e-3), \
                    "the box should touch the outermost white pixels of the only object, none more, none less"


def test_shapes_have_what_a_detector_needs_to_be_tested_on():
    dataset = Shapes(200, 128)
    drawn = [dataset.draw(i) for i in range(200)]
    labels = np.concatenate([picture.labels for _, picture, _ in drawn])
    sides = np.concatenate([picture.areas for _, picture, _ in drawn]) ** 0.5
    counts = [len(picture.labels) for _, picture, _ in drawn]
    assert min(np.bincount(labels, minlength=4)) > 0.1 * len(labels), "every class should be common"
    assert sides.min() < 20 and 25 < np.median(sides) < 45 and sides.max() > 65, "sizes: varied, many small"
    assert 4 < counts.count(0) < 30 and max(counts) == 4, "some empty images, at most 4 objects"
    heights, widths = zip(*(image.shape[:2] for image, _, _ in drawn))
    assert (min(heights), max(heights)) == (min(widths), max(widths)) == (96, 128), "3/4 to all of size"
    assert dataset.num_boxes == sum(counts) and dataset.max_boxes >= max(counts)
    for _, picture, owner in drawn:
        for k in range(len(picture.labels)):
            assert (owner == k).sum() > 0.05 * picture.areas[k], "an object should not vanish behind others"


def test_shapes_depend_on_seed_split_and_number_only():
    one, two = (data.load("shapes", size=64, seed=5) for _ in range(2))
    two["train"][7], two["val"][3]  # drawing something else in between changes nothing
    assert_same(one["train"][0, 2], two["train"][9, 2], "the same shape picture in another epoch")
    assert_same(one["val"][2], data.load(size=64, seed=6)["val"][2], "validation pictures under another seed")
    other = data.load(size=64, seed=6)["train"]
    assert not torch.equal(one["train"][2][0], other[2][0]), "another seed, the same picture"
    default = data.load(size=64)
    assert not torch.equal(default["train"][2][0], default["val"][2][0]), "val should not repeat train"
    assert (len(one["train"]), len(one["val"])) == (20000, 250)


# ---- Layouts ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("json_name, image_name, val", [
    ("annotations/instances_{}2017.json", "{}2017", "val"),
    ("annotations/instances_{}.json", "{}", "val"),
    ("{}/_annotations.coco.json", "{}", "valid"),
    ("{}/_annotations.coco.json", "{}", "val"),
])
def test_every_layout_is_found(tmp_path, json_name, image_name, val):
    for name, boxes in (("train", TRAIN), (val, VAL)):
        write_split(tmp_path / json_name.format(name), tmp_path / image_name.format(name), boxes)
    sets = data.load(str(tmp_path), size=64)
    assert (len(sets["train"]), len(sets["val"])) == (3, 2)
    assert (sets["train"].num_boxes, sets["train"].max_boxes) == (2, 1)
    assert_targets_are_right(sets)


def test_four_paths_do_as_well_as_a_folder(tmp_path):
    write_split(tmp_path / "a.json", tmp_path / "pictures", TRAIN)
    write_split(tmp_path / "deep/b.json", tmp_path / "others", VAL)
    paths = dict(train_json=str(tmp_path / "a.json"), train_images=str(tmp_path / "pictures"),
                 val_json=tmp_path / "deep/b.json", val_images=tmp_path / "others")
    assert_targets_are_right(data.load(**paths, size=64))
    with pytest.raises(DataError, match="--val-json and --val-images"):
        data.load(train_json=paths["train_json"], train_images=paths["train_images"])
    with pytest.raises(DataError, match="not both"):
        data.load(tmp_path, **paths)


def assert_targets_are_right(sets):
    for dataset, boxes in ((sets["train"], TRAIN), (sets["val"], VAL)):
        assert dataset.category_ids == [3, 7] and dataset.class_names == ["dog", "cat"], \
            "classes are the category ids of the file in increasing order, numbered from 0"
        for k, box in enumerate(boxes, 1):
            image, target = dataset[k - 1]
            assert image.shape[0] == 3 and image.dtype == torch.float32 and max(image.shape[1:]) <= 64
            assert type(image) is type(target["boxes"]) is torch.Tensor, "no tv_tensors outside support/data.py"
            assert (target["image_id"], target["size"]) == (k, (48, 64))
            assert target["labels"].tolist() == ([(1, 0)[k % 2]] if box else []), "id 7 is class 1, 3 is 0"
            if not box:
                assert target["boxes"].shape == (0, 4), "an empty image still has a [0, 4] tensor of boxes"
            elif dataset is sets["val"]:
                x, y, w, h = box
                expected = torch.tensor([[(x + w / 2) / 64, (y + h / 2) / 48, w / 64, h / 48]])
                assert torch.allclose(target["boxes"], expected, atol=1e-6), "(cx, cy, w, h) over image size"


def test_val_alone_keeps_the_classes_of_the_training_set(folder):
    change(folder, lambda c: c.update(annotations=[], categories=CATEGORIES[:1]), "val")
    sets = data.load(folder, splits=("val",))
    assert list(sets) == ["val"] and sets["val"].class_names == ["dog", "cat"], \
        "a model trained on two classes has two outputs, whatever the validation file says"
    assert any("no box of class dog, cat" in note for note in sets["val"].notes)
    (folder / "annotations/instances_train.json").write_text("{")
    with pytest.raises(DataError, match="instances_train.json"):
        data.load(folder, splits=("val",))  # guessing the classes could give wrong results without a word
    (folder / "annotations/instances_train.json").unlink()
    assert data.load(folder, splits=("val",))["val"].class_names == ["cat"], "val is all there is"


# ---- Bad input: one clear line ---------------------------------------------------------------------------
def assert_one_line(error, *words):
    message = one_line(error)
    assert "\n" not in str(error), f"one line, please: {error}"
    for word in words:
        assert word in message, f"the message should name {word!r}: {message}"


def edit(key, index, **values):
    """A change to one entry of an annotation file; a value of ... deletes the field."""
    def how(contents):
        entry = contents[key][index]
        entry.update(values)
        for name in [name for name, value in values.items() if value is ...]:
            del entry[name]
    return how


@pytest.mark.parametrize("how, words", [
    (lambda c: [c], ["is a list"]),
    (lambda c: {"images": [], "categories": []}, ['"annotations"']),
    (lambda c: c.update(images={}), ['"images"', "list"]),
    (lambda c: c.update(annotations=[[1, 2]]), ['"annotations"', "list"]),
    (lambda c: c.update(categories=[]), ["categories", "empty"]),
    (lambda c: c.update(images=[], annotations=[]), ["images", "empty"]),
    (lambda c: c.update(annotations=[]), ["not a single usable box"]),
    (edit("images", 1, id="2"), ["image number 2", "'2'"]),
    (edit("images", 1, id=1), ["image ids that occur twice", "image id 1"]),
    (edit("images", 1, file_name=...), ["image id 2", "file_name"]),
    (edit("images", 1, file_name="gone.png"), ["do not exist: 1", "gone.png"]),
    (edit("images", 1, width=-64), ["image id 2", "[-64, 48]"]),
    (edit("images", 1, width="64"), ["image id 2", "['64', 48]"]),
    (edit("categories", 1, id=7), ["category ids that occur twice", "category id 7"]),
    (edit("categories", 1, id=None), ["category number 2"]),
    (edit("annotations", 1, id=1), ["annotation ids that occur twice", "annotation id 1"]),
    (edit("annotations", 1, id=True), ["annotation number 2", "True"]),
    (edit("annotations", 1, image_id=99), ["annotation id 2", "image_id", "99"]),
    (edit("annotations", 1, category_id=5), ["2.png", "annotation id 2", "image id 2", "category_id", "5"]),
    (edit("annotations", 1, category_id=...), ["annotation id 2", "category_id"]),
    (edit("annotations", 1, bbox=...), ["annotation id 2", "image id 2", "bbox"]),
    (edit("annotations", 1, bbox=[1, 2, 3]), ["annotation id 2", "image id 2", "[1, 2, 3]"]),
    (edit("annotations", 1, bbox=[1, 2, "3", 4]), ["annotation id 2", "image id 2", "'3'"]),
])
def test_a_broken_annotation_file_is_named_with_the_place(folder, how, words):
    change(folder, how)
    with pytest.raises(DataError) as error:
        data.load(folder)
    assert_one_line(error.value, "instances_train.json", *words)


@pytest.mark.parametrize("text, words", [
    (b'{"images": [],\n "annotations": [}', ["line 2", "column"]),
    (b"", ["line 1"]),
    (b"\xff\xfe\x00{", ["JSON"]),
    (b"[" * 100_000, ["JSON"]),
])
def test_broken_json_is_named_with_the_position(folder, text, words):
    (folder / "annotations/instances_val.json").write_bytes(text)
    with pytest.raises(DataError) as error:
        data.load(folder)
    assert_one_line(error.value, "instances_val.json", *words)


def test_missing_things_are_named(folder):
    def message(*args, **kwargs):
        with pytest.raises(DataError) as error:
            data.load(*args, **kwargs)
        assert_one_line(error.value)
        return str(error.value)

    assert "nowhere: no such folder" in message("nowhere")
    assert "shapes" in message("shape"), "a misspelt 'shapes' should remind of the embedded set"
    assert "instances_train2017.json" in message(folder / "train"), "say what was looked for"
    assert "b.json" in message(train_json="b.json", train_images=folder, val_json="b.json", val_images=folder)
    assert "augment" in message(folder, augment="heavy") and "size" in message(size=5)
    (folder / "annotations/instances_val.json").unlink()
    assert "no val annotations" in message(folder)
    for image in (folder / "train").iterdir():
        image.unlink()
    assert "image files that do not exist: 3 (first: " in message(folder)
    (folder / "train").rmdir()
    assert "train: no such folder" in message(folder)


def test_val_must_not_know_other_classes_than_train(folder):
    change(folder, lambda c: c["categories"].append({"id": 9, "name": "cow"}), "val")
    with pytest.raises(DataError, match="_val.json: .*id 9 is 'cow', in train it does not exist"):
        data.load(folder)
    change(folder, lambda c: c.update(categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]), "val")
    with pytest.raises(DataError, match="_val.json: .*id 3 is 'cat', in train it is 'dog'"):
        data.load(folder)


def test_bad_boxes_are_repaired_or_dropped_and_reported_once(folder):
    bad = [[-5, -5, 20, 20], [60, 40, 20, 20], [100, 0, 5, 5], [3, 3, 0, 5], [3, 3, -4, 5],
           [0, 0, float("nan"), 5], [0, 0, float("inf"), 5], [0, 0, 10 ** 400, 5], [0.2, 0.2, 63.9, 47.9]]
    change(folder, lambda c: c.update(annotations=[
        {"id": k, "image_id": 1, "category_id": 7, "bbox": box} for k, box in enumerate(bad, 50)]))
    dataset = data.load(folder)["train"]
    assert dataset.images[0].boxes_xyxy.tolist() == pytest.approx(
        np.array([[0, 0, 15, 15], [60, 40, 64, 48], [0.2, 0.2, 64, 48]])), \
        "boxes over the edge are cut at it; those that are outside, empty or not finite go"
    notes = {note.split(": ", 1)[1] for note in dataset.notes}
    assert notes == {
        "boxes reaching over the image edge, clipped: 2 (first: 1.png, image id 1, annotation id 50)",
        "boxes outside their image, dropped: 1 (first: 1.png, image id 1, annotation id 52)",
        "boxes that are not finite or have no width or height, dropped: 5 "
        "(first: 1.png, image id 1, annotation id 53)",
        "images without boxes, kept: 2 (first: 2.png, image id 2)",
        "no box of class dog",
    }, "the ninth box is off by a tenth of a pixel: rounding, not worth a note"


def test_several_objects_keep_their_order_and_their_classes(folder):
    objects = [(7, [1, 1, 10, 10]), (3, [20, 5, 8, 30]), (3, [40, 2, 20, 6])]
    change(folder, lambda c: c.update(annotations=[
        {"image_id": 2, "category_id": category_id, "bbox": box} for category_id, box in objects]), "val")
    target = data.load(folder)["val"][1][1]
    assert target["labels"].tolist() == [1, 0, 0]
    boxes = box_convert(target["boxes"], "cxcywh", "xywh") * torch.tensor([64, 48, 64, 48])
    assert torch.allclose(boxes, torch.tensor([box for _, box in objects]).float(), atol=1e-4)


def test_missing_fields_are_filled_in(folder):
    bare = {"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40]}
    change(folder, lambda c: c.update(annotations=[bare, bare]))
    change(folder, edit("images", 0, width=..., height=0))
    dataset = data.load(folder)["train"]
    truth = dataset.coco.dataset["annotations"]
    assert [(a["id"], a["area"], a["iscrowd"]) for a in truth] == [(1, 1200, 0), (2, 1200, 0)]
    assert (dataset.images[0].height, dataset.images[0].width) == (48, 64), "sizes come from the file"


def test_outline_area_is_kept_and_nonsense_is_not(folder):
    areas = [100, -3, 0, "big", 10 ** 6, None]
    change(folder, lambda c: c.update(annotations=[
        {"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40], "area": area} for area in areas]))
    assert data.load(folder)["train"].images[0].areas.tolist() == [100] + [1200] * 5


# ---- Image files -----------------------------------------------------------------------------------------
def load_single(tmp_path, image, name="x.png", size=None, **save):
    """Saves a PIL image and reads it back as training does; returns uint8 [H, W, 3]."""
    image.save(tmp_path / name, **save)
    width, height = size or image.size
    picture = AnnotatedImage(1, str(tmp_path / name), height, width, *[np.zeros(0)] * 4)
    loaded = load_image(picture)
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
    with pytest.raises(DataError) as error:
        data.load(folder)["train"][1]
    assert_one_line(error.value, "2.png", "image id 2", "100 x 80", "64 x 48")


@pytest.mark.parametrize("spoil, words", [
    (lambda path: path.write_bytes(path.read_bytes()[:-60]), []),
    (lambda path: path.write_bytes(b"not an image"), []),
    (lambda path: path.write_bytes(b""), []),
    (lambda path: Image.new("F", (64, 48)).save(path, format="TIFF"), ["floating-point"]),
])
def test_a_damaged_image_gives_one_line(folder, spoil, words):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "train/1.png")
    spoil(folder / "train/1.png")
    with pytest.raises(DataError) as error:
        data.load(folder)["train"][0]
    assert_one_line(error.value, str(folder / "train/1.png"), "image id 1", *words)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"not an image"),
                                   lambda path: write_image(path, width=100)])
def test_an_error_in_a_worker_is_still_one_line(folder, spoil):
    spoil(folder / "train/1.png")
    dataset = data.first_with_boxes(data.load(folder)["train"], 1)
    batches = iter(DataLoader(dataset, num_workers=1, collate_fn=data.collate))
    with pytest.raises(DataError) as error:
        next(batches)
    assert next(batches, None) is None  # the end: lets the worker go
    message = one_line(error.value)
    assert message.startswith(f"{folder}/train/1.png (image id 1)") and "\n" not in message, message


def test_a_hair_thin_image_is_refused(folder):
    write_image(folder / "train/1.png", width=640, height=2)
    change(folder, edit("images", 0, width=640, height=2))
    change(folder, edit("annotations", 0, bbox=[0, 0, 5, 2]))
    with pytest.raises(DataError, match="too thin"):
        data.load(folder)["train"][0]


# ---- Augmentation ----------------------------------------------------------------------------------------
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
    if augment == "none":
        assert mirrored == cut == {False}, '"none" should only resize'
    else:
        assert mirrored == cut == {True, False}, "80 draws should hold all kinds of images"


def test_an_object_cut_away_takes_its_label_along():
    image = tv_tensors.Image(torch.zeros(3, 40, 40, dtype=torch.uint8))
    boxes = tv_tensors.BoundingBoxes([[0., 0, 9, 9], [31, 31, 40, 40]], format="XYXY", canvas_size=(40, 40))
    torch.manual_seed(0)
    counts = set()
    for _ in range(50):
        _, target = data.RandomSizeCrop(15, 25)(image, {"boxes": boxes, "labels": torch.tensor([5, 6])})
        counts.add(len(target["boxes"]))
        assert len(target["labels"]) == len(target["boxes"]) and (target["boxes"][:, 2:] > 0).all()
    assert counts == {0, 1}, "a window of at most 25 pixels holds one of the two or none, never both"


@pytest.mark.parametrize("augment, size, shape", [
    ("laptop", 96, (72, 96)), ("none", 96, (72, 96)), ("paper", 96, (96, 128)), ("paper", None, (800, 1066))])
def test_validation_images_have_one_size(folder, augment, size, shape):
    dataset = data.load(folder, augment=augment, size=size)["val"]
    assert tuple(dataset[0][0].shape[1:]) == shape and torch.equal(dataset[0, 0][0], dataset[5, 0][0])


def test_training_images_stay_within_the_size(folder):
    for augment, largest in (("laptop", (96, 96)), ("paper", (160, 160))):
        dataset = data.load(folder, augment=augment, size=96)["train"]
        shapes = [dataset[epoch, 0][0].shape for epoch in range(40)]
        assert len(set(shapes)) > 3, "training should see several sizes"
        assert max(max(s[1:]) for s in shapes) <= largest[0], "no image may be larger than promised: memory"


def test_augmentation_depends_on_seed_epoch_and_index_only(folder):
    dataset, again = (data.load(folder, size=64, seed=3)["train"] for _ in range(2))
    keys = [(epoch, index) for epoch in range(3) for index in range(2)]
    wanted = [dataset[key] for key in keys]
    torch.manual_seed(99)
    for key, item in reversed(list(zip(keys, wanted))):
        assert_same(item, again[key], f"epoch and index {key}, asked for in another order")
    assert len({tuple(item[0].shape) + (item[0].sum().item(),) for item in wanted}) == 6, "6 keys, 6 images"
    other = data.load(folder, size=64, seed=4)["train"]
    assert any(not torch.equal(other[key][0], item[0]) for key, item in zip(keys, wanted)), "seed ignored"


def test_the_number_of_workers_changes_nothing(folder):
    keys = [[(epoch, index)] for epoch in range(2) for index in range(3)]
    for dataset in (data.load(folder, size=64)["train"], data.load(size=64)["train"]):
        alone, many = ([batch for batch in DataLoader(dataset, batch_sampler=keys, num_workers=workers,
                                                      collate_fn=data.collate)] for workers in (0, 2))
        for (a, _, s), (b, _, t) in zip(alone, many, strict=True):
            assert_same((a, s[0]), (b, t[0]), "0 workers against 2")


def test_loading_leaves_every_global_generator_alone(folder):
    datasets = data.load(folder, size=64)["train"], data.load(size=64)["train"]
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    for dataset in datasets:
        dataset[2, 1]
    assert torch.equal(before, torch.get_rng_state()), "torch's generator moved: dropout would depend on data"
    assert (numpy_before == np.random.get_state()[1]).all(), "numpy's generator moved"


# ---- Batches ---------------------------------------------------------------------------------------------
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
    shapes = data.first_with_boxes(data.load(size=64)["train"], 4)
    assert len(shapes) == len(shapes.coco.imgs) == 4 and all(len(shapes[i][1]["labels"]) for i in range(4))
    assert small.class_names == dataset.class_names


def test_datasets_travel_to_workers_on_windows_and_mac(folder):
    for dataset in (data.load(folder, size=64)["train"], Shapes(3, 64)):
        dataset.coco
        assert_same(pickle.loads(pickle.dumps(dataset))[1], dataset[1], "pickled and back")


# ---- Evaluation ------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, softmax", [("postprocess_softmax", True), ("postprocess_focal", False)])
def test_postprocess_agrees_with_the_official_code(name, softmax):
    case = Case(name)
    sizes = case.arrays["target_sizes_hw"].tolist()
    results = postprocess(case.arrays["logits"], case.arrays["boxes"], sizes, softmax)
    for i, result in enumerate(results):
        assert torch.equal(result["labels"], case.arrays[f"result_{i}_labels"].long())
        assert torch.allclose(result["scores"], case.arrays[f"result_{i}_scores"], rtol=0, atol=1e-6)
        assert torch.allclose(result["boxes"], case.arrays[f"result_{i}_boxes"], rtol=0, atol=1e-3)


def test_postprocess_with_few_queries_keeps_all_pairs():
    logits, boxes = torch.randn(1, 3, 2), torch.rand(1, 3, 4)
    (result,) = postprocess(logits, boxes, [(10, 20)], softmax=False)
    assert len(result["scores"]) == 6 and result["scores"].diff().max() <= 0, "3 queries x 2 classes, sorted"


def answer(*found):
    """Predictions for one image from (score, class index, [x, y, width, height])."""
    scores, labels, boxes = zip(*found) if found else ((), (), ())
    return {"scores": torch.tensor(scores, dtype=torch.float32),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "boxes": box_convert(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "xywh", "xyxy")}


def perfect(dataset):
    """The targets of all images as predictions, so back from [0, 1] to original pixels."""
    predictions = {}
    for _, target in (dataset[i] for i in range(len(dataset))):
        height, width = target["size"]
        boxes = box_convert(target["boxes"], "cxcywh", "xyxy") * torch.tensor([width, height, width, height])
        predictions[target["image_id"]] = {"scores": torch.ones(len(boxes)), "labels": target["labels"],
                                           "boxes": boxes}
    return predictions


def test_perfect_predictions_have_ap_1_and_print_nothing(folder, capsys):
    dataset = data.load(folder)["val"]
    metrics = coco_eval(dataset, perfect(dataset))
    assert list(metrics) == ["AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large",
                             "AR1", "AR10", "AR100", "AR_small", "AR_medium", "AR_large"]
    assert metrics["AP"] == metrics["AP_small"] == metrics["AP_medium"] == pytest.approx(1)
    assert metrics["AP_large"] == metrics["AR_large"] == -1, "nothing as large as 96 x 96 here"
    assert capsys.readouterr().out == "", "pycocotools should be silent"
    table = explain(metrics)
    assert all(name in table for name in metrics) and "-1 =" in table
    shapes = data.first_with_boxes(data.load(size=64)["val"], 5)
    assert coco_eval(shapes, perfect(shapes))["AP"] == pytest.approx(1)


def test_class_indices_are_mapped_back_to_category_ids(folder):
    dataset = data.load(folder)["val"]
    swapped = {i: p | {"labels": 1 - p["labels"]} for i, p in perfect(dataset).items()}
    assert coco_eval(dataset, swapped)["AP"] == 0, "right boxes with the wrong class are worth nothing"
    assert {a["category_id"] for a in dataset.coco.dataset["annotations"]} == {3, 7}


def test_ap_of_cases_computed_by_hand(folder):
    change(folder, lambda c: c.update(annotations=[
        {"id": 0, "image_id": 1, "category_id": 3, "bbox": [0, 0, 10, 10]},
        {"id": 1, "image_id": 2, "category_id": 3, "bbox": [0, 0, 10, 10]}]), "val")
    dataset = data.load(folder)["val"]

    def ap(predictions, name="AP", **how):
        return coco_eval(dataset, predictions, **how)[name]

    hit, miss = (0.9, 0, [0, 0, 10, 10]), (0.95, 0, [30, 30, 10, 10])
    assert ap({1: answer(hit), 2: answer(hit)}) == pytest.approx(1), "annotation id 0 counts like any other"
    assert ap({1: answer(hit)}) == pytest.approx(51 / 101), "recall 0.5 reaches 51 of the 101 recall levels"
    assert ap({1: answer(hit)}, image_ids=[1]) == pytest.approx(1), "image 2 was not asked about"
    assert ap({1: answer(hit, miss), 2: answer(hit)}) == pytest.approx(2 / 3), \
        "a miss ranked first: precision 1/2, then 2/3; AP takes the best precision at that recall or beyond"
    narrow = {i: answer((0.9, 0, [0, 0, 6.2, 10])) for i in (1, 2)}  # IoU 0.62
    assert (ap(narrow), ap(narrow, "AP50"), ap(narrow, "AP75")) == pytest.approx((0.3, 1, 0)), \
        "IoU 0.62 passes 0.50, 0.55 and 0.60 of ten thresholds"
    for nothing in ({}, {1: answer()}, {1: answer(), 2: answer()}):
        assert ap(nothing) == 0, "nothing found is AP 0, not a crash"


def test_crowds_are_not_trained_on_and_forgiven_in_the_evaluation(folder):
    change(folder, edit("annotations", 0, iscrowd=1, category_id=7), "val")
    dataset = data.load(folder)["val"]
    assert dataset.num_boxes == 1
    assert [a["iscrowd"] for a in dataset.coco.dataset["annotations"]] == [1, 0]
    for field in (dataset[0][1]["boxes"], dataset[0][1]["labels"]):
        assert len(field) == 0, "the crowd box should be gone together with its label"
    found = {1: answer((0.99, 1, [10, 10, 8, 8]), (0.98, 1, [20, 20, 8, 8])), 2: answer((0.9, 1, VAL[1]))}
    assert coco_eval(dataset, found)["AP"] == pytest.approx(1), \
        "what is found inside a crowd is neither right nor wrong"
    assert any("crowd regions" in note and ": 1 (" in note for note in dataset.notes)


def test_evaluation_agrees_with_pycocotools_on_the_files_themselves(folder, tmp_path):
    rng = np.random.default_rng(0)
    boxes = rng.integers(1, 24, (60, 4))
    change(folder, lambda c: c.update(annotations=[
        {"id": k, "image_id": 1 + k % 2, "category_id": (3, 7)[k % 3 > 0], "bbox": box,
         "area": box[2] * box[3], "iscrowd": int(k % 15 == 0)}
        for k, box in enumerate(boxes[:30].tolist(), 1)]), "val")
    dataset = data.load(folder)["val"]
    noisy = (boxes + rng.normal(0, 1, boxes.shape)).clip(0.5)
    found = {i: answer(*[(float(np.float32(rng.random())), (0, 1)[k % 3 > 0], noisy[k - 1].tolist())
                         for k in range(1, 61) if 1 + k % 2 == i]) for i in (1, 2)}
    results = [{"image_id": i, "category_id": [3, 7][label], "score": score, "bbox": box}
               for i, p in found.items()
               for score, label, box in zip(p["scores"].tolist(), p["labels"].tolist(),
                                            box_convert(p["boxes"], "xyxy", "xywh").tolist())]
    truth = COCO(str(folder / "annotations/instances_val.json"))
    judge = COCOeval(truth, truth.loadRes(results), "bbox")
    judge.evaluate(), judge.accumulate(), judge.summarize()
    assert list(coco_eval(dataset, found).values()) == pytest.approx(judge.stats.tolist(), abs=1e-9)
    assert 0.05 < judge.stats[0] < 0.95, "the test should be neither hopeless nor trivial"
