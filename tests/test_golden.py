"""Every model computes what the official code computes, with the same weights on the same images."""
import pytest
import torch

import train
from golden import CASES, FOLDER, RELATIVES, Case, assert_close, options_of, our_name
from tiny_models import module_named

LOSS = {"class": "loss_ce", "l1": "loss_bbox", "giou": "loss_giou"}


@pytest.fixture(scope="module", params=CASES)
def run(request):
    """The case, our module and model, and what one evaluation and one training step gave."""
    file, extra = CASES[request.param]
    case, module = Case(request.param), module_named(file)
    options = options_of(case.json["case"]["args"], extra)
    with torch.device("meta"):  # no initial numbers: all are loaded
        model = module.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    model.to_empty(device="cpu")
    module.load_official(model, {"model": case.state_dict()})
    seen = {}
    for name, part in model.named_children():
        part.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o))
    images, mask = case.batch()
    with torch.no_grad():
        out = model.eval()(images, mask)
    inside = dict(seen)
    criterion = train.SetCriterion(model)
    train_out = model.train()(images, mask)
    losses = criterion(train_out, case.targets())
    losses["total"].backward()
    return dict(case=case, module=module, model=model, mask=mask, out=out, inside=inside, criterion=criterion,
                train_out=train_out, losses=losses)


def test_logits_and_boxes_of_every_layer(run):
    for name in ("logits", "boxes"):
        assert_close(name, run["out"][name], run["case"].arrays[name], name)


def test_masks_and_positions_of_every_feature_map(run):
    case, module = run["case"], run["module"]
    offset = 0 if case.json["case"]["repo"] in ("detr", "conditional") else 0.5
    levels = [name for name in case.arrays if name.startswith("mask_")]
    for level in range(len(levels)):
        stored = case.arrays[f"mask_{level}"].bool()
        mask = module.resize_mask(run["mask"], stored.shape[-2:])
        assert mask.equal(stored), f"the padding mask of feature map {level} is not the nearest neighbour's"
        pos = module.sine_positions(mask, 256, offset).unflatten(1, mask.shape[1:])  # [B, h, w, D]
        pos = pos[..., ::17][..., :16].permute(0, 3, 1, 2)  # the channels that are stored
        inside = ~mask[:, None].expand_as(pos)
        assert_close(f"positions of level {level}", pos[inside], case.arrays[f"pos_{level}"][inside], "pos")


def test_encoder_and_decoder_outputs(run):
    case = run["case"]
    tokens, inside = case.arrays["memory_slice_token"], case.arrays["memory_slice_unpadded"].bool()
    memory = run["inside"]["encoder"][:, tokens, :16]
    assert_close("memory", memory[inside], case.arrays["memory_slice"][inside], "memory_slice")
    decoded = run["inside"]["decoder"]
    hs = decoded[0] if isinstance(decoded, tuple) else decoded
    assert_close("decoder output", hs, case.arrays["hs"], "hs")


def test_reference_points_and_boxes(run):
    arrays, inside = run["case"].arrays, run["inside"]
    if "init_reference" in arrays:  # Deformable DETR
        initial = inside["queries"][2]
        assert_close("first reference", initial, arrays["init_reference"], "init_reference")
        stored = arrays["inter_references"]
        after = run["out"]["boxes"] if run["model"].decoder.box_refine else initial.expand_as(stored)
        assert_close("reference after every layer", after, stored, "inter_references")
    elif run["case"].json["case"]["repo"] == "sam":  # the boxes that every layer is given
        first = run["model"].query_embed.weight.detach().sigmoid().expand_as(run["out"]["boxes"][:1])
        given = torch.cat([first, run["out"]["boxes"][:-1]])  # [L, B, Q, 4]
        assert_close("reference", given, arrays["reference"], "reference")
    elif "reference" in arrays:  # Conditional DETR
        assert_close("reference", inside["reference"].sigmoid(), arrays["reference"], "reference")
    else:
        assert run["case"].json["case"]["repo"] == "detr", "only DETR has no references"


def test_proposals_of_two_stages(run):
    arrays, out = run["case"].arrays, run["out"]
    assert ("proposals" in out) == ("enc_logits" in arrays)
    if "proposals" in out:
        logits = out["proposals"]["logits"]
        assert_close("proposal logits", logits, arrays["enc_logits"], "enc_logits")
        assert_close("proposal boxes", out["proposals"]["boxes"], arrays["enc_boxes"], "enc_boxes")
        best = logits[..., 0].topk(arrays["enc_topk"].shape[1], dim=1).indices
        assert best.equal(arrays["enc_topk"].long()), "other tokens are chosen as queries"


