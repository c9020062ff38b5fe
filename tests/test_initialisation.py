"""Training starts where the official code starts: mean, spread and family of every initial parameter."""
import json
import math
import re

import pytest
import torch

from golden import FOLDER
from tiny_models import module_named

CASES = {label: case for file in ("initialisation", "initialisation_dn_dino")
         for label, case in json.loads((FOLDER / f"{file}.json").read_text()).items()}
FILES = {"detr": "detr", "conditional": "conditional_detr", "deformable": "deformable_detr",
         "sam": "sam_detr", "group": "group_detr", "dab": "dab_detr", "smca": "smca_detr", "hdetr": "hdetr",
         "dn": "dn_detr", "dino": "dino"}
# SAM-DETR's points start at the centre of their box, a departure that the file states
MEANT = re.compile(r"^transformer\.decoder\.layers\.\d+\.point2\.6\.(weight|bias)$")


class NoBackbone(torch.nn.Module):
    """Channels of ResNet-50; the official backbones start from ImageNet, so they are not compared."""

    def __init__(self, *_):
        super().__init__()
        self.channels = [512, 1024, 2048]


def faults(ours, official):
    """The differences in words; ours [...] against the official row."""
    ours = ours.detach().double().flatten()
    n, mean, std = ours.numel(), ours.mean().item(), ours.std(unbiased=False).item()
    if official["constant"]:
        norm, wanted = ours.norm().item(), official["l2"]
        return [] if abs(norm - wanted) <= 1e-4 * max(norm, 1) else [f"norm {norm:.4g}, not {wanted:.4g}"]
    found = []
    if abs(std / official["std"] - 1) > 0.02 + 5 / math.sqrt(n):
        found.append(f"spread {std:.4g}, not {official['std']:.4g}")
    if abs(mean - official["mean"]) > 8 * official["std"] / math.sqrt(n):
        found.append(f"mean {mean:.4g}, not {official['mean']:.4g}")
    wanted = max(abs(official["min"]), official["max"]) / official["std"]
    largest = ours.abs().max().item() / (std or 1)
    if n > 400 and (largest < 2.2) != (wanted < 2.2):  # uniform or normal
        found.append(f"the largest is {largest:.3g} times the spread, not {wanted:.3g}")
    return found


def check(case, model, rename_official):
    """Each parameter of the model against the row of its official name."""
    ours, wrong = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, row in case["parameters"].items():
        (our_name,) = rename_official({name: None})
        assert our_name in ours, f"{name}: there is no parameter {our_name}"
        if not MEANT.match(name) and (found := faults(ours[our_name], row)):
            wrong[f"{name} ({our_name})"] = found
    assert not wrong, "; ".join(f"{name}: {', '.join(found)}" for name, found in wrong.items())


@pytest.mark.parametrize("label", CASES)
def test_every_parameter_starts_as_in_the_official_code(label, monkeypatch):
    case, options = CASES[label], dict(CASES[label]["our_options"])
    multiscale = options.pop("multiscale", False)
    module = module_named("sam_detr_multiscale" if multiscale else FILES[case["repo"]])
    monkeypatch.setattr(module_named(FILES[case["repo"]]), "Backbone", NoBackbone)
    torch.manual_seed(0)
    check(case, module.build(case["num_classes"], **options), module.rename_official)


@pytest.mark.parametrize("label, options", [
    ("detr", {"attention": "detr", "offsets": False, "class_loss": "softmax"}), ("conditional_detr", {})])
def test_the_step_from_detr_to_conditional_detr_begins_and_ends_with_their_initial_values(
        label, options, monkeypatch):
    monkeypatch.setattr(module_named("conditional_detr"), "Backbone", NoBackbone)
    torch.manual_seed(0)
    model = module_named("conditional_detr_ablations").build(CASES[label]["num_classes"], **options)
    check(CASES[label], model, module_named(label).rename_official)
