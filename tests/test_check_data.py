"""python -m support.check_data DIR: what it says about good and bad folders."""
import io
import runpy
import sys

import pytest
from PIL import Image

from support import UserError, check_data, data
from support.readers import SHARES
from tests.folders import TRAIN, assert_one_line, change, coco_folder, edit, write_image, write_noise


@pytest.fixture
def folder(tmp_path):
    """Three images and two, a box in each, nothing wrong."""
    return coco_folder(tmp_path, train=[*TRAIN[:2], [2, 2, 50, 40]])


def check(capsys, *flags):
    """(exit status, what was printed) of python -m support.check_data, flags: a folder or paths."""
    status = check_data.main([str(flag) for flag in flags])
    return status, capsys.readouterr().out


def refused(folder):
    """Whether training would stop: `load` or one of the images raises UserError."""
    try:
        for dataset in data.load(folder, size=32).values():
            [dataset[i] for i in range(len(dataset))]
    except UserError:
        return True
    return False


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


def photo_to_turn(folder, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(folder / "train/2.png").save(folder / "train/2.png", exif=exif)


def cut_off(folder):
    write_noise(folder / "train/2.png")
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
    "EXIF that does not exist": (
        lambda f: photo_to_turn(f, 9),
        "note: photos with an EXIF orientation that does not exist, used as they are: 1 "
        "(first: {train}/2.png: 9)"),
    "several frames": (
        lambda f: Image.new("L", (64, 48)).save(
            f / "train/2.png", format="GIF", save_all=True, append_images=[Image.new("L", (64, 48), 99)]),
        "note: images of several frames or pages, the first is used: 1 (first: {train}/2.png)"),
    "not listed": (
        lambda f: write_image(f / "train/sub.JPG"),
        "note: image files that no annotations name, not used: 1 (first: {train}/sub.JPG)"),
    "shares": (
        lambda f: change(f, edit("annotations", 1, bbox=[0.1, 0.2, 0.3, 0.4])),
        f"error: {SHARES}: {HERE}: [0.1, 0.2, 0.3, 0.4])"),
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
    assert status == 1 and text.splitlines()[-1].startswith("train.py will not use this")
    for words in ("do not exist: 1", "cannot be used: 1", "categories: 1", "should be an object"):
        assert words in text
    with pytest.raises(UserError) as error:
        data.load(folder)
    assert_one_line(error.value, "instances_train.json", "1.png", f"python -m support.check_data {folder}")


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
    status, text = check(capsys, *paths[2:])
    assert status == 0 and "train" not in text.splitlines()[0]
    assert text.endswith("This can be evaluated on.\n")
    assert check(capsys, "shapes") == (0, "shapes is the embedded data set: there is nothing to check.\n")
    for flags in ([folder / "nowhere"], [folder, *paths]):
        with pytest.raises(UserError):
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

    def press_ctrl_c(path):  # with exec() in its place, Python itself would end with the status of Ctrl-C
        raise KeyboardInterrupt

    monkeypatch.setattr(Image, "open", press_ctrl_c)
    assert "Interrupted" in run_command(monkeypatch, folder)


def test_names_that_the_terminal_cannot_show_are_printed_in_another_way(folder, monkeypatch):
    for split in ("train", "val"):
        change(folder, lambda c: c["categories"][0].update(name="\u540d\u524d \U0001f408 \ud800"), split)
    change(folder, edit("images", 1, file_name="\u540d\n\ud800.png"))
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", terminal)
    assert check_data.main([str(folder)]) == 1
    terminal.flush()
    text = terminal.buffer.getvalue().decode("cp1252")
    assert r"\u540d\u524d \U0001f408 \ud800" in text and r"do not exist: 1 (first: " in text


def test_one_file_in_both_splits_is_said_once(folder, capsys):
    (folder / "val/2.png").unlink()
    (folder / "val/2.png").symlink_to(folder / "train/2.png")
    _, text = check(capsys, folder)
    assert "images that are in train already, so val is too easy: 1 (first: " in text


def test_a_file_that_links_to_itself_is_no_traceback(folder, capsys):
    (folder / "train/2.png").unlink()
    (folder / "train/2.png").symlink_to(folder / "train/2.png")
    status, text = check(capsys, folder)
    assert status == 1 and "do not exist: 1" in text
