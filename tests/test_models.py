"""What every model file promises beyond the official numbers, at tiny sizes."""
import runpy
import shutil
import sys
from pathlib import Path

import pytest
import torch
import torchvision

import train
from tiny_models import ROOT, TARGETS, TINY, batch, module_named, shake, shaken, tiny

# Options that change what is computed: each must run and train all of its parameters.
VARIANTS = {
    "detr": [{}, {"dilation": True}, {"last_stage": 3}, {"last_stage": 2}, {"enc_layers": 0}],
    "conditional_detr": [{}, {"dec_layers": 1}],
    "deformable_detr": [{}, {"box_refine": True}, {"two_stage": True}, {"num_feature_levels": 1},
                        {"num_feature_levels": 1, "dilation": True},
                        {"num_feature_levels": 2, "last_stage": 3},
                        {"num_feature_levels": 5, "enc_points": 2, "dec_points": 3}],
    "sam_detr": [{}, {"smca": True}, {"input_norm": True}, {"last_stage": 2}],
    "sqr": [{}, {"recollect": "dense"}, {"box_refine": True}, {"two_stage": True}],
    "conditional_detr_ablations": [{}, {"dec_layers": 1}] + [
        {"spatial_query": form} for form in ("csq-p", "csq-t", "csq-c", "csq-i")] + [
        {"transform": t} for t in ("scalar", "identity", "block", "full")] + [
        {"reference": r} for r in ("learned", "origin")],
    "sam_detr_multiscale": [{}, {"smca": True}, {"last_stage": 3}],
}
ALL = list(VARIANTS)
FILES = [name for name in ALL if (ROOT / f"{name}.py").exists()]
EVERY = [pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
         for name in ALL for options in VARIANTS[name]]
AUTOCAST = [v for v in EVERY if v.values[1] in ({}, {"two_stage": True})]


@pytest.mark.parametrize("name, options", EVERY)
def test_shapes_are_the_contracts_and_every_parameter_is_trained(name, options):
    model = tiny(name, backbone_norm="batch", **options).train()
    out = model(*batch())
    S = 3 if name == "sqr" else options.get("dec_layers", 2)  # sqr trains 1 + 2 groups
    classes = 3 + (model.recipe["class_loss"] == "softmax")
    assert out["logits"].shape == (S, 2, 5, classes) and out["boxes"].shape == (S, 2, 5, 4)
    assert (out["boxes"] >= 0).all() and (out["boxes"] <= 1).all(), "boxes are not in [0, 1]"
    train.SetCriterion(model)(out, TARGETS)["total"].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused, f"these parameters take no part: {', '.join(unused)}"
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ALL)
def test_one_image_does_not_see_the_other(name):
    model, (images, mask) = shaken(name).eval(), batch()
    with torch.no_grad():
        before = model(images, mask)
        images[1] = torch.randn_like(images[1]).masked_fill(mask[1], 0)
        after = model(images, mask)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(before[key][:, 0], after[key][:, 0], rtol=0, atol=1e-6)
        assert (before[key][:, 1] - after[key][:, 1]).abs().max() > 1e-3, "these predictions ignore the image"


@pytest.mark.parametrize("name", FILES)
def test_order_of_queries_does_not_matter(name):
    model = shaken(name).eval()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = model(*batch())
        embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        embedding.weight.copy_(embedding.weight[order])
        after = model(*batch())
    for key in ("logits", "boxes"):
        torch.testing.assert_close(before[key][:, :, order], after[key], rtol=0, atol=1e-5)
        assert (before[key] - after[key]).abs().max() > 1e-3, "all queries predict the same"


