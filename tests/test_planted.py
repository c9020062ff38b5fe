"""The marks are tested: each planted mistake loses the mark it belongs to, and our files lose none."""
import importlib

import marks
import pytest
import torch
import torchvision
from grader import MARKS
from planted import MISTAKES, module_of
from torch import nn

CHEAP = {file: [m for m in names if m != "official"] for file, names in MARKS.items()}


class Block(nn.Module):
    def __init__(self, in_dim, out_dim, stride, norm_layer):
        super().__init__()
        self.conv1 = nn.Conv2d(in_dim, out_dim, 3, stride, 1, bias=False)
        self.bn1 = norm_layer(out_dim)

    def forward(self, x):
        return self.bn1(self.conv1(x)).relu()


class SmallResNet(nn.Module):
    """What our Backbone takes of a ResNet, with one convolution for each part: a tenth of the time."""

    def __init__(self, norm_layer):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), norm_layer(8)
        self.relu, self.maxpool, self.avgpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Identity()
        for i, (a, b) in enumerate([(8, 8), (8, 16), (16, 32), (32, 64)]):
            setattr(self, f"layer{i + 1}", nn.Sequential(Block(a, b, 1 + (i > 0), norm_layer)))
        self.fc = nn.Linear(64, 10)


@pytest.fixture
def small_backbone(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, norm_layer: SmallResNet(norm_layer))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread is a hindrance
    marks.built.cache_clear()
    yield
    marks.built.cache_clear()
    torch.set_num_threads(threads)


def lost(student, file, names):
    """{mark: sentence} of the marks that a module does not get."""
    ours, found = importlib.import_module(file), {}
    for name in names:
        try:
            getattr(marks, name)(student, ours, 0)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.file}: {m.what}")
def test_a_planted_mistake_loses_its_mark(mistake, small_backbone):
    assert lost(module_of(mistake), mistake.file, [mistake.mark]), f"{mistake.mark} is met, although {mistake.what}"


# Mistakes that lose nothing else, but for the marks where everything comes together
ALONE = [
    "attention does not use the padding mask",
    "scores are divided by the square root of the whole width, not of a head's",
    "positions encode x in the first half and y in the second",
    "boxes are corners, not centre and size",
    "lambda is added, not multiplied",
    "the reference point is detached",
    "values at padding are not set to zero",
    "sines of the points carry a gradient",
    "a stage is fed three stages before it, not two",
    "the class cost is a logarithm, as in the loss",
    "the weight 0.1 of \"no object\" is missing",
    "all stages use the last stage's matching",
]


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.what in ALONE], ids=lambda m: f"{m.file}: {m.what}")
def test_a_planted_mistake_loses_no_other_mark(mistake, small_backbone):
    found = lost(module_of(mistake), mistake.file, CHEAP[mistake.file])
    assert set(found) - {"everything", "criterion"} == {mistake.mark}, found


@pytest.mark.parametrize("file", MARKS)
def test_our_own_files_lose_no_mark(file, small_backbone):
    assert not lost(importlib.import_module(file), file, CHEAP[file])
