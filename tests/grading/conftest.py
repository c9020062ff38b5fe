"""Fixtures of the grading tests; what they need is imported late, so that grading one file starts at once."""
from functools import lru_cache

import pytest


@pytest.fixture(scope="session")
def small_models():
    """The cache of models with small backbones, so that ours are built once."""
    from tests.grading import pairs

    return lru_cache(maxsize=64)(pairs.build_both)


@pytest.fixture
def small_backbone(monkeypatch, small_models):
    import torch
    import torchvision

    from tests.grading import marks, pairs
    from tests.grading.small import SmallResNet

    small = lambda name, weights, norm_layer: SmallResNet(norm_layer)  # noqa: E731
    monkeypatch.setattr(torchvision.models, "get_model", small)
    for module in (marks, pairs):
        monkeypatch.setattr(module, "built", small_models)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # for tensors this small a second thread is a hindrance
    yield
    torch.set_num_threads(threads)
