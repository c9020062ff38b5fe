"""What look() returns are the model's own numbers; the command as somebody types it, mistakes included."""
import argparse
import functools
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden import Case, assert_close
from PIL import Image
from test_golden import options_of
from test_models import TINY, batch, tiny

import train
import visualize
from support.images import DataError
from support.shapes import SHAPE_NAMES

ROOT = Path(__file__).parents[1]
EXPECTED = {"detr": "draw_attention", "conditional_detr": "draw_spatial", "deformable_detr": "draw_sampling",
            "sam_detr": "draw_salient_points", "sqr": "draw_stages"}


CASES = [("detr", ""), ("conditional_detr", ""), ("deformable_detr", ""), ("deformable_detr", "two_stage"),
         ("sam_detr", "smca"), ("sam_detr", "multiscale"), ("sqr", "box_refine")]  # name, option that is on
every_case = pytest.mark.parametrize("name, option", CASES)


@functools.cache
def run(name, option=""):
    """(model, inputs and output of each module without look(), out, seen) of a tiny model on two padded images."""
    model, calls = tiny(name, **{option: True} if option else {}).eval(), {}
    hooks = [module.register_forward_hook(lambda m, i, o, part=part: calls.__setitem__(part, (i, o)))
             for part, module in model.named_modules()]
    with torch.no_grad():
        model(*batch())
    for hook in hooks:
        hook.remove()
    return model, calls, *visualize.look(model, *batch())


def layers(model, kind):
    return {part: module for part, module in model.named_modules() if type(module).__name__ == kind}


# ---- Arrays ------------------------------------------------------------------------------------------------
@every_case
def test_looking_changes_no_number_and_leaves_no_hook(name, option):
    model, calls, out, seen = run(name, option)
    _, expected = calls[""]
    assert out["logits"].equal(expected["logits"]) and out["boxes"].equal(expected["boxes"])
    assert seen and not any(module._forward_hooks for module in model.modules())
    with pytest.raises(ValueError):
        visualize.look(model, *(x[0] for x in batch()))
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
            torch.testing.assert_close(both / both.sum(-1, keepdim=True), arrays["weights"], rtol=1e-4, atol=1e-6)
    # The untrained box head adds nothing yet, so that boxes still sit on their reference points
    torch.testing.assert_close(seen["reference"]["points"], out["boxes"][-1, ..., :2])


@pytest.mark.parametrize("name, option", CASES[2:4] + CASES[5:])
def test_sampling_points_and_weights_are_those_that_the_module_used(name, option):
    model, calls, _, seen = run(name, option)
    sampling = importlib.import_module(name).deformable_sampling
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


@pytest.mark.parametrize("option", ["smca", "multiscale"])
def test_salient_points_lie_inside_the_reference_box(option):
    _, _, out, seen = run("sam_detr", option)
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


# ---- Which picture, and what it is drawn from --------------------------------------------------------------
@pytest.mark.parametrize("name, expected", EXPECTED.items())
def test_the_classes_in_a_model_decide_what_is_drawn(name, expected, monkeypatch):
    drawn = []
    for key, draw in visualize.PICTURES.items():
        monkeypatch.setitem(visualize.PICTURES, key, lambda scene, draw=draw: drawn.append(draw.__name__))
    model = run(*next(case for case in CASES if case[0] == name))[0]
    visualize.draw_looks(model, None)
    mine = torch.nn.Sequential(*model.children())  # somebody's own model with the same parts
    visualize.draw_looks(mine, None)
    assert drawn == [expected, "draw_sampling" if name == "sqr" else expected]


def test_a_class_of_the_same_name_that_takes_something_else_is_left_alone():
    class Attention(torch.nn.Module):
        def forward(self, images, mask):
            return images

    out, seen = visualize.look(Attention(), torch.ones(2), None)
    assert out.sum() == 2 and not seen


def test_fading_is_a_higher_iou_and_a_higher_score_for_the_same_object():
    true = torch.tensor([0.0, 0, 10, 10])
    boxes = torch.tensor([[[0.0, 0, x, 10]] for x in (9, 9, 9, 6, 7)])  # [S, Q, 4], one query
    scores, labels = torch.tensor([0.9, 0.3, 0.9, 0.9, 0.5])[:, None], torch.tensor([0, 0, 1, 0, 0])[:, None]

    def fading(truth):
        return visualize.Scene(None, (10, 10), ["cat", "dog"], truth, scores, labels, boxes, {}, 0.3).fading(0)

    found, iou, better = fading([("dog", true), ("cat", true)])
    assert found is true and iou.tolist() == pytest.approx([0.9, 0.9, 0.9, 0.6, 0.7])
    # Stage 2 was less sure, stage 3 said dog, stage 4 had a worse box
    assert better.tolist() == [True, False, False, False, False]
    for nothing in [], [("dog", true)], [("cat", true + 8)]:
        found, iou, better = fading(nothing)
        assert found is None and not iou.any() and not better.any()


