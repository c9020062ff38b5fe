"""Each paper's claims as tests at tiny sizes. Official numbers and gradients are in test_golden.py."""
import itertools
import math

import pytest
import torch

import sam_detr
import sqr
import train
from tiny_models import TARGETS, batch, module_named, quick, shake, shaken, tiny


def record(modules):
    """A list that fills with (inputs, output) of every call of the modules."""
    calls = []
    for module in modules:
        module.register_forward_hook(lambda m, inputs, output: calls.append((inputs, output)))
    return calls


def predict(model):
    with torch.no_grad():
        return model.eval()(*batch())


# ---- DETR and Conditional DETR -----------------------------------------------------------------------------
def test_detrs_first_self_attention_gives_every_query_the_same_vector():
    """Its values are the empty content."""
    model = quick("detr")
    calls = record([model.decoder.layers[0].self_attn])
    predict(model)
    (_, attended), = calls
    torch.testing.assert_close(attended, attended[:, :1].expand_as(attended))


@pytest.mark.parametrize("name", ["detr", "conditional_detr", "group_detr", "smca_detr"])
def test_reference_points_are_encoded_as_cells_are_with_the_same_temperature(name):
    """DAB-DETR, section 4.5. The first of the second image's 3 x 2 cells is at (x, y) = (1/2, 1/3)."""
    module, model = module_named(name), shaken(name, temperature=20)
    calls = record([model.decoder])
    predict(model)
    (inputs, _), = calls
    y, x = (module.sine(torch.tensor(place), 16, temperature=20) for place in (1 / 3, 1 / 2))
    pos = inputs[{"detr": 2, "smca_detr": 4}.get(name, 3)]
    torch.testing.assert_close(pos[1, 0], torch.cat([y, x]))
    if hasattr(model, "reference_head"):  # the others encode no points
        query_pos, p_s = inputs[:2]
        s = model.reference_head(query_pos).sigmoid()
        torch.testing.assert_close(p_s, module.sine_xy(s, 32, temperature=20))


def test_only_conditional_detrs_first_layer_adds_positions_and_has_no_lambda():
    model = shaken("conditional_detr", dec_layers=3)
    layers = model.decoder.layers
    assert [layer.ca_q_pos is not None for layer in layers] == [True, False, False]
    calls = record(layers)
    predict(model)
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


@pytest.mark.parametrize("name, options", [
    ("detr", {"attention": "detr", "offsets": False, "class_loss": "softmax"}), ("conditional_detr", {})])
def test_the_step_from_detr_to_conditional_detr_begins_and_ends_at_these_files(name, options):
    """To the last bit; gradients as sums in another order. Initial values are in test_initialisation.py."""
    files = shaken(name, dropout=0.1), quick("conditional_detr_ablations", dropout=0.1, **options)
    files[1].load_state_dict(files[0].state_dict())
    assert [n for n, _ in files[1].named_parameters()] == [n for n, _ in files[0].named_parameters()]
    outputs = [model.train()(*batch()) for model in files]  # batch() seeds dropout
    losses = [train.SetCriterion(model)(out, TARGETS) for model, out in zip(files, outputs)]
    for one, other in [outputs, losses]:
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for loss in losses:
        loss["total"].backward()
    for (n, one), other in zip(files[0].named_parameters(), files[1].parameters()):
        if one.requires_grad:
            torch.testing.assert_close(other.grad, one.grad, msg=n)


# ---- Deformable DETR ---------------------------------------------------------------------------------------
def test_deformable_attention_starts_as_a_uniform_star():
    attention = module_named("deformable_detr").MSDeformAttn(64, nheads=8, levels=4, points=4)
    attention.reset_parameters()
    query, shapes = torch.randn(1, 2, 64), [(8, 8), (4, 4), (2, 2), (1, 1)]
    locations, weights = attention.locations_and_weights(query, torch.full((1, 2, 4, 2), 0.5), shapes)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 16))
    # head 0 looks right, head 2 down (y grows downwards), point k is k pixels of its level away
    torch.testing.assert_close(locations[0, 0, 0, 0, :, 0], 0.5 + torch.arange(1, 5) / 8)
    torch.testing.assert_close(locations[0, 0, 2, 1, :, 1], 0.5 + torch.arange(1, 5) / 4)


