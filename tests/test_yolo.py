"""YOLO's folders: the layouts people have, data.yaml as people write it, and labels that are wrong."""
from pathlib import Path

import pytest

from support import UserError, check_data, data, yolo
from tests.folders import assert_one_line, coco_folder, write_image, write_label, yolo_folder

BLOCK = """\
# made by hand
path: ../datasets/pets  # relative to a folder of the tool
train: "images/train"
val: images/val  # 2 images
test:

names:
  0: dog  # Canis
  1: 'cat'
download: |
  names: [x]
"""
ROBOFLOW = """\
train: ../train/images
val: ../valid/images
test: ../test/images

nc: 2
names: ['dog', 'cat']

roboflow:
  workspace: mine
  nc: 7
"""


def lists(folder):
    """As CVAT exports it: data.yaml names lists of images."""
    yolo_folder(folder, data_yaml="train: train.txt\nval: val.txt\nnames:\n- dog\n- cat\n")
    for split, count in (("train", 3), ("val", 2)):
        names = "".join(f"images/{split}/{k}.png\n" for k in range(1, count + 1))
        (folder / f"{split}.txt").write_text(names)


def in_one_folder(folder):
    """As darknet had it: labels beside the images."""
    yolo_folder(folder, "train", "val", "train: train\nval: ./val\nnames: {0: dog, 1: cat}\n")


def without_yaml(folder):
    """As labelImg leaves it."""
    yolo_folder(folder).joinpath("data.yaml").rename(folder / "classes.txt").write_text("dog\ncat\n")


LAYOUTS = {
    "Ultralytics": lambda f: yolo_folder(f, data_yaml=BLOCK),
    "Roboflow": lambda f: yolo_folder(f, "train/images", "valid/images", ROBOFLOW),
    "another name": lambda f: yolo_folder(f).joinpath("data.yaml").rename(f / "pets.yml"),
    "lists of images": lists,
    "labels beside": in_one_folder,
    "classes.txt": without_yaml,
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_yolo_folder_is_the_data_set_that_its_coco_twin_is(layout, tmp_path):
    LAYOUTS[layout](tmp_path / "yolo")
    wanted, found = data.load(coco_folder(tmp_path / "coco")), data.load(tmp_path / "yolo")
    for split in ("train", "val"):
        assert found[split].class_names == wanted[split].class_names == ["dog", "cat"]
        assert len(found[split]) == len(wanted[split]) == {"train": 3, "val": 2}[split]
        for a, b in zip(found[split].images, wanted[split].images):
            assert Path(a.path).name == Path(b.path).name and a.labels.tolist() == b.labels.tolist()
            assert a.boxes_xyxy.shape == b.boxes_xyxy.shape and (a.height, a.width) == (b.height, b.width)
            assert abs(a.boxes_xyxy - b.boxes_xyxy).max(initial=0) < 1e-4, a.path
    assert data.load(tmp_path / "yolo", splits=("val",))["val"].class_names == ["dog", "cat"]


def test_the_four_paths_may_name_data_yaml(tmp_path):
    yolo_folder(tmp_path)
    val = dict(val_json=tmp_path / "data.yaml", val_images=tmp_path / "images/val")
    assert [image.labels.tolist() for image in data.load(**val, splits=("val",))["val"].images] == [[0], [1]]
    sets = data.load(train_json=val["val_json"], train_images=tmp_path / "images/train", **val)
    assert (len(sets["train"]), len(sets["val"])) == (3, 2)
    with pytest.raises(UserError, match="nowhere: no such folder"):
        data.load(**val | {"val_images": tmp_path / "nowhere"}, splits=("val",))


def test_val_is_evaluated_where_the_training_images_are_not(tmp_path):
    yolo_folder(tmp_path, train=None, data_yaml="train: images/train\nval: images/val\nnames: [dog, cat]")
    assert len(data.load(tmp_path, splits=("val",))["val"]) == 2
    with pytest.raises(UserError) as error:
        data.load(tmp_path)
    assert_one_line(error.value, "data.yaml: line 1, train: ", f"{tmp_path}/images/train does not exist")


# ---- data.yaml ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, names", {
    "names: [a, b]": ["a", "b"],
    "names: ['0', \"b, c\", d's e's ]": ["0", "b, c", "d's e's"],
    "names: [a,  # first\n  'it''s',\n  \"\\u00e9\",\n]": ["a", "it's", "\u00e9"],
    "names: {0: a, 1: 'b: c'}": ["a", "b: c"],
    'names: {"0": "a", "1": "b"}': ["a", "b"],
    "names:\n- a b\n-   'c # d'  # e": ["a b", "c # d"],
    "names:\n    - no\n    - 10:30": ["no", "10:30"],
    "\ufeff'names' :\n  1: b\n\n  0: a\n": ["a", "b"],
    "---\r\nnames:\r\n  0: a\r\n  1: b\r\n...\r\n": ["a", "b"],
    "nc: 2": ["0", "1"],
}.items())
def test_names_are_read_as_people_write_them(text, names, tmp_path):
    yolo_folder(tmp_path, data_yaml=text)
    for label in tmp_path.glob("labels/*/*.txt"):
        write_label(label, [0, 0.5, 0.5, 0.2, 0.2])
    assert data.load(tmp_path, splits=("val",))["val"].class_names == names