def test_matching_of_every_stage(run):
    stored, out = run["case"].json["matching"], run["train_out"]
    matches = run["criterion"].match(out["logits"], out["boxes"], run["case"].targets())
    for stage, match in enumerate(matches):
        ours = [[q.tolist(), g.tolist()] for q, g in match]
        assert ours == stored[str(stage)], f"stage {stage} is matched differently"
    if "proposals" in out:
        objects = [{"labels": t["labels"] * 0, "boxes": t["boxes"]} for t in run["case"].targets()]
        match = run["criterion"].match(*(out["proposals"][k][None] for k in ("logits", "boxes")), objects)[0]
        ours = [[q.tolist(), g.tolist()] for q, g in match]
        assert ours == stored["enc"], "proposals are matched differently"


def test_every_loss_term_and_the_total(run):
    stored, losses = run["case"].json, run["losses"]
    stages = len(losses["class"])
    for ours, official in LOSS.items():
        for s in range(stages):
            name = official if s == stages - 1 else f"{official}_{s}"
            assert_close(f"{ours} of stage {s}", losses[ours][s].detach(), stored["loss_raw"][name], "loss")
        if f"{official}_enc" in stored["loss_raw"]:
            proposal = losses[f"proposal_{ours}"][0].detach()
            assert_close(f"{ours} of the proposals", proposal, stored["loss_raw"][f"{official}_enc"], "loss")
    assert_close("total", losses["total"].detach(), stored["loss_total"], "loss")


def test_gradient_norm_of_every_parameter(run):
    """Forward passes can agree while a detach is missing: gradients tell."""
    stored, model = run["case"].json, run["model"]
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    total = stored["grad_l2_total"]
    for name, norm in stored["grad_l2"].items():
        ours = gradients.pop(our_name(run["module"], name)).double()  # float32 sums are off by 1e-4
        ours = ours.norm().item()
        allowed = 1e-6 * total + 0.002 * norm
        assert abs(ours - norm) <= allowed, f"gradient of {name} has norm {ours:.6g}, not {norm:.6g}"
    assert not gradients, f"trained here but not in the official code: {', '.join(gradients)}"


def test_parameter_counts_of_the_small_models(run):
    model, stored = run["model"], run["case"].json
    assert sum(p.numel() for p in model.parameters()) == stored["n_params"]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == stored["n_params_trainable"]