# One image alone against the same image padded into a larger batch: the largest difference of a logit or a
# coordinate. Behind the backbone DETR and Conditional DETR do not see padding: positions count valid cells,
# attention is masked. Deformable DETR's sampling does not either, but its GroupNorm averages over the padded
# map; without it nothing is left. A real backbone adds a little: its convolutions read what they wrote just
# outside the image's edge.
#
# No test compares whole models with a real backbone: without ImageNet's weights (no test downloads) no
# tolerance tells a right model from a wrong one. Measured with random ResNet-18s and shaken weights behind
# them, as the mean change of logits or boxes by padding (256 x 224 to 384 x 384), divided by that of another
# image:
#                        as it is     mask dropped
#     detr               0.6 to 1.8   2.2 to 7.6
#     conditional_detr   0.4 to 3.6   1.0 to 4.8
#     deformable_detr    0.5 to 1.1   1.0 to 1.4
#     sam_detr           1.1 to 6.0   1.6 to 5.8
# An inverted mask hides the image itself, and test_one_image_does_not_see_the_other fails. A dropped mask is
# found by the first test that follows; the second says which cells of a real backbone padding may change.
def padding_error(model):
    model.eval()
    torch.manual_seed(2)
    images, mask = torch.zeros(2, 3, 192, 192), torch.ones(2, 192, 192, dtype=torch.bool)
    images[0, :, :128, :64], mask[0, :128, :64] = torch.randn(3, 128, 64), False
    images[1], mask[1] = torch.randn(3, 192, 192), False
    with torch.no_grad():
        alone, padded = model(images[:1, :, :128, :64], mask[:1, :128, :64]), model(images, mask)
    return max((alone[key] - padded[key][:, :1]).abs().max().item() for key in ("logits", "boxes"))


@pytest.mark.parametrize("name", [n for n in FILES if n != "sam_detr"])  # test_sam_detr.py has its own
def test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm(name):
    model = shaken(name)
    if name in ("deformable_detr", "sqr"):
        assert padding_error(model) > 1e-3, "GroupNorm no longer sees the padding? Then say so in the README"
        for proj in model.input_proj:
            proj[1] = torch.nn.Identity()
            torch.nn.init.zeros_(proj[0].bias)
    assert padding_error(model) < 1e-5


def test_a_real_backbone_sees_padding_in_the_cells_near_the_images_edge_only():
    """Convolutions at the edge read what they wrote on padding; C3 of ResNet-18 reaches 50 pixels."""
    torch.manual_seed(2)
    backbone = shake(tiny("detr")).backbone.eval()  # the same text in all files
    image = torch.randn(1, 3, 192, 160)
    with torch.no_grad():
        alone = backbone(image)[0]  # [1, C3, 24, 20]
        padded = backbone(torch.nn.functional.pad(image, (0, 96, 0, 64)))[0][..., :24, :20]
    change = (alone - padded).abs().amax((0, 1)) / alone.abs().max()  # [24, 20]
    assert change[:17, :13].max() < 1e-5 and change[23].min() > 1e-5 and change[:, 19].min() > 1e-5


# The backbone is the same text in all files and takes longest: DETR alone compiles a real one.
@pytest.mark.parametrize("name, options", [
    ("detr", {"last_stage": 3}), ("conditional_detr", {}),
    ("deformable_detr", {"two_stage": True, "num_feature_levels": 2}),
    ("sam_detr_multiscale", {"smca": True, "last_stage": 3, "dec_layers": 1}),
    ("conditional_detr_ablations", {"spatial_query": "csq-i", "transform": "block"})])
