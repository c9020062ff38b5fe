"""Query recollection: the official numbers, who is fed what, and that nothing but the training changes."""
import itertools

import pytest
import torch

import sqr
import train
from golden import Case, assert_close, options_of
from test_golden import (  # noqa: F401, tests of every golden case: here they meet groups instead of layers
    test_every_loss_term_and_the_total,
    test_gradient_norm_of_every_parameter,
    test_logits_and_boxes_of_every_layer,
    test_matching_of_every_stage,
    test_parameter_counts_of_the_small_models,
)
from tiny_models import TARGETS, batch, shaken, tiny

KINDS = [{}, {"box_refine": True}, {"two_stage": True}]
TRAININGS = [{"recollect": "none"}, {"recollect": "selective"}, {"recollect": "dense"}, {"recurrent": True}]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=str)
each_training = pytest.mark.parametrize("training", TRAININGS, ids=str)


# ---- Official numbers --------------------------------------------------------------------------------------
def golden_run(name, recollect):
    """What the tests of test_golden.py ask for."""
    case = Case(name)
    options = options_of(case.json["case"]["args"], {"recollect": recollect})
    with torch.device("meta"):  # no initial numbers: all are loaded
        model = sqr.build(case.json["case"]["num_classes"], pretrained_backbone=False, **options)
    model.to_empty(device="cpu")
    sqr.load_official(model, {"model": case.state_dict()})
    hs = []
    hooks = [layer.register_forward_hook(lambda m, i, o: hs.append(o)) for layer in model.decoder.layers]
    images, mask = case.batch()
    with torch.no_grad():
        out = model.eval()(images, mask)
    for hook in hooks:
        hook.remove()
    criterion = train.SetCriterion(model)
    train_out = model.train()(images, mask)
    losses = criterion(train_out, case.targets())
    losses["total"].backward()
    return dict(case=case, module=sqr, model=model, out=out, hs=torch.stack(hs), criterion=criterion,
                train_out=train_out, losses=losses)


@pytest.fixture(scope="module", params=[("sqr", "selective"), ("dqr", "dense")], ids=["sqr", "dqr"])
def run(request):
    return golden_run(*request.param)


def test_decoder_outputs_at_inference(run):
    assert_close("decoder output", run["hs"], run["case"].arrays["hs"], "hs")


def test_logits_and_boxes_of_every_group_in_training(run):
    assert len(run["train_out"]["logits"]) == {"sqr": 11, "dqr": 15}[run["case"].name]
    for name in ("logits", "boxes"):
        ours = run["train_out"][name].detach()
        assert_close(f"{name} in training", ours, run["case"].arrays[f"train_{name}"], f"train_{name}")


# ---- Who is fed what ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("stages", range(1, 8))
def test_groups_are_those_of_the_official_lists(stages):
    """Queries are numbered in order of production, 0 is the initial one."""
    start, end = [0, 0, 1, 2, 4, 7, 12], [1, 2, 4, 7, 12, 20, 33]  # official start_q and end_q

    def fed(source):
        plan = sqr.recollection_plan([(stage, source) for stage in range(stages)])
        return [[query for stage, query in plan if stage == i] for i in range(stages)]

    assert fed("selective") == [list(range(a, b)) for a, b in zip(start, end)][:stages]
    assert fed("dense") == [list(range(2 ** i)) for i in range(stages)]
    assert fed("none") == [[i] for i in range(stages)]


@pytest.mark.parametrize("training, groups", list(zip(TRAININGS, [6, 32, 63, 63 + 32])), ids=str)
def test_six_stages_supervise_this_many_groups(training, groups):
    model, inputs = tiny("sqr", dec_layers=6, **training), batch()
    with torch.no_grad():  # gradients have no say in it, self.training has
        out = model.train()(*inputs)
    assert out["logits"].shape == (groups, 2, 5, 3) and out["boxes"].shape == (groups, 2, 5, 4)
    assert len(model.eval()(*inputs)["logits"]) == 6


def paths(recollect, stages):
    """The stages that each group went through, in order of production; the first one is 1."""
    found = [[*earlier, last] for last in range(1, stages + 1) for n in range(last)
             for earlier in itertools.combinations(range(1, last), n)]
    if recollect == "selective":  # no step is longer than 2, and the initial query is at 0
        found = [p for p in found if all(b - a <= 2 for a, b in zip([0, *p], p))]
    if recollect == "none":
        found = [list(range(1, last + 1)) for last in range(1, stages + 1)]
    return sorted(found, key=lambda p: [*reversed(p), 0])


