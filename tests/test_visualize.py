"""visualize.py as somebody types it, mistakes included."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import visualize
from support import UserError, data
from support.checkpoints import FORMAT
from support.options import make_parser
from support.shapes import SHAPE_NAMES
from tests.tiny_models import TINY, tiny

ROOT = Path(__file__).parents[1]
ARGS = {**vars(make_parser("").parse_args([])), "preset": "laptop", "size": 64, "seed": 0}
FIXED = '''
import torch
RECIPE = dict(class_loss="focal", w_class=2, w_l1=5, w_giou=2)

class Fixed(torch.nn.Module):
    """The same three answers for every image: two of class 1, one with a low score, and one of class 0."""
    recipe = RECIPE

    def __init__(self):
        super().__init__()
        self.zero = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images, mask):
        logits = self.zero + torch.tensor([[-9.0, 2.0], [-9.0, -4.0], [0.0, -9.0]])
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5]])
        return {"logits": logits.expand(1, len(images), 3, 2), "boxes": boxes.expand(1, len(images), 3, 4)}

def build(num_classes, **options):
    return Fixed()
'''
ZERO = {"zero": torch.zeros(())}


def save(path, model, state, options=None, names=("cat", "dog"), **args):
    """A checkpoint as train.py writes it."""
    torch.save({"format": FORMAT, "model": state, "args": {**ARGS, "model": str(model), **args},
                "model_options": options or {}, "class_names": list(names),
                "category_ids": list(range(len(names))), "step": 1200, "metrics": {"AP": 0.25}}, path)
    return str(path)


@pytest.fixture
def fixed(tmp_path, monkeypatch):
    """Flags for the model above, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("fixed.py").write_text(FIXED)
    return ["--weights", save("best.pt", tmp_path / "fixed.py", ZERO), "--model", "fixed.py"]


# ---- Pictures ----------------------------------------------------------------------------------------------
def test_predictions_on_an_image_and_a_folder_are_in_pixels_of_the_original(fixed, capsys):
    Path("folder").mkdir()
    Image.new("RGB", (200, 100)).save("one.jpg")
    Image.new("RGB", (50, 80)).save("folder/two.PNG")
    Path("folder/notes.txt").write_text("no image")
    visualize.main([*fixed, "one.jpg", "folder", "--json", "all.json", "--out", "a/b", "--attention"])
    high = pytest.approx(0.8808)
    assert json.loads(Path("all.json").read_text()) == [
        {"file": "one.jpg", "label": "dog", "score": high, "box_xyxy": [80, 30, 120, 70]},
        {"file": "one.jpg", "label": "cat", "score": 0.5, "box_xyxy": [0, 0, 100, 50]},
        {"file": "folder/two.PNG", "label": "dog", "score": high, "box_xyxy": [20, 24, 30, 56]},
        {"file": "folder/two.PNG", "label": "cat", "score": 0.5, "box_xyxy": [0, 0, 25, 40]}]
    assert sorted(p.name for p in Path("a/b").iterdir()) == ["one-predictions.png", "two-predictions.png"]
    assert capsys.readouterr().out.count("Only predictions can be drawn") == 1
    visualize.main([*fixed, "one.jpg", "--json", "few.json", "--threshold", "0.6"])
    assert [p["label"] for p in json.loads(Path("few.json").read_text())] == ["dog"]
    assert Path("pictures/one-predictions.png").exists()


def test_images_of_the_same_name_do_not_overwrite_each_other():
    assert visualize.picture_names(["a/x.png", "b/y.png"]) == ["x", "y"]
    same = ["a/x.png", "b/X.png", f"{'y' * 99}.png"]
    assert visualize.picture_names(same) == ["0-x", "1-X", f"2-{'y' * 60}"]


def test_a_method_gets_its_pictures_from_a_checkpoint_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save("best.pt", "detr", tiny("detr").state_dict(), TINY, SHAPE_NAMES[:3])
    visualize.main(["--weights", path, "--attention", "--count", "1", "--threshold", "0.9"])
    for kind in "predictions", "attention":
        assert min(Image.open(f"pictures/shapes-0-{kind}.png").size) > 200