def test_torch_compile_gives_the_same_numbers_in_one_graph(name, options):
    """SQR's recurrent inference is in test_sqr.py; sam_detr's layers are sam_detr_multiscale's."""
    model, inputs = (tiny if name == "detr" else shaken)(name, **options).eval(), batch()
    with torch.no_grad():
        expected = model(*inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(compiled[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, options", [
    ("conditional_detr", {"dec_layers": 1}),
    ("deformable_detr", {"num_feature_levels": 2, "dec_layers": 1, "enc_points": 1, "dec_points": 2}),
    ("sam_detr", {"smca": True, "dec_layers": 1}),
    ("sqr", {"num_feature_levels": 1, "enc_points": 1, "recurrent": True, "two_stage": True})])
def test_torch_export_takes_any_number_of_images_of_any_size(name, options):
    """What is left: the exported maps have more than one cell, so images more pixels than the largest stride.

    Few levels, layers and points: each takes seconds. DETR, with a real backbone, is in test_export.py.
    """
    model = shaken(name, **options).eval()
    B, H, W = torch.export.Dim("B", max=64), torch.export.Dim("H", min=65), torch.export.Dim("W", min=65)
    sizes = {0: B, 2: H, 3: W}, {0: B, 1: H, 2: W}
    exported = torch.export.export(model, batch(), dynamic_shapes=sizes).module()
    for b, h, w in [(2, 96, 96), (1, 96, 128), (3, 70, 211)]:
        images, mask = torch.randn(b, 3, h, w), torch.zeros(b, h, w, dtype=torch.bool)
        mask[-1, h // 2:] = True
        with torch.no_grad():
            expected, got = model(images, mask), exported(images, mask)
        for key in ("logits", "boxes"):
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, options", AUTOCAST)
def test_bfloat16_autocast_trains(name, options):
    """--amp: matching and losses stay in float32, gradients arrive finite in every parameter."""
    model = tiny(name, backbone_norm="batch", **options).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch())
    losses = train.SetCriterion(model)(out, TARGETS)
    losses["total"].backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


WRONG = [{"backbone_norm": "layer"}, {"backbone": "vgg16"}, {"last_stage": 5}, {"last_stage": True}] + [
    {"nheads": n} for n in (0, -1, 3, 5, 4.0, True)] + [{"hidden_dim": n} for n in (0, -32, 30, 33)] + [
    {"dropout": x} for x in (float("nan"), -0.1, 1.0, "0.1", True)] + [
    {name: n} for name in ("dec_layers", "dim_feedforward", "num_queries") for n in (0, -1, 2.0, True)] + [
    {"enc_layers": -1}, {"dilation": 1}, {"dilation": "False"}, {"pretrained_backbone": "false"}]


@pytest.mark.parametrize("name", ALL)
def test_wrong_values_are_refused_with_a_sentence(name):
    for options in WRONG:
        (option,) = options
        with pytest.raises(ValueError, match="it must be ") as error:
            tiny(name, **options)
        assert option in str(error.value)
    for num_classes in (0, -1, 2.0, "3", True):
        with pytest.raises(ValueError, match="num_classes is .*, it must be"):
            module_named(name).build(num_classes, **TINY)
    with pytest.raises(TypeError, match="num_querys"):
        tiny(name, num_querys=5)
    assert tiny(name, dropout=0).training, "0 is a dropout, too"


@pytest.mark.parametrize("name, options", [
    ("deformable_detr", {"num_feature_levels": 0}), ("deformable_detr", {"enc_points": -1}),
    ("deformable_detr", {"two_stage": "False"}), ("deformable_detr", {"box_refine": 1}),
    ("sam_detr", {"smca": 1}), ("sam_detr", {"input_norm": None}),
    ("sqr", {"recurrent": "true"}), ("sqr", {"recollect": "all"}),
    ("conditional_detr_ablations", {"transform": "diag"}),
    ("conditional_detr_ablations", {"reference": "corner"}),
    ("conditional_detr_ablations", {"spatial_query": "csq-x"})])
def test_wrong_values_of_a_files_own_options_are_refused_with_a_sentence(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=f"{option} is .*, it must be "):
        tiny(name, **options)


@pytest.mark.parametrize("name", ALL)
def test_wrong_inputs_are_refused_with_a_sentence(name):
    model, (images, mask) = tiny(name), batch()
    with pytest.raises(ValueError, match=r"image\[None\]"):
        model(images[0], mask[0])
    with pytest.raises(ValueError, match="must be bool"):
        model(images, mask.float())


@pytest.mark.parametrize("name", FILES)
def test_the_file_alone_in_an_empty_folder_runs(name, tmp_path, monkeypatch, capsys):
    """As `python FILE.py` does there; in this process, because importing torch takes longer than the rest."""
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    for path in ROOT.iterdir():
        monkeypatch.setitem(sys.modules, path.stem, None)  # an import of it fails
    monkeypatch.chdir(tmp_path)
    runpy.run_path(f"{name}.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert "parameters" in printed and "'logits'" in printed


@pytest.mark.parametrize("name", [name for name in ALL if name not in FILES])
def test_a_file_of_relatives_runs_from_any_folder(name, tmp_path, monkeypatch, capsys):
    """It finds its parents itself."""
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if not Path(folder, "detr.py").exists()])
    for parent in FILES:
        monkeypatch.setitem(sys.modules, parent, None)
        monkeypatch.delitem(sys.modules, parent)  # as if it had not been imported
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(ROOT / "relatives" / f"{name}.py"), run_name="__main__")
    assert "parameters" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_frozen_norm_is_torchvisions_and_keeps_the_type_of_its_input(dtype):
    """With --amp: in float32 its maps would take twice the memory, and be copied for the next convolution."""
    ours, theirs = (module.FrozenBatchNorm2d(4) for module in (module_named("detr"), torchvision.ops))
    for buffer in ours.state_dict().values():
        buffer.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 3, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = ours(x)
    assert out.dtype == dtype
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out.float(), theirs(x.float()), rtol=0, atol=tolerance)


