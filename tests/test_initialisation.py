"""Training starts where the official code starts: mean, spread and family of every initial parameter."""
import json
import math
import re

import pytest
import torch

from golden import FOLDER
from tiny_models import ROOT, module_named

CASES = {label: case for file in ("initialisation", "initialisation_dn_dino")
         for label, case in json.loads((FOLDER / f"{file}.json").read_text()).items()}
FILES = {"detr": "detr", "conditional": "conditional_detr", "deformable": "deformable_detr",
         "sam": "sam_detr", "group": "group_detr", "dab": "dab_detr", "smca": "smca_detr", "hdetr": "hdetr",
         "dn": "dn_detr", "dino": "dino"}
# SAM-DETR's points start at the centre of their box, a departure that the file states
MEANT = re.compile(r"^transformer\.decoder\.layers\.\d+\.point2\.6\.(weight|bias)$")


def file_and_options(case):
    options = dict(case["our_options"])
    if options.get("multiscale") and exists("sam_detr_multiscale"):
        del options["multiscale"]
        return "sam_detr_multiscale", options
    return FILES[case["repo"]], options


def exists(name):
    return any((folder / f"{name}.py").exists() for folder in (ROOT, ROOT / "relatives"))


class NoBackbone(torch.nn.Module):
    """Channels of ResNet-50; the official backbones start from ImageNet, so that they are not compared."""

    def __init__(self, *_):
        super().__init__()
        self.channels = [512, 1024, 2048]


def family(largest, spread):
    return "uniform" if largest / spread < 2.2 else "normal"


def faults(ours, official):
    """What differs, as a list of words; ours [...] against the official row."""
    ours = ours.detach().double().flatten()
    n, mean, std = ours.numel(), ours.mean().item(), ours.std(unbiased=False).item()
    if official["constant"]:
        norm, wanted = ours.norm().item(), official["l2"]
        same = abs(norm - wanted) <= 1e-4 * max(norm, 1)
        return [] if same else [f"norm {norm:.4g}, not {wanted:.4g}"]
    found = []
    if abs(std / official["std"] - 1) > 0.02 + 5 / math.sqrt(n):
        found.append(f"spread {std:.4g}, not {official['std']:.4g}")
    if abs(mean - official["mean"]) > 8 * official["std"] / math.sqrt(n):
        found.append(f"mean {mean:.4g}, not {official['mean']:.4g}")
    if n > 400 and std > 0:
        wanted = family(max(abs(official["min"]), official["max"]), official["std"])
        if wanted != family(ours.abs().max().item(), std):
            found.append(f"not {wanted}")
    return found


@pytest.mark.parametrize("label", [
    label for label, case in CASES.items() if exists(file_and_options(case)[0])])
def test_every_parameter_starts_as_in_the_official_code(label, monkeypatch):
    case = CASES[label]
    name, options = file_and_options(case)
    module = module_named(name)
    parent = module_named("sam_detr") if name == "sam_detr_multiscale" else module
    monkeypatch.setattr(parent, "Backbone", NoBackbone)
    torch.manual_seed(0)
    model = module.build(case["num_classes"], **options)
    official = {name: row for name, row in case["parameters"].items() if not MEANT.match(name)}
    ours, wrong = dict(model.named_parameters(remove_duplicate=False)), {}
    for name, row in official.items():
        (our_name,) = module.rename_official({name: None})
        assert our_name in ours, f"{name}: there is no parameter {our_name}"
        if found := faults(ours[our_name], row):
            wrong[f"{name} ({our_name})"] = found
    assert not wrong, "; ".join(f"{name}: {', '.join(found)}" for name, found in wrong.items())
