"""Tests are tested: each fault, a replacement in a model file, must make the test beside it fail."""
import sys
import types

import pytest

import test_models
import test_sam_detr
import test_sqr
from tiny_models import ROOT

# test, its arguments, the file, what is replaced, what by
FAULTS = [
    (test_models.test_one_image_does_not_see_the_other, ("detr",), "detr",
     "tgt = self.norm1(tgt + self.dropout(self.self_attn(q, k, v)))",
     "tgt = self.norm1(tgt + self.self_attn(*(x.transpose(0, 1) for x in (q, k, v))).transpose(0, 1))"),
    (test_models.test_one_image_does_not_see_the_other, ("detr",), "detr", "tgt = layer(tgt, query_pos,",
     "tgt = layer(tgt + tgt.mean(0) + memory.mean((0, 1)), query_pos,"),
    (test_models.test_order_of_queries_does_not_matter, ("detr",), "detr", "hs = self.decoder(query_pos, ",
     "hs = self.decoder(query_pos.cumsum(1), "),
    (test_models.test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm, ("detr",), "detr",
     "self.cross_attn(q, k, v, mask)", "self.cross_attn(q, k, v)"),
    (test_models.test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm,
     ("conditional_detr",), "conditional_detr", "if mask is not None:", "if False:"),
    (test_models.test_padding_changes_nothing_behind_the_backbone_except_through_groupnorm,
     ("deformable_detr",), "deformable_detr", ".masked_fill(mask[..., None], 0)  # padding", "  # padding"),
    (test_models.test_a_real_backbone_sees_padding_in_the_cells_near_the_images_edge_only, ("detr",), "detr",
     "features.append(x)", "features.append(x - x.mean((2, 3), keepdim=True))"),
    (test_models.test_wrong_values_are_refused_with_a_sentence, ("detr",), "detr",
     "if not 0 <= values[\"dropout\"] < 1:", "if values[\"dropout\"] < 0 or values[\"dropout\"] >= 1:"),
    (test_models.test_wrong_inputs_are_refused_with_a_sentence, ("detr",), "detr",
     "if mask.dtype != torch.bool:", "if False:"),
    (test_models.test_wrong_values_of_a_files_own_options_are_refused_with_a_sentence,
     ("sqr", {"recollect": "all"}), "sqr", "if recollect not in SOURCES:", "if False:"),
    (test_models.test_frozen_norm_keeps_imagenets_first_layers_and_batch_norm_trains_all, ("detr",), "detr",
     "body.layer1.requires_grad_(False)", "body.layer2.requires_grad_(False)"),
    (test_models.test_shapes_are_the_contracts_and_every_parameter_is_trained,
     ("conditional_detr", {"dec_layers": 1}), "conditional_detr",
     "depth=2) if num_layers > 1 else None", "depth=2)"),
    (test_models.test_detrs_first_self_attention_gives_every_query_the_same_vector, (), "detr",
     "self.sa_proj(tgt + query_pos, tgt + query_pos, tgt)", "self.sa_proj(*[tgt + query_pos] * 3)"),
    (test_models.test_only_conditional_detrs_first_layer_adds_positions_and_has_no_lambda, (),
     "conditional_detr", "p_q = p_s if i == 0 else self.query_scale(tgt) * p_s", "p_q = p_s"),
    (test_models.test_conditional_attention_adds_a_content_and_a_spatial_score_in_every_head, (),
     "conditional_detr", "torch.cat(pair, dim=-1).flatten(-2)", "torch.cat(pair, dim=-2).flatten(-2)"),
    (test_models.test_deformable_attention_starts_as_a_uniform_star, (), "deformable_detr",
     "[angle.cos(), angle.sin()]", "[angle.sin(), angle.cos()]"),
    (test_models.test_deformable_sampling_by_hand_written_loops, (), "deformable_detr",
     "align_corners=False", "align_corners=True"),
    (test_models.test_refinement_cuts_the_gradient_between_layers, (), "deformable_detr",
     "reference = boxes[-1].detach()", "reference = boxes[-1]"),
    (test_models.test_two_stages_train_on_maps_with_fewer_tokens_than_queries, ("deformable_detr",),
     "deformable_detr", "torch.sym_min(self.num_queries, logits.shape[1])", "self.num_queries"),
    (test_models.test_padded_tokens_propose_the_whole_image_and_only_their_score_keeps_them_from_becoming_queries,
     (), "deformable_detr", "invalid[..., None], math.inf)", "invalid[..., None], 0.0)"),
    (test_sqr.test_groups_are_those_of_the_official_lists, (6,), "sqr", "slice(-2, None)", "slice(-3, None)"),
    (test_sqr.test_six_stages_supervise_this_many_groups, ({"recollect": "selective"}, 32), "sqr",
     "self.recollect if self.training else", "self.recollect if torch.is_grad_enabled() else"),
    (test_sqr.test_every_group_is_deformable_detr_with_the_groups_own_stages, ({"box_refine": True},
     {"recollect": "selective"}), "sqr", "box_heads[stage]", "box_heads[-1]"),
    (test_sqr.test_without_recollection_it_is_deformable_detr_bit_for_bit, ({},), "sqr",
     "outputs.append(tgt)", "outputs.append(tgt * 1.001)"),
    (test_sqr.test_inference_is_deformable_detrs_bit_for_bit_even_with_gradients, ({}, "dense"), "sqr",
     "self.recollect if self.training else", "self.recollect if True else"),
    (test_sqr.test_recurrent_inference_repeats_the_last_stage_and_pruning_changes_no_number, ({},), "sqr",
     "stages = [stages[-1]] * self.num_stages", "stages = stages[:-1] + [stages[-1]]"),
    (test_sqr.test_wrong_values_and_pruning_a_model_that_needs_its_stages_are_refused, (), "sqr",
     "if not model.recurrent:", "if False:"),
    (test_sam_detr.test_no_gradient_goes_from_one_layers_box_to_the_previous_one, (), "sam_detr",
     "reference = boxes[-1].detach()", "reference = boxes[-1]"),
    (test_sam_detr.test_salient_points_lie_inside_the_reference_box, (), "sam_detr",
     "xy[:, :, 0].tanh()", "xy[:, :, 0]"),
    (test_sam_detr.test_points_start_at_the_centre_of_the_box_and_scales_do_not_start_at_zero, (), "sam_detr",
     "            layer.aligner.centre_points()", "            pass"),
]


@pytest.mark.parametrize("test, arguments, file, old, new", FAULTS,
                         ids=[f"{i}-{row[0].__name__[5:40]}" for i, row in enumerate(FAULTS)])
def test_a_fault_makes_its_test_fail(test, arguments, file, old, new, monkeypatch):
    text = (ROOT / f"{file}.py").read_text()
    assert text.count(old) == 1, f"{file}.py has {text.count(old)} times {old!r}"
    module = types.ModuleType(file)
    monkeypatch.setitem(sys.modules, file, module)
    exec(compile(text.replace(old, new), f"{file} with a fault", "exec"), module.__dict__)
    for tests in (test_sqr, test_sam_detr):
        if hasattr(tests, file):
            monkeypatch.setattr(tests, file, module)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        test(*arguments)
