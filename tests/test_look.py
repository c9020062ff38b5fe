"""Arrays of look() are the model's own numbers; numbers of a Scene; the picture that fits a model."""
import functools

import numpy as np
import pytest
import torch

import deformable_detr
from support import UserError
from support.attention_pictures import draw_look, outputs_of_training
from support.evaluation import boxes_to_pixels
from support.pictures import Scene
from support.predict import best_class, look
from tests.tiny_models import batch, module_named, tiny

CASES = [("detr", ""), ("conditional_detr", ""), ("deformable_detr", ""), ("deformable_detr", "two_stage"),
         ("sam_detr", "smca"), ("sam_detr_multiscale", ""), ("dab_detr", ""), ("adamixer", "")]


@functools.cache
def run(name, option=""):
    """(model, inputs and output of each module without look(), out, seen) on two padded images."""
    layers = int(name != "adamixer")  # which has no encoder
    model, calls = tiny(name, enc_layers=layers, **{option: True} if option else {}).eval(), {}
    hooks = [module.register_forward_hook(lambda m, i, o, part=part: calls.__setitem__(part, (i, o)))
             for part, module in model.named_modules()]
    with torch.no_grad():
        model(*batch())
    for hook in hooks:
        hook.remove()
    return model, calls, *look(model, *batch())


def layers(model, kind):
    return {part: module for part, module in model.named_modules() if type(module).__name__.endswith(kind)}


# ---- Arrays ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, option", CASES)
def test_looking_changes_no_number_and_leaves_no_hook(name, option):
    model, calls, out, seen = run(name, option)
    _, expected = calls[""]
    assert out["logits"].equal(expected["logits"]) and out["boxes"].equal(expected["boxes"])
    assert seen and not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name, option", CASES)
def test_attention_weights_are_those_that_the_module_used(name, option):
    model, calls, _, seen = run(name, option)
    assert layers(model, "Attention")
    for part, module in layers(model, "Attention").items():
        (q, k, v, *rest), output = calls[part]
        weights = seen[part]["weights"]
        assert weights.shape == (2, 4, q.shape[1], k.shape[1])  # [B, M, Q, T]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        if rest and rest[0] is not None:
            assert not weights.masked_select(rest[0][:, None, None]).any(), f"{part} attends to padding"
        mixed = weights @ v.unflatten(-1, (4, -1)).transpose(1, 2)  # [B, M, Q, D/M]
        with torch.no_grad():
            again = module.out_proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, output, rtol=0, atol=1e-5)


def test_conditional_attention_is_the_product_of_its_content_and_spatial_maps():
    _, calls, out, seen = run("conditional_detr")
    arrays = seen["decoder.layers.1.cross_attn"]
    p_q, p_k = (calls[f"decoder.layers.1.{part}"][1].unflatten(-1, (4, -1)).transpose(1, 2)  # [B, M, ., D/M]
                for part in ("ca_q_sine", "ca_k_pos"))
    padding = calls["decoder.layers.1.cross_attn"][0][3][:, None, None]
    expected = (p_q @ p_k.mT / 16 ** 0.5).masked_fill(padding, -torch.inf).softmax(-1)
    torch.testing.assert_close(arrays["spatial"], expected)
    both = arrays["content"] * arrays["spatial"]
    torch.testing.assert_close(both / both.sum(-1, keepdim=True), arrays["weights"], rtol=1e-4, atol=1e-6)
    # The untrained box head adds nothing yet, so boxes still sit on their reference points
    torch.testing.assert_close(seen["reference_head"]["reference"], out["boxes"][-1, ..., :2])


