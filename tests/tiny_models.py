"""Models small enough for a test, a batch of two images, and their objects."""
import copy
import importlib
from pathlib import Path
from unittest import mock

import torch
import torchvision

ROOT = Path(__file__).parents[1]
TINY = dict(backbone="resnet18", pretrained_backbone=False, hidden_dim=32, nheads=4, enc_layers=1,
            dec_layers=2, dim_feedforward=32, dropout=0.0, num_queries=5)
OWN = {"hdetr": dict(num_one2many=6, k_one2many=2), "dn_detr": dict(dn_groups=3), "dino": dict(dn_number=6),
       "adamixer": dict(enc_layers=0, in_points=4, out_points=6)}
OWN["sqr_adamixer"] = OWN["adamixer"]
TARGETS = [{"labels": torch.tensor([0, 2]),
            "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.4]])},
           {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]
get_model, MADE = torchvision.models.get_model, {}


def module_named(name):
    """The model file of that name, at the top or in relatives/."""
    return importlib.import_module(name if (ROOT / f"{name}.py").exists() else f"relatives.{name}")


def get_model_again(name, weights, norm_layer, replace_stride_with_dilation):
    """torchvision's get_model, which draws 11 million numbers for ResNet-18; a copy if it did so before."""
    how = dict(norm_layer=norm_layer, replace_stride_with_dilation=replace_stride_with_dilation)
    if weights or torch.get_default_device().type != "cpu":
        return get_model(name, weights=weights, **how)
    key = name, norm_layer, tuple(replace_stride_with_dilation), torch.get_rng_state().numpy().tobytes()
    if key not in MADE:
        MADE[key] = get_model(name, weights=None, **how), torch.get_rng_state()
    model, state = MADE[key]
    torch.set_rng_state(state)
    return copy.deepcopy(model)


def tiny(name, **options):
    """A new model of three classes, always with the same weights; `name` is that of a file, or its module."""
    torch.manual_seed(0)
    module = module_named(name) if isinstance(name, str) else name
    with mock.patch.object(torchvision.models, "get_model", get_model_again):
        return module.build(3, **{**TINY, **OWN.get(name, {}), **options})


def batch():
    """Two images of 64 x 96 and 96 x 64 pixels, padded to 96 x 96."""
    torch.manual_seed(1)
    images, mask = torch.zeros(2, 3, 96, 96), torch.ones(2, 96, 96, dtype=torch.bool)
    for b, (h, w) in enumerate([(64, 96), (96, 64)]):
        images[b, :, :h, :w] = torch.randn(3, h, w)
        mask[b, :h, :w] = False
    return images, mask


class Patches(torch.nn.Module):
    """Stands in for a backbone: cells see only their own pixels, and nothing leaks over the image's edge."""

    def __init__(self, backbone):
        super().__init__()
        self.channels = backbone.channels
        self.strides = getattr(backbone, "strides", [8, 16, 32])  # AdaMixer has stride 4, too
        self.convs = torch.nn.ModuleList(
            torch.nn.Conv2d(3, c, s, s, bias=False) for c, s in zip(self.channels, self.strides))
        self.requires_grad_(False)  # some models take the last map only

    def forward(self, images):
        return [conv(images) for conv in self.convs]


def shake(model):
    """Move every parameter a little at random and return the model; a new one predicts one box everywhere."""
    torch.manual_seed(2)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return model


def quick(name, **options):
    """A new model without a real backbone."""
    model = tiny(name, **options)
    model.backbone = Patches(model.backbone)
    return model


def shaken(name, **options):
    """A quick model whose predictions depend on the image, on the query and on the stage."""
    return shake(quick(name, **options))
