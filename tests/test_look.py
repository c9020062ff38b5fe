"""What look() returns are the model's own numbers; what a Scene says of them; which picture fits a model."""
import functools

import numpy as np
import pytest
import torch

import deformable_detr
from support import attention_pictures
from support.look import CannotDraw, Scene, look, quiet_training
from tests.tiny_models import batch, tiny

CASES = [("detr", ""), ("conditional_detr", ""), ("deformable_detr", ""), ("deformable_detr", "two_stage"),
         ("sam_detr", "smca"), ("sam_detr_multiscale", ""), ("sqr", "box_refine")]  # name, option that is on
every_case = pytest.mark.parametrize("name, option", CASES)


@functools.cache
def run(name, option=""):
    """(model, inputs and output of each module without look(), out, seen) on two padded images."""
    model, calls = tiny(name, **{option: True} if option else {}).eval(), {}
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
@every_case
def test_looking_changes_no_number_and_leaves_no_hook(name, option):
    model, calls, out, seen = run(name, option)
    _, expected = calls[""]
    assert out["logits"].equal(expected["logits"]) and out["boxes"].equal(expected["boxes"])
    assert seen and not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError):
        look(model, *(x[0] for x in batch()))
    assert not any(module._forward_hooks for module in model.modules()), "a failed run left its hooks behind"


@every_case
def test_attention_weights_are_those_that_the_module_used(name, option):
    model, calls, _, seen = run(name, option)
    assert layers(model, "Attention")
    for part, module in layers(model, "Attention").items():
        (q, k, v, *rest), output = calls[part]
        weights = seen[part]["weights"]
        assert weights.shape == (2, 4, q.shape[1], k.shape[1])  # [B, M, Q, T]
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3]))
        if rest:
            assert not weights.masked_select(rest[0][:, None, None]).any(), f"{part} attends to padding"
        mixed = weights @ v.unflatten(-1, (4, -1)).transpose(1, 2)  # [B, M, Q, D/M]
        with torch.no_grad():
            again = module.out_proj(mixed.transpose(1, 2).flatten(2))
        torch.testing.assert_close(again, output, rtol=0, atol=1e-5)


def test_conditional_attention_is_the_product_of_its_content_and_spatial_maps():
    _, calls, out, seen = run("conditional_detr")
    p_q, p_k = (calls[f"decoder.layers.1.{part}"][1].unflatten(-1, (4, -1)).transpose(1, 2)  # [B, M, ., D/M]
                for part in ("ca_q_sine", "ca_k_pos"))
    padding = calls["decoder.layers.1.cross_attn"][0][3][:, None, None]
    expected = (p_q @ p_k.mT / 16 ** 0.5).masked_fill(padding, -torch.inf).softmax(-1)
    torch.testing.assert_close(seen["decoder.layers.1.cross_attn"]["spatial"], expected)
    for part, arrays in seen.items():
        assert ("spatial" in arrays) == part.endswith("cross_attn")
        if "spatial" in arrays:
            both = arrays["content"] * arrays["spatial"]
            both = both / both.sum(-1, keepdim=True)
            torch.testing.assert_close(both, arrays["weights"], rtol=1e-4, atol=1e-6)
    # The untrained box head adds nothing yet, so that boxes still sit on their reference points
    torch.testing.assert_close(seen["reference"]["reference"], out["boxes"][-1, ..., :2])


