"""What the files in relatives/ promise beyond the official numbers, at tiny sizes; the papers' claims."""
import runpy
import shutil
import subprocess
from types import SimpleNamespace

import pytest
import torch

import train
from support import data
from support.evaluation import METRICS
from support.model_files import known_files
from tiny_models import ROOT, TARGETS, TINY, batch, module_named, shake, tiny

SMALL = {"hdetr": {"num_one2many": 6, "k_one2many": 2},
         "adamixer": {"enc_layers": 0, "in_points": 4, "out_points": 6}}
# Options that change what is computed
VARIANTS = {
    "group_detr": [{}, {"num_groups": 1}, {"dec_layers": 1}],
    "dab_detr": [{}, {"num_patterns": 3}, {"dec_layers": 1}, {"enc_layers": 0}],
    "smca_detr": [{}, {"scale_type": "none"}, {"scale_type": "isotropic"}, {"scale_type": "xy_product"},
                  {"dilation": True}, {"last_stage": 3}],
    "hdetr": [{}, {"two_stage": False}, {"mixed_selection": False}, {"look_forward_twice": False},
              {"two_stage": False, "box_refine": False, "look_forward_twice": False}, {"num_one2many": 0},
              {"k_one2many": 0}],
    "adamixer": [{}, {"n_groups": 1}, {"last_stage": 3}, {"dilation": True}],
}
FILES = list(VARIANTS)
EVERY = [pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
         for name in FILES for options in VARIANTS[name]]
NOTHING = [TARGETS[1], TARGETS[1]]
ARGS = SimpleNamespace(device="cpu", amp=False, workers=0, eval_batch_size=2)
# Lines out and in of `git diff --no-index --numstat`, at most
DIFF = {("conditional_detr", "group_detr"): 70, ("conditional_detr", "dab_detr"): 230,
        ("detr", "smca_detr"): 150, ("deformable_detr", "hdetr"): 140}


def small(name, **options):
    return tiny(name, **{**SMALL.get(name, {}), **options})


def predict(model, images=None, mask=None):
    with torch.no_grad():
        return model.eval()(*(batch() if images is None else (images, mask)))


@pytest.mark.parametrize("name, options", EVERY)
def test_every_option_trains_every_parameter_also_without_objects_and_in_bfloat16(name, options):
    """The defaults in all three ways, options once."""
    model = small(name, backbone_norm="batch", **options).train()
    criterion = train.SetCriterion(model)
    optimizer = train.make_optimizer(model, 1e-3, 1e-3, 1e-4)
    batches = [(TARGETS, False)] if options else [(TARGETS, False), (NOTHING, False), (TARGETS, True)]
    for targets, amp in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = model(*batch())
        losses = criterion(out, targets)
        optimizer.zero_grad()
        losses["total"].backward()
        for parameter_name, p in model.named_parameters():
            # Several processes refuse a parameter that takes no part
            assert (p.grad is None) == (not p.requires_grad), f"{parameter_name} takes no part"
            assert p.grad is None or p.grad.isfinite().all(), f"{parameter_name}: the gradient is not finite"
        assert losses["total"].dtype == torch.float32 and losses["total"].isfinite()
        optimizer.step()


@pytest.mark.parametrize("name", FILES)
def test_shapes_and_boxes_are_the_contracts(name):
    model = small(name)
    out = predict(model)
    assert out["logits"].shape == (2, 2, 5, 4 if name == "smca_detr" else 3)
    assert out["boxes"].shape == (2, 2, 5, 4)
    boxes = out["boxes"]
    assert model.recipe.get("free_boxes") or ((boxes >= 0) & (boxes <= 1)).all()
    assert set(out) == {"logits", "boxes"} | ({"proposals"} if name == "hdetr" else set())


