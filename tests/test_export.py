"""The recipe of docs/export.md exports a model, and the other side finds the same with its files."""
import re
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from support.predict import Detector
from tests.folders import write_noise
from tests.test_docs import TEXT
from tests.tiny_models import shake, tiny

RECIPE, CHECK, OTHER_SIDE, PLAIN = re.findall(r"```python\n(.*?)```", TEXT["export.md"], re.S)
MISSING = [name for name in ("onnx", "onnxscript", "onnxruntime") if not find_spec(name)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The folder of the recipe, a Detector and its variables; with ONNX only if the packages are there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("export"))
        model = shake(tiny("detr", dec_layers=1, last_stage=3)).eval()
        detector = Detector(model, ["cat", "dog", "cow"], {"preset": "laptop", "size": 112})
        recipe = RECIPE.replace('load("runs/deformable_detr-shapes")', "detector")
        scope = {"detector": detector}
        exec(recipe[:recipe.index("names = dict(")] if MISSING else recipe, scope)
        yield SimpleNamespace(folder=Path.cwd(), scope=scope, detector=detector)


@pytest.mark.skipif(bool(MISSING), reason=f"optional and not there: pip install {' '.join(MISSING)}")
def test_onnx_gives_the_same_numbers(exported):
    printed = []
    exec(CHECK, {**exported.scope, "print": lambda *values: printed.append(values)})
    assert len(printed) == 3 and all(0 <= error < 1e-4 for _, *both in printed for error in both)


@pytest.mark.filterwarnings("ignore:No complete tensor found")
def test_torch_reads_the_export_and_takes_any_number_of_images_of_any_size(exported):
    module = torch.export.load("model.pt2").module()
    for b, h, w in [(2, 96, 96), (3, 70, 211)]:
        images, mask = torch.randn(b, 3, h, w), torch.zeros(b, h, w, dtype=torch.bool)
        mask[-1, h // 2:] = True
        with torch.no_grad():
            scores, boxes = module(images, mask)
            out = exported.detector.model(images, mask)
        centre, size = out["boxes"][-1].split(2, dim=-1)
        expected = torch.cat([centre - size / 2, centre + size / 2], dim=-1)
        torch.testing.assert_close(scores, out["logits"][-1].softmax(-1)[..., :3], rtol=0, atol=1e-5)
        torch.testing.assert_close(boxes, expected, rtol=0, atol=1e-5)


class FromTorch:
    """Stands in for onnxruntime.InferenceSession where that is missing: the other export, run by torch."""

    def __init__(self, program):
        self.program = program

    def run(self, names, inputs):
        with torch.no_grad():
            out = self.program.module()(*(torch.from_numpy(inputs[name]) for name in ("images", "mask")))
        return [value.numpy() for value in out]


def test_the_other_side_finds_what_predict_finds(exported, monkeypatch):
    """Only from model.json; noise is the hardest picture to make smaller in the same way."""
    if MISSING:
        stand_in = SimpleNamespace(InferenceSession=lambda file: FromTorch(exported.scope["program"]))
        monkeypatch.setitem(sys.modules, "onnxruntime", stand_in)
    write_noise(exported.folder / "photo.jpg", 90, 60)
    expected, printed = exported.detector.predict("photo.jpg", 0), []
    exec(OTHER_SIDE.replace("> 0.3", "> 0"), {"print": lambda *values: printed.append(values)})
    names, scores, boxes = map(list, zip(*sorted(printed, key=lambda one: -one[1])))
    assert names == expected.names and len(names) == 5
    np.testing.assert_allclose(scores, expected.scores, rtol=0, atol=2e-3)
    np.testing.assert_allclose(boxes, expected.boxes, rtol=0, atol=2e-3 * 90)


def test_plain_attention_is_attention(monkeypatch):
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", fused)  # and back at the end
    exec(PLAIN, {})
    plain, (q, k, v) = torch.nn.functional.scaled_dot_product_attention, torch.randn(3, 2, 4, 7, 8)
    assert plain is not fused
    for mask in (None, torch.rand(2, 1, 1, 7) > 0.3, torch.randn(2, 4, 7, 7)):
        torch.testing.assert_close(plain(q, k, v, mask), fused(q, k, v, attn_mask=mask))
