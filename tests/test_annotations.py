"""COCO folders: which are found, what is read, and one clear line for whatever is wrong in them."""
import os

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert

from support import UserError, data
from tests.folders import CATEGORIES, TRAIN, VAL, assert_one_line, change, coco_folder, edit, write_split


@pytest.fixture
def folder(tmp_path):
    return coco_folder(tmp_path)


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
    with pytest.raises(UserError, match="--val-json and --val-images"):
        data.load(train_json=paths["train_json"], train_images=paths["train_images"])
    with pytest.raises(UserError, match="not both"):
        data.load(tmp_path, **paths)


def assert_targets_are_right(sets):
    for dataset, boxes in ((sets["train"], TRAIN), (sets["val"], VAL)):
        assert dataset.category_ids == [3, 7] and dataset.class_names == ["dog", "cat"], \
            "classes are the category ids of the file in increasing order, numbered from 0"
        for k, box in enumerate(boxes, 1):
            image, target = dataset[k - 1]
            assert image.shape[0] == 3 and image.dtype == torch.float32 and max(image.shape[1:]) <= 64
            assert type(image) is type(target["boxes"]) is torch.Tensor, "no tv_tensors leave data.py"
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
    with pytest.raises(UserError, match="instances_train.json"):
        data.load(folder, splits=("val",))  # guessing the classes could give wrong results without a word
    (folder / "annotations/instances_train.json").unlink()
    assert data.load(folder, splits=("val",))["val"].class_names == ["cat"], "val is all there is"


@pytest.mark.parametrize("how, words", [
    (lambda c: [c], ["should be an object", "results"]),
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
    (edit("annotations", 1, bbox=[1, 2], place="kitchen"), ["2.png, image id 2, annotation id 2: [1, 2]"]),
    (edit("annotations", 1, bbox=[0.5, 0.5, 0.25, 1]), ["from 0 to 1", "YOLO", "pixels", "annotation id 2"]),
    (edit("images", 1, width=float("nan")), ["image id 2", "[nan, 48]"]),
    (edit("images", 1, height=float("inf")), ["image id 2", "[64, inf]"]),
    (edit("images", 1, height=10 ** 400), ["image id 2", "[64, 1000"]),
    (edit("images", 1, file_name="a\0b"), ["do not exist: 1", "a\\x00b"]),
    (edit("images", 1, file_name="x" * 300), ["do not exist: 1", "xxx"]),
    (edit("images", 1, file_name="x/" * 3000), ["do not exist: 1", "x/x"]),
    (edit("images", 1, file_name="2\n\ud800\x1b[2J.png"), ["do not exist: 1", "2 \\ud800\\x1b[2J.png"]),
    (edit("images", 1, file_name=""), ["do not exist: 1", "image id 2"]),
])
def test_a_broken_annotation_file_is_named_with_the_place(folder, how, words):
    change(folder, how)
    with pytest.raises(UserError) as error:
        data.load(folder)
    assert_one_line(error.value, "instances_train.json", *words)


@pytest.mark.parametrize("text, words", [
    (b'{"images": [],\n "annotations": [}', ["line 2", "column"]),
    (b"", ["is empty"]),
    (b" \n", ["is empty"]),
    (b"\xff\xfe\x00{", ["JSON"]),
    (b"[" * 100_000, ["nested too deeply"]),
    (b'{"images": [{"id": ' + b"1" * 5000, ["JSON", "5000 digits"]),
    (b'{"images": [], "images": []}', ["'images' stands twice"]),
    (b'{"categories": [{"id": 1, "name": "a", "id": 2}]}', ["'id' stands twice"]),
])
def test_broken_json_is_named_with_the_position(folder, text, words):
    (folder / "annotations/instances_val.json").write_bytes(text)
    with pytest.raises(UserError) as error:
        data.load(folder)
    assert_one_line(error.value, "instances_val.json", *words)


