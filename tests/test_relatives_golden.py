"""The files in relatives/ compute what the official code computes, with its weights on the same images."""
import pytest
import torch

import train
from golden import RELATIVES, Case, assert_close, options_of, our_name
from tiny_models import module_named

LOSS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
ADAMIXER_LOSS = {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}
# What the official parsers have where a case does not say otherwise; our defaults are those of the scripts
PARSER = {
    "hdetr": {"two_stage": False, "box_refine": False, "mixed_selection": False, "look_forward_twice": False,
              "num_one2many": 0},
    "group_detr": {"num_groups": 1},
}


@pytest.fixture(scope="module", params=RELATIVES)
def run(request):
    """The case, our module and model, and what one evaluation and one training step gave."""
    file, extra = RELATIVES[request.param]
    case, module = Case(request.param), module_named(file)
    options = options_of(case.json["case"]["args"], extra)
    model = module.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    module.load_official(model, {"model": case.state_dict()})
    inside = {}

    def keep(name):
        return lambda part, inputs, output: inside.setdefault(name, []).append(output)

    hooks = [part.register_forward_hook(keep(name)) for name, part in model.named_modules() if name]
    images, mask = case.batch()
    with torch.no_grad():
        out = model.eval()(images, mask)
    for hook in hooks:
        hook.remove()
    criterion = train.SetCriterion(model)
    train_out = model.train()(images, mask)
    losses = criterion(train_out, case.targets())
    losses["total"].backward()
    return dict(case=case, file=file, module=module, model=model, mask=mask, out=out, inside=inside,
                criterion=criterion, train_out=train_out, losses=losses)


def test_logits_and_boxes_of_every_layer(run):
    arrays = run["case"].arrays
    for key in ("logits", "boxes"):
        assert_close(key, run["out"][key], arrays[key], key)
        trained = arrays.get(f"train_{key}", arrays[key])
        assert_close(f"{key} in training", run["train_out"][key].detach(), trained, key)
    assert set(run["out"]) <= {"logits", "boxes", "proposals"}, "no groups in inference, no second part"


def test_the_second_part_and_the_proposals(run):
    arrays, out, stored = run["case"].arrays, run["train_out"], run["case"].json.get("one2many")
    assert ("one2many" in out) == (stored is not None) and ("proposals" in out) == ("enc_logits" in arrays)
    if stored is not None:
        assert (out["one2many"]["repeat"], out["one2many"]["weight"]) == (stored["repeat"], stored["weight"])
    for part, prefix in (("one2many", "one2many"), ("proposals", "enc")):
        for key in ("logits", "boxes") if part in out else ():
            assert_close(f"{part} {key}", out[part][key].detach(), arrays[f"{prefix}_{key}"], key)


def test_what_the_decoder_is_given_and_returns(run):
    arrays, inside, file = run["case"].arrays, run["inside"], run["file"]
    decoded = inside["decoder"][0]
    if file == "adamixer":
        assert_close("places", decoded[1], arrays["xyzr"], "xyzr")
        for level, feature_map in enumerate(inside["input_norm"]):
            assert_close(f"map {level}", feature_map[:, ::16], arrays[f"map_{level}"], "map")
        return
    assert_close("decoder output", decoded[0] if isinstance(decoded, tuple) else decoded, arrays["hs"], "hs")
    tokens, unpadded = arrays["memory_slice_token"], arrays["memory_slice_unpadded"].bool()
    memory = inside["encoder"][0][:, tokens, :16]
    assert_close("memory", memory[unpadded], arrays["memory_slice"][unpadded], "memory_slice")


def test_references_offsets_and_scales(run):
    arrays, inside, file = run["case"].arrays, run["inside"], run["file"]
    if file == "group_detr":
        assert_close("reference", inside["reference"][0].sigmoid(), arrays["reference"], "reference")
    elif file == "smca_detr":
        assert_close("centre", inside["decoder.reference"][0].sigmoid(), arrays["reference"], "reference")
        for name in [name for name in ("offset", "scale") if f"head_{name}" in arrays]:
            layers = [inside[f"decoder.layers.{i}.gaussian.{name}"][0] for i in range(3)]
            ours = torch.stack(layers).unflatten(-1, (8, -1))  # [L, B, Q, M, .]
            assert_close(name, ours, arrays[f"head_{name}"], f"head_{name}")
    elif file == "hdetr":
        initial = inside["queries"][0][2]
        assert_close("first reference", initial, arrays["train_init_reference"], "init_reference")
        if run["model"].decoder.box_refine:
            assert_close("references", run["out"]["boxes"], arrays["inter_references"], "inter_references")
        best = arrays.get("enc_topk")
        if best is not None:
            logits = run["out"]["proposals"]["logits"][..., 0]
            assert logits.topk(best.shape[1], dim=1).indices.equal(best.long()), "other tokens become queries"


