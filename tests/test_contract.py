"""Every model file keeps the same contract, at tiny sizes. New files in relatives/ are tested, too."""
import runpy
import shutil
import sys

import pytest
import torch
import torchvision

import train
from support.checkpoints import known_files
from tiny_models import TARGETS, batch, module_named, quick, shake, shaken, tiny

FILES = known_files()
NAMES = list(FILES)
ALONE = [name for name in NAMES if "sys.path.append" not in FILES[name].read_text()]  # they import no parent
# Options that change the computation, beyond the defaults: each must run and train all of its parameters
VARIANTS = {
    "detr": [{"last_stage": 3}, {"last_stage": 2}, {"enc_layers": 0}],
    "conditional_detr": [{"dec_layers": 1}],
    "deformable_detr": [{"box_refine": True}, {"two_stage": True}, {"num_feature_levels": 1},
                        {"num_feature_levels": 2, "last_stage": 3},
                        {"num_feature_levels": 5, "enc_points": 2, "dec_points": 3}],
    "sam_detr": [{"smca": True}, {"input_norm": True}, {"last_stage": 2}, {"hidden_dim": 64, "nheads": 2}],
    "sqr": [{"recollect": "dense"}, {"recurrent": True}, {"box_refine": True}, {"two_stage": True},
            {"dec_layers": 1}],
    "conditional_detr_ablations": [{"dec_layers": 1}] + [
        {"spatial_query": form} for form in ("csq-p", "csq-t", "csq-c", "csq-i")] + [
        {"transform": t} for t in ("scalar", "identity", "block", "full")] + [
        {"reference": r} for r in ("learned", "origin")] + [
        {"attention": a, "offsets": o, "class_loss": c} for a in ("conditional", "detr")
        for o in (True, False) for c in ("focal", "softmax")] + [
        {"offsets": False, "spatial_query": "csq-c"}, {"attention": "detr", "reference": "learned"}],
    "sam_detr_multiscale": [{"smca": True}, {"last_stage": 3}, {"dec_layers": 1}],
    "group_detr": [{"num_groups": 1}, {"dec_layers": 1}],
    "dab_detr": [{"num_patterns": 3}, {"dec_layers": 1}, {"enc_layers": 0}],
    "smca_detr": [{"scale_type": "none"}, {"scale_type": "isotropic"}, {"scale_type": "xy_product"}],
    "hdetr": [{"two_stage": False}, {"mixed_selection": False}, {"look_forward_twice": False},
              {"two_stage": False, "box_refine": False, "look_forward_twice": False}, {"num_one2many": 0},
              {"k_one2many": 0}],
    "adamixer": [{"n_groups": 1}, {"last_stage": 3}],
    "sqr_adamixer": [{"recollect": "dense"}],
    "dn_detr": [{"num_patterns": 3}, {"dec_layers": 1}, {"dn_groups": 0}],
    "dino": [{"mixed_selection": False}, {"num_feature_levels": 2, "last_stage": 3}, {"dn_number": 0}],
}
EVERY = [pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
         for name in NAMES for options in [{}, *VARIANTS.get(name, [])]]


def predict(model, inputs=None):
    with torch.no_grad():
        return model.eval()(*(inputs or batch()))


def trained(model, targets):
    """The output that training gets from the model."""
    return model.train()(*batch(), *([targets] if model.recipe.get("denoising") else []))


