"""Somebody else's implementations lose the marks in which they really differ, and no other.

transformers is no dependency of this project: pip install transformers, then these tests run.
"""

import copy
from types import ModuleType

import pytest
from torch import nn

from tests.grading.judge import TOGETHER, judged
from tests.grading.small import CHEAP, lost

pytest.importorskip("transformers", reason="Hugging Face's transformers is not installed, it is not needed")
from tests.grading.transformers_wrappers import module  # noqa: E402

# {mark: what differs}, found by reading modeling_*.py of transformers 5.24 next to the official code
EVERYWHERE = {
    "start": "linear layers and convolutions start normal, with a standard deviation of 0.02",
    "training": "the encoder's input goes through a dropout",
}
NORM_GOES_ON = {
    "heads": "with auxiliary_loss=True the next layer is fed the normalised output of a layer",
}
DIFFERENT = {
    "detr": {**EVERYWHERE, **NORM_GOES_ON},
    "conditional_detr": {**EVERYWHERE, **NORM_GOES_ON},
    "deformable_detr": {
        **EVERYWHERE,
        "refinement": "with_box_refine without two_stage ties the class heads of all layers to the first",
    },
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_only_what_really_differs_is_lost(kind, small_backbone):
    verdicts = judged(module(kind), kind, 0, CHEAP[kind])
    assert {mark for mark, v in verdicts.items() if v.status == "lost"} == set(DIFFERENT[kind]), verdicts
    assert {mark for mark, v in verdicts.items() if v.status == "unjudged"} <= {*TOGETHER}, verdicts


def without_the_norm(decoder):
    """Every layer, and lambda, get what the layer before gave, as in the official code."""
    last = {}

    def keep(layer, args, out):
        last["out"] = out

    def feed(part, args):
        return (last["out"], *args[1:])

    for i, layer in enumerate(decoder.layers):
        layer.register_forward_hook(keep)
        if i:
            layer.register_forward_pre_hook(feed)
    if hasattr(decoder, "query_scale"):
        decoder.query_scale.register_forward_pre_hook(feed)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_with_these_differences_undone_the_marks_are_met(kind, small_backbone):
    """So the sentences above are the reasons."""
    original, repaired = module(kind), ModuleType(f"repaired_{kind}")

    def build(*args, **options):
        model = original.build(*args, **options)
        theirs = model.theirs
        theirs.model.encoder.dropout = 0.0
        if kind == "deformable_detr":
            if options.get("box_refine"):
                theirs.class_embed = nn.ModuleList(copy.deepcopy(head) for head in theirs.class_embed)
        else:
            without_the_norm(theirs.model.decoder)
        return model

    repaired.build, repaired.load_official = build, original.load_official
    assert set(lost(repaired, kind, CHEAP[kind])) == {"start"}
