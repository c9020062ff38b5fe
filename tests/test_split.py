"""Images that lie together, and --split, which holds some of them out: always the same ones."""
import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import torch

import train
import visualize
from support import UserError, check_data, checkpoints, data, options, pictures
from tests.command import QUICK, check_refused
from tests.folders import (
    VOC_TRAIN,
    annotations_of,
    change,
    coco_folder,
    small_coco,
    write_image,
    write_label,
    write_voc,
    yolo_folder,
)

BOXES = [[10, 8, 20, 16], [30, 4, 12, 30], None, [5, 5, 40, 40], [1, 2, 6, 5]]


def names(dataset):
    return {Path(image.path).name for image in dataset.images}


def coco_together(folder, json_path, images, prefix=""):
    """All of BOXES in one COCO file, as tools export it."""
    contents = annotations_of(BOXES)
    for entry, box in zip(contents["images"], BOXES):
        write_image(folder / images / entry["file_name"], box=box)
        entry["file_name"] = prefix + entry["file_name"]
    (folder / json_path).parent.mkdir(parents=True, exist_ok=True)
    (folder / json_path).write_text(json.dumps(contents))


def yolo_together(folder, images, data_yaml):
    """The same as YOLO's."""
    for k, box in enumerate(BOXES, 1):
        write_image(folder / images / f"{k}.png", box=box)
        x, y, w, h = box or (0, 0, 0, 0)
        line = [(k + 1) % 2, (x + w / 2) / 64, (y + h / 2) / 48, w / 64, h / 48]
        write_label(folder / images.replace("images", "labels") / f"{k}.txt", *[line] * bool(box))
    (folder / "data.yaml").write_text(data_yaml)


TOGETHER = {
    "beside": lambda f: coco_together(f, "all.json", "."),
    "Label Studio": lambda f: coco_together(f, "result.json", "images", "images\\"),
    "CVAT": lambda f: coco_together(f, "annotations/instances_default.json", "images/default"),
    "Roboflow": lambda f: coco_together(f, "train/_annotations.coco.json", "train"),
    "YOLO": lambda f: yolo_together(f, "images", "names: [dog, cat]"),
    "YOLO, val is train": lambda f: yolo_together(
        f, "images", "train: images\nval: images\nnames: [dog, cat]"),
    "YOLO of Roboflow": lambda f: yolo_together(
        f, "train/images", "train: ../train/images\nval: ../valid/images\nnames: [dog, cat]"),
    "YOLO, labels beside": lambda f: yolo_together(f, ".", "names: [dog, cat]"),
}


@pytest.mark.parametrize("layout", TOGETHER)
def test_the_same_images_are_held_out_whatever_the_format(layout, tmp_path):
    TOGETHER["beside"](tmp_path / "a")
    TOGETHER[layout](tmp_path / "b")
    wanted, found = (data.load(tmp_path / name, split=0.4) for name in "ab")
    for split, count in (("train", 3), ("val", 2)):
        assert names(wanted[split]) == names(found[split]) and len(found[split]) == count
        assert found[split].num_boxes == wanted[split].num_boxes
    assert found["val"].held_out == wanted["val"].held_out and found["train"].held_out is None
    assert "2 of 5 images, held out of the training set by --split 0.4, seed 0" in found["val"].notes[0]


@pytest.mark.parametrize(
    "xml, images", [("Annotations", "JPEGImages"), ("Annotations", "images"), (".", ".")])
def test_voc_files_that_lie_together(xml, images, tmp_path):
    write_voc(tmp_path / xml, tmp_path / images, VOC_TRAIN)
    sets = data.load(tmp_path, split=0.3)
    assert (len(sets["train"]), len(sets["val"])) == (2, 1)
    assert sets["train"].class_names == sets["val"].class_names == ["cat", "dog"]


def test_a_split_is_a_function_of_names_and_seed_with_every_class_in_both_parts(tmp_path):
    folder = small_coco(tmp_path / "a", images=60, categories=[{"id": k, "name": f"c{k}"} for k in range(3)])
    (folder / "annotations/instances_val.json").unlink()
    rare = {5, 17, 29, 41, 53}  # five images with a box of class 2, ten with nothing, the others 1 or 0
    change(folder, lambda c: c.update(annotations=[
        {"image_id": k, "category_id": 2 if k in rare else k % 2, "bbox": [4, 4, 20, 20]}
        for k in range(60) if k in rare or k % 6]))
    sets = data.load(folder, split=0.2)
    assert len(names(sets["val"])) == 12 and not names(sets["val"]) & names(sets["train"])
    classes = [label for image in sets["val"].images for label in image.labels.tolist()]
    assert [classes.count(label) for label in range(3)] == [4, 5, 1], "a fifth of 20, 25 and 5 images"
    again = data.load(shutil.move(folder, tmp_path / "moved"), split=0.2, splits=("val",))["val"]
    assert names(again) == names(sets["val"]), "the place of a folder changes nothing"
    change(tmp_path / "moved", lambda c: c["images"].reverse())
    assert names(data.load(tmp_path / "moved", split=0.2)["val"]) == names(sets["val"]), "nor does the order"
    other = data.load(tmp_path / "moved", split=0.2, seed=1)["val"]
    assert names(other) != names(sets["val"]) and other.held_out != again.held_out == sets["val"].held_out


