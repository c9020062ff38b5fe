"""docs/exercises.md: every block that it takes out loses the marks it names, and nothing breaks in another
way."""

import re
import subprocess
import sys
import types

import pytest

from tests.grading import marks
from tests.grading.blank import blank
from tests.grading.child import sentence
from tests.grading.files import ROOT, ours_named, path_of
from tests.grading.grader import MARKS
from tests.grading.notebook import notebook
from tests.grading.small import cheap

TEXT = (ROOT / "docs" / "exercises.md").read_text()
EXERCISES = re.findall(
    r"    python -m tests.grading.blank (?:relatives/)?(\w+)\.py (.+) > my_\w+\.py\n\n"
    r"Marks: ([\w, ]+)\.", TEXT,
)


def module_without(file, blocks):
    module = types.ModuleType(file)
    module.__file__ = f"my_{file}.py"
    exec(compile(blank(path_of(file).read_text(), *blocks), module.__file__, "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("file, blocks, named", EXERCISES, ids=lambda x: x)
def test_what_is_not_written_yet_loses_its_marks_and_says_so(file, blocks, named, small_backbone):
    module, ours, lost = module_without(file, blocks.split()), ours_named(file), {}
    only = "Only this one" in TEXT.split(f"{file}.py {blocks} >")[1].split("**")[0]
    for name in (
        cheap(file) if only else {*named.split(", "), "shapes", "training", "everything"} & {*cheap(file)}
    ):
        try:
            getattr(marks, name)(module, ours, 0)
        except Exception as error:
            lost[name] = sentence(error, module.__file__)
    assert set(named.split(", ")) <= set(lost)
    block = re.compile("not written yet: (" + "|".join(blocks.split()) + r")(\.\w+)?$")
    assert all(block.match(why) for why in lost.values()), lost
    if only:
        assert set(lost) == {named}, lost


# ---- As a notebook -----------------------------------------------------------------------------------------
def pytest_generate_tests(metafunc):
    if "book_of" in metafunc.fixturenames:
        everyone = dict.fromkeys(file for file, *_ in EXERCISES)
        some = ("conditional_detr", "train", "hdetr")  # the others with --all-planted
        metafunc.parametrize("book_of", everyone if metafunc.config.getoption("--all-planted") else some)


def test_the_notebook_runs_from_top_to_bottom(book_of, small_backbone):
    book = notebook(book_of)
    assert book["nbformat"] == 4 and len({cell["id"] for cell in book["cells"]}) == len(book["cells"])
    names = {}
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)


def test_without_solutions_the_notebook_s_tests_fail_and_say_what_is_missing(small_backbone):
    names, failed = {}, []
    for cell in notebook("conditional_detr", student=True)["cells"]:
        source = "".join(cell["source"])
        assert "SOLUTION" not in source
        if cell["metadata"].get("nbgrader", {}).get("grade"):
            with pytest.raises(AssertionError, match="not written yet"):
                exec(source, names)
            failed.append(cell["metadata"]["nbgrader"]["points"])
        elif cell["cell_type"] == "code":
            exec(source, names)
    assert len(failed) >= 3 and all(points > 0 for points in failed)


def test_every_file_has_exercises_and_every_question_an_answer():
    assert {file for file, *_ in EXERCISES} >= set(MARKS)
    questions, answers = TEXT.split("## Answers")
    asked, answered = (
        re.findall(r"\((\d+[a-z])\)", questions),
        re.findall(r"^\* (\d+[a-z])\. ", answers, re.M),
    )
    assert asked == answered
    numbers = [int(n) for n in re.findall(r"^\*\*(\d+)\. ", questions, re.M)]
    assert numbers == list(range(1, len(EXERCISES) + 1)), "an exercise without a command and marks"


def test_the_command_blanks_a_file_and_lists_what_it_knows():
    def run(*blocks):
        command = [sys.executable, "-m", "tests.grading.blank", "detr.py", *blocks]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run("MLP", "sine")
    assert done.stdout.count('raise NotImplementedError("not written yet")') == 2
    assert done.stdout.count("\n") < (ROOT / "detr.py").read_text().count("\n")
    done = run("YOLO")
    assert done.returncode == 2 and "no block 'YOLO'; there are FrozenBatchNorm2d, Backbone" in done.stderr
