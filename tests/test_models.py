"""What every model file promises beyond the official numbers, at tiny sizes."""
import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train

ROOT = Path(__file__).parents[1]
TINY = dict(backbone="resnet18", pretrained_backbone=False, hidden_dim=32, nheads=4, enc_layers=1, dec_layers=2,
            dim_feedforward=32, dropout=0.0, num_queries=5)
# Options that change what is computed: each must run, train all of its parameters, compile and export.
VARIANTS = {
    "detr": [{}, {"dilation": True}, {"last_stage": 3}],
    "conditional_detr": [{}] + [
        {"spatial_query": form} for form in ("csq-p", "csq-t", "csq-c", "csq-i")] + [
        {"transform": t} for t in ("scalar", "identity", "block", "full")] + [
        {"reference": r} for r in ("learned", "origin")] + [{"dec_layers": 1}],
    "deformable_detr": [{}, {"box_refine": True}, {"two_stage": True}, {"num_feature_levels": 1},
                        {"num_feature_levels": 1, "dilation": True}, {"num_feature_levels": 2, "last_stage": 3},
                        {"num_feature_levels": 5, "enc_points": 2, "dec_points": 3}],
    "sam_detr": [{}, {"smca": True}, {"multiscale": True}, {"multiscale": True, "smca": True},
                 {"input_norm": True}, {"last_stage": 3}, {"multiscale": True, "last_stage": 3}],
    "sqr": [{}, {"recollect": "dense"}, {"box_refine": True}, {"two_stage": True}],
}
FILES = [name for name in train.MODELS if name in VARIANTS]
EVERY = [pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
         for name in FILES for options in VARIANTS[name]]
COMPILED = [v for v in EVERY if v.values[1] in ({}, {"two_stage": True}, {"multiscale": True, "smca": True})]


def tiny(name, **options):
    torch.manual_seed(0)
    return importlib.import_module(name).build(3, **{**TINY, **options})


def batch():
    """Two images of 64 x 96 and 96 x 64 pixels, padded to 96 x 96."""
    torch.manual_seed(1)
    images, mask = torch.zeros(2, 3, 96, 96), torch.ones(2, 96, 96, dtype=torch.bool)
    for b, (h, w) in enumerate([(64, 96), (96, 64)]):
        images[b, :, :h, :w] = torch.randn(3, h, w)
        mask[b, :h, :w] = False
    return images, mask


TARGETS = [{"labels": torch.tensor([0, 2]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.6, 0.5, 0.4]])},
           {"labels": torch.zeros(0, dtype=torch.int64), "boxes": torch.zeros(0, 4)}]


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


