"""SAM-DETR: what its paper claims (the official numbers are in test_golden.py)."""
import math
from functools import partial

import pytest
import torch

import sam_detr
from golden import our_name
from tiny_models import batch
from tiny_models import tiny as tiny_model

tiny = partial(tiny_model, "sam_detr")


def record(modules):
    """A list that fills with (inputs, output) of every call of the modules."""
    calls = []
    for module in modules:
        module.register_forward_hook(lambda m, inputs, output: calls.append((inputs, output)))
    return calls


def test_heads_and_width_are_not_hard_coded():
    out = tiny(hidden_dim=64, nheads=2, smca=True)(*batch())
    assert out["boxes"].shape == (2, 2, 5, 4)


def test_multi_scale_goes_from_coarse_to_fine_with_any_number_of_decoder_layers():
    """Two layers on stride 32, two on 16, the rest on 8; the official code stops at 6 layers."""
    model = tiny_model("sam_detr_multiscale", dec_layers=7).eval()
    calls = record(model.decoder.layers)
    with torch.no_grad():
        model(*batch())
    sides = [math.isqrt(inputs[3].shape[1]) for inputs, _ in calls]  # of the square maps that `memory` is
    assert sides == [3, 3, 6, 6, 12, 12, 12]
    with torch.no_grad():
        assert tiny_model("sam_detr_multiscale", dec_layers=1)(*batch())["boxes"].shape == (1, 2, 5, 4)


# ---- The paper's claims ------------------------------------------------------------------------------------
def test_salient_points_lie_inside_the_reference_box():
    model = tiny(dec_layers=3).eval()
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.aligner.point_mlp[-1].weight, std=10)  # far from the centre
    calls = record(layer.aligner for layer in model.decoder.layers)
    with torch.no_grad():
        out = model(*batch())
    initial = model.query_embed.weight.sigmoid().expand(2, -1, -1)
    for (inputs, (_, _, points, _)), box in zip(calls, [initial, *out["boxes"]]):
        assert inputs[1].equal(box), "a layer looks into the box that the layer before it returned"
        offset = (points - box[:, :, None, :2]) / box[:, :, None, 2:]  # [B, Q, M, 2]
        assert (offset.abs() <= 0.5 + 1e-5).all(), "a salient point lies outside its reference box"
        assert (offset.std(2) > 1e-3).all(), "heads look at different points"


def test_points_start_at_the_centre_of_the_box_and_scales_do_not_start_at_zero():
    model = tiny(smca=True).eval()
    calls = record(layer.aligner for layer in model.decoder.layers)
    with torch.no_grad():
        model(*batch())
    for (_, reference, *_), (_, _, points, scale) in calls:
        assert points.equal(reference[:, :, None, :2].expand_as(points)) and scale.abs().min() > 0


def aligner_of_open_weights(smca=False):
    """(aligner, xy): M = 3 heads whose points are fixed at xy [3, 2] in the box; all weights are 1."""
    torch.manual_seed(0)
    aligner = sam_detr.SemanticsAligner(32, 3, smca)
    xy = torch.tensor([[-0.5, 0.25], [0.0, 0.0], [0.8, -0.7]])
    torch.nn.init.zeros_(aligner.point_mlp[-1].weight)
    with torch.no_grad():
        aligner.point_mlp[-1].bias[:6] = xy.atanh().flatten()
        for linear in (aligner.reweight_content, aligner.reweight_position):
            linear.bias.fill_(100)
    return aligner, xy


