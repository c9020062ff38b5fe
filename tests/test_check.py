"""python -m support.check_data DIR: what it says about good and bad folders; VOC folders; hundreds of damaged files.

A data set may be wrong in any way: the answer is a line that names the file, never a traceback, and never
boxes that nobody drew.
"""
import copy
import json
import random
import re
import runpy
import sys
import time
import warnings
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image
from test_data import annotations_of, assert_one_line, change, edit, write_image

from support import check_data, data
from support.images import AnnotatedImage, DataError, load_image

TRAIN = [[10, 8, 20, 16], [30, 4, 12, 30], [2, 2, 50, 40]]
VAL = [[5, 5, 40, 40], [1, 2, 6, 5]]


@pytest.fixture
def folder(tmp_path):
    """annotations/instances_{train,val}.json with train/ and val/: three images and two, nothing wrong."""
    for split, boxes in (("train", TRAIN), ("val", VAL)):
        contents = annotations_of(boxes)
        for image, box in zip(contents["images"], boxes):
            write_image(tmp_path / split / image["file_name"], box=box)
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(contents))
    return tmp_path


def check(capsys, *flags):
    """(exit status, what was printed) of `python -m support.check_data`, flags being a folder or the four paths."""
    status = check_data.main([str(flag) for flag in flags])
    return status, capsys.readouterr().out


def refused(folder):
    """Whether training would stop: `load` or one of the images raises DataError."""
    try:
        for dataset in data.load(folder, size=32).values():
            [dataset[i] for i in range(len(dataset))]
    except DataError:
        return True
    return False


# ---- The command -----------------------------------------------------------------------------------------
def test_a_clean_folder_is_described_on_one_screen(folder, capsys):
    status, text = check(capsys, folder)
    lines = text.splitlines()
    assert status == 0 and lines[-1] == "This can be trained on." and text.count("nothing wrong") == 2
    assert "error" not in text and "note" not in text
    table = lines[:lines.index("")]
    assert len({len(line) for line in table}) == 1 and len(lines) < 30, "aligned columns, on one screen"
    rows = [[cell.strip() for cell in (line[:40], line[40:62], line[62:])] for line in table]
    for row in (["", "train", "val"], ["images", "3", "2"], ["boxes", "3", "2"],
                ["height: min / median / max", "48 / 48 / 48", "48 / 48 / 48"],
                ["width: min / median / max", "12 / 20 / 50", "6 / 23 / 40"],
                ["area to 32 x 32 / to 96 x 96 / above", "67% / 33% / 0%", "50% / 50% / 0%"],
                ["dog", "2", "1"], ["cat", "1", "1"]):
        assert row in rows, f"{row} is missing in\n{text}"


def test_many_classes_still_fit_on_the_screen(folder, capsys):
    for split in ("train", "val"):
        change(folder, lambda c: c.update(
            categories=[{"id": k, "name": f"class {k}"} for k in range(80)],
            annotations=[{"image_id": 1, "category_id": k, "bbox": [1, 1, 9, 9 + k / 10]}
                         for k in range(80) for _ in range(1 + (k == 70))]), split)
    _, text = check(capsys, folder)
    assert "  class 70 " in text and "and 65 more classes" in text and len(text.splitlines()) < 45


def photo_to_turn(folder):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / "train/2.png").save(folder / "train/2.png", exif=exif)


def cut_off(folder):
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(noise).save(folder / "train/2.png")
    (folder / "train/2.png").write_bytes((folder / "train/2.png").read_bytes()[:-2000])


def unlist(folder):
    change(folder, lambda contents: contents["annotations"].pop(1) and None)


def double(folder):
    change(folder, lambda contents: contents["annotations"].append(contents["annotations"][1] | {"id": 4}))


