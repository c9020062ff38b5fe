"""The marks are tested: each planted mistake costs the mark it belongs to and no other, and our files lose
none."""

import pytest

from tests.grading.files import model_files, ours_named
from tests.grading.grader import MARKS, marks_of
from tests.grading.judge import TOGETHER, judged
from tests.grading.planted import MISTAKES, module_of
from tests.grading.small import CHEAP, lost

# Whoever crashes cannot be judged by much
CRASHES = (
    "the cost is computed on centre and size",
    "positions are not numbers",
    "the first dimension is the batch",
)
# The slips that people make most are judged by all marks every time, all others with --all-planted
ALWAYS = (
    "the feed-forward block has a GELU",
    "logits go through a softmax",
    "the final norm is there twice",
    "the feed-forward block has no dropout",
    "attention weights have no dropout",
    "positions are not numbers",
    "losses are divided by the objects of this part",
    "values of the decoder's self-attention have the queries'",
    "boxes are relative to the padded image",
    "lambda is added",
    "all stages use the last stage's matching",
)


def pytest_generate_tests(metafunc):
    if "slip" in metafunc.fixturenames:
        everyone = metafunc.config.getoption("--all-planted")
        slips = [m for m in MISTAKES if everyone or m.what.startswith(ALWAYS)]
        metafunc.parametrize("slip", slips, ids=lambda m: f"{m.file}: {m.what}")


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.file}: {m.what}")
def test_a_planted_mistake_loses_its_mark(mistake, small_backbone):
    assert lost(module_of(mistake), mistake.file, [mistake.mark]), (
        f"{mistake.mark} is met, although {mistake.what}"
    )


def test_one_slip_costs_one_mark(slip, small_backbone):
    verdicts = judged(module_of(slip), slip.file, 0, CHEAP[slip.file])
    found = {
        status: {m for m, v in verdicts.items() if v.status == status} for status in ("lost", "unjudged")
    }
    assert found["lost"] == {slip.mark}, verdicts
    allowed = {*TOGETHER, "multiscale", "refinement", "two_stage"}  # what stands on the lost mark as a whole
    assert found["unjudged"] <= allowed or slip.what.startswith(CRASHES), verdicts


@pytest.mark.parametrize("file", MARKS)
def test_our_own_files_lose_no_mark(file, small_backbone):
    assert not lost(ours_named(file), file, CHEAP[file])


@pytest.mark.parametrize("file", [name for name in model_files() if name not in MARKS])
def test_relatives_lose_no_mark(file, small_backbone):
    """No list names them: whatever has a RECIPE and a build can be graded against."""
    assert not lost(ours_named(file), file, [mark for mark in marks_of(file) if mark != "official"])


def test_a_group_that_sees_the_others_loses_its_mark(small_backbone):
    from tests.grading.files import path_of
    from tests.grading.planted import module_from

    text = path_of("group_detr").read_text()
    fold = "(x.unflatten(1, (groups, -1)).flatten(0, 1) for x in (q, k, v))"
    unfold = ".unflatten(0, (-1, groups)).flatten(1, 2)"
    assert text.count(fold) == text.count(unfold) == 1
    module = module_from(text.replace(fold, "(q, k, v)").replace(unfold, ""), "group_detr")
    assert "groups" in lost(module, "group_detr", ["groups"])
