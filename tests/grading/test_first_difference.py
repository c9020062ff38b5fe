"""The first difference is named where it is, and how it differs, as far as that can be told."""

import itertools
import sys
import types

import pytest
import torch

from tests.grading import first_difference as first_difference_py
from tests.grading.files import ROOT, ours_named
from tests.grading.first_difference import PLAIN, VARIANTS, first_difference, how, main
from tests.grading.planted import MISTAKES, module_of

# (words of a mistake, index into VARIANTS, where it is seen first, how)
SEEN = [
    ("the mask is inverted", 0, "argument `input` of encoder.layers.0.self_attn.out_proj", "off by up to"),
    ("positions encode x in the first half", 0, "argument `pos` of encoder", "its two halves are swapped"),
    (
        "decoder self-attention is along the batch",
        0,
        "argument `q` of decoder.layers.0.self_attn",
        "transposed",
    ),
    (
        "the decoder looks at padding",
        0,
        "argument `input` of decoder.layers.0.cross_attn.out_proj",
        "only for image 2",
    ),
    (
        "boxes are corners",
        0,
        "the output boxes of stage 1",
        "corners (x, y, x, y) instead of centre and size",
    ),
    ("boxes have no sigmoid", 0, "the output boxes of stage 1", "the sigmoid is missing"),
    ("lambda is left out", 0, "argument `p_q` of decoder.layers.1", "off by up to"),
    ("width and height are relative", 0, "the output boxes of stage 1", "only for width and height"),
    (
        "offsets are divided by (H, W)",
        0,
        "argument `input` of encoder.layers.0.self_attn.output_proj",
        "off by up to",
    ),
    ("the Gaussian lacks the 1/8", 1, "argument `bias` of decoder.layers.0.cross_attn", "scaled by 8"),
    ("a stage is fed three stages", 1, "argument `tgt` of decoder.layers.2", "off by up to"),
]


@pytest.mark.parametrize("words, variant, place, description", SEEN, ids=lambda x: str(x)[:40])
def test_a_planted_mistake_is_named(words, variant, place, description, small_backbone):
    mistake = next(m for m in MISTAKES if m.what.startswith(words))
    student, ours = module_of(mistake), ours_named(mistake.file)
    line = next(first_difference(student, ours, variants=[VARIANTS[mistake.file][variant]]))
    assert f"the first difference is {place}: " in line and description in line, line


def test_a_mistake_that_people_make_is_recognised(small_backbone, monkeypatch):
    """One of two_stage: its wrong choice of proposals must not be seen in every other mistake's numbers."""
    some = [m for m in MISTAKES if m.mark in ("padding", "two_stage", "sampling")]
    monkeypatch.setattr(first_difference_py, "MISTAKES", some)
    for words in ("the mask is inverted", "proposals are ranked"):
        mistake = next(m for m in MISTAKES if m.what.startswith(words))
        variants = [
            v for v in VARIANTS[mistake.file] if v[0] in ("with the default options", "with two_stage")
        ][-1:]
        _, _, *lines = first_difference(module_of(mistake), ours_named(mistake.file), variants=variants)
        assert lines == [f"The output is exactly that of our file where {mistake.what}."]


def test_differences_in_gradients_and_initial_values_are_named(small_backbone):
    for words, expected in [
        ("the reference point is detached", "does not reach reference.layers.0.weight (a detach too much?)"),
        ("the class head does not start", "class_head.bias starts at"),
    ]:
        mistake = next(m for m in MISTAKES if m.what.startswith(words))
        lines = list(first_difference(module_of(mistake), ours_named(mistake.file)))
        assert any(expected in line for line in lines), lines


def test_other_names_inside_leave_the_stages_of_the_output(small_backbone, monkeypatch):
    import detr
    from tests.grading import other_detr

    assert next(first_difference(other_detr, detr)).endswith(
        "no difference, neither in numbers nor in gradients."
    )
    forward = other_detr.Detector.forward

    def wrong(self, images, mask):
        out = forward(self, images, mask)
        return {**out, "boxes": torch.cat([out["boxes"][:1], 1 - out["boxes"][1:]])}

    monkeypatch.setattr(other_detr.Detector, "forward", wrong)
    assert "the output boxes of stage 2" in next(first_difference(other_detr, detr, variants=[PLAIN]))


def test_how_two_tensors_differ():
    torch.manual_seed(0)
    x, padding = torch.randn(2, 5, 8), torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()
    on_padding = x + padding[..., None]
    cases = [
        (x.transpose(1, 2), "transposed, its dimensions are ours in the order [0, 2, 1]"),
        (x * 3, "scaled by 3"),
        (x + 0.5, "shifted by 0.5"),
        (-x, "scaled by -1"),
        (x * 0, "all zero"),
        (x.sigmoid(), "a sigmoid too much"),
        (x.flip(1), "in reverse order along dimension 1"),
        (on_padding, "wrong only on tokens that are padding"),
        (x.softmax(1), "softmax over dimension 1 too much"),
        (x[:1], "shape [1, 5, 8], not [2, 5, 8]"),
        (x.log(), "not finite"),
    ]
    for theirs, words in cases:
        assert how(theirs, x, padding).startswith(words), words
    assert how(~padding, padding) == "inverted"


def test_the_command(monkeypatch, capsys):
    other = ROOT / "tests" / "golden.py"
    monkeypatch.setattr(sys, "argv", ["first_difference.py", str(other), "--like", "detr"])
    main()
    assert "cannot be built or filled. not written yet: build" in capsys.readouterr().out
    for file, like, words in [
        ("nothing.py", "detr", "nothing.py: no such file"),
        (str(other), "yolo", "--like yolo, it must be one of"),
        (str(other), "train", "--like train has no parts to follow"),
    ]:
        monkeypatch.setattr(sys, "argv", ["first_difference.py", file, "--like", like])
        with pytest.raises(SystemExit):
            main()
        assert words in capsys.readouterr().err


def test_initial_values_do_not_hide_what_comes_after_them(small_backbone):
    """Two faults: other initial values, and one that shows with two_stage alone."""
    first, second = (
        next(m for m in MISTAKES if m.what.startswith(words))
        for words in ("points do not start as a star", "proposals are ranked")
    )
    both = second._replace(old=(first.old, second.old), new=(first.new, second.new))
    lines = list(itertools.islice(first_difference(module_of(both), ours_named("deformable_detr")), 3))
    assert "with two_stage, inference: the first difference is" in lines[2], lines


def test_a_block_that_is_still_blank_is_named(small_backbone):
    from tests.grading.blank import blank

    module = types.ModuleType("detr")
    module.__file__ = "my_detr.py"
    exec(
        compile(blank((ROOT / "detr.py").read_text(), "sine_positions"), "my_detr.py", "exec"),
        module.__dict__,
    )
    lines = list(first_difference(module, ours_named("detr")))
    assert lines == ["with the default options, inference: your file stops. not written yet: sine_positions"]
