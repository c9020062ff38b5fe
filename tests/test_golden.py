"""Every model computes what the official code computes, with the official weights on the same images."""
from types import SimpleNamespace

import pytest
import torch

import train
from golden import ALONE, CASES, FOLDER, SIZES, Case, assert_close, options_of, our_name
from tiny_models import module_named

LOSS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}
ADAMIXER_LOSS = {"class": "loss_cls", "l1": "loss_bbox", "giou": "loss_iou"}


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """The case, its model, and the results of one evaluation and one training step."""
    file, extra = CASES[request.param]
    case, module = Case(request.param), module_named(file)
    with torch.device("meta"):  # no initial numbers: all are loaded
        model = module.build(case.json["case"]["num_classes"], pretrained_backbone=False,
                             **options_of(case.json["case"]["args"], extra))
    model.to_empty(device="cpu")
    module.load_official(model, {"model": case.state_dict()})
    inside = {}
    hooks = [part.register_forward_hook(
                lambda m, inputs, output, name=name: inside.setdefault(name, []).append(output))
             for name, part in model.named_modules() if name and not name.startswith("backbone.")]
    images, mask = case.batch()
    with torch.no_grad():
        out = model.eval()(images, mask)
    for hook in hooks:
        hook.remove()
    criterion = train.SetCriterion(model)
    inputs = (images, mask, case.targets()) if criterion.denoising else (images, mask)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "draw_noise", lambda *how: case.noise(), raising=False)
        train_out = model.train()(*inputs)
    losses = criterion(train_out, case.targets())
    losses["total"].backward()
    return dict(case=case, file=file, module=module, model=model, mask=mask, out=out, inside=inside,
                criterion=criterion, train_out=train_out, losses=losses)


def every_stage(criterion, logits, boxes, targets):
    """The matching of every stage as sorted [(query, object), ...] per image."""
    found = criterion.match(logits, boxes, targets)
    return [[sorted(zip(q.tolist(), g.tolist())) for q, g in images] for images in found]


def pairs(stored):
    return [sorted(zip(*pair)) for pair in stored]


def test_logits_and_boxes_of_every_layer_in_evaluation_and_in_training(run):
    arrays, out, trained = run["case"].arrays, run["out"], run["train_out"]
    for key in ("logits", "boxes"):
        assert_close(key, out[key], arrays[key], key)
        field = f"train_{key}" if f"train_{key}" in arrays else key
        assert_close(f"{key} in training", trained[key].detach(), arrays[field], field)
    assert set(out) <= {"logits", "boxes", "proposals"}, "inference has neither groups nor a second part"


def test_masks_and_positions_of_every_feature_map(run):
    case, module, file = run["case"], run["module"], run["file"]
    origin = ("detr", "conditional", "group", "dab", "smca", "dn", "dino")
    offset = 0 if case.json["case"]["repo"] in origin else 0.5
    temperature = 20 if file in ("dab_detr", "dn_detr", "dino") else 10000
    for level in range(sum(name.startswith("mask_") for name in case.arrays)):
        stored = case.arrays[f"mask_{level}"].bool()
        mask = module.resize_mask(run["mask"], stored.shape[-2:])
        assert mask.equal(stored), f"the padding mask of feature map {level} is not the nearest neighbour's"
        pos = module.sine_positions(mask, 256, offset, temperature)[..., ::17][..., :16]  # stored channels
        pos = pos.unflatten(1, mask.shape[1:]).permute(0, 3, 1, 2)  # [B, 16, h, w]
        inside = ~mask[:, None].expand_as(pos)
        assert_close(f"positions of level {level}", pos[inside], case.arrays[f"pos_{level}"][inside], "pos")