def test_what_cannot_be_split_gets_one_line(tmp_path):
    def message(*args, **kwargs):
        with pytest.raises(UserError) as error:
            data.load(*args, **kwargs)
        return str(error.value)

    own = coco_folder(tmp_path / "own")
    assert f"has a val of its own, {own / 'val'}: leave out --split" in message(own, split=0.2)
    (own / "annotations/instances_val.json").unlink()
    assert "hold some out with --split 0.2" in message(own)
    assert "of 3 images leaves none" in message(own, split=0.1)
    assert "a share between 0 and 1" in message(own, split=1.0)
    assert "have a val of their own" in message(split=0.2)
    coco_together(tmp_path / "two", "a.json", ".")
    assert "no train annotations" in message(tmp_path / "two")
    (tmp_path / "two/b.json").write_text("{}")
    assert "several *.json here" in message(tmp_path / "two", split=0.4)
    paths = dict(train_json=tmp_path / "two/a.json", train_images=tmp_path / "two")
    assert len(data.load(**paths, split=0.4)["val"]) == 2
    assert "leave out --val-json" in message(**paths, val_json="a.json", val_images="two", split=0.2)
    (tmp_path / "two/1.png").unlink()
    assert "1.png" in (text := message(**paths, split=0.4)) and text.endswith("the same paths --split 0.4")


def test_check_data_splits_too(tmp_path, capsys):
    TOGETHER["YOLO"](tmp_path)
    assert check_data.main([str(tmp_path), "--split", "0.4"]) == 0
    text = capsys.readouterr().out
    assert ["images", "3", "2"] in [line.split() for line in text.splitlines()]
    assert f"val: {tmp_path}/data.yaml\n  note: 2 of 5 images, held out" in text
    (tmp_path / "labels/1.txt").write_text("0 1 2")
    assert check_data.main([str(tmp_path), "--split", "0.4"]) == 1


# ---- A run -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder "set", and "run" of one step on it. Tests copy both."""
    folder = tmp_path_factory.mktemp("finished")
    TOGETHER["YOLO"](folder / "set")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "draw_predictions", lambda *_: None)
        patch.setattr(pictures, "draw_curves", lambda *_: None)
        patch.chdir(folder)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            train.main(["--data", "set", "--split", "0.4", "--seed", "3", "--no-flip", "--steps", "1", *QUICK,
                        "--batch-size", "2", "--out", "run"])
    assert "2 of 5 images, held out of the training set by --split 0.4, seed 3" in said.getvalue()
    return folder


@pytest.fixture
def together(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_keeps_its_split_when_it_goes_on_and_when_it_is_evaluated(together):
    wanted = data.load("set", split=0.4, seed=3)["val"]
    content = torch.load("run/last.pt", weights_only=True)
    assert content["num_images"] == 3 and content["held_out"] == wanted.held_out
    assert json.loads(Path("run/args.json").read_text())["train"]["split"] == 0.4
    shutil.copytree("set", "copy")
    for flags in (["--resume", "run"], ["--resume", "run", "--data", "copy"], ["--eval", "--weights", "run"],
                  ["--eval", "--weights", "run", "--data", "copy", "--split", "0.4"]):
        request = options.parse("", flags)
        sets = options.load_datasets(request.args, ("train", "val"))
        assert names(sets["val"]) == names(wanted), flags
        checkpoints.check_data(request.checkpoint, sets)
        assert "Flip" not in repr(sets["train"].transform), flags
    trained = checkpoints.load_checkpoint("run")["args"]
    assert names(visualize.held_out(trained, None, 9)) <= names(wanted), "pictures show held-out images"
    (together / "set/images/0.png").write_bytes((together / "set/images/1.png").read_bytes())
    with pytest.raises(SystemExit, match="selects other images"):
        train.main(["--eval", "--weights", "run", "--workers", "0"])


def test_another_split_or_seed_is_refused_and_other_images_all_count(together, capsys):
    for flags in (["--seed", "4"], ["--split", "0.3"]):
        with pytest.raises(SystemExit):
            options.parse("", ["--eval", "--weights", "run", *flags])
        assert "the run was trained on what --split 0.4 --seed 3 left" in capsys.readouterr().err
    check_refused(["--eval", "--weights", "run", "--no-flip"], "--no-flip: that is decided", capsys)
    check_refused(["--split", "0.2"], "have a val of their own", capsys)
    check_refused(["--split", "1"], "--split 1.0: it must be a number between 0 and 1", capsys)
    yolo_folder(together / "other")
    args = options.parse("", ["--eval", "--weights", "run", "--data", "other"]).args
    assert len(options.load_datasets(args, ("val",))["val"]) == 2 and args.split is None


@pytest.mark.parametrize("preset", ["laptop", "paper"])
def test_without_flips_no_image_is_mirrored(preset, tmp_path):
    coco_folder(tmp_path, train=[[4, 4, 12, 40]])
    args = options.parse("", ["--data", str(tmp_path), "--preset", preset, "--size", "64", "--no-flip"]).args
    for dataset, expected in ((options.load_datasets(args, ("train",))["train"], {True}),
                              (data.load(tmp_path, augment=preset, size=64)["train"], {True, False})):
        boxes = torch.cat([dataset[epoch, 0][1]["boxes"] for epoch in range(40)])
        whole = boxes[(boxes[:, 2] - 12 / 64).abs() < 0.01]  # the image was not cut
        assert set((whole[:, 0] < 0.3).tolist()) == expected