def plain(model, path, **kind):
    """Deformable DETR whose decoder is those stages of the model, each with its own heads."""
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


@each_kind
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


# ---- Nothing else changes ----------------------------------------------------------------------------------
@each_kind
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


@each_kind
@pytest.mark.parametrize("recollect", ["selective", "dense"])
def test_inference_is_deformable_detrs_bit_for_bit_even_with_gradients(kind, recollect):
    model = shaken("sqr", dec_layers=3, recollect=recollect, **kind).eval()
    out, expected = model(*batch()), plain(model, [1, 2, 3], **kind)(*batch())
    assert out["boxes"].requires_grad and all(out[key].equal(expected[key]) for key in ("logits", "boxes"))


@each_kind
@each_training
@pytest.mark.parametrize("stages", [1, 2])
def test_every_parameter_is_trained(kind, training, stages):
    model = tiny("sqr", dec_layers=stages, backbone_norm="batch", **kind, **training).train()
    train.SetCriterion(model)(model(*batch()), TARGETS)["total"].backward()
    unused = [n for n, p in model.named_parameters() if p.grad is None]
    assert not unused, f"these parameters take no part: {', '.join(unused)}"


# ---- A recurrent last stage (DQRR) -------------------------------------------------------------------------
@each_kind
def test_recurrent_inference_repeats_the_last_stage_and_pruning_changes_no_number(kind):
    options = dict(dec_layers=4, recurrent=True, **kind)
    model, inputs = shaken("sqr", **options).eval(), batch()
    with torch.no_grad():
        out, expected = model(*inputs), plain(model, [4, 4, 4, 4], **kind)(*inputs)
        before = sum(p.numel() for p in model.parameters())
        sqr.prune(model)
        after = sum(p.numel() for p in model.parameters())
        pruned = model(*inputs)
    assert after < before and len(model.decoder.layers) == 1
    new = shaken("sqr", **options).eval()  # other weights
    sqr.prune(new)
    new.load_state_dict(model.state_dict())
    with torch.no_grad():
        loaded = new(*inputs)
    for key in ("logits", "boxes"):
        assert len(out[key]) == 4
        assert out[key].equal(expected[key]) and out[key].equal(pruned[key]) and out[key].equal(loaded[key])


def test_wrong_values_and_pruning_a_model_that_needs_its_stages_are_refused():
    with pytest.raises(ValueError, match='recollect is .all., it must be "selective"'):
        tiny("sqr", recollect="all")
    with pytest.raises(ValueError, match="recurrent=True"):
        sqr.prune(tiny("sqr"))


def test_torch_compile_takes_recurrent_inference_as_one_graph():
    model, inputs = shaken("sqr", recurrent=True, box_refine=True, num_feature_levels=2).eval(), batch()
    with torch.no_grad():
        expected = model(*inputs)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(*inputs)
    for key in ("logits", "boxes"):
        torch.testing.assert_close(compiled[key], expected[key], rtol=0, atol=1e-5)


# ---- Any decoder -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("source, groups", [("none", 4), ("selective", 11), ("dense", 15)])
@pytest.mark.parametrize("name", ["detr", "conditional_detr"])
def test_recollection_goes_around_the_decoders_of_other_files(name, source, groups):
    model = shaken(name, dec_layers=4).eval()
    decoder, seen = model.decoder, {}
    decoder.register_forward_hook(lambda module, inputs, output: seen.update(inputs=inputs, hs=output))
    with torch.no_grad():
        model(*batch())
    query_pos, *context = seen["inputs"]
    queries = [torch.zeros_like(query_pos)]  # the initial query, then what each group became
    for stage, query in sqr.recollection_plan([(stage, source) for stage in range(4)]):
        tgt, between = queries[query], context
        if name == "conditional_detr":  # p_s, and lambda from what the stage is fed
            p_s, *between = context
            between = [p_s if stage == 0 else decoder.query_scale(tgt) * p_s, *between]
        queries.append(decoder.layers[stage](tgt, query_pos, *between))
    hs = torch.stack([decoder.norm(tgt) for tgt in queries[1:]])  # [S, B, Q, D]
    assert hs.shape == (groups, 2, 5, 32)
    torch.testing.assert_close(hs[-1], seen["hs"][-1], rtol=0, atol=1e-5)  # the plain, sequential path
    if source == "none":
        assert hs.equal(seen["hs"]), "without recollection it is the plain decoder, bit for bit"
