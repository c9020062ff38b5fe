"""The marks are tested: each planted mistake loses the mark it belongs to, and our files lose none."""
import pytest

from tests.grading.files import ours_named
from tests.grading.grader import MARKS
from tests.grading.planted import MISTAKES, module_of
from tests.grading.small import CHEAP, lost


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda m: f"{m.file}: {m.what}")
def test_a_planted_mistake_loses_its_mark(mistake, small_backbone):
    assert lost(module_of(mistake), mistake.file, [mistake.mark]), f"{mistake.mark} is met, although {mistake.what}"


# Mistakes that lose nothing else, but for the marks where everything comes together
ALONE = [
    "attention does not use the padding mask",
    "scores are divided by the square root of the whole width, not of a head's",
    "positions encode x in the first half and y in the second",
    "boxes are corners, not centre and size",
    "lambda is added, not multiplied",
    "the reference point is detached",
    "values at padding are not set to zero",
    "sines of the points carry a gradient",
    "a stage is fed three stages before it, not two",
    "the class cost is a logarithm, as in the loss",
    "the weight 0.1 of \"no object\" is missing",
    "all stages use the last stage's matching",
]


@pytest.mark.parametrize("mistake", [m for m in MISTAKES if m.what in ALONE], ids=lambda m: f"{m.file}: {m.what}")
def test_a_planted_mistake_loses_no_other_mark(mistake, small_backbone):
    found = lost(module_of(mistake), mistake.file, CHEAP[mistake.file])
    assert set(found) - {"everything", "criterion"} == {mistake.mark}, found


@pytest.mark.parametrize("file", MARKS)
def test_our_own_files_lose_no_mark(file, small_backbone):
    assert not lost(ours_named(file), file, CHEAP[file])