def test_matching_of_every_stage(run):
    stored, out, targets = run["case"].json, run["train_out"], run["case"].targets()
    for stage, match in enumerate(run["criterion"].match(out["logits"], out["boxes"], targets)):
        ours = [sorted(zip(q.tolist(), g.tolist())) for q, g in match]
        assert ours == [sorted(zip(*pair)) for pair in stored["matching"][str(stage)]], f"stage {stage}"
    if "one2many" not in out:
        return
    many, repeat = out["one2many"], out["one2many"]["repeat"]
    copies = [{"labels": t["labels"].repeat(repeat), "boxes": t["boxes"].repeat(repeat, 1)} for t in targets]
    for stage, match in enumerate(run["criterion"].match(many["logits"], many["boxes"], copies)):
        ours = [sorted(zip(q.tolist(), (g % len(t["labels"])).tolist())) for (q, g), t in zip(match, targets)]
        official = stored["matching_one2many"][str(stage)]
        assert ours == [sorted(zip(*pair)) for pair in official], f"stage {stage}, one to many"


def test_every_loss_term_and_the_total(run):
    stored, losses = run["case"].json, run["losses"]
    for part in ("class", "l1", "giou"):
        stages = len(losses[part])
        assert stages == 3, "groups are averaged"
        for s in range(stages):
            if run["file"] == "adamixer":
                official = stored["loss_raw"][f"stage{s}_{ADAMIXER_LOSS[part]}"]
            else:
                official = stored["loss_raw"][LOSS[part] if s == stages - 1 else f"{LOSS[part]}_{s}"]
            assert_close(f"{part} of stage {s}", losses[part][s].detach(), official, "loss")
            name = f"{LOSS[part]}_one2many" if s == stages - 1 else f"{LOSS[part]}_{s}_one2many"
            if name in stored["loss_raw"]:  # these are times lambda
                ours = run["train_out"]["one2many"]["weight"] * losses[f"one2many_{part}"][s].detach()
                assert_close(f"{part} of stage {s}, one to many", ours, stored["loss_raw"][name], "loss")
        if f"{LOSS[part]}_enc" in stored["loss_raw"]:
            official = stored["loss_raw"][f"{LOSS[part]}_enc"]
            proposal = losses[f"proposal_{part}"][0].detach()
            assert_close(f"{part} of the proposals", proposal, official, "loss")
    assert_close("total", losses["total"].detach(), stored["loss_total"], "loss")


def test_gradient_norm_of_every_parameter(run):
    """Forward passes can agree while a detach is missing: gradients tell."""
    stored, model = run["case"].json, run["model"]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    total = stored["grad_l2_total"]
    for name, norm in stored["grad_l2"].items():
        if norm is None:  # trained by name only: AdaMixer's first boxes
            continue
        ours = gradients.pop(our_name(run["module"], name)).double().norm().item()
        limit = 1e-6 * total + 0.002 * norm
        assert abs(ours - norm) <= limit, f"gradient of {name}: {ours:.6g}, not {norm:.6g}"
    assert not gradients, f"trained here but not in the official code: {', '.join(gradients)}"


def test_load_official_refuses_what_it_does_not_know(run):
    with pytest.raises(RuntimeError, match="mystery"):
        run["module"].load_official(run["model"], {"model": {"mystery.weight": torch.zeros(1)}})


@pytest.mark.parametrize("file", sorted({file for file, _ in RELATIVES.values()}))
def test_parameter_counts_at_the_papers_size(file):
    for variant, stored in Case(f"params_{file}").json["counts"].items():
        options = {**PARSER.get(file, {}), **options_of(stored["options"], {})}
        with torch.device("meta"):  # shapes only
            model = module_named(file).build(stored["num_classes"], pretrained_backbone=False, **options)
        # mmdet counts scale and shift of batch norm, which are no parameters where they are frozen
        wanted = stored.get("n_params_without_batch_norm", stored["n_params"])
        assert sum(p.numel() for p in model.parameters()) == wanted, variant
        if "n_params_trainable" in stored:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert trained == stored["n_params_trainable"], variant
