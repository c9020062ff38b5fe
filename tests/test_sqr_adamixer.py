"""SQR around AdaMixer: inference is AdaMixer's, training is recollection's."""
import pytest
import torch

import train
from tests.tiny_models import TARGETS, batch, shake, tiny

SOURCES = ("none", "selective", "dense")


def pair(**options):
    """AdaMixer and the same with recollection, with the same shaken weights."""
    plain, model = shake(tiny("adamixer", dec_layers=4)), tiny("sqr_adamixer", dec_layers=4, **options)
    model.load_state_dict(plain.state_dict())
    return plain, model


@pytest.mark.parametrize("recollect", SOURCES)
def test_inference_is_adamixer_bit_for_bit_even_with_gradients(recollect):
    plain, model = pair(recollect=recollect)
    ours, theirs = model.eval()(*batch()), plain.eval()(*batch())
    assert all(ours[key].equal(theirs[key]) for key in ("logits", "boxes"))


def test_without_recollection_training_is_adamixer_bit_for_bit():
    gradients = []
    for model in pair(recollect="none"):
        losses = train.SetCriterion(model)(model.train()(*batch()), TARGETS)
        losses["total"].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(a.equal(b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("stages, groups", [(3, 6), (6, 32), (7, 53)])
def test_groups_are_those_of_the_official_lists(stages, groups):
    model = tiny("sqr_adamixer", dec_layers=1).train()
    model.decoder.layers = torch.nn.ModuleList(list(model.decoder.layers) * stages)
    start, end = [0, 0, 1, 2, 4, 7, 12], [1, 2, 4, 7, 12, 20, 33]
    official = [(stage, query) for stage in range(stages) for query in range(start[stage], end[stage])]
    assert model.decoder.plan() == official and len(official) == groups


def test_every_group_has_its_own_boxes_and_the_last_one_is_the_plain_path():
    plain, model = pair(recollect="selective")
    with torch.no_grad():
        trained, out = model.train()(*batch()), plain.train()(*batch())
    boxes = trained["boxes"]
    assert boxes.shape == (11, 2, 5, 4)
    torch.testing.assert_close(boxes[-1], out["boxes"][-1], rtol=0, atol=1e-6)
    assert all((boxes[a] - boxes[b]).abs().max() > 1e-4 for a in range(11) for b in range(a))


def test_a_wrong_value_is_refused():
    with pytest.raises(ValueError, match='recollect is .all., it must be "selective"'):
        tiny("sqr_adamixer", recollect="all")