HERE = "1 (first: 2.png, image id 2, annotation id 2"
PROBLEMS = {  # what happens to the training set: how, and the line that should be printed
    "image missing": (
        lambda f: (f / "train/2.png").unlink(),
        "error: image files that do not exist: 1 (first: {train}/2.png, image id 2)"),
    "image cut off": (
        cut_off,
        "error: image files that cannot be used: 1 (first: {train}/2.png (image id 2): "),
    "no image": (
        lambda f: (f / "train/2.png").write_text("hello"),
        "error: image files that cannot be used: 1 (first: {train}/2.png (image id 2): "),
    "no image and no size": (
        lambda f: (f / "train/2.png").write_text("hello") and change(f, edit("images", 1, width=...)),
        "error: image files that cannot be used: 1 (first: {train}/2.png (image id 2): "),
    "another size": (
        lambda f: write_image(f / "train/2.png", width=100),
        "error: image files that are of another size: 1 (first: {train}/2.png (image id 2): the file has "
        "100 x 48 pixels, its annotations say 64 x 48"),
    "an impossible size": (
        lambda f: change(f, edit("images", 1, width=-64)),
        "error: images whose width and height are not whole numbers above 0 (may be left out): 1 "
        "(first: {train}/2.png, image id 2: [-64, 48])"),
    "turned by EXIF": (
        photo_to_turn,
        "note: photos to be turned (EXIF), used as they were annotated: 1 (first: {train}/2.png)"),
    "the same in val": (
        lambda f: (f / "val/2.png").write_bytes((f / "train/2.png").read_bytes()),
        "note: images that are in train already, so val is too easy: 1 "
        "(first: {val}/2.png is {train}/2.png)"),
    "listed twice": (
        lambda f: change(f, edit("images", 1, file_name="1.png")),
        "note: images that are in train already, kept: 1 (first: {train}/1.png)"),
    "image id twice": (
        lambda f: change(f, edit("images", 1, id=1)),
        "error: image ids that occur twice: 1 (first: image id 1)"),
    "id that is text": (
        lambda f: change(f, edit("annotations", 1, id="2")),
        "error: annotation ids that are not whole: 1 (first: annotation number 2: '2')"),
    "unknown image": (
        lambda f: change(f, edit("annotations", 1, image_id=9)),
        "error: annotations whose image_id is not among the images: 1 (first: annotation id 2: 9)"),
    "unknown class": (
        lambda f: change(f, edit("annotations", 1, category_id=9)),
        f"error: annotations whose category_id is not among the categories: {HERE}: 9)"),
    "no box": (
        lambda f: change(f, edit("annotations", 1, bbox=[1, 2])),
        f"error: annotations whose bbox is not four numbers: {HERE}: [1, 2])"),
    "no boxes at all": (
        lambda f: change(f, lambda contents: contents.update(annotations=[])),
        "error: not a single usable box to train on in 3 images"),
    "not JSON": (
        lambda f: (f / "annotations/instances_train.json").write_text("{"),
        "error: cannot be read as JSON: "),
    "no height": (
        lambda f: change(f, edit("annotations", 1, bbox=[3, 3, 9, 0])),
        f"note: boxes that are not finite or have no width or height, dropped: {HERE})"),
    "outside": (
        lambda f: change(f, edit("annotations", 1, bbox=[300, 3, 9, 9])),
        f"note: boxes outside their image, dropped: {HERE})"),
    "over the edge": (
        lambda f: change(f, edit("annotations", 1, bbox=[60, 3, 9, 9])),
        f"note: boxes reaching over the image edge, clipped: {HERE})"),
    "box twice": (
        double,
        "note: boxes given more than once, with the same class, kept: 1 "
        "(first: 2.png, image id 2, annotation id 4)"),
    "crowd": (
        lambda f: change(f, edit("annotations", 1, iscrowd=1)),
        f"note: crowd regions (VOC: difficult), neither trained on nor evaluated: {HERE})"),
    "empty image": (
        unlist,
        "note: images without boxes, kept: 1 (first: 2.png, image id 2)"),
    "class without boxes": (
        lambda f: change(f, lambda contents: contents["categories"].append({"id": 9, "name": "cow"})),
        "note: no box of class cow"),
}


@pytest.mark.parametrize("what", PROBLEMS)
def test_every_kind_of_problem_is_counted_with_its_first_place(folder, capsys, what):
    spoil, line = PROBLEMS[what]
    spoil(folder)
    line = "  " + line.format(train=folder / "train", val=folder / "val")
    status, text = check(capsys, folder)
    assert any(printed.startswith(line) for printed in text.splitlines()), f"{line!r} is missing in\n{text}"
    assert status == refused(folder) == line.startswith("  error"), "1 exactly if training would stop"


