"""The first difference is named where it is, and how it differs, as far as that can be told."""
import sys

import pytest
import torch

from tests.grading import other_detr
from tests.grading.blank import blank
from tests.grading.files import ROOT, ours_named
from tests.grading.first_difference import PLAIN, first_difference, how, main
from tests.grading.planted import MISTAKES, module_of


@pytest.mark.parametrize("words, place, description", [
    ("scores of padding are -1", "of encoder.layers.0.self_attn.out_proj", "off by up to"),
    ("keys of attention among queries", "argument k of decoder.layers.0.sa_proj", "scaled by 0"),
    ("boxes begin at their top left", "output['boxes'] of the model (stage 1)", "off by up to"),
])
def test_a_planted_mistake_is_located(words, place, description):
    mistake = next(m for m in MISTAKES if m.what.startswith(words) and m.file == "detr")
    line = next(first_difference(module_of(mistake), ours_named("detr"), variants=[PLAIN]))
    assert f"{place}: " in line and description in line, line


def test_a_right_file_gets_no_untrue_line():
    """Its parts have other names, so only the output can be compared."""
    lines = list(first_difference(other_detr, ours_named("detr")))
    assert lines == ["with the default options: no difference, neither in numbers nor in gradients."]


def test_variants_gradients_and_initial_values_are_looked_at():
    for words, file, expected in [
        ("boxes train only their head", "detr", "must reach the parameter"),
        ("biases of attention's output", "detr", "initial values: the parameter that is"),
        ("points are relative to (height", "deformable_detr", "with box_refine, inference: the first"),
    ]:
        mistake = next(m for m in MISTAKES if m.what.startswith(words) and m.file == file)
        lines = list(first_difference(module_of(mistake), ours_named(file)))
        assert any(expected in line for line in lines), lines


def test_how_two_tensors_differ():
    torch.manual_seed(0)
    x = torch.rand(2, 5, 4)
    corners = torch.cat([x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2], -1)
    for theirs, words in [(x.transpose(1, 2), "transposed, its dimensions are ours in the order [0, 2, 1]"),
                          (x * 3, "scaled by 3"), (x.sigmoid(), "a sigmoid too much"), (corners, "corners"),
                          (x.logit(), "the sigmoid is missing"), (x.roll(2, -1), "its two halves"),
                          (x[:1], "shape [1, 5, 4], not [2, 5, 4]")]:
        assert how(theirs, x).startswith(words), words


def test_the_command(monkeypatch, capsys, tmp_path):
    file = tmp_path / "my_detr.py"
    file.write_text(blank((ROOT / "detr.py").read_text(), "sine_positions"))
    monkeypatch.setattr(sys, "argv", ["first_difference.py", str(file), "--like", "detr"])
    main()
    assert "your file stops. not written yet: sine_positions" in capsys.readouterr().out
