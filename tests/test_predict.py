"""Predictions from Python: the same as those of visualize.py, from a path, an image, an array or a tensor."""
import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import visualize
from support import UserError
from support.predict import Detector, load, look, official_names, to_photo
from tests.folders import write_noise
from tests.golden import Case, assert_close, options_of
from tests.test_visualize import FIXED, save
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
def test_a_run_predicts_the_same_as_visualize(photos):
    Path("run").mkdir()
    for i in (3, 4):
        (photos / f"{i}.png").unlink()
    model = shake(tiny("deformable_detr"))
    save("run/last.pt", "deformable_detr", model.state_dict(), TINY, ["cat", "dog", "cow"], size=128)
    visualize.main(["--weights", "run", str(photos), "--threshold", "0.01", "--json", "all.json"])
    expected = json.loads(Path("all.json").read_text())
    got = [(found.file, name, score, box) for found in load("run").predict(photos, 0.01)
           for name, score, box in found]
    assert [one[:2] for one in got] == [(one["file"], one["label"]) for one in expected] and len(got) > 5
    for (_, _, score, box), one in zip(got, expected):
        assert box == pytest.approx(one["box_xyxy"], abs=0.0052)
        assert score == pytest.approx(one["score"], abs=2e-4)


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


def test_an_image_may_have_more_than_100_objects(photos):
    model = shaken("conditional_detr", num_queries=150).eval()
    detector = Detector(model, ["cat", "dog", "cow"], {"preset": "laptop", "size": 64})
    assert len(detector.predict(photos / "0.png", 0)) == 150


# ---- Forms of a photo --------------------------------------------------------------------------------------
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
    assert to_photo(array[:, :, 0], "").mode == to_photo(array[:, :, :1], "").mode == "L"
    for what in (array[None], torch.stack([tensor, tensor])):
        assert_same(detector.predict(what, 0)[-1], expected)
    assert detector.predict([]) == []
    with pytest.raises(AssertionError):
        assert_same(detector.predict(array[:, :, ::-1], 0), expected)


def test_boxes_of_a_turned_photo_fit_the_photo_that_a_viewer_shows(photos, detector):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    image = Image.open(photos / "0.png")
    image.save(photos / "turned.png", exif=exif)
    turned = detector.predict(photos / "turned.png", 0)
    assert turned.size == (90, 60)
    assert_same(detector.predict(Image.open(photos / "turned.png"), 0), turned)
    assert_same(detector.predict(image.transpose(Image.Transpose.ROTATE_270), 0), turned)


# ---- Models ------------------------------------------------------------------------------------------------
def test_official_weights_give_the_official_boxes(tmp_path):
    case, path = Case("deformable_detr"), str(tmp_path / "official.pth")
    torch.save({"model": case.state_dict(), "args": argparse.Namespace(lr=1)}, path)
    options = options_of(case.json["case"]["args"], {})
    detector = load(path, "deformable_detr", **options)
    assert detector.class_names == [f"class {i}" for i in range(case.json["case"]["num_classes"])]
    assert_close("boxes", look(detector.model, *case.batch())[0]["boxes"], case.arrays["boxes"], "boxes")


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
    ("text.jpg", "text.jpg (image id 0): not an image, or damaged"),
    ("empty", "empty: no images in this folder"),
    (["photos/0.png", "gone.jpg"], "gone.jpg: no such image"),
    ([7], "image 0: a int is not a path"),
    (None, "image 0: a NoneType is not a path"),
    (np.zeros((3, 40, 60), np.uint8), "[3, 40, 60], uint8; give an array [H, W, 3]"),
    (torch.zeros(40, 60, 3), "[40, 60, 3], torch.float32; give an array [H, W, 3] or a tensor [3, H, W]"),
    (np.zeros((4, 5, 3), np.uint16), "uint16; give"),
    (np.full((4, 5, 3), 128.0), "float64; give"),
    (np.full((4, 5, 3), np.nan), "floats from 0 to 1"),
])
def test_an_object_that_is_no_photo_is_refused_in_one_line(what, message, photos, detector):
    Path("empty").mkdir()
    Path("text.jpg").write_text("no image")
    with pytest.raises(UserError) as error:
        detector.predict(what)
    assert message in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize("flags", [dict(threshold=1), dict(threshold=float("nan")), dict(threshold=50)])
def test_wrong_numbers_are_refused(flags, detector):
    with pytest.raises(UserError, match="it must be a"):
        detector.predict([], **flags)


@pytest.mark.parametrize("source, how, message", [
    ("gone", {}, "gone: no such checkpoint"),
    ("text.jpg", {}, "text.jpg: not a readable checkpoint"),
    ("photos", {}, "last.pt: no such checkpoint"),
    ("official.pth", {}, 'official weights need the name of a model, such as model="detr"'),
    ("official.pth", {"model": "detr"}, "not official weights"),
    ("foreign.pth", {"model": "detr", "backbone": "resnet18"}, "of another model, or needs an --option"),
    ("foreign.pth", {"model": "fixed.py"}, "has no load_official()"),
    ("ours.pt", {"model": "conditional_detr"}, "its weights are not those of this model"),
    ("ours.pt", {"model": "gone.py"}, "gone.py: no such .py file"),
    ("ours.pt", {"colour": 1}, "detr has no such option"),
    ("run.pt", {"device": "abacus"}, "no such device"),
])
def test_a_source_that_cannot_be_loaded_is_refused_in_one_line(source, how, message, photos):
    Path("text.jpg").write_text("no image")
    Path("fixed.py").write_text(FIXED)
    torch.save({"model": {}}, "official.pth")
    torch.save({"class_embed.weight": torch.zeros(4, 256)}, "foreign.pth")
    save("ours.pt", "detr", {}, TINY)
    save("run.pt", "detr", tiny("detr").state_dict(), TINY, ["cat", "dog", "cow"])
    with pytest.raises(UserError) as error:
        load(source, **how)
    assert message in str(error.value) and str(error.value).isprintable()


def test_a_model_that_has_diverged_says_so(photos):
    model = shaken("detr").eval()
    model.class_head.bias.data[0] = float("nan")
    with pytest.raises(UserError, match="0.png: the model predicts numbers that are not finite"):
        Detector(model, ["cat"], {"preset": "laptop", "size": 64}).predict(photos)