@pytest.mark.parametrize("name", FILES)
def test_frozen_norm_keeps_imagenets_first_layers_and_batch_norm_trains_all(name):
    frozen, live = tiny(name), tiny(name, backbone_norm="batch")
    fixed = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert fixed and all(n.startswith(("backbone.body.conv1", "backbone.body.layer1")) for n in fixed)
    assert all(p.requires_grad for p in live.parameters())


# ---- Each paper's claims -----------------------------------------------------------------------------------
def record(modules):
    """A list that fills with (inputs, output) of every call of the modules."""
    calls = []
    for module in modules:
        module.register_forward_hook(lambda m, inputs, output: calls.append((inputs, output)))
    return calls


def test_detrs_first_self_attention_gives_every_query_the_same_vector():
    """Its values are the empty content (USERS.md, quirk 2.1)."""
    model, seen = tiny("detr").eval(), []
    model.decoder.layers[0].self_attn.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        model(*batch())
    torch.testing.assert_close(seen[0], seen[0][:, :1].expand_as(seen[0]))


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "group_detr", "smca_detr"])
def test_reference_points_are_encoded_as_cells_are_with_the_same_temperature(name):
    """DAB-DETR, section 4.5. The first of the second image's 3 x 2 cells is at (x, y) = (1/2, 1/3)."""
    module, model = module_named(name), shaken(name, temperature=20).eval()
    calls = record([model.decoder])
    with torch.no_grad():
        model(*batch())
        (inputs, _), = calls
        y, x = (module.sine(torch.tensor(place), 16, temperature=20) for place in (1 / 3, 1 / 2))
        pos = inputs[{"detr": 2, "smca_detr": 4}.get(name, 3)]
        torch.testing.assert_close(pos[1, 0], torch.cat([y, x]))
        if hasattr(model, "reference"):  # the others encode no points
            query_pos, p_s = inputs[:2]
            s = model.reference(query_pos).sigmoid()
            torch.testing.assert_close(p_s, module.sine_xy(s, 32, temperature=20))


def test_only_conditional_detrs_first_layer_adds_positions_and_has_no_lambda():
    model = shaken("conditional_detr", dec_layers=3).eval()
    layers = model.decoder.layers
    assert [layer.ca_q_pos is not None for layer in layers] == [True, False, False]
    calls = record(layers)
    with torch.no_grad():
        model(*batch())
    p_s = calls[0][0][2]
    for (inputs, _), (_, before) in zip(calls[1:], calls):
        torch.testing.assert_close(inputs[2], model.decoder.query_scale(before) * p_s)


def test_conditional_attention_adds_a_content_and_a_spatial_score_in_every_head():
    """q.k of the concatenation = c_q.c_k + p_q.p_k, head by head: not of one half of the heads each."""
    concat_heads = module_named("conditional_detr").concat_heads
    c_q, p_q, c_k, p_k = torch.randn(4, 1, 7, 32).unbind(0)

    def score(q, k):  # [1, M, 7, 7]
        q, k = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in (q, k))
        return q @ k.mT

    together = score(concat_heads(c_q, p_q, 4), concat_heads(c_k, p_k, 4))
    torch.testing.assert_close(together, score(c_q, c_k) + score(p_q, p_k))


def test_deformable_attention_starts_as_a_uniform_star():
    attention = tiny("deformable_detr", nheads=8, hidden_dim=64).decoder.layers[0].cross_attn
    query, shapes = torch.randn(1, 2, 64), [(8, 8), (4, 4), (2, 2), (1, 1)]
    locations, weights = attention.locations_and_weights(query, torch.full((1, 2, 4, 2), 0.5), shapes)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16))
    # head 0 looks right, head 2 down (y grows downwards), point k is k pixels of its level away
    torch.testing.assert_close(locations[0, 0, 0, 0, :, 0], 0.5 + torch.arange(1, 5) / 8)
    torch.testing.assert_close(locations[0, 0, 2, 1, :, 1], 0.5 + torch.arange(1, 5) / 4)