@pytest.mark.parametrize("name, option", CASES[2:4] + CASES[5:6])
def test_sampling_points_and_weights_are_those_that_the_module_used(name, option):
    model, calls, _, seen = run(name, option)
    assert layers(model, "MSDeformAttn")
    for part, module in layers(model, "MSDeformAttn").items():
        (query, reference, value, shapes, mask), output = calls[part]
        found = seen[part]
        assert found["locations"].shape[:3] == found["weights"].shape[:3] == (*query.shape[:2], 4)
        assert found["reference"].equal(reference) and found["shapes"].tolist() == [list(s) for s in shapes]
        with torch.no_grad():
            value = module.value_proj(value).masked_fill(mask[..., None], 0).unflatten(-1, (4, -1))
            again = module.output_proj(deformable_detr.deformable_sampling(
                value, shapes, found["locations"], found["weights"]))
        torch.testing.assert_close(again, output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, option", CASES[4:6])
def test_salient_points_lie_inside_the_reference_box(name, option):
    _, _, out, seen = run(name, option)
    first, second = (seen[f"decoder.layers.{i}.aligner"] for i in range(2))
    assert first["points"].shape == (2, 5, 4, 2)
    centre, wh = first["reference"][:, :, None].chunk(2, dim=-1)  # [B, Q, 1, 2]
    assert ((first["points"] - centre).abs() <= wh / 2 + 1e-6).all()
    assert second["reference"].equal(out["boxes"][0]), "layer 2 starts from the boxes of layer 1"


def test_adamixer_samples_lie_where_its_sampler_reads():
    sampler = module_named("adamixer").Sampler(8, 1, 16)
    x = (torch.arange(24.0) + 0.5) * 4  # [w], of a map of 96 x 64 pixels whose value is x itself
    maps, tgt = [x.expand(1, 8, 16, 24)], torch.randn(1, 3, 8)
    xyzr = torch.tensor([40.0, 32, 4, 0]).expand(1, 3, 4)
    model = Method(sampler, tgt, xyzr, maps, [4])
    output = sampler(tgt, xyzr, maps, [4])[..., 0]  # [B, Q, G, P]
    samples = look(model, None, None)[1]["decoder.part"]["samples"]
    torch.testing.assert_close(samples[..., 0] * 96, output.detach(), rtol=0, atol=1e-3)


def test_dab_detr_refines_the_box_that_look_returns():
    _, _, out, seen = run("dab_detr")
    assert seen["decoder.box_positions"]["reference"].equal(out["boxes"][0]), "of layer 2, the last one"


# ---- A Scene -----------------------------------------------------------------------------------------------
def scene_of(model, threshold=0.3):
    """A Scene of a black image of 64 x 96 pixels."""
    image = torch.zeros(1, 3, 64, 96)
    out, seen = look(model.eval(), image, image[:, 0] > 1)
    scores, labels = best_class(model, out["logits"][:, 0], 3)
    boxes = boxes_to_pixels(out["boxes"][:, 0], (64, 96))
    photo = np.zeros((64, 96, 3), np.uint8)
    return Scene(photo, (64, 96), image[0], list("abc"), [], scores, labels, boxes, seen, threshold)


def test_fading_is_a_higher_iou_and_a_higher_score_for_the_same_object():
    true = torch.tensor([0.0, 0, 10, 10])
    boxes = torch.tensor([[[0.0, 0, x, 10]] for x in (9, 9, 9, 6, 7)])  # [S, Q, 4], one query
    scores, labels = torch.tensor([0.9, 0.3, 0.9, 0.9, 0.5])[:, None], torch.tensor([0, 0, 1, 0, 0])[:, None]

    def fading(truth):
        scene = Scene(None, (10, 10), None, ["cat", "dog"], truth, scores, labels, boxes, {}, 0.3)
        return scene.fading_positives(0)

    found, iou, better = fading([("dog", true), ("cat", true)])
    assert found is true and iou.tolist() == pytest.approx([0.9, 0.9, 0.9, 0.6, 0.7])
    # Stage 2 had a lower score, stage 3 predicted dog, stage 4 had a worse box
    assert better.tolist() == [True, False, False, False, False]
    found, iou, better = fading([("cat", true + 8)])
    assert found is None and not iou.any() and not better.any()


def test_a_token_is_found_where_its_cell_is():
    scene = Scene(None, (640, 960), torch.zeros(3, 64, 96), [], [], None, None, None, {}, 0.3)
    assert scene.map_size(24) == (4, 6) and scene.map_size(6) == (2, 3)  # strides 16 and 32
    assert scene.token_at(torch.tensor([959.0, 0]), (4, 6)) == 5
    assert scene.token_at(torch.tensor([2000.0, 330]), (4, 6)) == 17  # a box may reach over the edge
    with pytest.raises(UserError, match="23 tokens"):
        scene.map_size(23)


# ---- Files of other methods --------------------------------------------------------------------------------
class Attention(torch.nn.Module):
    """It has the name and the arguments of ours, and one more."""
    nheads = 2

    def forward(self, q, k, v, mask=None, bias=None, extra=None):
        return v


class Method(torch.nn.Module):
    """A method that nobody knows: one module in its decoder, and additional outputs in training."""
    recipe = {"class_loss": "focal"}

    def __init__(self, part, *inputs, **training):
        super().__init__()
        self.decoder, self.inputs, self.extra = torch.nn.ModuleDict({"part": part}), inputs, training

    def forward(self, images, mask):
        self.decoder["part"](*self.inputs)
        stages = self.extra.get("stages", 1) if self.training else 1
        extra = {k: v for k, v in self.extra.items() if k != "stages" and self.training}
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.25, 0.25, 0.2, 0.2], [0.52, 0.5, 0.5, 0.5]])
        logits = torch.tensor([[3.0, -9, -9], [-9, 1, -9], [1, -9, -9]])
        return {"logits": logits.expand(stages, 1, 3, 3), "boxes": boxes.expand(stages, 1, 3, 4), **extra}