def test_deformable_sampling_by_hand_written_loops():
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
    ours = module_named("deformable_detr").deformable_sampling(value, shapes, locations, weights)
    torch.testing.assert_close(ours, expected.flatten(2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name, options", [("deformable_detr", {"box_refine": True}), ("sam_detr", {})])
def test_refinement_cuts_the_gradient_between_layers(name, options):
    model = quick(name, **options)
    for head in model.box_head:
        torch.nn.init.normal_(head.layers[-1].weight)
    model(*batch())["boxes"][1].sum().backward()
    gradient = model.box_head[0].layers[-1].weight.grad
    assert gradient is None or not gradient.any(), "layer 2's box reaches back into layer 1's head"
    if name == "sam_detr":
        assert not model.query_embed.weight.grad.any(), "sine and RoIAlign carry no gradient to the boxes"


@pytest.mark.parametrize("name", ["deformable_detr", "hdetr"])
def test_two_stages_train_on_maps_with_fewer_tokens_than_queries(name):
    """Each token is one query then; 64 x 64 pixels have 8 x 8 + 4 x 4 + 2 x 2 + 1 = 85 tokens."""
    more = {"num_one2many": 300} if name == "hdetr" else {}
    model = quick(name, two_stage=True, num_queries=60 if more else 300, **more).train()
    out = model(torch.randn(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.bool))
    assert out["logits"].shape[2] + ("one2many" in out and out["one2many"]["logits"].shape[2]) == 85
    train.SetCriterion(model)(out, TARGETS)["total"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_padded_tokens_propose_the_whole_image_and_only_their_score_keeps_them_from_becoming_queries():
    """They stay among the proposals, and so in the loss, as in the official code."""
    model, (images, mask) = shaken("deformable_detr", two_stage=True), batch()
    mask[1, :, 64:] = False  # now image 2 is whole but for a corner: only there the mask itself must exclude
    mask[1, 64:, 64:] = True
    with torch.no_grad():
        proposals = model.eval()(images, mask)["proposals"]
    resize = module_named("deformable_detr").resize_mask
    padded = torch.cat([resize(mask, (side, side)).flatten(1) for side in (12, 6, 3, 2)], dim=1)
    assert padded[1].any() and (proposals["boxes"][padded] == 1).all(), "infinite logits: (1, 1, 1, 1)"
    assert (proposals["boxes"][~padded] < 1).any()
    first = proposals["logits"][padded]
    torch.testing.assert_close(first, first[:1].expand_as(first))  # nothing of what padding held is left


# ---- SAM-DETR ----------------------------------------------------------------------------------------------
def test_multi_scale_goes_from_coarse_to_fine_with_any_number_of_decoder_layers():
    """Two layers on stride 32, two on 16, the rest on 8; the official code stops at 6 layers."""
    model = quick("sam_detr_multiscale", dec_layers=7)
    calls = record(model.decoder.layers)
    predict(model)
    sides = [math.isqrt(inputs[3].shape[1]) for inputs, _ in calls]  # of the square maps that `memory` is
    assert sides == [3, 3, 6, 6, 12, 12, 12]


def test_salient_points_lie_inside_the_reference_box_and_layers_look_into_the_previous_box():
    model = quick("sam_detr", dec_layers=3)
    for layer in model.decoder.layers:
        torch.nn.init.normal_(layer.aligner.point_mlp[-1].weight, std=10)  # far from the centre
    calls = record(layer.aligner for layer in model.decoder.layers)
    out = predict(model)
    initial = model.query_embed.weight.sigmoid().expand(2, -1, -1)
    for (inputs, (_, _, points, _)), box in zip(calls, [initial, *out["boxes"]]):
        assert inputs[1].equal(box), "a layer looks into the box that the previous layer returned"
        offset = (points - box[:, :, None, :2]) / box[:, :, None, 2:]  # [B, Q, M, 2]
        assert (offset.abs() <= 0.5 + 1e-5).all(), "a salient point lies outside its reference box"
        assert (offset.std(2).amax(-1) > 1e-3).all(), "heads look at different points"


def test_points_start_at_the_centre_of_the_box_and_scales_do_not_start_at_zero():
    model = quick("sam_detr", smca=True)
    calls = record(layer.aligner for layer in model.decoder.layers)
    predict(model)
    for (_, reference, *_), (_, _, points, scale) in calls:
        assert points.equal(reference[:, :, None, :2].expand_as(points)) and scale.abs().min() > 0


def aligner_of_open_weights():
    """(aligner, xy): M = 3 heads whose points are fixed at xy [3, 2] in the box; all weights are 1."""
    torch.manual_seed(0)
    aligner = sam_detr.SemanticsAligner(32, 3, temperature=10000, smca=False)
    xy = torch.tensor([[-0.5, 0.25], [0.0, 0.0], [0.8, -0.7]])
    torch.nn.init.zeros_(aligner.point_mlp[-1].weight)
    with torch.no_grad():
        aligner.point_mlp[-1].bias[:6] = xy.atanh().flatten()
        for linear in (aligner.reweight_content, aligner.reweight_position):
            linear.bias.fill_(100)
    return aligner, xy


def test_every_head_takes_the_feature_at_its_own_point():
    """On a map whose features are coordinates of the image, the feature tells where it was taken."""
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


def test_every_head_has_a_whole_query_of_its_own_and_all_have_the_same_key():
    model = shaken("sam_detr")
    calls = record([model.decoder.layers[1].cross_attn])
    predict(model)
    q, k, v = calls[0][0][:3]
    assert (q.shape[-1], k.shape[-1], v.shape[-1]) == (4 * 32, 32, 32)
    q = q.unflatten(-1, (4, 32))  # [B, Q, M, D]
    assert not q.equal(q[:, :, :1].expand_as(q))


def test_padding_changes_sam_detr_only_where_a_box_reaches_over_the_images_edge():
    """There RoIAlign reads the encoder's output on padding."""
    def padding_error():
        with torch.no_grad():
            alone = model(images[:1, :, :128, :64], mask[:1, :128, :64])["boxes"]
            return (alone - model(images, mask)["boxes"][:, :1]).abs().max().item()

    images, mask = torch.randn(2, 3, 192, 192), torch.zeros(2, 192, 192, dtype=torch.bool)
    mask[0, 128:], mask[0, :, 64:] = True, True
    images = images.masked_fill(mask[:, None], 0)
    model = quick("sam_detr", dec_layers=1).eval()
    torch.nn.init.normal_(model.box_head[0].layers[-1].weight)
    torch.nn.init.normal_(model.decoder.layers[0].aligner.point_mlp[-1].weight)  # points leave the centre
    with torch.no_grad():
        model.query_embed.weight.copy_(torch.tensor([0.2, -0.2, 1.0, 1.0]))
        assert padding_error() > 1e-4, "boxes over the edge no longer read padding"
        model.query_embed.weight.copy_(torch.tensor([0.2, -0.2, -2.0, -2.0]))
        assert padding_error() < 1e-5


# ---- SQR ---------------------------------------------------------------------------------------------------
KINDS = pytest.mark.parametrize("kind", [{"box_refine": True}, {"two_stage": True}], ids=str)


def test_groups_are_those_of_the_official_lists():
    """Groups are numbered in order of production, 0 is the initial one."""
    start, end = [0, 0, 1, 2, 4, 7, 12], [1, 2, 4, 7, 12, 20, 33]  # official start_q and end_q

    def fed(source):
        plan = sqr.recollection_plan([(stage, source) for stage in range(7)])
        return [[group for stage, group in plan if stage == i] for i in range(7)]

    assert fed("selective") == [list(range(a, b)) for a, b in zip(start, end)]
    assert fed("dense") == [list(range(2 ** i)) for i in range(7)]
    assert fed("none") == [[i] for i in range(7)]


@pytest.mark.parametrize("training, groups", [
    ({"recollect": "none"}, 6), ({"recollect": "selective"}, 32), ({"recollect": "dense"}, 63),
    ({"recurrent": True}, 63 + 32)], ids=str)
def test_six_stages_supervise_this_many_groups(training, groups):
    model = quick("sqr", dec_layers=6, num_feature_levels=1, **training).train()
    with torch.no_grad():  # gradients do not decide it, self.training does
        out = model(*batch())
    assert out["logits"].shape == (groups, 2, 5, 3) and out["boxes"].shape == (groups, 2, 5, 4)
    assert len(model.eval()(*batch())["logits"]) == 6


def paths(recollect, stages):
    """The stages that each group went through, in order of production; the first one is 1."""
    found = [[*earlier, last] for last in range(1, stages + 1) for n in range(last)
             for earlier in itertools.combinations(range(1, last), n)]
    if recollect == "selective":  # no step is longer than 2, and the initial query is at 0
        found = [p for p in found if all(b - a <= 2 for a, b in zip([0, *p], p))]
    return sorted(found, key=lambda p: [*reversed(p), 0])


def plain(model, path, **kind):
    """Deformable DETR whose decoder has those stages of the model, each with its own heads."""
    with torch.device("meta"):  # all of it is replaced
        alone = tiny("deformable_detr", **kind)
    for name in ("backbone", "input_proj", "level_embed", "encoder", "queries"):
        setattr(alone, name, getattr(model, name))
    alone.decoder.layers = torch.nn.ModuleList(model.decoder.layers[i - 1] for i in path)
    proposals = [len(model.decoder.layers)] if kind.get("two_stage") else []
    for name in ("class_head", "box_head"):
        heads = getattr(model, name)
        setattr(alone, name, torch.nn.ModuleList(heads[i] for i in [i - 1 for i in path] + proposals))
    return alone.train(model.training)


@KINDS
@pytest.mark.parametrize("training", [{"recollect": "selective"}, {"recurrent": True}], ids=str)
def test_every_group_is_deformable_detr_with_the_groups_own_stages(kind, training):
    """Logits, boxes and gradients: own reference boxes, own heads, and nothing leaks from group to group."""
    model, inputs = shaken("sqr", dec_layers=3, **kind, **training), batch()
    expected = paths(training.get("recollect", "dense"), 3)
    if "recurrent" in training:  # dense, and then the last stage on its own outputs
        expected += [p + [3] for p in expected if p[-1] == 3]
    out = model.train()(*inputs)
    assert len(out["logits"]) == len(expected)
    weights = {key: torch.randn_like(out[key]) for key in ("logits", "boxes")}
    sum((out[key] * weights[key]).sum() for key in weights).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    for g, path in enumerate(expected):
        alone = plain(model, path, **kind)(*inputs)
        for key in weights:
            torch.testing.assert_close(out[key][g], alone[key][-1], rtol=0, atol=1e-5)
        sum((alone[key][-1] * weights[key][g]).sum() for key in weights).backward()
    total = sum(grad.norm() ** 2 for grad in gradients.values()) ** 0.5
    for name, p in model.named_parameters():
        if p.grad is not None:
            error = (p.grad - gradients[name]).norm()
            assert error <= 1e-5 * total + 1e-3 * p.grad.norm(), f"gradient of {name} is off by {error:.2e}"


@KINDS
def test_without_recollection_it_is_deformable_detr_bit_for_bit(kind):
    parent, none = (shaken(name, dec_layers=3, dropout=0.1, **kind, **more)
                    for name, more in [("deformable_detr", {}), ("sqr", {"recollect": "none"})])
    none.load_state_dict(parent.state_dict())
    for mode in (True, False):
        torch.manual_seed(3)  # dropout
        expected = parent.train(mode)(*batch())
        torch.manual_seed(3)
        out = none.train(mode)(*batch())
        assert all(out[key].equal(expected[key]) for key in ("logits", "boxes")), f"training={mode}"
        assert out.keys() == expected.keys()


@pytest.mark.parametrize("recollect", ["selective", "dense"])
def test_inference_is_deformable_detrs_bit_for_bit_even_with_gradients(recollect):
    model = shaken("sqr", dec_layers=3, recollect=recollect, box_refine=True).eval()
    out, expected = model(*batch()), plain(model, [1, 2, 3], box_refine=True)(*batch())
    assert out["boxes"].requires_grad and all(out[key].equal(expected[key]) for key in ("logits", "boxes"))


@KINDS
def test_recurrent_inference_repeats_the_last_stage_and_pruning_changes_no_number(kind):
    options = dict(dec_layers=4, recurrent=True, **kind)
    model = shaken("sqr", **options).eval()
    with torch.no_grad():
        out, expected = predict(model), plain(model, [4, 4, 4, 4], **kind)(*batch())
    before = sum(p.numel() for p in model.parameters())
    sqr.prune(model)
    assert sum(p.numel() for p in model.parameters()) < before and len(model.decoder.layers) == 1
    new = quick("sqr", **options)
    sqr.prune(new)
    new.load_state_dict(model.state_dict())
    pruned, loaded = predict(model), predict(new)
    for key in ("logits", "boxes"):
        assert len(out[key]) == 4
        assert out[key].equal(expected[key]) and out[key].equal(pruned[key]) and out[key].equal(loaded[key])
    with pytest.raises(ValueError, match="recurrent=True"):
        sqr.prune(tiny("sqr"))


@pytest.mark.parametrize("source, groups", [("none", 4), ("selective", 11), ("dense", 15)])
def test_recollection_goes_around_the_decoders_of_other_files(source, groups):
    model = shaken("conditional_detr", dec_layers=4)
    decoder = model.decoder
    calls = record([decoder])
    predict(model)
    (query_pos, p_s, *context), hs = calls[0]
    made = [torch.zeros_like(query_pos)]  # the initial group, then what each group became
    for stage, group in sqr.recollection_plan([(stage, source) for stage in range(4)]):
        p_q = p_s if stage == 0 else decoder.query_scale(made[group]) * p_s  # lambda from its input
        made.append(decoder.layers[stage](made[group], query_pos, p_q, *context))
    found = torch.stack([decoder.norm(tgt) for tgt in made[1:]])  # [S, B, Q, D]
    assert found.shape == (groups, 2, 5, 32)
    torch.testing.assert_close(found[-1], hs[-1], rtol=0, atol=1e-5)  # the plain, sequential path


# ---- Group DETR --------------------------------------------------------------------------------------------
def test_group_detr_the_first_group_in_training_is_the_answer_of_inference():
    model = shaken("group_detr", num_groups=3)
    answer, trained = predict(model), model.train()(*batch())
    assert trained["groups"] == 3 and trained["logits"].shape == (6, 2, 5, 3)
    torch.testing.assert_close(trained["logits"][::3], answer["logits"], rtol=0, atol=1e-5)
    assert (trained["logits"][1::3] - answer["logits"]).abs().max() > 1e-3, "the groups are all the same"


def test_group_detr_with_one_group_is_conditional_detr():
    model, parent = quick("group_detr", num_groups=1), shaken("conditional_detr")
    model.load_state_dict(parent.state_dict())
    out, expected = predict(model), predict(parent)
    assert all(out[key].equal(expected[key]) for key in ("logits", "boxes"))


# ---- DAB-DETR ----------------------------------------------------------------------------------------------
def test_dab_detr_a_wide_box_looks_wide():
    """Twice the width halves the x half of the spatial query, the second one, not the y half."""
    positions = shake(module_named("dab_detr").BoxPositions(32))
    tgt, box = torch.randn(1, 1, 32), torch.tensor([[[0.4, 0.6, 0.1, 0.2]]])
    _, narrow = positions(box, tgt)
    _, wide = positions(box * torch.tensor([1, 1, 2, 1]), tgt)
    torch.testing.assert_close(wide[..., :16], narrow[..., :16])
    torch.testing.assert_close(wide[..., 16:], narrow[..., 16:] / 2)


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


@pytest.mark.parametrize("options, stride", [({}, 32), ({"last_stage": 3}, 16), ({"last_stage": 2}, 8)])
def test_smca_centres_are_relative_to_every_images_own_size_at_the_real_stride(options, stride):
    model = quick("smca_detr", **options)
    s, layers = record([model.decoder.reference_head]), record(model.decoder.layers[:1])
    predict(model)
    for b, (h, w) in enumerate([(64, 96), (96, 64)]):
        expected = s[0][1][b].sigmoid() * torch.tensor([w, h]) / stride
        torch.testing.assert_close(layers[0][0][2][b], expected)


# ---- H-DETR ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("two_stage", [True, False])
def test_hdetr_the_two_parts_do_not_see_each_other_and_inference_has_one(two_stage):
    model = shaken("hdetr", two_stage=two_stage)
    answer, out = predict(model), model.train()(*batch())
    assert set(answer) == {"logits", "boxes"} | ({"proposals"} if two_stage else set())
    assert out["one2many"]["logits"].shape == (2, 2, 6, 3)
    assert (out["one2many"]["repeat"], out["one2many"]["weight"]) == (2, 1.0)
    torch.testing.assert_close(out["logits"], answer["logits"], rtol=0, atol=1e-5)
    with torch.no_grad():
        model.queries.query_embed.weight[5:] += 1
    again = model(*batch())
    torch.testing.assert_close(again["logits"], out["logits"], rtol=0, atol=1e-5)
    assert (again["one2many"]["logits"] - out["one2many"]["logits"]).abs().max() > 1e-3


@pytest.mark.parametrize("twice", [True, False])
def test_hdetr_look_forward_twice_reaches_the_previous_box_head_and_no_earlier_one(twice):
    model = shaken("hdetr", dec_layers=3, look_forward_twice=twice).train()
    model(*batch())["boxes"][2].sum().backward()
    reached = [head.layers[-1].weight.grad is not None and bool(head.layers[-1].weight.grad.any())
               for head in model.box_head[:3]]
    assert reached == [False, twice, True]


# ---- AdaMixer ----------------------------------------------------------------------------------------------
def test_adamixer_starts_with_the_whole_image_and_boxes_may_leave_it():
    model = quick("adamixer")
    boxes = predict(model)["boxes"]
    torch.testing.assert_close(boxes, torch.tensor([0.5, 0.5, 1, 1]).expand_as(boxes), rtol=0, atol=1e-5)
    assert not model.init_boxes.weight.requires_grad
    assert (predict(shake(model))["boxes"] > 1).any()
