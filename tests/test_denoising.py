"""DN-DETR and DINO: noisy copies of the objects, which query sees which, and the losses of known targets."""
import pytest
import torch

import train
from support.attention_pictures import draw_look
from tests.test_look import scene_of
from tests.tiny_models import TARGETS, batch, module_named, shaken, tiny

NAMES = ("dn_detr", "dino")
each = pytest.mark.parametrize("name", NAMES)
FEW = [{"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.4]])},
       {"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.9, 1.0]])}]
EMPTY = [TARGETS[1], TARGETS[1]]


def steady(monkeypatch, name, **values):
    """Replaces draw_noise by these numbers, the same for all objects; by default no label flips."""
    def draw(shape, num_classes, device):
        noise = {"flip": torch.ones(shape), "label": torch.zeros(shape, dtype=torch.int64),
                 "box": torch.full((*shape, 4), 0.5), "sign": torch.ones(*shape, 4)}
        for key, value in values.items():
            noise[key] = torch.as_tensor(value).expand(noise[key].shape)
        return noise
    monkeypatch.setattr(module_named(name), "draw_noise", draw)


# ---- Noise -------------------------------------------------------------------------------------------------
def noisy(name, **options):
    """Content [B, N, D] and boxes [B, N, 4] of the noisy queries of FEW."""
    module = tiny(name, **options).denoising
    tgt, boxes, _, known = module(torch.zeros(2, 5, 32), torch.zeros(2, 5, 4), FEW)
    N = known["target"].shape[1]
    return tgt[:, :N], boxes[:, :N], known["target"], module.label_embed.weight


def test_dn_detr_moves_centres_by_half_of_what_sizes_change(monkeypatch):
    steady(monkeypatch, "dn_detr", box=torch.tensor([1.0, 0.5, 0.0, 0.75]), flip=0.19, label=1)
    content, boxes, target, table = noisy("dn_detr", dn_groups=2)
    expected = torch.tensor([0.3 + 0.4 * 0.1, 0.4, 0.2 - 0.4 * 0.2, 0.3 + 0.2 * 0.3])
    torch.testing.assert_close(boxes[0, 0], expected)
    assert content[0, 0].equal(torch.cat([table[1], torch.ones(1)])), "the flipped label, and the flag"
    assert target.tolist() == [[0, 1, 0, 1], [0, -2, 0, -2]]
    assert content[1, 1].eq(0).all() and boxes[1, 1].eq(0.5).all(), "a place that stays empty"


def test_dino_moves_corners_and_those_of_negatives_further(monkeypatch):
    steady(monkeypatch, "dino", sign=torch.tensor([-1.0, -1, 1, 1]), box=0.25, flip=0.26)
    _, boxes, target, _ = noisy("dino", dn_number=4)
    larger = torch.tensor([0.3, 0.4, 0.25, 0.375])
    torch.testing.assert_close(boxes[0, 0], larger)
    torch.testing.assert_close(boxes[0, 2], torch.tensor([0.3, 0.4, 0.45, 0.675]))  # the same, one more half
    assert target.tolist() == [[0, 1, -1, -1] * 2, [0, -1, -1, -1] * 2]


@pytest.mark.parametrize("name, flip, flips", [
    ("dn_detr", 0.19, True), ("dn_detr", 0.21, False), ("dino", 0.24, True), ("dino", 0.26, False)])
def test_labels_flip_as_often_as_officially_and_boxes_stay_away_from_the_edge(name, flip, flips, monkeypatch):
    steady(monkeypatch, name, flip=flip, label=1, box=1.0, sign=-1.0)
    content, boxes, _, table = noisy(name)
    assert content[0, 0, :31].equal(table[1 if flips else 0, :31])
    assert boxes.min() > 9e-4 and boxes.max() < 1 - 9e-4


def test_random_numbers_follow_the_seed_so_that_a_resumed_step_draws_them_again():
    for name in NAMES:
        draws = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            draws.append(module_named(name).draw_noise((2, 3), 5, "cpu"))
        assert all(value.equal(draws[1][key]) for key, value in draws[0].items())
        assert not any(value.equal(draws[2][key]) for key, value in draws[0].items())


# ---- Who sees whom -----------------------------------------------------------------------------------------
@each
def test_the_mask_of_two_groups_of_one_and_two_matching_queries(name):
    hidden = module_named(name).group_bias(2, 1, 2, "cpu")[0, 0].isinf()
    assert hidden.int().tolist() == [[0, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


@each
def test_groups_do_not_see_each_other_and_matching_queries_see_no_noise(name, monkeypatch):
    model, outputs = shaken(name).train(), []  # three groups
    box = torch.full((3, *([2] if name == "dino" else []), 3, 4), 0.5)
    for moved in (False, True):
        box = box.clone()
        box[1] += 0.3 * moved  # in the second group only
        steady(monkeypatch, name, box=box)
        outputs.append(model(*batch(), FEW))
    plain = model(*batch())
    before, after = (out["denoising"]["boxes"].unflatten(2, (3, -1)) for out in outputs)
    assert not before[:, :, 1].equal(after[:, :, 1])
    torch.testing.assert_close(before[:, :, [0, 2]], after[:, :, [0, 2]], atol=1e-6, rtol=0)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(outputs[0][key], outputs[1][key], atol=1e-6, rtol=0)
        torch.testing.assert_close(outputs[0][key], plain[key], atol=1e-5, rtol=0)


@each
def test_evaluation_ignores_targets_and_training_without_them_has_no_noise(name):
    model = shaken(name)
    assert "denoising" not in model.train()(*batch())
    with torch.no_grad():
        plain, given = model.eval()(*batch()), model(*batch(), FEW)
    assert "denoising" not in given and plain["boxes"].equal(given["boxes"])


def without_gradient(model):
    return [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


# ---- Losses ------------------------------------------------------------------------------------------------
@each
def test_known_targets_replace_the_matching(name):
    criterion = train.SetCriterion(tiny(name))
    out = {"logits": torch.randn(2, 1, 4, 3), "boxes": torch.rand(2, 1, 4, 4) * 0.4 + 0.3}
    known = torch.tensor([[1, -1, 0, -2]])
    noise = {**out, "target": known, "groups": 2}
    losses = criterion({**out, "denoising": noise}, FEW[:1])
    wrong = (out["boxes"][:, 0, [2, 0]] - FEW[0]["boxes"]).abs().sum((1, 2)) / 4  # 2 groups of 2 objects
    torch.testing.assert_close(losses["denoising_l1"], wrong)
    kept = {key: value[:, :, :3] for key, value in out.items()}
    again = criterion({**out, "denoising": {**kept, "target": known[:, :3], "groups": 2}}, FEW[:1])
    torch.testing.assert_close(losses["denoising_class"], again["denoising_class"])
    alone = criterion(out, FEW[:1])
    extra = sum(w * losses[f"denoising_{part}"].sum() for part, w in criterion.weights.items())
    torch.testing.assert_close(losses["total"], alone["total"] + extra)


@each
def test_without_objects_the_loss_is_zero_and_every_parameter_still_has_a_gradient(name):
    model = shaken(name).train()
    criterion = train.SetCriterion(model)
    losses = criterion(model(*batch(), EMPTY), EMPTY)
    assert all(losses[f"denoising_{part}"].eq(0).all() for part in ("class", "l1", "giou"))
    losses["total"].backward()  # with several processes, torch waits for every gradient
    assert without_gradient(model) == []


@each
def test_parts_of_a_batch_add_up_to_the_whole(name, monkeypatch):
    steady(monkeypatch, name)
    model, targets = shaken(name).train(), [FEW[0], FEW[0]]
    criterion, (images, mask) = train.SetCriterion(model), batch()
    whole = criterion(model(images, mask, targets), targets)
    parts = [criterion(model(images[i:i + 1], mask[i:i + 1], targets[:1]), targets[:1], [2, 2])
             for i in (0, 1)]
    for key in whole:
        torch.testing.assert_close(whole[key], parts[0][key] + parts[1][key])


@each
def test_noise_can_be_switched_off(name):
    model = tiny(name, **{"dn_groups" if name == "dn_detr" else "dn_number": 0}).train()
    criterion = train.SetCriterion(model)
    out = model(*batch(), FEW)
    criterion(out, FEW)["total"].backward()
    assert out.get("denoising", {"target": torch.zeros(2, 0)})["target"].shape[1] == 0
    assert without_gradient(model) == []


@each
def test_the_picture_shows_noisy_boxes_and_what_comes_back(name):
    model = tiny(name).eval()
    scene = scene_of(model, threshold=0.01)
    figure = draw_look(model, scene)
    assert "Boxes with noise" in figure.get_suptitle()
    assert ('blue must say "no object"' in figure.get_suptitle()) == (name == "dino")
    assert "with noise: mean IoU" in figure.axes[0].get_title()