def test_encoder_and_decoder_outputs(run):
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
    arrays, inside, file, out = run["case"].arrays, run["inside"], run["file"], run["out"]
    if "init_reference" in arrays:  # Deformable DETR and its children
        field = "train_init_reference" if "train_init_reference" in arrays else "init_reference"
        initial, stored = inside["queries"][0][2], arrays["inter_references"]
        assert_close("first reference", initial, arrays[field], "init_reference")
        if run["model"].decoder.box_refine:
            assert_close("reference after every layer", out["boxes"], stored, "inter_references")
        else:
            stored = stored[..., :2]
            points = initial[:, :stored.shape[2]].expand_as(stored)
            assert_close("reference after every layer", points, stored, "inter_references")
    elif file in ("conditional_detr", "group_detr"):
        assert_close("reference", inside["reference_head"][0].sigmoid(), arrays["reference"], "reference")
    elif file.startswith("sam_detr"):  # the boxes that every layer is given
        first = run["model"].query_embed.weight.detach().sigmoid().expand_as(out["boxes"][:1])
        assert_close("reference", torch.cat([first, out["boxes"][:-1]]), arrays["reference"], "reference")
    elif file == "smca_detr":
        centre = inside["decoder.reference_head"][0].sigmoid()
        assert_close("centre", centre, arrays["reference"], "reference")
        for name in [name for name in ("offset", "scale") if f"head_{name}" in arrays]:
            layers = [inside[f"decoder.layers.{i}.gaussian.{name}"][0] for i in range(3)]
            ours = torch.stack(layers).unflatten(-1, (8, -1))  # [L, B, Q, M, .]
            assert_close(name, ours, arrays[f"head_{name}"], f"head_{name}")
    else:
        others = ("detr", "dab_detr", "dn_detr", "dino", "adamixer")
        assert file in others, f"the references of {file} are not compared"


def test_proposals_of_two_stages_and_the_second_part_of_hybrid_matching(run):
    arrays, out, stored = run["case"].arrays, run["train_out"], run["case"].json.get("one2many")
    assert ("one2many" in out) == (stored is not None) and ("proposals" in out) == ("enc_logits" in arrays)
    if stored is not None:
        assert (out["one2many"]["repeat"], out["one2many"]["weight"]) == (stored["repeat"], stored["weight"])
    for part, prefix in (("one2many", "one2many"), ("proposals", "enc")):
        for key in ("logits", "boxes") if part in out else ():
            assert_close(f"{part} {key}", out[part][key].detach(), arrays[f"{prefix}_{key}"], key)
    if "enc_topk" in arrays and run["file"] != "dino":  # which returns the chosen ones only
        best = run["out"]["proposals"]["logits"][..., 0].topk(arrays["enc_topk"].shape[1], dim=1).indices
        assert best.equal(arrays["enc_topk"].long()), "other tokens are chosen as queries"


def test_matching_of_every_stage(run):
    stored, out, targets = run["case"].json, run["train_out"], run["case"].targets()
    for stage, ours in enumerate(every_stage(run["criterion"], out["logits"], out["boxes"], targets)):
        assert ours == pairs(stored["matching"][str(stage)]), f"stage {stage} is matched differently"
    if "proposals" in out:
        objects = [{"labels": t["labels"] * (run["file"] == "dino"), "boxes": t["boxes"]} for t in targets]
        logits, boxes = out["proposals"]["logits"][None], out["proposals"]["boxes"][None]
        (ours,) = every_stage(run["criterion"], logits, boxes, objects)
        assert ours == pairs(stored["matching"]["enc"]), "proposals are matched differently"
    if "one2many" in out:
        many, repeat = out["one2many"], out["one2many"]["repeat"]
        copies = [{key: torch.cat([value] * repeat) for key, value in t.items()} for t in targets]
        for stage, ours in enumerate(every_stage(run["criterion"], many["logits"], many["boxes"], copies)):
            ours = [sorted((q, g % len(t["labels"])) for q, g in image) for image, t in zip(ours, targets)]
            assert ours == pairs(stored["matching_one2many"][str(stage)]), f"stage {stage}, one to many"


def test_every_loss_term_and_the_total(run):
    stored, losses, out = run["case"].json["loss_raw"], run["losses"], run["train_out"]
    for part, official in LOSS.items():
        stages = len(losses[part])
        assert stages == len(out["logits"]) // out.get("groups", 1), "a loss per stage, the mean over groups"
        for s in range(stages):
            last = "" if s == stages - 1 else f"_{s}"
            name = f"stage{s}_{ADAMIXER_LOSS[part]}" if run["file"] == "adamixer" else f"{official}{last}"
            assert_close(f"{part} of stage {s}", losses[part][s].detach(), stored[name], "loss")
            if "one2many" in out:  # the stored ones are times lambda
                ours = out["one2many"]["weight"] * losses[f"one2many_{part}"][s].detach()
                name = f"{official}{last}_one2many"
                assert_close(f"{part} of stage {s}, one to many", ours, stored[name], "loss")
            if "denoising" in out:
                ours = losses[f"denoising_{part}"][s].detach()
                name = f"{official}_dn{last}" if run["file"] == "dino" else f"tgt_{official}{last}"
                assert_close(f"{part} of stage {s}, denoising", ours, stored[name], "loss")
        if "proposals" in out:
            proposal = losses[f"proposal_{part}"][0].detach()
            name = f"{official}_interm" if run["file"] == "dino" else f"{official}_enc"
            assert_close(f"{part} of the proposals", proposal, stored[name], "loss")
    assert_close("total", losses["total"].detach(), run["case"].json["loss_total"], "loss")