def test_problems_of_all_kinds_are_listed_together_while_loading_names_the_first(folder, capsys):
    (folder / "train/1.png").unlink()
    (folder / "train/2.png").write_text("hello")
    change(folder, edit("annotations", 2, category_id=5))
    (folder / "annotations/instances_val.json").write_text("[]")
    status, text = check(capsys, folder)
    assert status == 1 and text.splitlines()[-1].startswith("train.py will not train on this")
    for words in ("do not exist: 1", "cannot be used: 1", "categories: 1", "is a list"):
        assert words in text
    with pytest.raises(DataError) as error:
        data.load(folder)
    assert_one_line(error.value, "instances_train.json", "1.png", "python -m support.check_data lists more errors")


def test_a_name_with_line_breaks_and_without_end_still_gives_one_line(folder):
    change(folder, edit("images", 1, file_name="2\n.png" * 1000))
    with pytest.raises(DataError) as error:
        data.load(folder)
    assert_one_line(error.value, "do not exist: 1")
    assert len(str(error.value)) < 1000


def test_counts_go_beyond_the_first(folder, capsys):
    change(folder, lambda contents: contents.update(
        annotations=[a | {"bbox": [0, 0, 0, 0]} for a in contents["annotations"]] * 2), "val")
    _, text = check(capsys, folder)
    assert "no width or height, dropped: 4 (first: 1.png, image id 1, annotation id 1)" in text
    assert "annotation ids that occur twice: 2 (first: annotation id 1)" in text
    assert "images without boxes, kept: 2 (first: 1.png, image id 1)" in text


def test_four_paths_and_wrong_arguments(folder, capsys):
    paths = [f"--{split}-{what}={path}" for split in ("train", "val") for what, path in (
        ("json", folder / f"annotations/instances_{split}.json"), ("images", folder / split))]
    assert check(capsys, *paths)[0] == 0
    assert check(capsys, *paths[:3])[0] == 1, "the fourth path is missing"
    for flags in ([folder / "nowhere"], [folder, *paths]):
        with pytest.raises(DataError):
            check(capsys, *flags)
    with pytest.raises(SystemExit) as usage:
        check(capsys)
    assert usage.value.code == 2 and "usage:" in capsys.readouterr().err


