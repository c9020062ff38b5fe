"""Tests are tested: each fault, a replacement in a model file, must make the test beside it fail."""
import functools
import inspect
import shutil
import sys
import types

import pytest
import torch

import test_models as models
import test_sam_detr as sam
import test_sqr as sqr
from tiny_models import ROOT

TESTS = (models, sam, sqr)
NO_FAULT = {}  # tests of these files that no cheap fault makes fail, and why


@functools.cache
def golden_run(old, new):
    """The stored run that some tests of test_sqr.py take; made while that fault is there."""
    return sqr.golden_run("dqr", "dense")


# Faults that several tests must notice
LOUDER = "maps = [proj(feature) for", "maps = [1.1 * proj(feature) for"
FEWER = '"dense": slice(None),', '"dense": slice(0, 1),'

# test, its arguments, the file, what is replaced, what by
FAULTS = [
    # ---- test_models.py
    (models.test_shapes_are_the_contracts_and_every_parameter_is_trained,
     ("conditional_detr", {"dec_layers": 1}), "conditional_detr",
     "depth=2) if num_layers > 1 else None", "depth=2)"),
    (models.test_shapes_are_the_contracts_and_every_parameter_is_trained, ("detr", {}), "detr",
     "self.box_head(hs).sigmoid()", "self.box_head(hs)"),
    (models.test_one_image_does_not_see_the_other, ("detr",), "detr",
     "tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v)))",
     "tgt = self.norm1(tgt + self.self_attn(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1))"),
    (models.test_one_image_does_not_see_the_other, ("detr",), "detr", "tgt = layer(tgt, query_pos,",
     "tgt = layer(tgt + tgt.mean(0) + memory.mean((0, 1)), query_pos,"),
    (models.test_one_image_does_not_see_the_other, ("sam_detr",), "sam_detr",
     "size=size)[:, 0].bool()", "size=size)[:, 0] == 0"),
    (models.test_order_of_queries_does_not_matter, ("detr",), "detr",
     "hs = self.decoder(query_pos, ", "hs = self.decoder(query_pos.cumsum(1), "),
    (models.test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm, ("detr",), "detr",
     "self.cross_attn(q, k, v, mask)", "self.cross_attn(q, k, v)"),
    (models.test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm, ("conditional_detr",),
     "conditional_detr", "if mask is not None:", "if False:"),
    (models.test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm, ("deformable_detr",),
     "deformable_detr", ".masked_fill(mask[..., None], 0)  # padding", "  # padding"),
    (models.test_a_real_backbone_sees_padding_in_the_cells_near_the_images_edge_only, (), "detr",
     "features.append(x)", "features.append(x - x.mean((2, 3), keepdim=True))"),
    (models.test_torch_compile_gives_the_same_numbers_in_one_graph, ("conditional_detr", {}),
     "conditional_detr", "if mask is not None:", "if mask is not None and mask.any():"),
    (models.test_torch_export_takes_any_number_of_images_of_any_size, ("conditional_detr", {"dec_layers": 1}),
     "conditional_detr", "weight.expand(images.shape[0], -1, -1)", "weight.expand(len(images), -1, -1)"),
    (models.test_bfloat16_autocast_trains, ("detr", {}), "detr", "self.box_head(hs).sigmoid()",
     "torch.zeros(*hs.shape[:3], 4).masked_scatter(torch.tensor(True), self.box_head(hs)).sigmoid()"),
    (models.test_wrong_values_are_refused_with_a_sentence, ("detr",), "detr",
     'if not 0 <= values["dropout"] < 1:', 'if values["dropout"] < 0 or values["dropout"] >= 1:'),
    (models.test_wrong_values_of_a_files_own_options_are_refused_with_a_sentence,
     ("sqr", {"recollect": "all"}), "sqr", "if recollect not in SOURCES:", "if False:"),
    (models.test_wrong_inputs_are_refused_with_a_sentence, ("detr",), "detr",
     "if mask.dtype != torch.bool:", "if False:"),
    (models.test_the_file_alone_in_an_empty_folder_runs, ("sam_detr",), "sam_detr",
     "import copy\n", "import copy\nfrom conditional_detr import MLP\n"),
    (models.test_a_file_of_relatives_runs_from_any_folder, ("sam_detr_multiscale",), "sam_detr_multiscale",
     "sys.path.append(str(Path(__file__).resolve().parents[1]))", ""),
    (models.test_the_frozen_norm_is_torchvisions_and_keeps_the_type_of_its_input, (torch.float32,), "detr",
     "self.bias - self.running_mean", "self.bias + self.running_mean"),
    (models.test_the_frozen_norm_is_torchvisions_and_keeps_the_type_of_its_input, (torch.bfloat16,), "detr",
     "shift[:, None, None].to(x)", "shift[:, None, None]"),
    (models.test_frozen_norm_keeps_imagenets_first_layers_and_batch_norm_trains_all, ("detr",), "detr",
     "body.layer1.requires_grad_(False)", "body.layer2.requires_grad_(False)"),
    (models.test_detrs_first_self_attention_gives_every_query_the_same_vector, (), "detr",
     "self.sa_proj(tgt + query_pos, tgt + query_pos, tgt)", "self.sa_proj(*[tgt + query_pos] * 3)"),
    (models.test_reference_points_are_encoded_as_cells_are_with_the_same_temperature, ("conditional_detr",),
     "conditional_detr", "query_pos.shape[-1], self.temperature)", "query_pos.shape[-1])"),
    (models.test_only_conditional_detrs_first_layer_adds_positions_and_has_no_lambda, (), "conditional_detr",
     "p_q = p_s if i == 0 else self.query_scale(tgt) * p_s", "p_q = p_s"),
    (models.test_conditional_attention_adds_a_content_and_a_spatial_score_in_every_head, (),
     "conditional_detr", "torch.cat(pair, dim=-1).flatten(-2)", "torch.cat(pair, dim=-2).flatten(-2)"),
    (models.test_deformable_attention_starts_as_a_uniform_star, (), "deformable_detr",
     "[angle.cos(), angle.sin()]", "[angle.sin(), angle.cos()]"),
    (models.test_deformable_sampling_by_hand_written_loops, (), "deformable_detr",
     "align_corners=False", "align_corners=True"),
    (models.test_refinement_cuts_the_gradient_between_layers, (), "deformable_detr",
     "reference = boxes[-1].detach()", "reference = boxes[-1]"),
    (models.test_two_stages_train_on_maps_with_fewer_tokens_than_queries, ("deformable_detr",),
     "deformable_detr", "torch.sym_min(self.num_queries, logits.shape[1])", "self.num_queries"),
    (models.test_padded_tokens_propose_the_whole_image_and_only_their_score_keeps_them_from_becoming_queries,
     (), "deformable_detr", "invalid[..., None], math.inf)", "invalid[..., None], 0.0)"),
    (models.test_a_padded_corner_proposes_nothing_though_its_row_and_column_reach_into_the_image, (),
     "deformable_detr", "invalid = mask | ", "invalid = "),
    # ---- test_sqr.py
    (sqr.test_decoder_outputs_at_inference, (golden_run,), "sqr", *LOUDER),
    (sqr.test_logits_and_boxes_of_every_layer, (golden_run,), "sqr", *LOUDER),
    (sqr.test_logits_and_boxes_of_every_group_in_training, (golden_run,), "sqr", *LOUDER),
    (sqr.test_every_loss_term_and_the_total, (golden_run,), "sqr", *LOUDER),
    (sqr.test_matching_of_every_stage, (golden_run,), "sqr", *FEWER),
    (sqr.test_gradient_norm_of_every_parameter, (golden_run,), "sqr", *FEWER),
    (sqr.test_parameter_counts_of_the_small_models, (golden_run,), "sqr",
     "body.layer1.requires_grad_(False)", "body.layer2.requires_grad_(False)"),
    (sqr.test_groups_are_those_of_the_official_lists, (6,), "sqr", "slice(-2, None)", "slice(-3, None)"),
    (sqr.test_six_stages_supervise_this_many_groups, ({"recollect": "selective"}, 32), "sqr",
     "self.recollect if self.training else", "self.recollect if torch.is_grad_enabled() else"),
    (sqr.test_every_group_is_deformable_detr_with_the_groups_own_stages,
     ({"box_refine": True}, {"recollect": "selective"}), "sqr", "box_heads[stage]", "box_heads[-1]"),
    (sqr.test_without_recollection_it_is_deformable_detr_bit_for_bit, ({},), "sqr",
     "outputs.append(tgt)", "outputs.append(tgt * 1.001)"),
    (sqr.test_inference_is_deformable_detrs_bit_for_bit_even_with_gradients, ({}, "dense"), "sqr",
     "self.recollect if self.training else", "self.recollect if True else"),
    (sqr.test_every_parameter_is_trained, ({}, {"recollect": "none"}, 2), "sqr",
     "for stage in range(len(self.decoder.layers))]", "for stage in range(1, len(self.decoder.layers))]"),
    (sqr.test_recurrent_inference_repeats_the_last_stage_and_pruning_changes_no_number, ({},), "sqr",
     "stages = [stages[-1]] * self.num_stages", "stages = stages[:-1] + [stages[-1]]"),
    (sqr.test_wrong_values_and_pruning_a_model_that_needs_its_stages_are_refused, (), "sqr",
     "if not model.recurrent:", "if False:"),
    (sqr.test_torch_compile_takes_recurrent_inference_as_one_graph, (), "sqr",
     "if self.box_refine:", "if self.box_refine and reference.max() > 0:"),
    (sqr.test_recollection_goes_around_the_decoders_of_other_files, ("detr", "none", 4), "sqr",
     '"none": slice(-1, None),', '"none": slice(0, 1),'),
    # ---- test_sam_detr.py
    (sam.test_heads_and_width_are_not_hard_coded, (), "sam_detr",
     "nn.Linear(hidden_dim // 4 * self.roi_size ** 2, ", "nn.Linear(8 * self.roi_size ** 2, "),
    (sam.test_multi_scale_goes_from_coarse_to_fine_with_any_number_of_decoder_layers, (),
     "sam_detr_multiscale", "max(len(levels) - 1 - i // 2, 0)", "len(levels) - 1 - i // 2"),
    (sam.test_salient_points_lie_inside_the_reference_box, (), "sam_detr",
     "xy[:, :, 0].tanh()", "xy[:, :, 0]"),
    (sam.test_points_start_at_the_centre_of_the_box_and_scales_do_not_start_at_zero, (), "sam_detr",
     "            layer.aligner.centre_points()", "            pass"),
    (sam.test_every_head_takes_the_feature_at_its_own_point, (), "sam_detr", "aligned=True", "aligned=False"),
    (sam.test_the_old_query_only_reweighs_what_was_taken, (), "sam_detr",
     "self.reweight_position(tgt).sigmoid()", "self.reweight_position(tgt).tanh()"),
    (sam.test_every_head_has_a_whole_query_of_its_own_and_all_have_the_same_key, (), "sam_detr",
     "k.repeat(1, 1, self.nheads)", "k.repeat_interleave(self.nheads, dim=2)"),
    (sam.test_the_gaussian_of_smca_by_hand_written_loops, (), "sam_detr",
     "+ 0.5 - points[..., 1:])", "- points[..., 1:])"),
    (sam.test_no_gradient_goes_from_one_layers_box_to_the_previous_one, (), "sam_detr",
     "reference = boxes[-1].detach()", "reference = boxes[-1]"),
    (sam.test_padding_changes_nothing_behind_the_backbone_as_long_as_boxes_stay_inside_the_image, (),
     "sam_detr", "size = valid_size(mask).repeat", "size = valid_size(mask & False).repeat"),
    (sam.test_the_only_convolution_without_input_norm_loads_whatever_its_official_name, (), "sam_detr",
     r"^input_proj\.(0\.)?(weight|bias)$", r"^input_proj\.(0\.)(weight|bias)$"),
]