def titles(model):
    """Titles of the panels in the picture of a model."""
    return [axes.get_title() for axes in draw_look(model, scene_of(model)).axes]


def test_a_class_of_the_same_name_with_other_arguments_is_left_alone():
    class Attention(torch.nn.Module):
        def forward(self, images, mask):
            return images

    out, seen = look(Attention(), torch.ones(2), None)
    assert out.sum() == 2 and not seen


def test_a_bias_is_drawn_as_a_prior():
    torch.manual_seed(0)
    q, k = torch.randn(1, 3, 8), torch.randn(1, 24, 8)
    bias, mask = -torch.rand(1, 2, 3, 24), torch.zeros(1, 24, dtype=torch.bool)
    model = Method(Attention(), q, k, k, mask, bias)
    seen = look(model, None, None)[1]["decoder.part"]
    torch.testing.assert_close(seen["prior"], bias.exp())
    both = seen["content"] * seen["prior"]
    torch.testing.assert_close(both / both.sum(-1, keepdim=True), seen["weights"])
    assert "prior, head 2" in titles(model)


def test_a_bias_of_self_attention_is_no_picture():
    q, bias = torch.randn(1, 24, 8), torch.rand(1, 2, 24, 24)
    with pytest.raises(UserError, match="encoder"):
        titles(Method(Attention(), q, q, q, None, bias))


def test_a_model_without_a_known_module_cannot_be_drawn():
    with pytest.raises(UserError, match="Method has no decoder that shows any of samples, points"):
        titles(Method(torch.nn.Identity(), torch.zeros(1)))


def test_groups_and_one_to_many_queries_are_drawn_next_to_each_other():
    many = {"logits": torch.full((1, 1, 4, 3), -9.0), "boxes": torch.full((1, 1, 4, 4), 0.5)}
    many["logits"][..., :3, 0] = 2  # three of four queries predict the same as the best query
    assert titles(Method(torch.nn.Identity(), torch.zeros(1), one2many=many)) == [
        "one-to-one: 2 x a", "one-to-many: 3 x a", "one-to-one: 1 x b", "one-to-many: 0 x b"]
    assert titles(Method(torch.nn.Identity(), torch.zeros(1), groups=2, stages=2)) == [
        "group 1: 2 x a", "group 2: 2 x a", "group 1: 1 x b", "group 2: 1 x b"]


# ---- Which picture -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("name, options, title", [
    ("detr", {}, "Attention of the last layers"),
    ("conditional_detr", {}, "attention by the spatial and content product"),
    ("dab_detr", {}, "attention by the spatial and content product"),
    ("smca_detr", {}, "the Gaussian, attention by content"),
    ("deformable_detr", {"num_feature_levels": 3}, "Where the last layers of encoder"),
    ("sam_detr", {"smca": True}, "a salient point for each head"),
    ("sqr", {}, "The same query at every stage"),
    ("sqr", {"recollect": "none"}, "Where the last layers of encoder"),
    ("group_detr", {}, "Which queries claim an object"),
    ("hdetr", {}, "Which queries claim an object"),
    ("adamixer", {"enc_layers": 0}, "at which scale, a query samples"),
    ("sqr_adamixer", {}, "The same query at every stage"),
    ("dn_detr", {}, "Boxes with noise"),
    ("dino", {}, "Boxes with noise"),
])
def test_every_method_gets_the_picture_of_its_paper(name, options, title):
    model = tiny(name, **options)
    model.__class__ = type("MyOwn", (type(model),), {})  # somebody's own file
    assert title in draw_look(model, scene_of(model, threshold=0.01)).get_suptitle()
    assert not any(module.training for module in model.modules()), "drawing left the model in training"


def test_training_for_a_picture_is_without_noise_and_leaves_no_trace():
    model = tiny("detr", dropout=0.5, backbone_norm="batch").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    scene = scene_of(model)
    out, _ = outputs_of_training(model, scene)
    assert boxes_to_pixels(out["boxes"][:, 0], (64, 96)).equal(scene.boxes)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