def run_command(monkeypatch, *flags):
    """support/check_data.py as a program; returns what it exits with: a status, or the text of an error."""
    monkeypatch.setattr(sys, "argv", ["check_data", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(check_data.__file__, run_name="__main__")
    return end.value.code


def test_exit_status_and_ctrl_c(folder, monkeypatch):
    assert run_command(monkeypatch, folder) == 0
    assert "nowhere: no such folder" in run_command(monkeypatch, folder / "nowhere")
    monkeypatch.setattr(Image, "open", lambda path: exec("raise KeyboardInterrupt"))
    assert "Interrupted" in run_command(monkeypatch, folder)


# ---- VOC -------------------------------------------------------------------------------------------------
def voc_box(x0, y0, x1, y1):
    return f"<bndbox><xmax>{x1}</xmax><xmin>{x0}</xmin><ymin>{y0}</ymin><ymax>{y1}</ymax></bndbox>"


def voc_text(objects, width=64, height=48):
    """One VOC file; objects: (class, xmin, ymin, xmax, ymax), perhaps "difficult". Each also has a part."""
    part = f"<part><name>head</name>{voc_box(1, 1, 3, 3)}</part>"
    items = [f"<object><name>{name}</name><difficult>{len(rest)}</difficult>{voc_box(*box)}{part}</object>"
             for name, *box, rest in ((*thing[:5], thing[5:]) for thing in objects)]
    size = f"<size><width>{width}</width><height>{height}</height><depth>3</depth></size>"
    return f"<annotation><filename>whatever.jpg</filename>{size}{''.join(items)}</annotation>"


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
        (xml_folder / f"{stem}.xml").write_text(voc_text(objects))


@pytest.fixture(params=["as published", "trainval and test", "as Roboflow exports it"])
def voc(request, tmp_path):
    """(folder, folder of the training images' XML files)"""
    if request.param == "as Roboflow exports it":
        write_voc(tmp_path / "train", tmp_path / "train", VOC_TRAIN)
        write_voc(tmp_path / "valid", tmp_path / "valid", VOC_VAL)
        return tmp_path, tmp_path / "train"
    names = ("train", "val") if request.param == "as published" else ("trainval", "test")
    (tmp_path / "ImageSets/Main").mkdir(parents=True)
    for name, contents in zip(names, (VOC_TRAIN, VOC_VAL)):
        write_voc(tmp_path / "Annotations", tmp_path / "JPEGImages", contents)
        (tmp_path / f"ImageSets/Main/{name}.txt").write_text("\n".join(contents) + "\n")
    return tmp_path, tmp_path / "Annotations"


def test_voc_folders_are_read_like_coco(voc, capsys):
    folder, _ = voc
    sets = data.load(folder, size=64, augment="none")
    assert sets["train"].class_names == ["cat", "dog"] and sets["train"].category_ids == [1, 2]
    found = {Path(p.path).stem: p for p in sets["train"].images}
    assert sorted(found) == sorted(VOC_TRAIN)
    assert found["b"].boxes_xyxy.tolist() == [[10, 8, 30, 24]], "VOC's first pixel is 1, its last is included"
    assert found["a.x"].boxes_xyxy.tolist() == [[0, 0, 64, 48], [2, 2, 9, 9]], "1..64 is all; no parts"
    assert found["a.x"].labels.tolist() == [0, 1] and found["a.x"].crowd.tolist() == [False, True]
    assert found["c"].boxes_xyxy.shape == (0, 4)
    assert sets["train"].num_boxes == 2, "difficult ones do not count"
    image, target = sets["train"][[p.path for p in sets["train"].images].index(found["b"].path)]
    assert target["boxes"][0].tolist() == pytest.approx([20 / 64, 16 / 48, 20 / 64, 16 / 48])
    assert image[:, 8:24, 10:30].min() > 1 > image[:, :8].max(), "the box is around the white pixels"
    assert sets["val"].class_names == ["cat", "dog"], "val has no dogs"
    assert sets["val"].images[0].boxes_xyxy.tolist() == [[4, 5, 14, 25]]
    status, text = check(capsys, folder)
    assert status == 0 and "crowd regions (VOC: difficult)" in text and "a.x.xml, object 2)" in text


def test_voc_classes_are_numbered_in_the_order_of_their_names(voc):
    folder, xmls = voc
    names = ("zebra", "Ant", "bee", "owl", "eel")
    (xmls / "c.xml").write_text(voc_text([(name, 1, 1, 9, 9) for name in names]))
    assert data.load(folder)["train"].class_names == ["Ant", "bee", "cat", "dog", "eel", "owl", "zebra"]


def test_voc_val_alone_has_the_classes_of_the_training_set(voc):
    assert data.load(voc[0], splits=("val",))["val"].class_names == ["cat", "dog"], "val holds cats only"


def test_voc_image_size_and_name_may_be_missing(voc):
    folder, xmls = voc
    (xmls / "b.xml").write_text(
        f"<annotation><object><name> dog </name>{voc_box('11.0', 9, 30, 24.5)}</object></annotation>")
    picture = next(p for p in data.load(folder)["train"].images if p.path.endswith("b.png"))
    assert (picture.height, picture.width, picture.boxes_xyxy.tolist()) == (48, 64, [[10, 8, 30, 24.5]])


@pytest.mark.parametrize("text, words", [
    (voc_text([("dog", 1, 2, 3, 4)])[:-20], ["XML files that cannot be read: 1", "line 1"]),
    ("", ["XML files that cannot be read: 1"]),
    ("<svg/>", ["XML files without VOC annotations: 1", "<svg>"]),
    (voc_text([("dog", 1, 2, 30, 40), ("dog", 1, 2, "x", 4)]), ["not four numbers: 1", "object 2", "'x'"]),
    (voc_text([("dog", 1, 2, 30, 40)]).replace("<bndbox>", "<bndbox/><bndbox>"), ["not four numbers: 1"]),
    (voc_text([("", 1, 2, 30, 40)]), ["category_id", "object 1"]),
    (voc_text([], width=64.5), ["width and height", "[64.5, 48]"]),
    (voc_text([]), None),
])
def test_a_broken_voc_file_is_named_with_the_object(voc, capsys, text, words):
    folder, xmls = voc
    (xmls / "b.xml").write_text(text)
    status, printed = check(capsys, folder)
    assert status == refused(folder) == (words is not None)
    if words:
        with pytest.raises(DataError) as error:
            data.load(folder)
        assert_one_line(error.value, "b.", *words)
        assert all(word in printed for word in words)


def test_a_voc_class_that_only_val_has_is_refused(voc, capsys):
    folder, xmls = voc
    place = folder / "valid/d.xml" if xmls.name == "train" else xmls / "d.xml"
    place.write_text(voc_text([("ant", 1, 2, 30, 40)]))
    with pytest.raises(DataError, match="id 3 is 'ant', in train it does not exist"):
        data.load(folder)


def test_voc_files_that_do_not_exist_are_named(voc):
    folder, xmls = voc
    next(folder.glob("*/b.png")).unlink()
    with pytest.raises(DataError, match="do not exist: 1 .*whatever.jpg"):
        data.load(folder)
    if xmls.name == "Annotations":
        (xmls / "b.xml").unlink()
        with pytest.raises(DataError, match="cannot be read: 1 .*b.xml"):
            data.load(folder)


# ---- Damaged files ---------------------------------------------------------------------------------------
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


def assert_sound(folder, capsys):
    """What `load` accepts must be sane, DataError is the only other answer, and the check says the same.

    Returns the training pictures, None if refused.
    """
    start, sets, problem = time.process_time(), None, None
    try:
        sets = data.load(folder, size=32, augment="none")
        targets = [sets["train"][i][1] for i in range(len(sets["train"]))]
    except DataError as error:
        problem = str(error)
        assert str(folder) in problem and "train" in problem.replace(str(folder), ""), f"where? {problem}"
        assert len(problem.splitlines()) == 1 and len(problem) < 2000, f"one line, please: {problem}"
    status, text = check(capsys, folder)
    assert status == (problem is not None), f"load said {problem}, but python -m support.check_data\n{text}"
    assert time.process_time() - start < 5, "it took far too long"
    if problem:
        return None
    for picture, target in zip(sets["train"].images, targets, strict=True):
        boxes_xyxy, size = picture.boxes_xyxy, [picture.width, picture.height] * 2
        assert np.isfinite(boxes_xyxy).all() and (boxes_xyxy >= 0).all() and (boxes_xyxy <= size).all()
        assert (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all() and (picture.areas > 0).all()
        assert set(picture.labels.tolist()) <= set(range(len(sets["train"].class_names)))
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all()
    return sets["train"].images


def clip(x0, y0, x1, y1, width, height):
    """The part of a box inside the image as [x0, y0, x1, y1]; None if nothing is left."""
    if not all(abs(v) < 1e9 for v in (x0, y0, x1, y1)) or min(x1 - x0, y1 - y0) < 0.1:
        return None
    box = [min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)]
    return box if min(box[2] - box[0], box[3] - box[1]) >= 0.1 else None


def assert_boxes(pictures, expected, why):
    """expected: {image id: [(label, box or None)]}, in any order."""
    for picture in pictures:
        found = sorted([label, *box] for label, box in zip(picture.labels, picture.boxes_xyxy.tolist()))
        wanted = sorted([label, *box] for label, box in expected[picture.id] if box)
        assert np.shape(found) == np.shape(wanted), f"{why}: {found}, not {wanted}"
        assert np.allclose(found, wanted, atol=1e-3), f"{why}: {found}, not {wanted}"


STRANGE = [
    None, True, 0, -1, 3, 7, 1.5, 1e308, 10 ** 400, 2 ** 53, float("nan"), float("inf"),
    "", "7", "a\nb", "\ud800", "\0", "x" * 5000,
    [], {}, [[[]]], {"id": 1}, [[[]] * 9] * 9, [1, 2, 3], [None] * 4, [True] * 4,
    [0, 0, 1e-30, 5], [5, 5, float("nan"), 5], [-1e8, -1e8, 3e8, 3e8], [63.95, 0, 30, 30], [-5, -5, 30, 1e6],
]


def all_places(value):
    """Every (container, key) in a JSON value."""
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        yield value, key
        if isinstance(child, (dict, list)):
            yield from all_places(child)


def mutate_json(contents, rng):
    """Deletes, replaces, exchanges or doubles something in one to three places."""
    for _ in range(rng.randint(1, 3)):
        (container, key), (other, other_key) = rng.choices(list(all_places(contents)), k=2)
        kind = rng.choice(["delete", "replace", "replace", "exchange", "double"])
        if kind == "delete":
            del container[key]
        elif kind == "replace":
            container[key] = copy.deepcopy(rng.choice(STRANGE))
        elif kind == "exchange":
            container[key], other[other_key] = copy.deepcopy([other[other_key], container[key]])
        elif isinstance(container, list):
            container.append(copy.deepcopy(container[key]))
    return json.dumps(contents).encode()


def test_damaged_coco_files_are_named_or_read_rightly(folder, capsys):
    path = folder / "annotations/instances_train.json"
    good, accepted = path.read_bytes(), 0
    for seed in range(300):
        rng = random.Random(seed)
        path.write_bytes(mutate_json(json.loads(good), rng) if seed % 3 else mutate_bytes(good, rng))
        pictures = assert_sound(folder, capsys)
        if pictures is None:
            continue
        accepted += 1
        contents = json.loads(path.read_bytes())
        labels = {i: k for k, i in enumerate(sorted(c["id"] for c in contents["categories"]))}
        expected = {picture.id: [] for picture in pictures}
        for a in contents["annotations"]:
            x, y, w, h = a["bbox"]
            expected[a["image_id"]].append((labels[a["category_id"]], clip(x, y, x + w, y + h, 64, 48)))
        assert_boxes(pictures, expected, f"seed {seed}")
    assert 30 < accepted < 270, f"{accepted} of 300 were accepted: the damage is too heavy or too mild"


STRANGE_TEXT = ["", "x", "-5", "0", "7", "1e308", "nan", "-inf", "9" * 500, "12.5", " 12 ", "1_0", "&lt;",
                "&no;", "<b/>", "\u0663", "cat", "64", "<object/>", "<bndbox/>"]


def mutate_xml(text, rng):
    """Replaces, deletes, doubles or exchanges elements in one to three places."""
    for _ in range(rng.randint(1, 3)):
        elements = re.finditer(r"<(\w+)>[^<>]*</\1>|<object>.*?</object>", text)
        (a, b), (c, d) = sorted(rng.choices([element.span() for element in elements] or [(0, 5)], k=2))
        kind = rng.randrange(5)
        if kind == 0:
            text = text[:a] + text[b:]
        elif kind == 1:
            text = text[:b] + text[a:]
        elif kind == 2 and b <= c:
            text = text[:a] + text[c:d] + text[b:c] + text[a:b] + text[d:]
        else:
            strange = rng.choice(STRANGE_TEXT)
            text = text[:a] + re.sub(r">[^<>]*<", lambda _: f">{strange}<", text[a:b], count=1) + text[b:]
    return text.encode()


def test_damaged_voc_files_are_named_or_read_rightly(tmp_path, capsys):
    write_voc(tmp_path / "train", tmp_path / "train", VOC_TRAIN)
    write_voc(tmp_path / "val", tmp_path / "val", VOC_VAL)
    path, accepted = tmp_path / "train/a.x.xml", 0
    good = path.read_text()
    for seed in range(200):
        rng = random.Random(seed)
        path.write_bytes(mutate_xml(good, rng) if seed % 3 else mutate_bytes(good.encode(), rng))
        pictures = assert_sound(tmp_path, capsys)
        if pictures is None:
            continue
        accepted += 1
        objects = ElementTree.parse(path).findall("object")
        classes = sorted({*(o.find("name").text.strip() for o in objects), "dog"})  # b.xml has a dog
        expected = {1: []}
        for o in objects:
            box = o.find("bndbox")
            x0, y0, x1, y1 = (float(box.find(key).text) for key in ("xmin", "ymin", "xmax", "ymax"))
            label = classes.index(o.find("name").text.strip())
            expected[1].append((label, clip(x0 - 1, y0 - 1, x1, y1, 64, 48)))
        assert_boxes(pictures[:1], expected, f"seed {seed}")
    assert 20 < accepted < 180, f"{accepted} of 200 were accepted: the damage is too heavy or too mild"


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_damaged_images_are_named_or_still_rgb(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    picture = AnnotatedImage(5, str(path), 18, 24, *[np.zeros(0)] * 4)
    noise = np.random.default_rng(0).integers(0, 256, (18, 24, 3), np.uint8)
    Image.fromarray(noise).save(path)
    good = path.read_bytes()
    others = [b"", b"\0" * 100, b"hello", b"<svg/>", b"%PDF-1.4", b"P6 24 18 255 ", good[:20],
              b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 24 18\n", b"BM" + b"\xff" * 60,
              b"II*\0\x08\0\0\0\xff\xff", b"RIFF\0\0\0\0WEBPVP8 "]
    refused = 0
    for seed in range(60):
        path.write_bytes(others[seed] if seed < len(others) else mutate_bytes(good, random.Random(seed)))
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                image = load_image(picture)
                assert (image.mode, image.size) == ("RGB", (24, 18))
            except DataError as error:
                assert_one_line(error, str(path), "image id 5")
                refused += 1
        assert time.process_time() - start < 5, "it took far too long"
    assert refused >= len(others)