@pytest.mark.parametrize("name", FILES)
def test_an_evaluation_names_classes_of_the_data_only(name):
    """SMCA has a sigmoid more than classes, and at the start it may well be the surest."""
    shapes = data.load(size=64)["val"].subset(range(2))
    model = module_named(name).build(len(shapes.class_names), **{**TINY, **SMALL.get(name, {})})
    if model.recipe.get("extra_logit"):
        model.class_head.bias.data[-1] = 9
    metrics, found = train.evaluate(model, train.SetCriterion(model), shapes, ARGS)
    assert set(metrics) > set(METRICS) and set(found) == {t["image_id"] for _, t in shapes}
    assert all((one["labels"] < len(shapes.class_names)).all() for one in found.values())


@pytest.mark.parametrize("name", FILES)
def test_one_image_does_not_see_the_other(name):
    model, (images, mask) = shake(small(name)), batch()
    before = predict(model, images, mask)
    images[1] = torch.randn_like(images[1]).masked_fill(mask[1], 0)
    after = predict(model, images, mask)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(before[key][:, 0], after[key][:, 0], rtol=0, atol=1e-6)
        assert (before[key][:, 1] - after[key][:, 1]).abs().max() > 1e-4, "these predictions ignore the image"


@pytest.mark.parametrize("name", ["group_detr", "dab_detr", "smca_detr"])
def test_what_is_behind_padding_changes_nothing(name):
    """Behind the backbone. AdaMixer reads padding like image; for H-DETR see its parent."""
    model, (images, mask) = shake(small(name)), batch()
    features = model.backbone(images)
    outputs = []
    for noise in (0.0, 5.0):
        padded = [f + noise * torch.randn_like(f) * _cells(mask, f) for f in features]
        model.backbone.forward = lambda _, maps=padded: maps
        outputs.append(predict(model, images, mask))
    for key in ("logits", "boxes"):
        torch.testing.assert_close(outputs[0][key], outputs[1][key], rtol=0, atol=1e-5)


def _cells(mask, feature_map):
    return torch.nn.functional.interpolate(mask[:, None].float(), feature_map.shape[-2:])


def test_torch_compile_gives_the_same_numbers_in_one_graph():
    """AdaMixer shares least with its parent; the parents' tests have the rest."""
    model, inputs = shake(small("adamixer", dec_layers=1)), batch()
    expected = predict(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(compiled[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["smca_detr", "adamixer"])
def test_torch_export_takes_any_number_of_images_of_any_size(name):
    model = shake(small(name, dec_layers=1)).eval()
    B, H, W = torch.export.Dim("B", max=64), torch.export.Dim("H", min=65), torch.export.Dim("W", min=65)
    sizes = {0: B, 2: H, 3: W}, {0: B, 1: H, 2: W}
    exported = torch.export.export(model, batch(), dynamic_shapes=sizes).module()
    images, mask = torch.randn(3, 3, 70, 211), torch.zeros(3, 70, 211, dtype=torch.bool)
    mask[-1, 35:] = True
    expected, got = predict(model, images, mask), exported(images, mask)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, option, value", [
    ("group_detr", "num_groups", 0), ("group_detr", "num_groups", 1.5), ("dab_detr", "num_patterns", -1),
    ("smca_detr", "scale_type", "type3"), ("smca_detr", "scale_type", 3), ("hdetr", "num_one2many", -1),
    ("hdetr", "k_one2many", "6"), ("hdetr", "lambda_one2many", "1"), ("hdetr", "mixed_selection", 1),
    ("adamixer", "enc_layers", 2), ("adamixer", "in_points", 0), ("adamixer", "n_groups", 0)])
def test_wrong_values_are_refused_with_a_sentence(name, option, value):
    with pytest.raises(ValueError, match=f"{option} is .*, it must be "):
        small(name, **{option: value})


def test_combinations_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="look_forward_twice is True, it must be False without"):
        small("hdetr", two_stage=False, box_refine=False)
    with pytest.raises(ValueError, match="hidden_dim is 32, it must be a multiple of n_groups"):
        small("adamixer", n_groups=3)


@pytest.mark.parametrize("name", FILES)
def test_the_file_alone_in_an_empty_folder_runs(name, tmp_path, capsys):
    runpy.run_path(shutil.copy(known_files()[name], tmp_path), run_name="__main__")
    said = capsys.readouterr().out
    assert "parameters" in said and "'logits'" in said


