"""The command as somebody types it, mistakes included."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import visualize
from support import data
from support.checkpoints import FORMAT
from support.options import make_parser
from support.predict import trained_size
from support.shapes import SHAPE_NAMES
from tests.tiny_models import TINY, tiny

ROOT = Path(__file__).parents[1]
OPTIONS = {"detr": {}, "conditional_detr": {}, "deformable_detr": {}, "sam_detr": {"smca": True}, "sqr": {}}


# ---- Pictures ----------------------------------------------------------------------------------------------
FIXED = '''
import torch
RECIPE = dict(class_loss="focal", w_class=2, w_l1=5, w_giou=2)

class Fixed(torch.nn.Module):
    """The same three answers for every image: two of class 1, one of them hardly, and one of class 0."""
    recipe = RECIPE

    def forward(self, images, mask):
        logits = torch.tensor([[-9.0, 2.0], [-9.0, -4.0], [0.0, -9.0]]).expand(1, len(images), 3, 2)
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5]])
        return {"logits": logits, "boxes": boxes.expand(1, len(images), 3, 4)}

def build(num_classes, **options):
    return Fixed()
'''


def save(path, model, state, options=None, names=("cat", "dog"), **args):
    """A checkpoint as train.py writes it."""
    args = {**vars(make_parser("").parse_args([])), "model": str(model), **args}
    torch.save({"format": FORMAT, "model": state,
                "args": args, "model_options": options or {}, "class_names": list(names),
                "category_ids": list(range(len(names)))}, path)
    return str(path)


@pytest.fixture
def fixed(tmp_path, monkeypatch):
    """A checkpoint of the model above, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("fixed.py").write_text(FIXED)
    return save("best.pt", tmp_path / "fixed.py", {}, size=64)


def test_predictions_on_an_image_and_a_folder_arrive_in_pixels_of_the_original(fixed, capsys):
    Path("folder").mkdir()
    Image.new("RGB", (200, 100)).save("one.jpg")
    Image.new("RGB", (50, 80)).save("folder/two.PNG")
    Path("folder/notes.txt").write_text("no image")
    flags = ["--json", "all.json", "--out", "a/b", "--attention"]
    visualize.main(["--weights", fixed, "one.jpg", "folder", *flags])
    half, sure = 0.5, pytest.approx(0.8808)
    assert json.loads(Path("all.json").read_text()) == [
        {"file": "one.jpg", "label": "dog", "score": sure, "box_xyxy": [80, 30, 120, 70]},
        {"file": "one.jpg", "label": "cat", "score": half, "box_xyxy": [0, 0, 100, 50]},
        {"file": "folder/two.PNG", "label": "dog", "score": sure, "box_xyxy": [20, 24, 30, 56]},
        {"file": "folder/two.PNG", "label": "cat", "score": half, "box_xyxy": [0, 0, 25, 40]}]
    assert sorted(p.name for p in Path("a/b").iterdir()) == ["one-predictions.png", "two-predictions.png"]
    assert capsys.readouterr().out.count("Only predictions can be drawn") == 1
    visualize.main(["--weights", fixed, "one.jpg", "--json", "few.json", "--threshold", "0.6"])
    assert [p["label"] for p in json.loads(Path("few.json").read_text())] == ["dog"]
    assert Path("pictures/one-predictions.png").exists()


def test_images_of_the_same_name_do_not_overwrite_each_other(fixed):
    for folder in "ab":
        Path(folder).mkdir()
        Image.new("RGB", (40, 40)).save(f"{folder}/x.png")
    visualize.main(["--weights", fixed, "a", "b"])
    names = sorted(p.name for p in Path("pictures").iterdir())
    assert names == ["x-0-predictions.png", "x-1-predictions.png"]
    assert visualize.picture_names(["a/x.png", "b/X.png", "c/x-0.png", "y" * 300 + ".png"]) == [
        "x-0", "X-1", "x-0-", "y" * 60]


@pytest.mark.parametrize("name", OPTIONS)
def test_every_method_gets_its_pictures_from_a_checkpoint_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {**TINY, **OPTIONS[name]}
    path = save("best.pt", name, tiny(name, **OPTIONS[name]).state_dict(), options, SHAPE_NAMES[:3])
    visualize.main(["--weights", path, "--attention", "--count", "1", "--threshold", "0.9"])
    for kind in "predictions", "attention":
        assert min(Image.open(f"pictures/shapes-0-{kind}.png").size) > 200