def test_a_token_is_found_where_its_cell_is():
    image = visualize.Scene(torch.zeros(3, 64, 96), (640, 960), [], [], None, None, None, {}, 0.3)
    assert image.map_size(24) == (4, 6) and image.map_size(6) == (2, 3)  # strides 16 and 32
    assert image.token_at(torch.tensor([959.0, 0]), (4, 6)) == 5
    assert image.token_at(torch.tensor([2000.0, 330]), (4, 6)) == 17  # a box may reach over the edge
    with pytest.raises(visualize.CannotDraw, match="23 tokens"):
        image.map_size(23)


# ---- The command -------------------------------------------------------------------------------------------
FIXED = '''
import torch
RECIPE = dict(class_loss="focal")

class Fixed(torch.nn.Module):
    """The same three answers for every image: two of class 1, one of them hardly, and one of class 0."""
    recipe = RECIPE

    def forward(self, images, mask):
        logits = torch.tensor([[-9.0, 2.0], [-9.0, -4.0], [0.0, -9.0]]).expand(1, len(images), 3, 2)
        boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 1, 1], [0.25, 0.25, 0.5, 0.5]])
        return {"logits": logits, "boxes": boxes.expand(1, len(images), 3, 4)}

def build(num_classes, **options):
    return Fixed()
'''


def save(path, model, state, options=None, names=("cat", "dog"), **args):
    """A checkpoint as train.py writes it."""
    defaults = vars(train.make_parser().parse_args([]))
    torch.save({"model": state, "args": {**defaults, "model": str(model), **args}, "model_options": options or {},
                "class_names": list(names), "category_ids": list(range(len(names)))}, path)
    return str(path)