def test_missing_things_are_named(folder):
    def message(*args, **kwargs):
        with pytest.raises(UserError) as error:
            data.load(*args, **kwargs)
        assert_one_line(error.value)
        return str(error.value)

    for wrong in ("nowhere", "", "a\0b", "x" * 300, "x/" * 3000, "a\udcff"):
        assert "no such folder" in message(wrong), f"{wrong[:20]!r} is no folder"
        assert "both needed" in message(val_json=wrong, val_images=""), "an empty path is no path"
        message(train_json=wrong, train_images=folder, val_json=wrong, val_images=folder)
    assert "a file, not a folder" in message(folder / "train/1.png")
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
    with pytest.raises(UserError, match="_val.json: .*id 9 is 'cow', in train it does not exist"):
        data.load(folder)
    change(folder, lambda c: c.update(categories=[{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]), "val")
    with pytest.raises(UserError, match="_val.json: .*id 3 is 'cat', in train it is 'dog'"):
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
    areas = [100, -3, 0, "big", 10 ** 6, None, float("nan"), float("inf"), 10 ** 400, True]
    change(folder, lambda c: c.update(annotations=[
        {"image_id": 1, "category_id": 7, "bbox": [1, 2, 30, 40], "area": area} for area in areas]))
    dataset = data.load(folder)["train"]
    assert dataset.images[0].areas.tolist() == [100] + [1200] * 9
    assert any("areas that are not numbers above 0" in note and ": 6 (" in note for note in dataset.notes)


def test_a_name_with_line_breaks_and_without_end_still_gives_one_line(folder):
    change(folder, edit("images", 1, file_name="2\n.png" * 1000))
    with pytest.raises(UserError) as error:
        data.load(folder)
    assert_one_line(error.value, "do not exist: 1")
    assert len(str(error.value)) < 1000


def test_an_error_says_how_to_see_all_of_them(folder):
    change(folder, edit("annotations", 0, bbox=None))
    change(folder, edit("annotations", 1, category_id=5))
    with pytest.raises(UserError) as error:
        data.load(folder)
    assert_one_line(error.value, "1.png", "1 more kinds of errors", f"python -m support.check_data {folder}")
    paths = {f"{split}_{what}": path for split in ("train", "val") for what, path in (
        ("json", folder / f"annotations/instances_{split}.json"), ("images", folder / split))}
    with pytest.raises(UserError, match="python -m support.check_data with the same paths"):
        data.load(**paths)


@pytest.mark.parametrize("value, crowd", [
    (1, True), ("1", True), (True, True), (0, False), ("0", False), (None, False),
    (2, None), (float("nan"), None), ("yes", None), ([], None)])
def test_iscrowd_is_understood_or_said(folder, value, crowd):
    change(folder, edit("annotations", 0, iscrowd=value))
    dataset = data.load(folder)["train"]
    assert dataset.images[0].crowd.tolist() == [bool(crowd)]
    assert any("crowd regions" in note for note in dataset.notes) == bool(crowd)
    assert any("neither 0 nor 1, taken as 0: 1 (" in note for note in dataset.notes) == (crowd is None)


def test_boxes_from_0_to_1_are_refused_and_one_pixel_is_not(folder):
    for box in ([0.1, 0.2, 0.3, 0.4], [-0.001, 0.5, 1, 1.001]):
        change(folder, lambda c: [entry.update(bbox=box) for entry in c["annotations"]] and None)
        with pytest.raises(UserError, match="from 0 to 1.*YOLO.*: 2 "):
            data.load(folder)
    change(folder, lambda c: [entry.update(bbox=[0, 0, 1, 1]) for entry in c["annotations"]] and None)
    assert data.load(folder)["train"].images[0].boxes_xyxy.tolist() == [[0, 0, 1, 1]]


def test_corners_in_place_of_sizes_are_suspected(folder):
    def to_corners(contents):
        contents["annotations"] = [{"image_id": 1, "category_id": 7, "bbox": [30 + k, 20, 60, 40]}
                                   for k in range(4)]

    change(folder, to_corners)
    notes = data.load(folder)["train"].notes
    assert any("another way (COCO's is x, y, width, height)" in note for note in notes)


def test_categories_of_one_name_or_none_are_said(folder):
    names = [{"id": 7, "name": "cat"}, {"id": 3, "name": "cat"}, {"id": 5}, {"id": 6, "name": " "}]
    for split in ("train", "val"):
        change(folder, lambda c: c.update(categories=names), split)
    dataset = data.load(folder)["train"]
    assert dataset.class_names == ["cat", "5", "6", "cat"] and dataset.category_ids == [3, 5, 6, 7]
    assert any("categories of the same name, kept apart: 2 (" in note for note in dataset.notes)
    assert any("categories without a name, called by their id: 2 (" in note for note in dataset.notes)


def test_class_names_can_be_printed_and_stored(folder):
    for split in ("train", "val"):
        change(folder, lambda c: c.update(categories=[
            {"id": 7, "name": "a\n\ud800\x1b[31m"}, {"id": 3, "name": "\u540d\u524d"}]), split)
    sets = data.load(folder)
    assert sets["train"].class_names == ["\u540d\u524d", "a \\ud800\\x1b[31m"]
    assert all(name.encode().decode().isprintable() for name in sets["train"].class_names)


@pytest.mark.parametrize("same", ["a path through the other folder", "a symbolic link", "a hard link"])
def test_a_training_image_that_is_a_validation_image_is_said(folder, same):
    if same == "a path through the other folder":
        change(folder, edit("images", 0, file_name="../val/1.png"))
    else:
        (folder / "train/1.png").unlink()
        link = os.symlink if same == "a symbolic link" else os.link
        link(folder / "val/1.png", folder / "train/1.png")
    sets = data.load(folder)
    assert any("images that are in train already, so val is too easy: 1 (first: " in note
               for note in sets["val"].notes)
    assert not any("already" in note for note in sets["train"].notes)


def test_a_path_from_windows_is_understood(folder):
    change(folder, edit("images", 0, file_name="..\\train\\1.png"))
    assert data.load(folder)["train"].path_of(0).endswith("../train/1.png")


def test_a_crowded_image_is_said_before_memory_is_gone(folder):
    boxes = [[k % 40, k % 30, 5 + k / 5000, 6] for k in range(20_000)]
    change(folder, lambda c: c.update(annotations=[
        {"image_id": 1, "category_id": 7, "bbox": box} for box in boxes]))
    dataset = data.load(folder)["train"]
    assert dataset.max_boxes == dataset.count_boxes(0) == 20_000
    assert any("more than 1000 boxes" in note and "image id 1: 20000" in note for note in dataset.notes)


def test_directories_and_unreadable_files_are_named(folder, monkeypatch):
    def message(words):
        with pytest.raises(UserError, match=words) as error:
            data.load(folder)
        assert_one_line(error.value, "train")

    path = folder / "annotations/instances_train.json"
    text = path.read_text()
    path.unlink(), path.mkdir()
    message("instances_train.json: cannot be read: Is a directory")
    path.rmdir(), path.symlink_to(path)
    message("no train annotations here")
    path.unlink(), path.write_text(text)
    with monkeypatch.context() as patch:
        patch.setattr("pathlib.Path.read_bytes", lambda path: open("/proc/self/mem", "rb").read())  # EIO
        message("instances_train.json: cannot be read: Input/output error")
    (folder / "train/1.png").unlink(), (folder / "train/1.png").mkdir()
    message("do not exist: 1 .*1.png")


def test_val_alone_is_enough_to_evaluate(folder):
    val = dict(val_json=folder / "annotations/instances_val.json", val_images=folder / "val")
    sets = data.load(**val, splits=("val",))
    assert list(sets) == ["val"] and sets["val"].class_names == ["dog", "cat"] and len(sets["val"]) == 2
    json_only, images_only = ({name: val[name]} for name in ("val_json", "val_images"))
    for wrong in (json_only, images_only, val | {"train_json": "x"}):
        with pytest.raises(UserError, match="are both needed"):
            data.load(**wrong, splits=("val",))
    with pytest.raises(UserError, match="--train-json and --train-images are both needed"):
        data.load(**val)


def test_a_subset_and_images_without_annotations(folder):
    dataset = data.load(folder)["val"]
    assert len(dataset.coco.imgs) == 2
    some = dataset.subset([1])
    assert (len(some), some.path_of(0), some.num_boxes) == (1, str(folder / "val/2.png"), 1)
    assert list(some.coco.imgs) == [2] and len(dataset) == 2
    assert dataset.subset([]).max_boxes == dataset.subset([]).num_boxes == 0
    (folder / "val/notes.txt").write_text("not an image")
    bare = data.from_images([folder / "train/2.png", folder / "val"], size=64)
    assert [bare.path_of(i) for i in range(3)] == [str(folder / name) for name in (
        "train/2.png", "val/1.png", "val/2.png")]
    assert bare[2][0].shape == (3, 48, 64) and bare.count_boxes(2) == 0 and bare.class_names == []
    for wrong, words in ((folder / "gone.png", "no such image"), (folder, "no images in this folder"),
                         (folder / "val/notes.txt", "not an image"), ("a\0b", "no such image")):
        with pytest.raises(UserError, match=words):
            data.from_images(wrong)
