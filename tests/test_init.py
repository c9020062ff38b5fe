"""--init: a new run that starts from the weights of another, ours or official."""
import argparse
from types import SimpleNamespace

import pytest
import torch

import train
from support import UserError, checkpoints
from support.checkpoints import load_model_file
from tests.command import QUICK
from tests.folders import small_coco
from tests.golden import CASES, Case, options_of
from tests.tiny_models import TINY, tiny


def test_init_copies_all_but_the_classes_and_the_queries_that_are_new(capsys):
    module = load_model_file("deformable_detr")
    old, new = tiny("deformable_detr"), module.build(5, **{**TINY, "num_queries": 8})
    head = new.class_head[0].weight.clone()
    weights = {name: value + 1 for name, value in old.state_dict().items()}
    checkpoint = {"model": weights, "model_options": {}, "class_names": ["a"]}
    checkpoints.initialise(new, module, checkpoint, list("abcde"))
    assert new.class_head[0].weight.equal(head), "the class head was for other classes"
    assert new.encoder.layers[0].norm1.weight.equal(old.encoder.layers[0].norm1.weight + 1)
    queries = new.queries.query_embed.weight
    assert queries[:5].equal(old.queries.query_embed.weight + 1) and queries.shape[0] == 8
    said = capsys.readouterr().out
    assert "class_head.0.weight: for other classes" in said and "the first 5 of the file's 5 queries" in said


@pytest.mark.parametrize("name", [
    "detr", "conditional_detr", "deformable_detr_two_stage", "sam_detr_multiscale"])
def test_init_takes_official_checkpoints(name, capsys):
    """As they are published, with the arguments of their training; ours has fewer classes."""
    (file, extra), case = CASES[name], Case(name)
    module = load_model_file(file)
    official = {"model": case.state_dict(), "args": SimpleNamespace(lr=1), "epoch": 49}
    model = module.build(5, **options_of(case.json["case"]["args"], extra), pretrained_backbone=False)
    checkpoints.initialise(model, module, official, list("abcde"))
    left = capsys.readouterr().out.splitlines()[1:]
    assert left and all("class_head" in line for line in left), left
    wanted = checkpoints.in_our_names(module, official)
    for key, value in model.state_dict().items():
        assert "class_head" in key or value.equal(wanted[key]), f"{key} was not copied"


def test_an_official_file_with_its_namespace_is_read(tmp_path):
    content = {"model": {"x": torch.zeros(2)}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "official.pth")
    assert checkpoints.read_init(tmp_path / "official.pth")["args"].lr == 1e-4


def test_weights_of_another_model_are_refused():
    module = load_model_file("detr")
    with pytest.raises(UserError, match="does not fit"):
        checkpoints.initialise(tiny("detr"), module, {"model": {"x": torch.zeros(2)}}, ["a"])


def test_what_holds_no_weights_is_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="does not fit"):
        init = checkpoints.read_init(tmp_path / "x.pt")
        checkpoints.initialise(tiny("detr"), load_model_file("detr"), init, ["a"])


def test_fine_tuning_from_a_run_by_the_command_line(tmp_path, monkeypatch, capsys):
    small_coco(tmp_path / "set")
    monkeypatch.chdir(tmp_path)
    train.main(["--model", "conditional_detr", "--steps", "1", "--overfit", "2", *QUICK, "--out", "first"])
    train.main(["--data", "set", "--init", "first", "--steps", "2", "--workers", "0", "--size", "48",
                "--batch-size", "2", "--out", "second"])
    assert "class_head.weight: for other classes" in capsys.readouterr().out
    second = torch.load(tmp_path / "second/last.pt", weights_only=True)
    assert second["args"]["model"] == "conditional_detr" and second["model_options"]["enc_layers"] == 1