@pytest.mark.parametrize("name, option", CASES[2:4] + CASES[5:])
def test_sampling_points_and_weights_are_those_that_the_module_used(name, option):
    model, calls, _, seen = run(name, option)
    sampling = deformable_detr.deformable_sampling
    assert layers(model, "MSDeformAttn")
    for part, module in layers(model, "MSDeformAttn").items():
        (query, reference, value, shapes, mask), output = calls[part]
        (B, Q, _), (M, L, K) = query.shape, module.shape
        found = seen[part]
        assert found["locations"].shape == (B, Q, M, L, K, 2) and found["weights"].shape == (B, Q, M, L, K)
        assert found["reference"].equal(reference) and found["shapes"].tolist() == [list(s) for s in shapes]
        torch.testing.assert_close(found["weights"].sum((-2, -1)), torch.ones(B, Q, M))
        with torch.no_grad():
            value = module.value_proj(value).masked_fill(mask[..., None], 0).unflatten(-1, (M, -1))
            again = module.output_proj(sampling(value, shapes, found["locations"], found["weights"]))
        torch.testing.assert_close(again, output, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name, option", [("sam_detr", "smca"), ("sam_detr_multiscale", "")])
def test_salient_points_lie_inside_the_reference_box(name, option):
    _, _, out, seen = run(name, option)
    first, second = (seen[f"decoder.layers.{i}.aligner"] for i in range(2))
    assert first["points"].shape == (2, 5, 4, 2) and ("scale" in first) == (option == "smca")
    centre, wh = first["reference"][:, :, None].chunk(2, dim=-1)  # [B, Q, 1, 2]
    assert ((first["points"] - centre).abs() <= wh / 2 + 1e-6).all()
    assert second["reference"].equal(out["boxes"][0]), "layer 2 starts from the boxes of layer 1"


def test_of_a_recurrent_stage_the_last_run_is_kept():
    _, calls, _, seen = run("sqr", "recurrent")  # calls keep the last run, too
    found = [part for part in seen if part.startswith("decoder") and part.endswith("self_attn")]
    assert found == ["decoder.layers.1.self_attn"]
    q, k, _ = (x.unflatten(-1, (4, -1)).transpose(1, 2) for x in calls[found[0]][0])
    torch.testing.assert_close(seen[found[0]]["weights"], (q @ k.mT / 8 ** 0.5).softmax(-1))


# ---- A Scene -----------------------------------------------------------------------------------------------
def scene_of(model, logits, boxes, seen):
    """A Scene of one image of 64 x 96 pixels from what a model returns for it."""
    scores, labels = logits[:, 0].sigmoid().max(-1)
    image, boxes = torch.zeros(3, 64, 96), boxes[:, 0]
    return Scene(None, (64, 96), image, list("abc"), [], scores, labels, boxes, seen, 0.3)


def test_fading_is_a_higher_iou_and_a_higher_score_for_the_same_object():
    true = torch.tensor([0.0, 0, 10, 10])
    boxes = torch.tensor([[[0.0, 0, x, 10]] for x in (9, 9, 9, 6, 7)])  # [S, Q, 4], one query
    scores, labels = torch.tensor([0.9, 0.3, 0.9, 0.9, 0.5])[:, None], torch.tensor([0, 0, 1, 0, 0])[:, None]

    def fading(truth):
        scene = Scene(None, (10, 10), None, ["cat", "dog"], truth, scores, labels, boxes, {}, 0.3)
        return scene.fading_positives(0)

    found, iou, better = fading([("dog", true), ("cat", true)])
    assert found is true and iou.tolist() == pytest.approx([0.9, 0.9, 0.9, 0.6, 0.7])
    # Stage 2 was less sure, stage 3 said dog, stage 4 had a worse box
    assert better.tolist() == [True, False, False, False, False]
    for nothing in [], [("dog", true)], [("cat", true + 8)]:
        found, iou, better = fading(nothing)
        assert found is None and not iou.any() and not better.any()


def test_a_token_is_found_where_its_cell_is():
    scene = Scene(None, (640, 960), torch.zeros(3, 64, 96), [], [], None, None, None, {}, 0.3)
    assert scene.map_size(24) == (4, 6) and scene.map_size(6) == (2, 3)  # strides 16 and 32
    assert scene.token_at(torch.tensor([959.0, 0]), (4, 6)) == 5
    assert scene.token_at(torch.tensor([2000.0, 330]), (4, 6)) == 17  # a box may reach over the edge
    with pytest.raises(CannotDraw, match="23 tokens"):
        scene.map_size(23)


# ---- What a file of another method can show ----------------------------------------------------------------
class Attention(torch.nn.Module):
    """It has the name and the arguments of ours."""
    nheads = 2

    def forward(self, q, k, v, mask=None, bias=None):
        return v


class Sampler(torch.nn.Module):
    def forward(self, query):
        return 2 * query

    def look(self, output, query):
        return {"samples": output - query}


class Method(torch.nn.Module):
    """A method that nobody knows: what its decoder does, what training adds."""
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


def picture_of(model):
    """(what draws the picture of a model, the figure)."""
    image = torch.zeros(1, 3, 64, 96)
    out, seen = look(model.eval(), image, image[:, 0] > 1)
    scene = scene_of(model, out["logits"], out["boxes"], seen)
    scene.photo, scene.size = torch.zeros(64, 96, 3).numpy(), (64, 96)
    scene.boxes = scene.boxes * torch.tensor([48.0, 32, 96, 64])
    scene.boxes[..., 2:] += scene.boxes[..., :2]
    return attention_pictures.choose(model, scene), attention_pictures.draw_look(model, scene)


def test_a_class_of_the_same_name_that_takes_something_else_is_left_alone():
    class Attention(torch.nn.Module):
        def forward(self, images, mask):
            return images

    out, seen = look(Attention(), torch.ones(2), None)
    assert out.sum() == 2 and not seen


def test_a_bias_is_shown_as_the_prior_that_it_is():
    torch.manual_seed(0)
    q, k = torch.randn(1, 3, 8), torch.randn(1, 24, 8)
    bias, mask = -torch.rand(1, 2, 3, 24), torch.zeros(1, 24, dtype=torch.bool)
    model = Method(Attention(), q, k, k, mask, bias)
    seen = look(model, torch.zeros(1, 3, 64, 96), None)[1]["decoder.part"]
    torch.testing.assert_close(seen["prior"], bias.exp())
    both = seen["content"] * seen["prior"]
    torch.testing.assert_close(both / both.sum(-1, keepdim=True), seen["weights"])
    draw, figure = picture_of(model)
    assert draw is attention_pictures.draw_prior
    assert "prior, head 2" in [axes.get_title() for axes in figure.axes]


def test_a_bias_of_self_attention_is_no_picture():
    q, bias = torch.randn(1, 24, 8), torch.rand(1, 2, 24, 24)
    with pytest.raises(CannotDraw, match="encoder"):
        picture_of(Method(Attention(), q, q, q, None, bias))


def test_a_module_may_say_itself_what_it_looked_at():
    samples = torch.rand(1, 3, 2, 4, 3)
    model = Method(Sampler(), samples)
    _, seen = look(model, torch.zeros(1, 3, 64, 96), None)
    assert list(seen) == ["decoder.part"] and seen["decoder.part"]["samples"].equal(samples)
    draw, figure = picture_of(model)
    assert draw is attention_pictures.draw_samples
    dots = figure.axes[0].collections[0].get_offsets()
    assert dots[0].tolist() == pytest.approx((samples[0, 0, 0, 0, :2] * torch.tensor([96, 64])).tolist())


def test_a_model_that_shows_nothing_is_told_so():
    with pytest.raises(CannotDraw, match="Method has no decoder that shows any of samples, points"):
        picture_of(Method(torch.nn.Identity(), torch.zeros(1)))


# ---- Which picture -----------------------------------------------------------------------------------------
EXPECTED = [("detr", "", "draw_attention"), ("conditional_detr", "", "draw_spatial"),
            ("deformable_detr", "", "draw_sampling"), ("sam_detr", "smca", "draw_salient_points"),
            ("sqr", "", "draw_stages")]


@pytest.mark.parametrize("name, option, expected", EXPECTED)
def test_what_a_model_shows_decides_what_is_drawn(name, option, expected):
    model = tiny(name, **{option: True} if option else {}).eval()
    image = torch.zeros(1, 3, 64, 96)
    out, seen = look(model, image, image[:, 0] > 1)
    renamed = type("MyOwn", (type(model),), {})
    model.__class__ = renamed  # somebody's own file
    draw = attention_pictures.choose(model, scene_of(model, out["logits"], out["boxes"], seen))
    assert draw.__name__ == expected
    assert not any(module.training for module in model.modules()), "drawing left the model in training"


def test_sqr_without_recollection_is_drawn_as_what_it_is():
    model = tiny("sqr", recollect="none").eval()
    image = torch.zeros(1, 3, 64, 96)
    out, seen = look(model, image, image[:, 0] > 1)
    draw = attention_pictures.choose(model, scene_of(model, out["logits"], out["boxes"], seen))
    assert draw is attention_pictures.draw_sampling


def test_the_key_of_all_levels_fits_below_a_single_query():
    model, image = tiny("deformable_detr", num_feature_levels=3).eval(), torch.zeros(1, 3, 64, 96)
    out, seen = look(model, image, image[:, 0] > 1)
    scene = scene_of(model, out["logits"], out["boxes"], seen)
    scene.photo, scene.threshold = np.zeros((64, 96, 3), np.uint8), 1
    figure = attention_pictures.draw_sampling(scene)
    figure.draw_without_rendering()
    key = figure.legends[0].get_window_extent()
    assert len(figure.legends[0].get_texts()) == 4 and key.x0 > 0 and key.x1 < figure.bbox.width


def test_groups_and_one_to_many_queries_are_drawn_beside_each_other():
    many = {"logits": torch.full((1, 1, 4, 3), -9.0), "boxes": torch.full((1, 1, 4, 4), 0.5)}
    many["logits"][..., :3, 0] = 2  # three of four queries say what the best query says, at its place
    for training, titles in [
            ({"one2many": many}, ["one-to-one: 2 x a", "one-to-many: 3 x a", "one-to-one: 1 x b",
                                  "one-to-many: 0 x b"]),
            ({"groups": 2, "stages": 2}, ["group 1: 2 x a", "group 2: 2 x a", "group 1: 1 x b",
                                          "group 2: 1 x b"])]:
        _, figure = picture_of(Method(torch.nn.Identity(), torch.zeros(1), **training))
        assert [axes.get_title() for axes in figure.axes] == titles


def test_training_for_a_picture_is_without_noise_and_leaves_no_trace():
    model = tiny("detr", dropout=0.5, backbone_norm="batch").eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = model(*batch())
    with torch.no_grad(), quiet_training(model):
        assert model.training and model.decoder.training
        out = model(*batch())
    assert out["boxes"].equal(expected["boxes"])
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert not any(module.training for module in model.modules())
