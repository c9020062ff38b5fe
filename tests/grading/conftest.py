"""Fixtures of the grading tests."""
import pytest
import torch
import torchvision

from tests.grading import marks
from tests.grading.small import SmallResNet


@pytest.fixture
def small_backbone(monkeypatch):
    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, norm_layer: SmallResNet(norm_layer))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread is a hindrance
    marks.built.cache_clear()
    yield
    marks.built.cache_clear()
    torch.set_num_threads(threads)