def test_held_out_images_of_a_folder_and_own_files_are_prepared_alike(tmp_path):
    (tmp_path / "val").mkdir()
    Image.effect_noise((90, 60), 50).convert("RGB").save(tmp_path / "val/x.png")
    content = {"images": [{"id": 7, "file_name": "x.png"}], "categories": [{"id": 1, "name": "cat"}],
               "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40]}]}
    (tmp_path / "annotations").mkdir()
    for split in "train", "val":
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    for preset in "laptop", "paper":
        args = {"data": str(tmp_path), "preset": preset, "size": None, **dict.fromkeys(
            ("train_json", "train_images", "val_json", "val_images"))}
        (image, target), = visualize.held_out(args, None, 4)
        own, nothing = data.from_images([tmp_path / "val/x.png"], preset, trained_size(args))[0]
        assert own.equal(image) and nothing["size"] == target["size"] == (60, 90)
        assert len(target["labels"]) == 1
        assert image.shape[1:] == {"laptop": (170, 256), "paper": (800, 1200)}[preset]


# ---- Mistakes ----------------------------------------------------------------------------------------------
def one_line(*flags):
    """The message that main() ends with."""
    with pytest.raises(SystemExit) as error:
        visualize.main(list(flags))
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_what_is_not_there_or_cannot_be_read_is_named(fixed):
    Path("empty").mkdir()
    Path("bad.jpg").write_text("no image")
    assert "nothing.pt: no such checkpoint" in one_line("--weights", "nothing.pt")
    assert "xxx: File name too long" in one_line("--weights", "x" * 5000)
    assert "data: nothing.jpg: no such image" in one_line("--weights", fixed, "nothing.jpg")
    assert "data: bad.jpg" in one_line("--weights", fixed, "bad.jpg")
    assert "empty: no images in this folder" in one_line("--weights", fixed, "empty")
    assert "unknown.py: no such file" in one_line("--weights", fixed, "--model", "unknown.py")
    assert "no such folder" in one_line("--weights", save("gone.pt", Path("fixed.py"), {}, data="gone"))
    assert "no such folder" in one_line("--weights", fixed, "--data", "gone")


@pytest.mark.parametrize("flags, message", [
    ([], "--weights --init"),
    (["--init", "x.pth"], "--init needs --model"),
    (["--weights", ""], "--weights is empty"),
    (["--weights", "x", "--count", "0"], "--count 0: it must be at least 1"),
    (["--weights", "x", "--count", "many"], "invalid int value"),
    (["--weights", "x", "--threshold", "nan"], "--threshold nan: it must be"),
    (["--weights", "x", "--threshold", "-0.1"], "--threshold -0.1: it must be"),
    (["--weights", "x", "--threshold", "1"], "--threshold 1.0: it must be"),
    (["--weights", "x", "--data", "d", "photo.jpg"], "not both"),
    (["--weights", "x", "--json", "photo.jpg"], "--json photo.jpg: its name must end in .json"),
])
def test_flags_that_make_no_sense_are_refused_before_anything_is_read(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        visualize.main(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]
    assert "write NAME=VALUE" in one_line("--weights", "x", "--option", "smca")


@pytest.mark.parametrize("change, message", [
    (lambda content: 7, "not a checkpoint"),
    (lambda content: [content], "not a checkpoint"),
    (lambda content: {k: v for k, v in content.items() if k != "class_names"}, "class_names"),
    (lambda content: {**content, "class_names": [1, 2]}, "class_names"),
    (lambda content: {**content, "class_names": 2}, "class_names"),
    (lambda content: {**content, "model": 7}, "look at its model"),
    (lambda content: {**content, "model": {"weight": 7}}, "not those of this model"),
    (lambda content: {**content, "args": {"model": "detr"}}, "preset"),
    (lambda content: {**content, "model_options": []}, "model_options"),
    (lambda content: {**content, "args": {**content["args"], "model": None}}, "args['model']"),
    (lambda content: {**content, "args": {**content["args"], "size": -1}}, "args['size']"),
    (lambda content: {**content, "args": {**content["args"], "data": 7}}, "args['data']"),
], ids=["an int", "a list", "no names", "numbers for names", "a number for names", "no state", "no tensors",
        "half of args", "a list of options", "no name of a model", "no size", "a number for a folder"])
def test_a_checkpoint_that_lacks_something_is_refused(change, message, fixed):
    save("best.pt", "detr", {}, TINY)
    torch.save(change(torch.load("best.pt")), "broken.pt")
    assert message in one_line("--weights", "broken.pt")


def test_a_model_that_has_diverged_is_not_drawn(fixed):
    Path("fixed.py").write_text(FIXED.replace("[[0.5, 0.5, 0.2, 0.4]", "[[0.5, 0.5, float('nan'), 0.4]"))
    Image.new("RGB", (40, 40)).save("x.png")
    message = one_line("--weights", fixed, "x.png")
    assert message.startswith("data: x.png: what the model predicts is not finite")


def test_weights_of_another_model_are_refused(fixed):
    assert "not those of this model" in one_line("--weights", save("other.pt", "detr", {}, TINY))
    sam = save("sam.pt", "sam_detr", tiny("sam_detr").state_dict(), TINY)
    assert "not those of this model" in one_line("--weights", sam, "--model", "conditional_detr")


@pytest.mark.parametrize("content, message", [
    ({"model": {}}, "not official weights"),
    ({"model": 7}, "holds no weights by name"),
    ({"class_embed.weight": 7}, "not official weights"),
    ({"class_embed.weight": torch.zeros(4, 256)}, "of another model"),
    (7, "holds no weights by name"),
])
def test_weights_that_are_not_official_are_refused(content, message, fixed):
    torch.save(content, "other.pth")
    flags = ["--model", "detr", "--option=backbone=resnet18", "x.jpg"]
    assert message in one_line("--init", "other.pth", *flags)


def test_official_weights_need_a_model_that_can_read_them(fixed):
    torch.save({"class_embed.weight": torch.zeros(4, 256)}, "other.pth")
    assert "has no load_official()" in one_line("--init", "other.pth", "--model", "fixed.py", "x.jpg")
    Path("text.pth").write_text("no weights")
    assert "text.pth: not a readable checkpoint" in one_line("--init", "text.pth", "--model", "detr", "x.jpg")


def test_what_cannot_be_written_is_said_before_anything_is_computed(fixed, monkeypatch):
    Image.new("RGB", (40, 40)).save("x.png")
    Path("file").write_text("")
    Path("folder.json").mkdir()
    monkeypatch.setattr(visualize, "make_scene", None)  # would be called after these
    flags = ["--weights", fixed, "x.png"]
    assert one_line(*flags, "--out", "file").startswith("--out file: ")
    assert one_line(*flags, "--out", "file/below").startswith("--out file/below: ")
    assert one_line(*flags, "--out", "x" * 300).startswith("--out xxx")
    assert one_line(*flags, "--json", "folder.json").startswith("--json folder.json: ")
    assert one_line(*flags, "--json", "nowhere/x.json").startswith("--json nowhere/x.json: ")
    if os.geteuid():  # root may write everywhere
        Path("folder.json").chmod(0o500)
        assert one_line(*flags, "--out", "folder.json").startswith("--out folder.json: ")


def test_any_name_of_a_class_or_file_is_drawn_and_printed(tmp_path):
    names = ["$x{$", "\ud800 \u732b"]
    (tmp_path / "fixed.py").write_text(FIXED)
    path = save(tmp_path / "best.pt", tmp_path / "fixed.py", {}, names=names, size=64)
    Image.new("RGB", (90, 60)).save(tmp_path / "\u732b $x{$.png")
    command = [sys.executable, "-W", "error", ROOT / "visualize.py", "--weights", path]
    command += ["\u732b $x{$.png", "--json", "x.json"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300,
                          env={**os.environ, "PYTHONIOENCODING": "cp1252"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"\\u732b $x{$.png: 2 with a score over 0.3" in done.stdout
    assert {entry["label"] for entry in json.loads((tmp_path / "x.json").read_text())} == set(names)
    assert (tmp_path / "pictures/\u732b $x{$-predictions.png").exists()