def test_the_heads_of_two_runs_are_drawn_for_the_same_object(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in "detr", "conditional_detr", "deformable_detr":
        Path(name).mkdir()
        save(f"{name}/last.pt", name, tiny(name).state_dict(), TINY, SHAPE_NAMES[:3])
    visualize.main(["--weights", "detr/last.pt", "--beside", "conditional_detr/last.pt", "--count", "1"])
    width, height = Image.open("pictures/shapes-0-heads.png").size
    assert width > height > 300  # two rows
    with pytest.raises(UserError, match="deformable_detr, 1,200 steps, AP 0.250: its heads sample"):
        visualize.main(["--weights", "detr", "--beside", "deformable_detr", "--count", "1"])


def test_held_out_images_of_a_folder_and_own_files_are_prepared_alike(tmp_path):
    (tmp_path / "val").mkdir()
    Image.effect_noise((90, 60), 50).convert("RGB").save(tmp_path / "val/x.png")
    content = {"images": [{"id": 7, "file_name": "x.png"}], "categories": [{"id": 1, "name": "cat"}],
               "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40]}]}
    (tmp_path / "annotations").mkdir()
    for split in "train", "val":
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    for preset in "laptop", "paper":
        for folder in None, str(tmp_path):
            args = {**ARGS, "data": str(tmp_path), "preset": preset, "size": 240}
            (image, target), = visualize.held_out(args, folder, 4)
            own, _ = data.from_images([tmp_path / "val/x.png"], preset, 240)[0]
            assert own.equal(image) and len(target["labels"]) == 1
            assert image.shape[1:] == {"laptop": (160, 240), "paper": (240, 360)}[preset]


def test_any_name_and_the_backend_of_a_notebook_end_in_pictures(tmp_path):
    names = ["$x{$", "\ud800 \u732b"]
    (tmp_path / "fixed.py").write_text(FIXED)
    path = save(tmp_path / "best.pt", tmp_path / "fixed.py", ZERO, names=names)
    Image.new("RGB", (90, 60)).save(tmp_path / "\u732b $x{$.png")
    command = [sys.executable, "-W", "error", ROOT / "visualize.py", "--weights", path, "--model", "fixed.py"]
    command += ["\u732b $x{$.png", "--json", "x.json"]
    done = subprocess.run(command, capture_output=True, cwd=tmp_path, timeout=300, env={
        **os.environ, "PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://matplotlib_inline.backend_inline"})
    assert done.returncode == 0 and not done.stderr, done.stderr
    assert b"\\u732b $x{$.png: 2 with a score over 0.3" in done.stdout
    assert {entry["label"] for entry in json.loads((tmp_path / "x.json").read_text())} == set(names)
    assert (tmp_path / "pictures/\u732b $x{$-predictions.png").exists()


# ---- Mistakes ----------------------------------------------------------------------------------------------
def check_refused(message, *flags):
    with pytest.raises((SystemExit, UserError, OSError)) as error:
        visualize.main(list(flags))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_missing_or_cannot_be_read_are_named(fixed):
    Path("bad.jpg").write_text("no image")
    check_refused("nothing.pt: no such checkpoint", "--weights", "nothing.pt")
    check_refused("nothing.jpg: no such image", *fixed, "nothing.jpg")
    check_refused("bad.jpg", *fixed, "bad.jpg")
    check_refused("unknown.py: no such .py file", *fixed, "--model", "unknown.py")
    check_refused("no such folder", *fixed, "--data", "gone")


@pytest.mark.parametrize("flags, message", [
    ([], "--weights --init"),
    (["--init", "x.pth"], "--init needs --model"),
    (["--weights", "x", "--count", "0"], "--count 0: it must be at least 1"),
    (["--weights", "x", "--threshold", "nan"], "--threshold nan: it must be"),
    (["--weights", "x", "--data", "d", "photo.jpg"], "only one of them"),
    (["--weights", "x", "--json", "photo.jpg"], "--json photo.jpg: its name must end in .json"),
])
def test_flags_that_make_no_sense_are_refused_before_any_file_is_read(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        visualize.main(flags)
    assert error.value.code == 2 and message in capsys.readouterr().err.splitlines()[-1]


def test_a_path_that_cannot_be_written_is_refused_before_anything_is_computed(fixed, monkeypatch):
    Image.new("RGB", (40, 40)).save("x.png")
    Path("file").write_text("")
    monkeypatch.setattr(visualize, "make_scene", None)  # would be called after these
    check_refused("file", *fixed, "x.png", "--out", "file")
    check_refused("nowhere/x.json", *fixed, "x.png", "--json", "nowhere/x.json")