# params_*.json: our file, and how its variants' options are called here
COUNTS = {
    "params_detr": "detr",
    "params_conditional_detr": "conditional_detr",
    "params_deformable_detr": "deformable_detr",
    "params_sam_detr": "sam_detr",
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_at_the_papers_size(name):
    case = Case(name)
    for variant, stored in case.json["counts"].items():
        extra = {"input_norm": True} if stored["options"].get("epochs", 50) < 25 else {}  # SAM-DETR (quirk)
        options = options_of(stored["options"], extra)
        module = module_named("sam_detr_multiscale" if "multiscale" in stored["options"] else COUNTS[name])
        with torch.device("meta"):  # shapes only
            model = module.build(stored["num_classes"], pretrained_backbone=False, **options)
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        buffers = sum(b.numel() for b in model.buffers())
        assert sum(p.numel() for p in model.parameters()) == stored["n_params"], variant
        assert (trained, buffers) == (stored["n_params_trainable"], stored["n_buffers"]), variant


def test_load_official_refuses_what_it_does_not_know():
    import detr

    model = detr.build(7, pretrained_backbone=False, **Case("detr").json["case"]["args"])
    state = {name: torch.zeros(shape) for name, shape, *_ in Case("detr").json["state"]}
    with pytest.raises(RuntimeError, match="mystery"):
        detr.load_official(model, {"model": {**state, "mystery.weight": torch.zeros(1)}})
    del state["class_embed.bias"]
    with pytest.raises(RuntimeError, match="class_head.bias"):
        detr.load_official(model, {"model": state})


# ---- The criterion and the matcher alone -------------------------------------------------------------------
class Recipe:
    """What SetCriterion needs to know of a model."""

    def __init__(self, repo):
        softmax = repo == "detr"
        w_class = 1 if softmax else 2
        self.recipe = dict(class_loss="softmax" if softmax else "focal", w_class=w_class, w_l1=5, w_giou=2)


@pytest.mark.parametrize("name", ["matcher_softmax", "matcher_focal"])
def test_the_matcher_alone(name):
    case = Case(name)
    criterion = train.SetCriterion(Recipe(case.json["case"]["repo"]))
    logits, boxes, targets = case.arrays["logits"], case.arrays["boxes"], case.targets()
    for b, target in enumerate(targets):
        cost = criterion.cost(logits[None, b], boxes[None, b], target)[0]
        assert_close(f"cost of image {b}", cost, case.arrays[f"cost_{b}"], "cost")
    ours = [[q.tolist(), g.tolist()] for q, g in criterion.match(logits[None], boxes[None], targets)[0]]
    assert ours == case.json["matching"]
    nothing = [{"labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in targets]
    ours = [[q.tolist(), g.tolist()] for q, g in criterion.match(logits[None], boxes[None], nothing)[0]]
    assert ours == case.json["matching_without_any_target"]


@pytest.mark.parametrize("given", ["given", "empty"])
@pytest.mark.parametrize("name", [
    "criterion_detr", "criterion_conditional", "criterion_deformable", "criterion_sam"])
def test_the_criterion_alone(name, given):
    """Losses and gradients, with the targets of the file and when no image has an object."""
    case = Case(name)
    stored = case.json[given]
    criterion = train.SetCriterion(Recipe(case.json["case"]["repo"]))
    leaves = {k: v.clone().requires_grad_() for k, v in case.arrays.items()
              if k in ("logits", "boxes", "enc_logits", "enc_boxes")}
    out = {"logits": leaves["logits"], "boxes": leaves["boxes"]}
    if "enc_logits" in leaves:
        out["proposals"] = {"logits": leaves["enc_logits"], "boxes": leaves["enc_boxes"]}
    targets = case.targets()
    if given == "empty":
        targets = [{"labels": t["labels"][:0], "boxes": t["boxes"][:0]} for t in targets]
    losses = criterion(out, targets)
    stages = len(losses["class"])
    for ours, official in LOSS.items():
        for s in range(stages):
            key = official if s == stages - 1 else f"{official}_{s}"
            assert_close(f"{ours} of stage {s}", losses[ours][s].detach(), stored["loss_raw"][key], "loss")
        if "proposals" in out:
            ours_value = losses[f"proposal_{ours}"][0].detach()
            assert_close(f"proposal {ours}", ours_value, stored["loss_raw"][f"{official}_enc"], "loss")
    assert_close("total", losses["total"].detach(), stored["loss_total"], "loss")
    losses["total"].backward()
    for key, leaf in leaves.items():
        gradient = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad
        assert_close(f"gradient of {key}", gradient, case.arrays[f"{given}_grad_{key}"], "criterion_grad")


def test_deformable_attention_alone():
    """The sampling core: values and gradients, in float32 as the official ones, in float64 by gradcheck."""
    from deformable_detr import deformable_sampling

    case = Case("ms_deform_attn")
    shapes = case.arrays["spatial_shapes"].tolist()
    names = ("value", "sampling_locations", "attention_weights")
    inputs = [case.arrays[name].clone().requires_grad_() for name in names]
    output = deformable_sampling(inputs[0], shapes, *inputs[1:])
    assert_close("output", output.detach(), case.arrays["output"], "msda_output")
    (output * case.arrays["upstream_grad"]).sum().backward()
    for name, leaf in zip(names, inputs):
        stored = next(array for key, array in case.arrays.items()
                      if key.startswith("grad") and array.shape == leaf.shape and name in key)
        assert_close(f"gradient of {name}", leaf.grad, stored, "msda_grad")

    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 4), (2, 2)]
    value = torch.randn(1, 16, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    points = torch.rand(1, 3, 2, 2, 2, 2, dtype=torch.float64, generator=generator)
    points = points * 1.4 - 0.2  # some outside
    weights = torch.rand(1, 3, 2, 2, 2, dtype=torch.float64, generator=generator, requires_grad=True)
    assert torch.autograd.gradcheck(lambda v, p, w: deformable_sampling(v, shapes, p, w),
                                    (value, points.requires_grad_(), weights))


def test_the_golden_files_are_complete():
    """Others are in test_sqr.py, test_relatives_golden.py, test_initialisation.py and test_evaluation.py."""
    stored = {p.stem for p in FOLDER.glob("*.json")} - {"tolerances", "initialisation"}
    tested = {*CASES, *COUNTS, *RELATIVES, *(f"params_{file}" for file, _ in RELATIVES.values()),
              "sqr", "dqr", "ms_deform_attn", "matcher_softmax", "matcher_focal", "postprocess_softmax",
              "postprocess_focal",
              "criterion_detr", "criterion_conditional", "criterion_deformable", "criterion_sam"}
    assert stored == tested, "a golden file is committed but not tested, or the other way round"