def test_noisy_queries_their_mask_and_what_comes_back(run):
    case, model, stored = run["case"], run["model"], run["case"].json.get("denoising")
    assert ("denoising" in run["train_out"]) == (stored is not None)
    if stored is None:
        return
    arrays, out, targets = case.arrays, run["train_out"]["denoising"], case.targets()
    real = arrays["denoising_target"] > -2
    assert out["groups"] == stored["groups"] and out["target"].equal(arrays["denoising_target"])
    for key in ("logits", "boxes"):
        ours, official = out[key].detach()[:, real], arrays[f"denoising_{key}"][:, real]
        assert_close(f"{key} of the noisy queries", ours, official, key)
    B, N, Q = *out["target"].shape, run["train_out"]["logits"].shape[2]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(run["module"], "draw_noise", lambda *how: case.noise())
        tgt, boxes, bias, _ = model.denoising(torch.zeros(B, Q, 256), torch.zeros(B, Q, 4), targets)
    assert_close("noisy boxes", boxes[:, :N], arrays["denoising_reference"], "reference")
    assert_close("noisy content", tgt[:, :N, -16:], arrays["denoising_content"], "reference")
    assert bias[0, 0].isinf().equal(arrays["denoising_apart"].bool()), "another mask in self-attention"
    with torch.no_grad():
        empty = without_objects(targets)
        nothing = run["criterion"](model(*case.batch(), empty), empty)["total"]
    assert_close("total without objects", nothing, case.json["loss_total_without_objects"], "loss")


def test_gradient_norm_of_every_parameter(run):
    """Forward passes can agree while a detach is missing: gradients tell."""
    stored, model = run["case"].json, run["model"]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    for name, norm in stored["grad_l2"].items():
        if norm is None:  # AdaMixer's first boxes, which are not trained
            continue
        ours = gradients.pop(our_name(run["module"], name)).double().norm().item()  # float32 is off
        allowed = 1e-6 * stored["grad_l2_total"] + 0.002 * norm
        assert abs(ours - norm) <= allowed, f"gradient of {name} has norm {ours:.6g}, not {norm:.6g}"
    assert not gradients, f"trained here but not in the official code: {', '.join(gradients)}"


@pytest.mark.parametrize("name", SIZES)
def test_parameter_counts_at_the_papers_size(name):
    for variant, stored in Case(name).json["counts"].items():
        official, file = stored["options"], SIZES[name][0]
        # SAM-DETR, quirk: the length of training decides about a normalisation
        extra = {"input_norm": True} if file == "sam_detr" and official.get("epochs", 50) < 25 else {}
        file = "sam_detr_multiscale" if "multiscale" in official else file
        with torch.device("meta"):  # shapes only
            model = module_named(file).build(stored["num_classes"], pretrained_backbone=False,
                                             **{**SIZES[name][1], **options_of(official, extra)})
        # mmdet counts scale and shift of batch norm, which are no parameters where they are frozen
        wanted = stored.get("n_params_without_batch_norm", stored["n_params"])
        assert sum(p.numel() for p in model.parameters()) == wanted, variant
        if "n_params_trainable" in stored:
            trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
            assert trained == stored["n_params_trainable"], variant
        if "n_buffers" in stored:
            assert sum(b.numel() for b in model.buffers()) == stored["n_buffers"], variant


def test_load_official_refuses_what_it_does_not_know():
    detr, case = module_named("detr"), Case("detr")
    with torch.device("meta"):
        model = detr.build(7, pretrained_backbone=False, **case.json["case"]["args"])
        state = {name: torch.zeros(shape) for name, shape, *_ in case.json["state"]}
    with pytest.raises(RuntimeError, match="mystery"):
        detr.load_official(model, {"model": {**state, "mystery.weight": torch.zeros(1)}})
    del state["class_embed.bias"]
    with pytest.raises(RuntimeError, match="class_head.bias"):
        detr.load_official(model, {"model": state})


def test_the_only_convolution_of_sam_detr_without_input_norm_loads_under_each_of_its_official_names():
    sam_detr = module_named("sam_detr")
    for name in ("input_proj.weight", "input_proj.0.weight", "input_proj.0.0.weight"):
        assert our_name(sam_detr, name) == "input_proj.0.0.weight"
    assert our_name(sam_detr, "input_proj.0.1.weight") == "input_proj.0.1.weight"  # GroupNorm


