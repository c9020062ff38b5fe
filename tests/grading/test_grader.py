"""The grader is tested through its command: our files get all points, and no file takes it down."""
import subprocess
import sys

import pytest

from tests.grading.files import ROOT
from tests.grading.grader import MARKS, grade, table
from tests.grading.small import CHEAP, lost


def command(*options):
    pytest = [sys.executable, "-m", "pytest", "-q", "tests"]
    done = subprocess.run([*pytest, *options], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("file, left_out", [("detr", 0), ("conditional_detr", 2)])  # official, 2 points, takes its time
def test_the_command_gives_our_files_all_points(file, left_out):
    which = ["-k", "not official"] if left_out else []
    code, output = command("--file", f"{file}.py", "--like", file, "--points", "--seed", "7", *which)
    assert code == 0, output
    points = sum(MARKS[file].values()) - left_out
    assert f"total          {points} / {points}" in output, output


def test_the_command_says_what_is_wrong_with_its_options():
    assert "must be one of conditional_detr, deformable_detr, detr" in command("--file", "detr.py", "--like", "yolo")[1]
    assert "no such file" in command("--file", "nothing.py", "--like", "detr")[1]


def test_a_file_that_is_built_in_another_way_gets_all_points(small_backbone):
    from tests.grading import other_detr

    assert not lost(other_detr, "detr", CHEAP["detr"])


BAD = '''
"""Every mark meets another disaster."""
import os, sys, time
from pathlib import Path

import torch


def hang():
    time.sleep(1000)


def exit_at_once():
    os._exit(3)


def leave():
    sys.exit("bye")


def eat():
    return torch.empty(2 ** 31)  # 8 GB


def print_a_lot():
    for _ in range(300):
        print("x" * 100_000)
    raise RuntimeError("tired")


def recur():
    recur()


def matching():
    raise NotImplementedError


def later():
    raise NotImplementedError("later")


class SetCriterion:
    """Created for every mark; a file counts them, because some do not survive."""

    def __init__(self, model):
        count = Path(__file__).with_suffix(".count")
        number = len(count.read_text()) if count.exists() else 0
        count.write_text("." * (number + 1))
        [leave, eat, print_a_lot, recur, matching, hang, exit_at_once, later, later][number]()
'''


def test_no_file_takes_the_grader_down(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    results = dict(grade(tmp_path / "bad.py", "train", seconds=6))
    expected = ["SystemExit: bye", "wants more than 4 GB", "tired (print_a_lot", "maximum recursion depth",
                "not written yet: matching", "took longer than 6 seconds", "ended Python (exit code 3)",
                "not written yet: later", "not written yet: later"]
    assert list(results) == list(MARKS["train"])
    for sentence, part in zip(results.values(), expected):
        assert part in sentence, results
    assert table("bad.py", "train", 0, results).split()[-4:] == ["total", "0", "/", str(sum(MARKS["train"].values()))]


def test_a_file_that_cannot_be_imported_is_told_so(tmp_path):
    (tmp_path / "broken.py").write_text("import torch\nx = 1 / 0\n")
    results = dict(grade(tmp_path / "broken.py", "train"))
    assert set(results) == set(MARKS["train"])
    assert all("cannot be imported: ZeroDivisionError" in sentence for sentence in results.values()), results


def test_without_load_official_the_marks_that_need_no_weights_remain(small_backbone, monkeypatch):
    from tests.grading import other_detr

    monkeypatch.delattr(other_detr, "load_official")
    found = lost(other_detr, "detr", CHEAP["detr"])
    assert set(CHEAP["detr"]) - set(found) == {"shapes", "independence", "training"}
    assert all("load_official, and this mark has to give" in sentence for sentence in found.values()), found