@pytest.mark.parametrize("pair", DIFF, ids="-".join)
def test_the_diff_against_the_parent_stays_small(pair):
    parent, child = (known_files()[name] for name in pair)
    assert f"Diff me against: {pair[0]}.py" in child.read_text()
    command = ["git", "diff", "--no-index", "--numstat", parent, child]
    added, removed, _ = subprocess.run(command, capture_output=True, text=True, cwd=ROOT).stdout.split("\t")
    assert int(added) + int(removed) <= DIFF[pair], f"{removed} lines out and {added} in"


# ---- Group DETR --------------------------------------------------------------------------------------------
def test_group_detr_the_first_group_in_training_is_the_answer_of_inference():
    model = shake(small("group_detr", num_groups=3, dropout=0.0))
    model.train()
    for part in model.backbone.modules():
        part.eval()
    trained, answer = model(*batch()), predict(model)
    assert trained["groups"] == 3 and trained["logits"].shape == (6, 2, 5, 3)
    torch.testing.assert_close(trained["logits"][::3], answer["logits"], rtol=0, atol=1e-5)
    assert (trained["logits"][1::3] - answer["logits"]).abs().max() > 1e-3, "the groups are all the same"


def test_group_detr_groups_do_not_see_each_other():
    model = shake(small("group_detr", num_groups=2)).train()
    before = model(*batch())["logits"].detach()
    with torch.no_grad():
        model.query_embed.weight[5:] += 1  # the second group
    after = model(*batch())["logits"].detach()
    torch.testing.assert_close(before[::2], after[::2], rtol=0, atol=1e-5)
    assert (before[1::2] - after[1::2]).abs().max() > 1e-3


def test_group_detr_takes_the_mean_of_the_groups_losses():
    model = small("group_detr", num_groups=3)
    logits, boxes = torch.randn(6, 2, 5, 3), torch.rand(6, 2, 5, 4) * 0.3 + 0.3
    criterion = train.SetCriterion(model)
    whole = criterion({"logits": logits, "boxes": boxes, "groups": 3}, TARGETS)["total"]
    each = [criterion({"logits": logits[k::3], "boxes": boxes[k::3]}, TARGETS)["total"] for k in range(3)]
    torch.testing.assert_close(whole, sum(each) / 3)


def test_group_detr_with_one_group_is_conditional_detr():
    model, parent = small("group_detr", num_groups=1), tiny("conditional_detr")
    shake(parent)
    model.load_state_dict(parent.state_dict())
    for key, value in predict(parent).items():
        assert predict(model)[key].equal(value)


# ---- DAB-DETR ----------------------------------------------------------------------------------------------
def test_dab_detr_query_p_times_q_has_pattern_p_and_anchor_q():
    model = shake(small("dab_detr", num_patterns=2))
    seen = []
    model.decoder.register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    predict(model)
    tgt, anchors = seen[0][:2]
    for p, q in ((0, 3), (1, 0), (1, 4)):
        assert tgt[0, p * 5 + q].equal(model.patterns.weight[p])
        torch.testing.assert_close(anchors[0, p * 5 + q], model.anchors.weight[q].sigmoid())


def test_dab_detr_a_wide_box_looks_wide():
    """Twice the width halves the x half of the spatial query, the second one, and leaves the y half alone."""
    positions = shake(module_named("dab_detr").BoxPositions(32))
    tgt, box = torch.randn(1, 1, 32), torch.tensor([[[0.4, 0.6, 0.1, 0.2]]])
    _, narrow = positions(box, tgt)
    _, wide = positions(box * torch.tensor([1, 1, 2, 1]), tgt)
    torch.testing.assert_close(wide[..., :16], narrow[..., :16])
    torch.testing.assert_close(wide[..., 16:], narrow[..., 16:] / 2)


def test_dab_detr_a_loss_reaches_the_refinement_one_layer_back_and_no_further():
    model = shake(small("dab_detr", dec_layers=3)).train()
    seen = []
    model.decoder.box_positions.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    model(*batch())
    assert seen[0].requires_grad, "the anchors are trained"
    assert not seen[1].requires_grad and not seen[2].requires_grad, "refined boxes are detached"


