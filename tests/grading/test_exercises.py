"""docs/exercises.md: every block that it takes out fails the marks it names, and the table shows it."""
import re

import pytest

from tests.grading.blank import blank
from tests.grading.files import ROOT, path_of
from tests.grading.grader import MARKS
from tests.grading.planted import module_from
from tests.grading.small import failing

TEXT = (ROOT / "docs" / "exercises.md").read_text()
EXERCISES = re.findall(r"    python -m tests.grading.blank (?:relatives/)?(\w+)\.py (.+) > work/my_\w+\.py\n"
                       r"\nMarks: ([\w, ]+)\.", TEXT)


@pytest.mark.parametrize("file, blocks, named", EXERCISES, ids=lambda x: x)
def test_what_is_not_written_yet_fails_its_marks_and_says_so(file, blocks, named):
    names = named.split(", ")
    found = failing(module_from(blank(path_of(file).read_text(), *blocks.split()), file), file, names)
    assert set(found) == set(names) and all("not written yet" in why for why in found.values()), found


def test_every_file_has_exercises_and_every_question_an_answer():
    assert {file for file, *_ in EXERCISES} >= set(MARKS)
    questions, answers = TEXT.split("## Answers")
    assert re.findall(r"\((\d+[a-z])\)", questions) == re.findall(r"^\* (\d+[a-z])\. ", answers, re.M)
    assert len(re.findall(r"^\*\*(\d+)\. ", questions, re.M)) == len(EXERCISES), "one has no command or marks"