@pytest.mark.parametrize("test, arguments, file, old, new", FAULTS,
                         ids=[f"{i}-{row[0].__name__[5:40]}" for i, row in enumerate(FAULTS)])
def test_a_fault_makes_its_test_fail(test, arguments, file, old, new, monkeypatch, tmp_path, request):
    (path,) = [path for path in (ROOT / f"{file}.py", ROOT / "relatives" / f"{file}.py") if path.exists()]
    text = path.read_text()
    assert text.count(old) == 1, f"{file}.py has {text.count(old)} times {old!r}"
    folder = tmp_path / "broken"
    broken = folder / path.relative_to(ROOT)  # a copy of all files, for tests that run them
    shutil.copytree(ROOT / "relatives", folder / "relatives")
    for parent in models.FILES:
        shutil.copy(ROOT / f"{parent}.py", folder)
    broken.write_text(text.replace(old, new))
    module = types.ModuleType(file)
    module.__file__ = str(broken)
    monkeypatch.setitem(sys.modules, file if path.parent == ROOT else f"relatives.{file}", module)
    monkeypatch.setattr(models, "ROOT", folder)
    for tests in TESTS:
        if hasattr(tests, file):
            monkeypatch.setattr(tests, file, module)
    exec(compile(broken.read_text(), f"{file} with a fault", "exec"), module.__dict__)
    arguments = [golden_run(old, new) if argument is golden_run else argument for argument in arguments]
    fixtures = {name: request.getfixturevalue(name) for name in ("capsys", "monkeypatch", "tmp_path")
                if name in inspect.signature(test).parameters}
    with pytest.raises((AssertionError, RuntimeError, ImportError, pytest.fail.Exception)):
        test(*arguments, **fixtures)


def is_a_case(test, arguments):
    """Whether pytest calls the test with these arguments, too: there it must pass."""
    given = dict(zip(inspect.signature(test).parameters, arguments))
    for mark in getattr(test, "pytestmark", []):
        names = mark.args[0].replace(",", " ").split()
        cases = [case.values if isinstance(case, type(pytest.param())) else case for case in mark.args[1]]
        cases = [list(case) if isinstance(case, tuple) else [case] for case in cases]
        if [given[name] for name in names] not in cases:
            return False
    return True


@pytest.mark.parametrize("tests", TESTS, ids=lambda module: module.__name__)
def test_every_test_has_a_fault(tests):
    ours = {name for name in vars(tests) if name.startswith("test_")}
    planted = {test.__name__ for test, arguments, *_ in FAULTS if is_a_case(test, arguments)}
    without = ours - planted - set(NO_FAULT)
    assert not without, f"plant a fault in tests/test_faults.py for {', '.join(sorted(without))}"
    assert not planted & set(NO_FAULT)