# ---- SMCA-DETR ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("scale_type", ["none", "isotropic", "xy", "xy_product"])
def test_smca_the_gaussian_by_hand(scale_type):
    gaussian = shake(module_named("smca_detr").Gaussian(32, 4, scale_type))
    query, centre = torch.randn(1, 3, 32), torch.rand(1, 3, 2) * 4
    bias = gaussian(query, centre, (4, 5))  # [B, M, Q, T]
    u = gaussian.norm(query)
    m, q, row, column = 2, 1, 3, 4
    x, y = (centre[0, q] + gaussian.offset(u)[0, q, 2 * m:2 * m + 2]).tolist()
    dx2, dy2 = (x - column) ** 2, (y - row) ** 2
    n = {"none": 0, "isotropic": 1, "xy": 2, "xy_product": 3}[scale_type]
    k = [1.0, 1.0] if n == 0 else gaussian.scale(u)[0, q, n * m:n * m + n].tolist()
    g = k[0] ** 2 * dx2 + k[min(1, len(k) - 1)] ** 2 * dy2 + (k[2] ** 2 * dx2 * dy2 if n == 3 else 0)
    assert bias.shape == (1, 4, 3, 20)
    assert bias[0, m, q, row * 5 + column].item() == pytest.approx(-g / 8, rel=1e-4)


def test_smca_centres_are_relative_to_every_images_own_size_at_the_real_stride():
    for options, stride in (({}, 32), ({"last_stage": 3}, 16), ({"last_stage": 2}, 8),
                            ({"dilation": True}, 16)):
        model, seen = small("smca_detr", **options), []
        model.decoder.layers[0].register_forward_hook(lambda module, inputs, output: seen.append(inputs[2]))
        model.decoder.reference.register_forward_hook(lambda module, inputs, output: seen.append(output))
        predict(model)
        s, centre = seen
        for b, (h, w) in enumerate([(64, 96), (96, 64)]):
            torch.testing.assert_close(centre[b], s[b].sigmoid() * torch.tensor([w, h]) / stride)


# ---- H-DETR ------------------------------------------------------------------------------------------------
def test_hdetr_the_two_parts_do_not_see_each_other_and_inference_knows_one():
    for options in ({}, {"two_stage": False}):
        model = shake(small("hdetr", **options)).train()
        for part in model.backbone.modules():
            part.eval()
        out, answer = model(*batch()), predict(model)
        assert out["one2many"]["logits"].shape == (2, 2, 6, 3)
        assert (out["one2many"]["repeat"], out["one2many"]["weight"]) == (2, 1.0)
        torch.testing.assert_close(out["logits"], answer["logits"], rtol=0, atol=1e-5)
        with torch.no_grad():
            model.queries.query_embed.weight[5:] += 1
            model.eval()
            model.training = True
            again = model(*batch())
        torch.testing.assert_close(again["logits"], out["logits"], rtol=0, atol=1e-5)
        assert (again["one2many"]["logits"] - out["one2many"]["logits"]).abs().max() > 1e-3


def test_hdetr_every_object_is_there_k_times_and_boxes_count_k_times():
    model = small("hdetr")
    criterion = train.SetCriterion(model)
    logits, boxes = torch.randn(1, 2, 6, 3), torch.rand(1, 2, 6, 4) * 0.3 + 0.3
    out = {"logits": torch.randn(1, 2, 5, 3), "boxes": torch.rand(1, 2, 5, 4) * 0.3 + 0.3}
    many = {"logits": logits, "boxes": boxes, "repeat": 2, "weight": 0.5}
    twice = [{key: value.repeat(2, *[1] * (value.ndim - 1)) for key, value in t.items()} for t in TARGETS]
    alone = criterion(out, TARGETS)["total"]
    extra = criterion({"logits": logits, "boxes": boxes}, twice)["total"]
    torch.testing.assert_close(criterion({**out, "one2many": many}, TARGETS)["total"], alone + 0.5 * extra)