# ---- Criterion, matcher and sampling, each alone ----------------------------------------------------------
def criterion_of(case):
    """A criterion without a model; it reads only the recipe."""
    kind = ("softmax", 1) if case.json["case"]["repo"] == "detr" else ("focal", 2)
    recipe = dict(class_loss=kind[0], w_class=kind[1], w_l1=5, w_giou=2)
    return train.SetCriterion(SimpleNamespace(recipe=recipe))


def without_objects(targets):
    return [{"labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in targets]


@pytest.mark.parametrize("name", ["matcher_softmax", "matcher_focal"])
def test_the_matcher_alone(name):
    case = Case(name)
    criterion = criterion_of(case)
    logits, boxes, targets = case.arrays["logits"][None], case.arrays["boxes"][None], case.targets()
    for b, target in enumerate(targets):
        cost = criterion.cost(logits[:, b], boxes[:, b], target)[0]
        assert_close(f"cost of image {b}", cost, case.arrays[f"cost_{b}"], "cost")
    assert every_stage(criterion, logits, boxes, targets) == [pairs(case.json["matching"])]
    nothing = every_stage(criterion, logits, boxes, without_objects(targets))
    assert nothing == [pairs(case.json["matching_without_any_target"])]


@pytest.mark.parametrize("given", ["given", "empty"])
@pytest.mark.parametrize("name", [name for name in ALONE if name.startswith("criterion")])
def test_the_criterion_alone(name, given):
    """Losses and gradients, with the targets of the file and when no image has an object."""
    case = Case(name)
    stored = case.json[given]
    leaves = {k: v.clone().requires_grad_() for k, v in case.arrays.items()
              if k in ("logits", "boxes", "enc_logits", "enc_boxes")}
    out = {"logits": leaves["logits"], "boxes": leaves["boxes"]}
    if "enc_logits" in leaves:
        out["proposals"] = {"logits": leaves["enc_logits"], "boxes": leaves["enc_boxes"]}
    losses = criterion_of(case)(out, case.targets() if given == "given" else without_objects(case.targets()))
    for part, official in LOSS.items():
        for s, loss in enumerate(losses[part]):
            key = official if s == len(losses[part]) - 1 else f"{official}_{s}"
            assert_close(f"{part} of stage {s}", loss.detach(), stored["loss_raw"][key], "loss")
        if "proposals" in out:
            ours = losses[f"proposal_{part}"][0].detach()
            assert_close(f"{part} of the proposals", ours, stored["loss_raw"][f"{official}_enc"], "loss")
    assert_close("total", losses["total"].detach(), stored["loss_total"], "loss")
    losses["total"].backward()
    for key, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_close(f"gradient of {key}", gradient, case.arrays[f"{given}_grad_{key}"], "criterion_grad")


def test_deformable_sampling_alone():
    """Values and gradients: in float32 compared with the official ones, in float64 by gradcheck."""
    sampling, case = module_named("deformable_detr").deformable_sampling, Case("ms_deform_attn")
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [case.arrays[name].clone().requires_grad_() for name in names]
    output = sampling(inputs[0], case.arrays["spatial_shapes"].tolist(), *inputs[1:])
    assert_close("output", output.detach(), case.arrays["output"], "msda_output")
    (output * case.arrays["upstream_grad"]).sum().backward()
    for name, leaf in zip(names, inputs):
        stored = next(array for key, array in case.arrays.items()
                      if key.startswith("grad") and array.shape == leaf.shape and name in key)
        assert_close(f"gradient of {name}", leaf.grad, stored, "msda_grad")

    generator = torch.Generator().manual_seed(0)
    value = torch.randn(1, 16, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    points = torch.rand(1, 3, 2, 2, 2, 2, dtype=torch.float64, generator=generator)
    points = (points * 1.4 - 0.2).requires_grad_()  # some outside
    weights = torch.rand(1, 3, 2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda v, p, w: sampling(v, [(3, 4), (2, 2)], p, w), (value, points, weights))


def test_every_golden_file_is_tested():
    """test_initialisation.py has the initialisation files, test_evaluation.py the postprocess files."""
    stored = {p.stem for p in FOLDER.glob("*.json")} - {
        "tolerances", "initialisation", "initialisation_dn_dino"}
    assert stored == {*CASES, *SIZES, *ALONE, "postprocess_softmax", "postprocess_focal"}