def test_deformable_sampling_by_hand_written_loops():
    sampling = module_named("deformable_detr").deformable_sampling
    torch.manual_seed(0)
    B, Q, M, K, width, shapes = 2, 3, 2, 2, 4, [(3, 5), (2, 2)]
    value = torch.randn(B, 19, M, width)
    locations, weights = torch.rand(B, Q, M, 2, K, 2) * 1.2 - 0.1, torch.rand(B, Q, M, 2, K)
    expected = torch.zeros(B, Q, M, width)
    for b, q, m, level, k in torch.cartesian_prod(*map(torch.arange, (B, Q, M, 2, K))).tolist():
        h, w = shapes[level]
        # Cell centres are integers
        x, y = (locations[b, q, m, level, k] * torch.tensor([w, h]) - 0.5).tolist()
        for row in range(h):
            for column in range(w):
                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                token = (0, 15)[level] + row * w + column
                expected[b, q, m] += share * weights[b, q, m, level, k] * value[b, token, m]
    ours = sampling(value, shapes, locations, weights)
    torch.testing.assert_close(ours, expected.flatten(2), atol=1e-5, rtol=1e-5)


def test_refinement_cuts_the_gradient_between_layers():
    model = tiny("deformable_detr", box_refine=True, dec_layers=2)
    torch.nn.init.normal_(model.box_head[0].layers[-1].weight)
    model(*batch())["boxes"][1].sum().backward()
    gradient = model.box_head[0].layers[-1].weight.grad
    assert not gradient.any(), "layer 2's box reaches back into layer 1's head"


@pytest.mark.parametrize("name", ["deformable_detr", "sqr"])
def test_two_stages_train_on_maps_with_fewer_tokens_than_queries(name):
    """Each token is one query then; 64 x 64 pixels have 8 x 8 + 4 x 4 + 2 x 2 + 1 = 85 tokens."""
    model = tiny(name, two_stage=True, num_queries=300).train()
    out = model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    assert out["logits"].shape[1:] == (2, 85, 3) and out["boxes"].shape[1:] == (2, 85, 4)
    train.SetCriterion(model)(out, TARGETS)["total"].backward()
    large = model.eval()(torch.randn(1, 3, 128, 160), torch.zeros(1, 128, 160, dtype=torch.bool))
    assert large["boxes"].shape[2] == 300


def padded_tokens(mask):
    """mask [B, 96, 96] at strides 8, 16, 32, 64: [B, T]."""
    resize = module_named("deformable_detr").resize_mask
    return torch.cat([resize(mask, (side, side)).flatten(1) for side in (12, 6, 3, 2)], dim=1)


def test_padded_tokens_propose_the_whole_image_and_only_their_score_keeps_them_from_becoming_queries():
    """They stay among the proposals, and so in the loss, as in the official code."""
    model = shaken("deformable_detr", two_stage=True).eval()
    images, mask = batch()
    with torch.no_grad():
        proposals = model(images, mask)["proposals"]
    padded = padded_tokens(mask)
    assert padded.any()
    assert (proposals["boxes"][padded] == 1).all(), "an infinite logit is the box (1, 1, 1, 1)"
    inside = (proposals["boxes"] < 1).any(-1)
    assert inside.any() and not (inside & padded).any()
    same = proposals["logits"][padded]
    torch.testing.assert_close(same, same[:1].expand_as(same))  # nothing of what padding held is left


def test_a_padded_corner_proposes_nothing_though_its_row_and_column_reach_into_the_image():
    """Below or right of the image an anchor is outside anyway: only here the mask itself must say so."""
    model = shaken("deformable_detr", two_stage=True).eval()
    images, mask = torch.randn(1, 3, 96, 96), torch.zeros(1, 96, 96, dtype=torch.bool)
    mask[:, 64:, 64:] = True
    with torch.no_grad():
        boxes = model(images.masked_fill(mask[:, None], 0), mask)["proposals"]["boxes"]
    padded = padded_tokens(mask)
    assert 0 < padded.sum() < padded.numel() and (boxes[padded] == 1).all() and (boxes[~padded] < 1).any()