@pytest.mark.parametrize("text, words", {
    "names: [a, b": "line 1: names should be a list",
    "x: 1\nnames: cat": "line 2: names should be a list",
    "names: [a, 1: b]": "line 1: names should be a list",
    "names: {0: a, 0: b}": "line 1: names should be a list",
    "names: {dog: 0, cat: 1}": "line 1: names should be a list",
    "names: ['a' b]": "line 1: names should be a list",
    "names: []": "line 1: names should be a list",
    "names:\n- a\nb": "line 1: names should be a list",
    "train: images/train": "names no classes",
    "nc: many": "names no classes",
    "nc: 10001": "names no classes",
    "names: [a]\nnames: [b]": "line 2: names stands here for the second time",
    "train: [images/a, images/b]\nnames: [a]": "line 1: train should be one folder or list",
    "train: \n  - images/a\nnames: [a]": "line 1: train should be one folder or list",
    "train: images/b\nnames: [a]": "line 1, train: .*images/b does not exist",
    b"names: [\xff]": "cannot be read",
}.items())
def test_a_data_yaml_that_is_not_understood_gets_one_line(text, words, tmp_path):
    text = text if isinstance(text, bytes) else text.encode()
    yolo_folder(tmp_path).joinpath("data.yaml").write_bytes(text)
    with pytest.raises(UserError, match=f"data.yaml: {words}") as error:
        data.load(tmp_path)
    assert_one_line(error.value)


def test_labels_without_a_file_that_names_the_classes(tmp_path):
    yolo_folder(tmp_path).joinpath("data.yaml").unlink()
    with pytest.raises(UserError, match="labels/train: YOLO's labels, but no .*data.yaml"):
        data.load(tmp_path)


# ---- Labels ------------------------------------------------------------------------------------------------
HERE = "1 (first: {labels}/2.txt, line 1"
PROBLEMS = {  # lines of the second label file, and what is said; None: it is deleted
    "four numbers": (
        [[0, 0.5, 0.5, 0.2]],
        f"error: {yolo.FORM}: {HERE}: 4 numbers)"),
    "six numbers": (
        [[1, 0.5, 0.5, 0.2, 0.2], [0, 0.5, 0.5, 0.2, 0.2, 0.9]],
        f"error: {yolo.FORM}: 1 (first: {{labels}}/2.txt, line 2: 6 numbers)"),
    "a word": (
        [["cat", 0.5, 0.5, 0.2, 0.2]],
        f"error: label lines with more than numbers: {HERE}: 'cat 0.5 0.5 0.2 0.2')"),
    "not a number": (
        [[0, "nan", 0.5, 0.2, 0.2]],
        f"error: label lines with more than numbers: {HERE}: '0 nan 0.5 0.2 0.2')"),
    "a class outside": (
        [[2, 0.5, 0.5, 0.2, 0.2]],
        f"error: annotations whose category_id is not among the categories: {HERE}: 2)"),
    "a negative class": (
        [[-1, 0.5, 0.5, 0.2, 0.2]],
        f"error: annotations whose category_id is not among the categories: {HERE}: -1)"),
    "half a class": (
        [[0.5, 0.5, 0.5, 0.2, 0.2]],
        f"error: annotations whose category_id is not among the categories: {HERE}: 0.5)"),
    "pixels": (
        [[0, 32, 24, 10, 10]],
        f"error: labels in pixels; YOLO's are shares of the image, from 0 to 1: {HERE}: '0 32 24 10 10')"),
    "a polygon": (
        [[1, 0.25, 0.5, 0.5, 0.25, 0.75, 0.5, 0.5, 0.75]],
        f"note: polygons, the boxes around them are used: {HERE})"),
    "no width": (
        [[1, 0.5, 0.5, 0, 0.2]],
        f"note: boxes that are not finite or have no width or height, dropped: {HERE})"),
    "over the edge": (
        [[1, 0.95, 0.5, 0.2, 0.2]],
        f"note: boxes reaching over the image edge, clipped: {HERE})"),
    "twice": (
        [[1, 0.5, 0.5, 0.2, 0.2]] * 2,
        "note: boxes given more than once, with the same class, kept: 1 (first: {labels}/2.txt, line 2)"),
    "an empty file": (
        [],
        "note: images without boxes, kept: 2 (first: 2.png, image id 2)"),
    "no file": (
        None,
        "note: images without a label file, taken as images without objects: 2 (first: {images}/2.png)"),
    "half a pixel in the corner": (
        [[1, 0.006, 0.006, 0.01, 0.01]],
        "note: no box of class"),
}