@pytest.mark.parametrize("twice", [True, False])
def test_hdetr_look_forward_twice_reaches_the_box_head_before_and_none_further_back(twice):
    model = shake(small("hdetr", dec_layers=3, look_forward_twice=twice)).train()
    model(*batch())["boxes"][2].sum().backward()
    reached = [head.layers[-1].weight.grad is not None and bool(head.layers[-1].weight.grad.any())
               for head in model.box_head[:3]]
    assert reached == [False, twice, True]


@pytest.mark.parametrize("num_queries", [5, 900])
def test_hdetr_trains_on_maps_with_fewer_tokens_than_queries(num_queries):
    model = small("hdetr", num_queries=num_queries, num_one2many=300, backbone_norm="batch").train()
    out = model(*batch())
    assert out["logits"].shape[2] + out["one2many"]["logits"].shape[2] == out["proposals"]["logits"].shape[1]
    train.SetCriterion(model)(out, TARGETS)["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- AdaMixer ----------------------------------------------------------------------------------------------
def test_adamixer_samples_by_hand_written_loops():
    """Levels weighted by a Gaussian around the point's own level, each read bilinearly, zero outside."""
    torch.manual_seed(0)
    sampler = shake(module_named("adamixer").Sampler(8, groups=2, points=3))
    tgt, xyzr = torch.randn(1, 2, 8), torch.tensor([[[9.0, 12.0, 3.0, 0.4], [30.0, 20.0, 4.0, -1.0]]])
    maps, strides = [torch.randn(2, 4, 8, 10), torch.randn(2, 4, 4, 5)], [4, 8]  # [G*B, D/G, h, w]
    got = sampler(tgt, xyzr, maps, strides)
    offsets = sampler.offsets(tgt).view(1, 2, 2, 3, 3)
    for q, g, p in ((0, 0, 0), (0, 1, 2), (1, 1, 1)):
        x0, y0, z, r = xyzr[0, q].tolist()
        dx, dy, dz = offsets[0, q, g, p].tolist()
        x, y = x0 + dx * 2 ** (z - r / 2), y0 + dy * 2 ** (z + r / 2)
        weights = torch.tensor([-(z + dz - level) ** 2 / 2 for level in (2, 3)]).softmax(0)
        wanted = torch.zeros(4)
        for weight, feature_map, stride in zip(weights, maps, strides):
            u, v = x / stride - 0.5, y / stride - 0.5
            for i in (int(u // 1), int(u // 1) + 1):
                for j in (int(v // 1), int(v // 1) + 1):
                    if 0 <= i < feature_map.shape[3] and 0 <= j < feature_map.shape[2]:
                        share = (1 - abs(u - i)) * (1 - abs(v - j))
                        wanted += weight * share * feature_map[g, :, j, i]
        torch.testing.assert_close(got[0, q, g, p], wanted, rtol=0, atol=1e-4)


def test_adamixer_starts_with_the_whole_image_and_boxes_of_any_size():
    model = small("adamixer")
    boxes = predict(model)["boxes"]
    torch.testing.assert_close(boxes, torch.tensor([0.5, 0.5, 1, 1]).expand_as(boxes), rtol=0, atol=1e-5)
    assert not model.init_boxes.weight.requires_grad
    shake(model)
    assert (predict(model)["boxes"] > 1).any(), "boxes may leave the image"


def test_adamixer_places_carry_no_gradient_from_layer_to_layer_but_content_does():
    model, seen = shake(small("adamixer")).train(), []
    model.decoder.layers[1].register_forward_hook(lambda module, inputs, output: seen.append(inputs))
    model(*batch())
    tgt, xyzr = seen[0][:2]
    assert tgt.requires_grad and not xyzr.requires_grad


def test_adamixer_matches_by_corners():
    criterion = train.SetCriterion(small("adamixer"))
    boxes, logits = torch.tensor([[[0.4, 0.5, 0.2, 0.4]]]), torch.zeros(1, 1, 3)
    target = {"labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}
    l1 = criterion({"logits": logits[None], "boxes": boxes[None]}, [target])["l1"]
    assert l1.item() == pytest.approx(0.2), "left edges agree, right edges are 0.2 apart"