@pytest.mark.parametrize("name, options", EVERY)
def test_shapes_are_the_contracts_and_every_parameter_is_trained(name, options):
    model = (quick if options else tiny)(name, backbone_norm="batch", **options)
    out = predict(model)
    queries = 5 * max(1, options.get("num_patterns", 1))
    extra = model.recipe["class_loss"] == "softmax" or model.recipe.get("extra_logit", False)
    assert out["logits"].shape == (options.get("dec_layers", 2), 2, queries, 3 + extra)
    assert out["boxes"].shape == (*out["logits"].shape[:3], 4)
    assert model.recipe.get("free_boxes") or ((out["boxes"] >= 0) & (out["boxes"] <= 1)).all()
    train.SetCriterion(model)(trained(model, TARGETS), TARGETS)["total"].backward()
    # Several processes refuse a parameter that takes no part
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not unused, f"these parameters take no part: {', '.join(unused)}"
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", NAMES)
def test_training_goes_on_without_objects_and_in_bfloat16(name):
    """--amp: matching and losses stay in float32, gradients arrive finite in every parameter."""
    model = quick(name)
    criterion, optimizer = train.SetCriterion(model), train.make_optimizer(model, 1e-3, 1e-3, 1e-4)
    for targets, amp in [([TARGETS[1]] * 2, False), (TARGETS, True)]:
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            out = trained(model, targets)
        losses = criterion(out, targets)
        optimizer.zero_grad()
        losses["total"].backward()
        assert all(loss.dtype == torch.float32 and loss.isfinite().all() for loss in losses.values())
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        assert all(grad is not None and grad.isfinite().all() for grad in gradients)
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_one_image_does_not_see_the_other(name):
    model, (images, mask) = shaken(name), batch()
    before = predict(model, (images, mask))
    changed = images.clone()
    changed[1] = torch.randn_like(images[1]).masked_fill(mask[1], 0)
    after, alone = predict(model, (changed, mask)), predict(model, (images[:1], mask[:1]))
    for key in ("logits", "boxes"):
        torch.testing.assert_close(before[key][:, 0], after[key][:, 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(before[key][:, :1], alone[key], rtol=0, atol=1e-5)
        assert (before[key][:, 1] - after[key][:, 1]).abs().max() > 1e-3, "these predictions ignore the image"


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dino"])  # where a query is a rank
def test_order_of_queries_does_not_matter(name):
    model = shaken(name, **({"two_stage": False} if name == "hdetr" else {}))
    order = torch.tensor([3, 0, 4, 1, 2])
    before = predict(model)
    with torch.no_grad():
        for table in model.modules():
            if isinstance(table, torch.nn.Embedding) and table.num_embeddings >= 5:
                table.weight[:5] = table.weight[order]
    after = predict(model)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(before[key][:, :, order], after[key], rtol=0, atol=1e-5)
        assert (before[key] - after[key]).abs().max() > 1e-3, "all queries predict the same"


# ---- Padding -----------------------------------------------------------------------------------------------
def padding_error(model):
    """The largest difference of a logit or a coordinate, one image unpadded or padded in a larger batch."""
    torch.manual_seed(2)
    images, mask = torch.zeros(2, 3, 192, 192), torch.ones(2, 192, 192, dtype=torch.bool)
    images[0, :, :128, :64], mask[0, :128, :64] = torch.randn(3, 128, 64), False
    images[1], mask[1] = torch.randn(3, 192, 192), False
    alone = predict(model, (images[:1, :, :128, :64], mask[:1, :128, :64]))
    padded = predict(model, (images, mask))
    return max((alone[key] - padded[key][:, :1]).abs().max().item() for key in ("logits", "boxes"))


# AdaMixer reads padding like image, DINO encodes boxes of the padded map. SAM-DETR reads it where boxes reach
# over the image's edge: test_claims.py
@pytest.mark.parametrize("name", [n for n in ALONE if n not in ("adamixer", "dino", "sam_detr")])
def test_padding_changes_nothing_after_the_backbone_except_through_groupnorm(name):
    model = shaken(name, **({"two_stage": False} if name == "hdetr" else {}))
    if isinstance(model.input_proj, torch.nn.ModuleList):
        assert padding_error(model) > 1e-3, "GroupNorm no longer averages over the padding"
        for proj in model.input_proj:
            proj[1] = torch.nn.Identity()
            torch.nn.init.zeros_(proj[0].bias)
    assert padding_error(model) < 1e-5


def test_a_real_backbone_sees_padding_only_in_the_cells_near_the_images_edge():
    """Convolutions at the edge read what they wrote on padding; C3 of ResNet-18 reaches 50 pixels."""
    torch.manual_seed(2)
    backbone = shake(tiny("detr")).backbone.eval()  # the same text in all files
    image = torch.randn(1, 3, 192, 160)
    with torch.no_grad():
        alone = backbone(image)[0]  # [1, C3, 24, 20]
        padded = backbone(torch.nn.functional.pad(image, (0, 96, 0, 64)))[0][..., :24, :20]
    change = (alone - padded).abs().amax((0, 1)) / alone.abs().max()  # [24, 20]
    assert change[:17, :13].max() < 1e-5 and change[23].min() > 1e-5 and change[:, 19].min() > 1e-5


# ---- torch.compile and torch.export: one model of each family ----------------------------------------------
FAMILIES = {
    "detr": {"last_stage": 3, "dec_layers": 1},  # with a real backbone, which is the same text in all files
    "deformable_detr": {"two_stage": True, "num_feature_levels": 1, "enc_points": 1, "dec_layers": 1},
    "sam_detr": {"smca": True, "dec_layers": 1},
    "adamixer": {"dec_layers": 1},
}


def of_family(name):
    return shake((tiny if name == "detr" else quick)(name, **FAMILIES[name])).eval()


@pytest.mark.parametrize("name", ["detr", "deformable_detr", "sam_detr"])
def test_torch_compile_gives_the_same_numbers_in_one_graph(name):
    model, inputs = of_family(name), batch()
    expected = predict(model)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(compiled[key], expected[key], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["deformable_detr", "sam_detr", "adamixer"])
def test_torch_export_takes_any_number_of_images_of_any_size(name):
    """As long as the maps have more than one cell. DETR is in test_export.py."""
    model = of_family(name)
    B, H, W = torch.export.Dim("B", max=64), torch.export.Dim("H", min=65), torch.export.Dim("W", min=65)
    sizes = {0: B, 2: H, 3: W}, {0: B, 1: H, 2: W}
    exported = torch.export.export(model, batch(), dynamic_shapes=sizes).module()
    for b, h, w in [(1, 96, 128), (3, 70, 211)]:
        images, mask = torch.randn(b, 3, h, w), torch.zeros(b, h, w, dtype=torch.bool)
        mask[-1, h // 2:] = True
        expected, got = predict(model, (images, mask)), exported(images, mask)
        for key in ("logits", "boxes"):
            torch.testing.assert_close(got[key], expected[key], rtol=0, atol=1e-5)


# ---- Errors ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_wrong_options_are_refused_with_a_sentence(name):
    for options, words in [
            ({"nheads": 5}, r"hidden_dim 32 must be a multiple of nheads \(5\) and of 4"),
            ({"hidden_dim": 30, "nheads": 2}, r"hidden_dim 30 must be a multiple of nheads \(2\) and of 4"),
            ({"backbone_norm": "layer"}, '"frozen" or "batch"'),
            ({"backbone": "vgg16"}, "it must be a torchvision ResNet"),
            ({"last_stage": 5}, "last_stage is 5, it must be 4")]:
        with pytest.raises(ValueError, match=words):
            tiny(name, **options)
    with pytest.raises(TypeError, match="num_querys"):
        tiny(name, num_querys=5)


@pytest.mark.parametrize("name, options, words", [
    ("deformable_detr", {"enc_layers": 0}, "enc_layers is 0, it must be at least 1"),
    ("sqr", {"recollect": "all"}, 'recollect is .all., it must be "selective"'),
    ("conditional_detr_ablations", {"transform": "diag"}, "transform is .diag., it must be one of"),
    ("conditional_detr_ablations", {"attention": "detr", "transform": "full"}, "transform is without effect"),
    ("conditional_detr_ablations", {"class_loss": "bce"}, "class_loss is .bce., it must be one of focal"),
    ("smca_detr", {"scale_type": "type3"}, "scale_type is .type3., it must be one of"),
    ("hdetr", {"two_stage": False, "box_refine": False}, "look_forward_twice is True, it must be"),
    ("adamixer", {"enc_layers": 2}, "enc_layers is 2, it must be 0"),
    ("adamixer", {"n_groups": 3}, "hidden_dim is 32, it must be a multiple of n_groups")])
def test_wrong_values_of_a_files_own_options_are_refused_with_a_sentence(name, options, words):
    with pytest.raises(ValueError, match=words):
        tiny(name, **options)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_refused_with_a_sentence(name):
    model, (images, mask) = quick(name), batch()
    with pytest.raises(ValueError, match=r"image\[None\]"):
        model(images[0], mask[0])
    with pytest.raises(ValueError, match="must be bool"):
        model(images, mask.float())


@pytest.mark.parametrize("name", ["deformable_detr", "hdetr"])
def test_one_image_whose_coarsest_map_is_a_single_cell_is_no_error(name):
    image, mask = torch.randn(1, 3, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    assert predict(quick(name), (image, mask))["boxes"].isfinite().all()


# ---- The file itself ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", NAMES)
def test_the_file_runs_alone_in_an_empty_folder(name, tmp_path, monkeypatch, capsys):
    """Or finds its parent from there. In this process and without numbers, because it prints only shapes."""
    path = shutil.copy(FILES[name], tmp_path) if name in ALONE else str(FILES[name])
    monkeypatch.setattr(sys, "path", [*sys.path])
    for other in NAMES:
        monkeypatch.setitem(sys.modules, other, None)  # an import of it fails
        if name not in ALONE:
            monkeypatch.delitem(sys.modules, other)  # as if it had not been imported
    monkeypatch.chdir(tmp_path)
    # On "meta" torch computes this one step by step, which takes seconds
    monkeypatch.setattr(torch.nn.functional, "grid_sample", lambda maps, grid, **_: maps.new_empty(
        *maps.shape[:2], *grid.shape[1:3]))
    with torch.device("meta"):
        runpy.run_path(path, run_name="__main__")
    printed = capsys.readouterr().out
    assert "parameters" in printed and ("'logits': [6, 2, " in printed or name not in ALONE)


@pytest.mark.parametrize("name", NAMES)
def test_frozen_norm_keeps_imagenets_first_layers_and_batch_norm_trains_all(name):
    frozen, live = tiny(name), tiny(name, backbone_norm="batch")
    fixed = {n for n, p in frozen.backbone.named_parameters() if not p.requires_grad}
    assert fixed and all(n.startswith(("body.conv1", "body.layer1")) for n in fixed)
    assert all(p.requires_grad for p in live.backbone.parameters())


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_the_frozen_norm_is_torchvisions_and_keeps_the_type_of_its_input(dtype, tolerance):
    """With --amp, maps in float32 would take twice the memory and be copied for the next convolution."""
    ours, theirs = (module.FrozenBatchNorm2d(4) for module in (module_named("detr"), torchvision.ops))
    for buffer in ours.state_dict().values():
        buffer.uniform_(0.5, 2)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 4, 3, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = ours(x)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), theirs(x.float()), rtol=0, atol=tolerance)
