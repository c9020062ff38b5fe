"""The marks are tested: each planted mistake loses the mark it belongs to, and right files lose none.

With --all-planted all marks judge each mistake: it must lose its own and no other. The end prints a table.
"""
from collections import Counter

import pytest

from tests.grading.files import model_files, ours_named
from tests.grading.grader import MARKS, marks_of
from tests.grading.planted import MISTAKES, module_of
from tests.grading.small import cheap, failing, judged

MEASURED = Counter()
IDS = [f"{m.file}: {m.what}" for m in MISTAKES]
ALWAYS = ("the softmax is over heads", "T is not shared", "objects are taken in their own order",
          "the batch norm is live", "weights of levels and points", "lambda comes from")


@pytest.mark.parametrize("mistake", MISTAKES, ids=IDS)
def test_a_planted_mistake_loses_its_mark(mistake, small_backbone, request):
    """Some are judged by all marks each time: one slip costs one mark."""
    new = mistake is next(m for m in MISTAKES if m.what == mistake.what)
    if not request.config.getoption("--all-planted") and not (new and mistake.what.startswith(ALWAYS)):
        assert failing(module_of(mistake), mistake.file, [mistake.mark]), f"{mistake.mark} is met"
        return
    lost = judged(module_of(mistake), mistake.file)["lost"]
    right, there = set(lost) == {mistake.mark}, mistake.mark in lost
    MEASURED[mistake.file, "right" if right else "several" if there else "another" if lost else "none"] += 1
    assert right, lost


@pytest.fixture(scope="module", autouse=True)
def print_table(request):
    yield
    for file in MARKS if request.config.getoption("--all-planted") else ():
        row = [MEASURED[file, column] for column in ("right", "several", "none", "another")]
        print(f"\n| {file} | {sum(row)} | {' | '.join(map(str, row))} |", end="")


@pytest.mark.parametrize("file", [*MARKS, *(name for name in model_files() if name not in MARKS)])
def test_our_own_files_lose_no_mark(file, small_backbone):
    """No list names relatives: whatever has a RECIPE and a build can be graded against."""
    assert not failing(ours_named(file), file)


def test_every_mark_has_a_mistake():
    of = {(m.file, m.mark) for m in MISTAKES}
    assert {mark for _, mark in of} == {mark for file in MARKS for mark in marks_of(file)} - {
        "everything", "official", "criterion"}
    for file in MARKS:
        own = set(cheap(file)) - set(cheap("detr")) - {"criterion"}
        assert own <= {mark for other, mark in of if other in (file, "deformable_detr")}, file