@pytest.mark.parametrize("name", FILES)
def test_one_image_does_not_see_the_other(name):
    model, (images, mask) = tiny(name).eval(), batch()
    with torch.no_grad():
        before = model(images, mask)["boxes"][:, 0]
        images[1] = torch.randn_like(images[1]).masked_fill(mask[1], 0)
        after = model(images, mask)["boxes"][:, 0]
    torch.testing.assert_close(before, after, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", FILES)
def test_order_of_queries_does_not_matter(name):
    model = tiny(name).eval()
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        before = model(*batch())
        embedding = next(m for m in model.modules() if isinstance(m, torch.nn.Embedding))
        embedding.weight.copy_(embedding.weight[order])
        after = model(*batch())
    for key in ("logits", "boxes"):
        torch.testing.assert_close(before[key][:, :, order], after[key], rtol=0, atol=1e-5)


class Patches(torch.nn.Module):
    """A backbone without overlap: cells see their own pixels only, so nothing leaks over the image's edge."""

    def __init__(self, channels):
        super().__init__()
        strides = [8, 16, 32][:len(channels)]
        self.convs = torch.nn.ModuleList(torch.nn.Conv2d(3, c, s, s, bias=False) for c, s in zip(channels, strides))

    def forward(self, images):
        return [conv(images) for conv in self.convs]


# One image alone against the same image padded into a larger batch: the largest difference of any box coordinate.
# Behind the backbone DETR and Conditional DETR do not see padding: positions count valid cells, attention is masked.
# Deformable DETR's sampling does not either, but its GroupNorm averages over the padded map; without it nothing is left.
# A real backbone adds a little for all of them: its convolutions read what they wrote just outside the image's edge.
def padding_error(model):
    model.eval()
    torch.manual_seed(2)
    images, mask = torch.zeros(2, 3, 192, 192), torch.ones(2, 192, 192, dtype=torch.bool)
    images[0, :, :128, :64], mask[0, :128, :64] = torch.randn(3, 128, 64), False
    images[1], mask[1] = torch.randn(3, 192, 192), False
    with torch.no_grad():
        alone = model(images[:1, :, :128, :64], mask[:1, :128, :64])["boxes"]
        padded = model(images, mask)["boxes"][:, :1]
    return (alone - padded).abs().max().item()


@pytest.mark.parametrize("name", [n for n in FILES if n != "sam_detr"])  # test_sam_detr.py has its own
def test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm(name):
    model = tiny(name)
    torch.nn.init.normal_(model.decoder.layers[0].ffn.linear1.weight)  # so that queries depend on the image
    model.backbone = Patches(model.backbone.channels)
    if name in ("deformable_detr", "sqr"):
        torch.nn.init.normal_(model.box_head[0].layers[-1].weight)
        assert padding_error(model) > 1e-5, "GroupNorm no longer sees the padding? Then say so in the README"
        for proj in model.input_proj:
            proj[1] = torch.nn.Identity()
            torch.nn.init.zeros_(proj[0].bias)
    elif name == "conditional_detr":
        torch.nn.init.normal_(model.box_head.layers[-1].weight)
    assert padding_error(model) < 1e-5


@pytest.mark.parametrize("name", FILES)
def test_padding_changes_little_with_a_real_backbone(name):
    assert padding_error(tiny(name)) < 0.05


@pytest.mark.parametrize("name, options", COMPILED)
def test_torch_compile_gives_the_same_numbers_in_one_graph(name, options):
    model, inputs = tiny(name, **options).eval(), batch()
    with torch.no_grad():
        expected = model(*inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(compiled[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, options", COMPILED)
def test_torch_export_gives_the_same_numbers(name, options):
    model, inputs = tiny(name, **options).eval(), batch()
    exported = torch.export.export(model, inputs).module()
    with torch.no_grad():
        expected, got = model(*inputs), exported(*inputs)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name, options", COMPILED)
def test_bfloat16_autocast_trains(name, options):
    """--amp: matching and losses stay in float32, gradients arrive finite in every parameter."""
    model = tiny(name, backbone_norm="batch", **options).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(*batch())
    losses = train.SetCriterion(model)(out, TARGETS)
    losses["total"].backward()
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", FILES)
def test_wrong_values_are_refused_with_a_sentence(name):
    for options, message in [({"backbone_norm": "layer"}, "backbone_norm"), ({"backbone": "vgg16"}, "resnet50"),
                             ({"last_stage": 5}, "last_stage")]:
        with pytest.raises(ValueError, match=message):
            tiny(name, **options)
    with pytest.raises(TypeError, match="num_querys"):
        tiny(name, num_querys=5)
    model, (images, mask) = tiny(name), batch()
    with pytest.raises(ValueError, match=r"images\[None\]|image\[None\]"):
        model(images[0], mask[0])
    with pytest.raises(ValueError, match="must be bool"):
        model(images, mask.float())


@pytest.mark.parametrize("name", FILES)
def test_the_file_alone_in_an_empty_folder_runs(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    done = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "parameters" in done.stdout and "'logits'" in done.stdout


@pytest.mark.parametrize("name", FILES)
def test_frozen_norm_keeps_imagenets_first_layers_and_batch_norm_trains_all(name):
    frozen, live = tiny(name), tiny(name, backbone_norm="batch")
    fixed = {n for n, p in frozen.named_parameters() if not p.requires_grad}
    assert fixed and all(n.startswith(("backbone.body.conv1", "backbone.body.layer1")) for n in fixed)
    assert all(p.requires_grad for p in live.parameters())


# ---- Each paper's claims ---------------------------------------------------------------------------------------------
def test_detrs_first_self_attention_gives_every_query_the_same_vector():
    """Its values are the empty content (USERS.md, quirk 2.1)."""
    model, seen = tiny("detr").eval(), []
    model.decoder.layers[0].self_attn.register_forward_hook(lambda m, i, o: seen.append(o))
    with torch.no_grad():
        model(*batch())
    torch.testing.assert_close(seen[0], seen[0][:, :1].expand_as(seen[0]))


def test_only_conditional_detrs_first_layer_adds_positions_and_has_no_lambda():
    layers = tiny("conditional_detr", dec_layers=3).decoder.layers
    assert [layer.ca_q_pos is not None for layer in layers] == [True, False, False]
    query = importlib.import_module("conditional_detr").SpatialQuery(32, 4, "csq", "diagonal")
    p_s, f = torch.randn(1, 5, 32), torch.randn(1, 5, 32)
    assert query(p_s, f, f, first=True).equal(p_s)
    torch.testing.assert_close(query(p_s, f, f, first=False), query.scale(f) * p_s)


def test_conditional_attention_adds_a_content_and_a_spatial_score_in_every_head():
    """q.k of the concatenation = c_q.c_k + p_q.p_k, head by head: not of one half of the heads each."""
    concat_heads = importlib.import_module("conditional_detr").concat_heads
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
    sampling = importlib.import_module("deformable_detr").deformable_sampling
    torch.manual_seed(0)
    B, Q, M, K, width, shapes = 2, 3, 2, 2, 4, [(3, 5), (2, 2)]
    value = torch.randn(B, 19, M, width)
    locations, weights = torch.rand(B, Q, M, 2, K, 2) * 1.2 - 0.1, torch.rand(B, Q, M, 2, K)
    expected = torch.zeros(B, Q, M, width)
    for b, q, m, level, k in torch.cartesian_prod(*map(torch.arange, (B, Q, M, 2, K))).tolist():
        h, w = shapes[level]
        x, y = (locations[b, q, m, level, k] * torch.tensor([w, h]) - 0.5).tolist()  # cell centres are integers
        for row in range(h):
            for column in range(w):
                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                token = (0, 15)[level] + row * w + column
                expected[b, q, m] += share * weights[b, q, m, level, k] * value[b, token, m]
    torch.testing.assert_close(sampling(value, shapes, locations, weights), expected.flatten(2), atol=1e-5, rtol=1e-5)


def test_refinement_cuts_the_gradient_between_layers():
    model = tiny("deformable_detr", box_refine=True, dec_layers=2)
    torch.nn.init.normal_(model.box_head[0].layers[-1].weight)
    model(*batch())["boxes"][1].sum().backward()
    assert not model.box_head[0].layers[-1].weight.grad.any(), "layer 2's box reaches back into layer 1's head"


def test_two_stages_never_choose_a_padded_token_over_a_better_one():
    """Invalid tokens become the box (1, 1, 1, 1); they stay in the proposals, as officially."""
    model = tiny("deformable_detr", two_stage=True).eval()
    with torch.no_grad():
        boxes = model(*batch())["proposals"]["boxes"]
    outside = (boxes == 1).all(-1)
    assert outside[0].any() and not outside.all()
