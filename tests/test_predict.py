"""Predictions from Python: the same as those of visualize.py, whatever a photo comes as."""
import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import visualize
from support import UserError
from support.look import look
from support.predict import Detector, load, official_names, to_photo, trained_size
from tests.folders import write_noise
from tests.golden import Case, assert_close, options_of
from tests.test_visualize import save
from tests.tiny_models import TINY, shake, shaken, tiny

SIZES = [(90, 60), (60, 90), (90, 60), (80, 80), (90, 60)]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of five photos of three sizes; the working folder is the one above."""
    monkeypatch.chdir(tmp_path)
    for i, (width, height) in enumerate(SIZES):
        write_noise(tmp_path / f"photos/{i}.png", width, height, seed=i)
    return tmp_path / "photos"


@pytest.fixture(scope="module")
def detector():
    return Detector(shaken("detr").eval(), ["cat", "dog", "cow"], {"preset": "laptop", "size": 64})


def assert_same(one, other):
    assert one.names == other.names and len(one) == len(one.boxes) == len(one.scores) > 0
    assert one.size == other.size
    torch.testing.assert_close(one.boxes, other.boxes, rtol=0, atol=2e-4)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=1e-5)


# ---- The same as visualize.py ------------------------------------------------------------------------------
@pytest.mark.parametrize("name, threshold", [("detr", 0.25), ("deformable_detr", 0.01)])
def test_a_run_predicts_what_visualize_says(name, threshold, photos):
    Path("run").mkdir()
    for i in (3, 4):
        (photos / f"{i}.png").unlink()
    save("run/last.pt", name, shake(tiny(name)).state_dict(), TINY, ["cat", "dog", "cow"], size=128)
    flags = ["--weights", "run", str(photos), "--threshold", str(threshold), "--json", "all.json"]
    visualize.main(flags)
    expected = json.loads(Path("all.json").read_text())
    got = [{"file": found.file, "label": label, "score": round(score, 4), "box_xyxy": box}
           for found in load("run").predict(photos, threshold) for label, score, box in found]
    assert len(got) == len(expected) > 5 and len({one["score"] for one in got}) > 3
    for one, other in zip(got, expected):
        assert one.pop("box_xyxy") == pytest.approx(other.pop("box_xyxy"), abs=0.0052)
        assert one.pop("score") == pytest.approx(other.pop("score"), abs=2e-4) and one == other


def test_images_of_one_size_share_a_batch_and_come_back_in_order(photos, detector):
    seen = []
    hook = detector.model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    try:
        several = detector.predict(photos, 0, batch_size=2)
        assert [tuple(images.shape) for images, _ in seen] == [
            (2, 3, 42, 64), (1, 3, 42, 64), (1, 3, 64, 42), (1, 3, 64, 64)]
        assert not any(mask.any() for _, mask in seen), "padding changes numbers"
        again = detector.predict([str(file) for file in sorted(photos.iterdir())], 0)
        assert len(seen) == 4 + 3
    finally:
        hook.remove()
    assert [found.size for found in several] == [(height, width) for width, height in SIZES]
    for file, one, other in zip(sorted(photos.iterdir()), several, again):
        assert one.file == other.file == str(file)
        assert_same(one, detector.predict(file, 0))
        assert_same(one, other)


# ---- What a photo may come as ------------------------------------------------------------------------------
def test_paths_images_arrays_and_tensors_give_the_same(photos, detector):
    expected = detector.predict(photos / "0.png", 0)
    image = Image.open(photos / "0.png")
    array = np.asarray(image)
    tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
    for what in (image, array, array / 255, tensor, tensor / 255, (tensor / 255).requires_grad_()):
        assert_same(detector.predict(what, 0), expected)
        one, two = detector.predict([what, str(photos / "1.png")], 0)
        assert_same(one, expected)
        assert two.size == (90, 60)
    for what in (array[None], torch.stack([tensor, tensor])):
        assert_same(detector.predict(what, 0)[-1], expected)
    assert detector.predict([]) == []
    with pytest.raises(AssertionError):
        assert_same(detector.predict(array[:, :, ::-1], 0), expected)


def test_grey_and_transparent_arrays_are_taken_as_such_files_are():
    grey = np.arange(20, dtype=np.uint8).reshape(4, 5)
    assert to_photo(grey, "").mode == to_photo(grey[:, :, None], "").mode == "L"
    assert to_photo(np.zeros((4, 5, 4), np.uint8), "").mode == "RGBA"
    assert to_photo(torch.zeros(3, 4, 5, dtype=torch.bfloat16), "").size == (5, 4)


def test_a_turned_photo_has_the_boxes_of_what_a_viewer_shows(photos, detector):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(photos / "0.png")
    image.save(photos / "turned.png", exif=exif)
    turned = detector.predict(photos / "turned.png", 0)
    assert turned.size == (90, 60)
    assert_same(detector.predict(Image.open(photos / "turned.png"), 0), turned)
    assert_same(detector.predict(image.transpose(Image.Transpose.ROTATE_270), 0), turned)


# ---- Models ------------------------------------------------------------------------------------------------
def test_images_have_the_size_that_the_model_was_trained_with():
    def size(**changes):
        return trained_size(
            {"data": None, "train_json": None, "size": None, "preset": "paper", **changes})

    assert size() == size(data="shapes") == 96
    assert size(data="x") == size(train_json="x") == 800
    assert size(data="x", preset="laptop") == 256
    assert size(size=224) == 224


def test_official_weights_give_the_official_boxes(tmp_path):
    case, path = Case("deformable_detr"), str(tmp_path / "official.pth")
    torch.save({"model": case.state_dict(), "args": argparse.Namespace(lr=1)}, path)
    options = options_of(case.json["case"]["args"], {})
    detector = load(path, "deformable_detr", **options)
    assert detector.class_names == [f"class {i}" for i in range(case.json["case"]["num_classes"])]
    assert_close("boxes", look(detector.model, *case.batch())[0]["boxes"], case.arrays["boxes"], "boxes")
    flags = ["--init", path, "--model", "deformable_detr", "photo.jpg", "--option=enc_layers=9"]
    with pytest.raises(SystemExit, match="needs an --option: .*Missing key"):
        visualize.main(flags)


def test_the_class_head_tells_how_many_classes_official_weights_have():
    def names(rows, head="class_embed.weight", **recipe):
        state = {head: torch.zeros(rows, 4)}
        return official_names({"model": state}, {"class_loss": "focal", **recipe})

    assert names(3) == names(4, class_loss="softmax") == names(4, extra_logit=True) == [
        "class 0", "class 1", "class 2"]
    coco = names(92, class_loss="softmax")
    assert coco == names(91, "class_embed.0.weight") and coco[1] == "person" and coco[90] == "toothbrush"


# ---- Mistakes ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("what, message", [
    ("gone.jpg", "gone.jpg: no such image or folder"),
    ("x" * 5000, "no such image or folder"),
    ("text.jpg", "text.jpg (image id 0): not an image, or damaged"),
    ("empty", "empty: no images in this folder"),
    (["photos/0.png", "gone.jpg"], "gone.jpg: no such image"),
    ([7], "image 0: a int is no path"),
    (None, "image 0: a NoneType is no path"),
    (np.zeros((3, 40, 60), np.uint8), "shape [3, 40, 60]; a numpy array is [H, W, 3]"),
    (torch.zeros(40, 60, 3), "shape [40, 60, 3]; a tensor is [3, H, W]"),
    (np.zeros((0, 5, 3), np.uint8), "shape [0, 5, 3]"),
    (np.zeros((4, 5, 3), np.uint16), "uint16; give uint8"),
    (torch.zeros(3, 4, 5, dtype=torch.int64), "torch.int64; give uint8"),
    (np.full((4, 5, 3), 128.0), "floats from 128 to 128; give uint8"),
    (torch.full((3, 4, 5), -1.0), "floats from -1 to -1; give uint8"),
    (np.full((4, 5, 3), np.nan), "floats from nan to nan"),
    (np.zeros((2, 500, 3), np.uint8), "image 0 (image id 0): 500 x 2 pixels are too thin"),
])
def test_what_is_no_photo_is_refused_in_a_line(what, message, photos, detector):
    Path("empty").mkdir()
    Path("text.jpg").write_text("no image")
    with pytest.raises(UserError) as error:
        detector.predict(what)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("flags", [dict(threshold=1), dict(threshold=float("nan")), dict(batch_size=0)])
def test_numbers_out_of_range_are_refused(flags, detector):
    with pytest.raises(UserError, match="it must be at least"):
        detector.predict([], **flags)


@pytest.mark.parametrize("source, how, message", [
    ("gone", {}, "gone: no such checkpoint"),
    ("x" * 5000, {}, "File name too long"),
    ("text.jpg", {}, "text.jpg: not a readable checkpoint"),
    ("photos", {}, "last.pt: no such checkpoint"),
    ("official.pth", {}, 'official weights; of which model? Say so: model="detr"'),
    ("official.pth", {"model": "detr"}, "not official weights"),
    ("ours.pt", {"model": "conditional_detr"}, "its weights are not those of this model"),
    ("ours.pt", {"model": "gone.py"}, "gone.py: no such file"),
    ("ours.pt", {"colour": 1}, "detr has no such option"),
])
def test_what_cannot_be_loaded_is_an_exception_of_one_line(source, how, message, photos):
    Path("text.jpg").write_text("no image")
    torch.save({"model": {}}, "official.pth")
    save("ours.pt", "detr", {}, TINY)
    with pytest.raises(UserError) as error:
        load(source, **how)
    assert message in str(error.value) and str(error.value).isprintable()


def test_a_model_that_has_diverged_says_so(photos):
    model = shaken("detr").eval()
    model.class_head.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="0.png: what the model predicts is not finite"):
        Detector(model, ["cat"], {"preset": "laptop", "size": 64}).predict(photos)