@pytest.fixture
def fixed(tmp_path, monkeypatch):
    """A checkpoint of the model above, in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    Path("fixed.py").write_text(FIXED)
    return save("best.pt", tmp_path / "fixed.py", {}, size=64)


def test_predictions_on_an_image_and_a_folder_arrive_in_pixels_of_the_original(fixed, capsys):
    Path("folder").mkdir()
    Image.new("RGB", (200, 100)).save("one.jpg")
    Image.new("RGB", (50, 80)).save("folder/two.PNG")
    Path("folder/notes.txt").write_text("no image")
    visualize.main(["--weights", fixed, "one.jpg", "folder", "--json", "all.json", "--out", "a/b", "--attention"])
    half, sure = 0.5, pytest.approx(0.8808)
    assert json.loads(Path("all.json").read_text()) == [
        {"file": "one.jpg", "label": "dog", "score": sure, "box_xyxy": [80, 30, 120, 70]},
        {"file": "one.jpg", "label": "cat", "score": half, "box_xyxy": [0, 0, 100, 50]},
        {"file": "folder/two.PNG", "label": "dog", "score": sure, "box_xyxy": [20, 24, 30, 56]},
        {"file": "folder/two.PNG", "label": "cat", "score": half, "box_xyxy": [0, 0, 25, 40]}]
    assert sorted(p.name for p in Path("a/b").iterdir()) == ["one-predictions.png", "two-predictions.png"]
    assert capsys.readouterr().out.count("Only predictions can be drawn") == 1
    visualize.main(["--weights", fixed, "one.jpg", "--json", "few.json", "--threshold", "0.6"])
    assert [p["label"] for p in json.loads(Path("few.json").read_text())] == ["dog"]
    assert Path("pictures/one-predictions.png").exists()


def test_images_of_the_same_name_do_not_overwrite_each_other(fixed):
    for folder in "ab":
        Path(folder).mkdir()
        Image.new("RGB", (40, 40)).save(f"{folder}/x.png")
    visualize.main(["--weights", fixed, "a", "b"])
    assert sorted(p.name for p in Path("pictures").iterdir()) == ["x-0-predictions.png", "x-1-predictions.png"]


@pytest.mark.parametrize("name", EXPECTED)
def test_every_method_gets_its_pictures_from_a_checkpoint_alone(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    _, option = case = next(case for case in CASES if case[0] == name)
    options = {**TINY, option: True} if option else TINY
    path = save("best.pt", name, run(*case)[0].state_dict(), options, SHAPE_NAMES[:3])
    visualize.main(["--weights", path, "--attention", "--count", "1", "--threshold", "0.9"])
    for kind in "predictions", "attention":
        assert min(Image.open(f"pictures/shapes-0-{kind}.png").size) > 200


def test_held_out_images_of_a_folder_and_own_files_are_prepared_alike(tmp_path):
    (tmp_path / "val").mkdir()
    Image.effect_noise((90, 60), 50).convert("RGB").save(tmp_path / "val/x.png")
    content = {"images": [{"id": 7, "file_name": "x.png"}], "categories": [{"id": 1, "name": "cat"}],
               "annotations": [{"image_id": 7, "category_id": 1, "bbox": [1, 2, 30, 40]}]}
    (tmp_path / "annotations").mkdir()
    for split in "train", "val":
        (tmp_path / f"annotations/instances_{split}.json").write_text(json.dumps(content))
    for preset in "laptop", "paper":
        args = {"data": str(tmp_path), "preset": preset, "size": None, **dict.fromkeys(
            ("train_json", "train_images", "val_json", "val_images"))}
        (image, target), = visualize.held_out(args, None, 4)
        own, nothing = visualize.own_images([tmp_path / "val/x.png"], args)[0]
        assert own.equal(image) and nothing["size"] == target["size"] == (60, 90) and len(target["labels"]) == 1
        assert image.shape[1:] == {"laptop": (170, 256), "paper": (800, 1200)}[preset]


def test_images_have_the_size_that_the_model_was_trained_with():
    args = {"data": None, "train_json": None, "size": None, "preset": "paper"}
    assert visualize.trained_size(args) == visualize.trained_size({**args, "data": "shapes"}) == 96
    assert visualize.trained_size({**args, "data": "x"}) == visualize.trained_size({**args, "train_json": "x"}) == 800
    assert visualize.trained_size({**args, "data": "x", "preset": "laptop"}) == 256
    assert visualize.trained_size({"size": 224, "preset": "laptop"}) == 224


def test_official_weights_give_the_official_boxes(tmp_path):
    case = Case("deformable_detr")
    torch.save({"model": case.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "official.pth")
    flags = ["--init", str(tmp_path / "official.pth"), "--model", "deformable_detr"]
    flags += [f"--option={k}={json.dumps(v)}" for k, v in options_of(case.json["case"]["args"], {}).items()]
    model, names, _ = visualize.load_model(visualize.make_parser().parse_args(flags))
    assert names == [f"class {i}" for i in range(case.json["case"]["num_classes"])]
    assert_close("boxes", visualize.look(model, *case.batch())[0]["boxes"], case.arrays["boxes"], "boxes")
    with pytest.raises(SystemExit, match="needs an --option: .*Missing key"):
        visualize.load_model(visualize.make_parser().parse_args([*flags, "--option=enc_layers=9"]))


def test_the_class_head_tells_how_many_classes_official_weights_have():
    def names(softmax, rows, head="class_embed.weight"):
        return visualize.official_names({"model": {head: torch.zeros(rows, 4)}}, softmax)

    assert names(False, 3) == names(True, 4) == ["class 0", "class 1", "class 2"]
    assert names(False, 91, "class_embed.0.weight") == names(True, 92)
    assert names(True, 92)[1] == "person" and names(True, 92)[90] == "toothbrush"


def one_line(flags):
    """The message that main() ends with."""
    with pytest.raises((SystemExit, DataError)) as error:
        visualize.main(flags)
    message = str(error.value)
    assert "\n" not in message and len(message) < 400
    return message


def test_mistakes_end_in_one_line_that_names_them(fixed, capsys):
    Path("empty").mkdir()
    Path("bad.jpg").write_text("no image")
    assert "nothing.pt: no such checkpoint" in one_line(["--weights", "nothing.pt"])
    assert "nothing.jpg: no such image" in one_line(["--weights", fixed, "nothing.jpg"])
    assert "bad.jpg" in one_line(["--weights", fixed, "bad.jpg"])
    assert "empty: no images in this folder" in one_line(["--weights", fixed, "empty"])
    assert "bad.jpg: not a readable checkpoint" in one_line(["--init", "bad.jpg", "--model", "detr", "bad.jpg"])
    torch.save({"model": {}}, "other.pth")
    assert "not official weights" in one_line(["--init", "other.pth", "--model", "detr", "bad.jpg"])
    assert "unknown.py: no such file" in one_line(["--weights", fixed, "--model", "unknown.py"])
    assert "of another model" in one_line(["--weights", save("other.pt", "detr", {}, TINY)])
    assert "no such folder" in one_line(["--weights", save("gone.pt", Path("fixed.py"), {}, data="gone")])
    for flags, message in [([], "--weights --init"), (["--init", "x.pth"], "--init needs --model")]:
        one_line(flags)
        assert message in capsys.readouterr().err
    done = subprocess.run([sys.executable, ROOT / "visualize.py", "--weights", fixed, "bad.jpg"],
                          capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and done.stderr.startswith("data: bad.jpg") and done.stderr.count("\n") == 1