def test_every_head_takes_the_feature_at_its_own_point():
    """On a map whose features are coordinates of the image, what a head takes says where it was taken."""
    aligner, xy = aligner_of_open_weights()
    mask = torch.ones(2, 16, 20, dtype=torch.bool)
    mask[0], mask[1, :12, :15] = False, False
    memory = torch.zeros(2, 16, 20, 32)
    for b, (h, w) in enumerate([(16, 20), (12, 15)]):
        memory[b, ..., 0] = (torch.arange(20) + 0.5) / w
        memory[b, ..., 1] = ((torch.arange(16) + 0.5) / h)[:, None]
    box = torch.tensor([[0.5, 0.5, 0.4, 0.6], [0.4, 0.6, 0.3, 0.2]]).expand(2, -1, -1)
    with torch.no_grad():
        content, position, points, scale = aligner(torch.zeros(2, 2, 32), box, memory.flatten(1, 2), mask)
    expected = box[:, :, None, :2] + xy * box[:, :, None, 2:] / 2  # [B, Q, M, 2]
    torch.testing.assert_close(points, expected)
    torch.testing.assert_close(content[..., :2], expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(position, sam_detr.sine_xy(expected, 32))
    assert scale is None


def test_the_old_query_only_reweighs_what_was_taken():
    aligner, _ = aligner_of_open_weights()
    inputs = torch.rand(1, 2, 4) * 0.5, torch.randn(1, 64, 32), torch.zeros(1, 8, 8, dtype=torch.bool)
    with torch.no_grad():
        content, position, *_ = aligner(torch.zeros(1, 2, 32), *inputs)
        aligner.reweight_content.bias.zero_()
        aligner.reweight_position.bias.zero_()
        tgt = torch.randn(1, 2, 32)
        new_content, new_position, *_ = aligner(tgt, *inputs)
        weight = aligner.reweight_content(tgt).sigmoid().unflatten(-1, (3, 32))  # [B, Q, M, D]
        torch.testing.assert_close(new_content, content * weight)
        weight = aligner.reweight_position(tgt).sigmoid().unflatten(-1, (3, 32))
        torch.testing.assert_close(new_position, position * weight)


def test_every_head_has_a_whole_query_of_its_own_and_all_have_the_same_key():
    model = tiny().eval()
    calls = record([model.decoder.layers[1].cross_attn])
    with torch.no_grad():
        model(*batch())
    q, k, v = calls[0][0][:3]
    assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (4 * 32, 32, 32)
    q = q.unflatten(-1, (4, 32))  # [B, Q, M, D]
    assert not q.equal(q[:, :, :1].expand_as(q))


def test_the_gaussian_of_smca_by_hand_written_loops():
    torch.manual_seed(0)
    mask = torch.ones(2, 3, 4, dtype=torch.bool)
    mask[0], mask[1, :2, :3] = False, False
    points, scale = torch.rand(2, 3, 2, 2), torch.randn(2, 3, 2, 2)  # B = 2, Q = 3, M = 2
    bias = sam_detr.gaussian_bias(points, scale, mask)
    assert bias.shape == (2, 2, 3, 12)
    for b, m, q, i, j in torch.cartesian_prod(*map(torch.arange, (2, 2, 3, 3, 4))).tolist():
        h, w = [(3, 4), (2, 3)][b]
        (x, y), (scale_x, scale_y) = points[b, q, m].tolist(), scale[b, q, m].tolist()
        dx, dy = j + 0.5 - x * w, i + 0.5 - y * h
        expected = -(scale_x ** 2 * dx ** 2 + scale_y ** 2 * dy ** 2) / 8
        assert bias[b, m, q, i * 4 + j].item() == pytest.approx(expected, abs=1e-5)


def test_no_gradient_goes_from_one_layers_box_to_the_previous_one():
    model = tiny()
    for head in model.box_head:
        torch.nn.init.normal_(head.layers[-1].weight)
    model(*batch())["boxes"][1].sum().backward()
    gradient = model.box_head[0].layers[-1].weight.grad
    assert not gradient.any(), "layer 2's box reaches back into layer 1's head"
    assert not model.query_embed.weight.grad.any(), "sine and RoIAlign carry no gradient to the boxes"


def test_padding_changes_nothing_behind_the_backbone_as_long_as_boxes_stay_inside_the_image():
    """RoIAlign reads what the encoder wrote on padding as soon as a box reaches over the image's edge."""
    class Patches(torch.nn.Conv2d):  # a backbone whose cells see their own pixels only
        def forward(self, images):
            return [super().forward(images)]

    def padding_error():
        with torch.no_grad():
            alone = model(images[:1, :, :128, :64], mask[:1, :128, :64])["boxes"]
            return (alone - model(images, mask)["boxes"][:, :1]).abs().max().item()

    images, mask = torch.randn(2, 3, 192, 192), torch.zeros(2, 192, 192, dtype=torch.bool)
    mask[0, 128:], mask[0, :, 64:] = True, True
    images = images.masked_fill(mask[:, None], 0)
    model = tiny(dec_layers=1).eval()
    model.backbone = Patches(3, 512, 32, 32, bias=False)
    torch.nn.init.normal_(model.box_head[0].layers[-1].weight)
    torch.nn.init.normal_(model.decoder.layers[0].aligner.point_mlp[-1].weight)  # points leave the centre
    with torch.no_grad():
        model.query_embed.weight.copy_(torch.tensor([0.2, -0.2, 1.0, 1.0]))
        assert padding_error() > 1e-4, "boxes over the edge no longer read padding? Then say so in the README"
        model.query_embed.weight.copy_(torch.tensor([0.2, -0.2, -2.0, -2.0]))
        assert padding_error() < 1e-5


def test_the_only_convolution_without_input_norm_loads_whatever_its_official_name():
    for name in ("input_proj.weight", "input_proj.0.weight", "input_proj.0.0.weight"):
        assert our_name(sam_detr, name) == "input_proj.0.0.weight"
    assert our_name(sam_detr, "input_proj.0.1.weight") == "input_proj.0.1.weight"  # GroupNorm
