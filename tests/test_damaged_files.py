"""Hundreds of damaged annotation and image files.

A data set may be wrong in any way: the answer is a line that names the file, never a traceback, and never
boxes that nobody drew.
"""
import copy
import json
import random
import re
import time
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from support import UserError, check_data, data
from support.images import AnnotatedImage, load_image
from tests.folders import (
    TRAIN,
    VOC_TRAIN,
    VOC_VAL,
    assert_one_line,
    coco_folder,
    mutate_bytes,
    write_voc,
    yolo_folder,
)


@pytest.fixture
def folder(tmp_path):
    return coco_folder(tmp_path, train=[*TRAIN[:2], [2, 2, 50, 40]])


def check(capsys, folder):
    """(exit status, what was printed) of python -m support.check_data."""
    return check_data.main([str(folder)]), capsys.readouterr().out


def assert_sound(folder, capsys):
    """What `load` accepts must be sane, UserError is the only other answer, and the check says the same.

    Returns the training images, None if refused.
    """
    start, sets, problem = time.process_time(), None, None
    try:
        sets = data.load(folder, size=32, augment="none")
        targets = [sets["train"][i][1] for i in range(len(sets["train"]))]
    except UserError as error:
        problem = str(error)
        place = re.search(r"train|data\.yaml", problem.replace(str(folder), ""))
        assert place and str(folder) in problem, f"where? {problem}"
        assert len(problem.splitlines()) == 1 and len(problem) < 2000, f"one line, please: {problem}"
    status, text = check(capsys, folder)
    assert status == (problem is not None), f"load said {problem}, but python -m support.check_data\n{text}"
    assert time.process_time() - start < 5, "it took far too long"
    if problem:
        return None
    for found, target in zip(sets["train"].images, targets, strict=True):
        boxes_xyxy, size = found.boxes_xyxy, [found.width, found.height] * 2
        assert np.isfinite(boxes_xyxy).all() and (boxes_xyxy >= 0).all() and (boxes_xyxy <= size).all()
        assert (boxes_xyxy[:, 2:] > boxes_xyxy[:, :2]).all() and (found.areas > 0).all()
        assert set(found.labels.tolist()) <= set(range(len(sets["train"].class_names)))
        assert ((target["boxes"] >= 0) & (target["boxes"] <= 1)).all()
    return sets["train"].images


def clip(x0, y0, x1, y1, width, height):
    """The part of a box inside the image as [x0, y0, x1, y1]; None if nothing is left."""
    if not all(abs(v) < 1e9 for v in (x0, y0, x1, y1)) or min(x1 - x0, y1 - y0) < 0.1:
        return None
    box = [min(max(x0, 0), width), min(max(y0, 0), height), min(max(x1, 0), width), min(max(y1, 0), height)]
    return box if min(box[2] - box[0], box[3] - box[1]) >= 0.1 else None


def assert_boxes(images, expected, why):
    """expected: {image id: [(label, box or None)]}, in any order."""
    for image in images:
        found = sorted([label, *box] for label, box in zip(image.labels, image.boxes_xyxy.tolist()))
        wanted = sorted([label, *box] for label, box in expected[image.id] if box)
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
        images = assert_sound(folder, capsys)
        if images is None:
            continue
        accepted += 1
        contents = json.loads(path.read_bytes())
        labels = {i: k for k, i in enumerate(sorted(c["id"] for c in contents["categories"]))}
        expected = {image.id: [] for image in images}
        for a in contents["annotations"]:
            x, y, w, h = a["bbox"]
            expected[a["image_id"]].append((labels[a["category_id"]], clip(x, y, x + w, y + h, 64, 48)))
        assert_boxes(images, expected, f"seed {seed}")
    assert 20 < accepted < 270, f"{accepted} of 300 were accepted: the damage is too heavy or too mild"


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
        images = assert_sound(tmp_path, capsys)
        if images is None:
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
        assert_boxes(images[:1], expected, f"seed {seed}")
    assert 20 < accepted < 180, f"{accepted} of 200 were accepted: the damage is too heavy or too mild"


def mutate_yolo(text, rng):
    """Deletes, replaces, exchanges or doubles one to three of the words, marks and line ends."""
    parts = re.findall(r"\w+|\s|[^\w\s]", text)
    for _ in range(rng.randint(1, 3)):
        a, b, kind = rng.randrange(len(parts)), rng.randrange(len(parts)), rng.randrange(4)
        if kind == 0:
            parts[a] = ""
        elif kind == 1:
            parts[a] = rng.choice([*"-:[}'\"#\n\t70/", "&x", "9" * 400, "nan", "\0"])
        elif kind == 2:
            parts[a], parts[b] = parts[b], parts[a]
        else:
            parts.insert(a, parts[b])
    return "".join(parts)


def test_damaged_yolo_files_are_named_or_read_rightly(tmp_path, capsys):
    yaml = "train: train.txt\nval: images/val\nnc: 2\nnames:\n  0: 'dog'\n  1: cat # x\n"
    yolo_folder(tmp_path, data_yaml=yaml)
    files = [tmp_path / name for name in ("data.yaml", "train.txt", "labels/train/1.txt")]
    files[1].write_text("images/train/1.png\nimages/train/2.png\n")
    good, outcomes = {file: file.read_text() for file in files}, set()
    for seed in range(60):
        rng = random.Random(seed)
        file = rng.choice(files)
        file.write_text(changed := mutate_yolo(good[file], rng))
        images = assert_sound(tmp_path, capsys)
        outcomes.add((file, images is None))
        if images and file.name == "1.txt" and len(changed.split("\n")[0].split()) == 5:
            label, *numbers = map(float, changed.split("\n")[0].split())
            cx, cy, w, h = (v * side for v, side in zip(numbers, (64, 48, 64, 48)))
            box = clip(cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2, 64, 48)
            first = images[0].boxes_xyxy[:1].tolist() if box else []
            assert np.allclose(first, [box] if box else [], atol=1e-3), f"seed {seed}: {changed!r}"
        file.write_text(good[file])
    assert len(outcomes) == 6, "some damage is harmless, some is not"


@pytest.mark.parametrize("ending", ["png", "jpg", "gif", "bmp", "tif", "webp"])
def test_damaged_images_are_named_or_still_rgb(tmp_path, ending):
    path = tmp_path / f"x.{ending}"
    annotated = AnnotatedImage(5, str(path), 18, 24, *[np.zeros(0)] * 4)
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
                image = load_image(annotated)
                assert (image.mode, image.size) == ("RGB", (24, 18))
            except UserError as error:
                assert_one_line(error, str(path), "image id 5")
                refused += 1
        assert time.process_time() - start < 5, "it took far too long"
    assert refused >= len(others)