def said_of(folder, capsys):
    """What check_data prints of a folder; its status must be what data.load does."""
    status, refused = check_data.main([str(folder)]), False
    try:
        data.load(folder)
    except UserError as error:
        refused = bool(assert_one_line(error) or error)
    text = capsys.readouterr().out
    assert status == refused, text
    return text


@pytest.mark.parametrize("what", PROBLEMS)
def test_every_kind_of_wrong_label_is_said_with_file_and_line(what, tmp_path, capsys):
    lines, said = PROBLEMS[what]
    label = yolo_folder(tmp_path) / "labels/train/2.txt"
    label.unlink() if lines is None else write_label(label, *lines)
    text = said_of(tmp_path, capsys)
    said = said.format(labels=label.parent, images=tmp_path / "images/train")
    assert (f"  {said}" in text) == (what != "half a pixel in the corner"), text
    assert (" error: " in text) == said.startswith("error"), text


def test_a_polygon_becomes_the_box_around_it_and_of_keypoints_only_the_box_counts(tmp_path):
    label = yolo_folder(tmp_path) / "labels/train/2.txt"
    write_label(label, [1, 0.25, 0.5, 0.5, 0.25, 0.75, 0.5, 0.5, 0.75])
    sets = data.load(tmp_path)
    assert sets["train"].images[1].boxes_xyxy.tolist() == [[16, 12, 48, 36]]
    assert f"polygons, the boxes around them are used: 1 (first: {label}" in sets["train"].notes[0]
    yolo_folder(tmp_path, data_yaml="kpt_shape: [2, 2]\nnames: [dog, cat]")
    write_label(label, [1, 0.5, 0.5, 0.25, 0.25, 0.1, 0.1, 0.9, 0.9])
    sets = data.load(tmp_path)
    assert sets["train"].images[1].boxes_xyxy.tolist() == [[24, 18, 40, 30]]
    assert "keypoints" in sets["train"].notes[0]


def test_counts_that_differ_labels_without_images_and_damaged_ones(tmp_path, capsys):
    yolo_folder(tmp_path, data_yaml="names: [dog, cat]\nnc: 3")
    write_label(tmp_path / "labels/train/9.txt", [0, 0.5, 0.5, 0.2, 0.2])
    text = said_of(tmp_path, capsys)
    assert text.count("  note: line 2: nc is 3, but there are 2 names; the names count\n") == 2
    assert f"  note: label files without an image, not used: 1 (first: {tmp_path}/labels/train/9.txt)" in text
    (tmp_path / "labels/train/1.txt").write_bytes(b"\xff")
    (tmp_path / "images/train/2.png").write_text("hello")
    text = said_of(tmp_path, capsys)
    assert f"  error: label files that cannot be read: 1 (first: {tmp_path}/labels/train/1.txt: " in text
    assert f"  error: image files that cannot be used: 1 (first: {tmp_path}/images/train/2.png (image" in text


def test_images_without_any_labels_say_where_they_were_looked_for(tmp_path):
    write_image(tmp_path / "images/train/a.b.jpg")
    yolo_folder(tmp_path, train=None)
    wanted = "no image has labels; looked for .*/labels/train/a.b.txt and .*/images/train/a.b.txt"
    with pytest.raises(UserError, match=wanted):
        data.load(tmp_path)
