"""Fixtures of the grading tests; what they need is imported late, so that grading one file starts at once."""
import pytest


@pytest.fixture
def small_backbone(monkeypatch):
    import torch
    import torchvision

    from tests.grading import pairs
    from tests.grading.small import SmallResNet

    monkeypatch.setattr(torchvision.models, "get_model", lambda name, weights, norm_layer: SmallResNet(norm_layer))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread is a hindrance
    pairs.built.cache_clear()
    yield
    pairs.built.cache_clear()
    torch.set_num_threads(threads)
