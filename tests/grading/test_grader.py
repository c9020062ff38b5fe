"""The grader is tested through its command: right files get all points, and no file takes it down."""
import json
import subprocess
import sys

from tests.grading.blank import blank
from tests.grading.files import ROOT
from tests.grading.grader import MARKS, asked_for, failures_of, grade, table
from tests.grading.judge import Failure, settle
from tests.grading.repeats import repeated


def command(*options):
    pytest = [sys.executable, "-m", "pytest", "-q", "tests/grading"]
    done = subprocess.run([*pytest, *options], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_command_gives_our_files_all_points(tmp_path):
    report, marks = tmp_path / "results.json", ["shapes", "queries", "official"]
    code, output = command("--file", "detr.py", "--like", "detr", "--points", "--seed", "7", "--json",
                           str(report), "-k", " or ".join(marks))
    points = sum(MARKS["detr"][mark] for mark in marks)
    assert code == 0 and f"{points} of {points} points" in output, output
    results = json.loads(report.read_text())
    assert results["score"] == points == sum(test["score"] for test in results["tests"])
    assert all(text.endswith(".") for text in asked_for().values() if text), "ends in mid-sentence"


def test_a_missing_file_gets_results_with_no_points(tmp_path):
    (tmp_path / "mydetr.py").write_text("")
    missing, report = str(tmp_path / "my_detr.py"), tmp_path / "results.json"
    code, output = command("--file", missing, "--like", "detr", "--json", str(report))
    results = json.loads(report.read_text())
    assert code and results["score"] == 0 and "there is mydetr.py" in results["tests"][0]["output"]
    assert "must be one of conditional_detr, deform" in command("--file", "x.py", "--like", "yolo")[1]


BAD = '''
import os, sys
from pathlib import Path

import torch


def print_a_lot():
    for _ in range(300):
        print("x" * 100_000)
    raise RuntimeError("tired")


def work():
    while True:
        pass


def matching():
    raise NotImplementedError


class SetCriterion:
    def __init__(self, model):  # created for every mark; a file counts them, because some do not survive
        count = Path(__file__).with_suffix(".count")
        number = len(count.read_text()) if count.exists() else 0
        count.write_text("." * (number + 1))
        [lambda: sys.exit("bye"), lambda: torch.empty(2 ** 31), print_a_lot, matching, lambda: os._exit(3),
         work][number]()
'''


def test_no_file_takes_the_grader_down(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    expected = ["SystemExit: bye", "asks for more than 4 GB", "tired (print_a_lot", "not written yet: match",
                "ends Python (exit code 3)", "takes longer than 3 seconds"]
    found = failures_of(tmp_path / "bad.py", "train", 0, list(MARKS["train"])[:len(expected)], seconds=3)
    assert all(words in failure.sentence for words, failure in zip(expected, found.values())), found


def test_our_files_cannot_be_imported(tmp_path):
    (tmp_path / "bad.py").write_text("import train\n")
    found = table(grade(tmp_path / "bad.py", "train", names=["l1_loss"], seconds=5))
    assert "No module named 'train'" in found and "0 of 2 points" in found, found


def test_what_builds_on_a_lost_mark_is_not_judged():
    found = settle({"heads": Failure("a"), "attention": Failure("b"), "start": Failure("c"),
                    "everything": Failure("d"), "backbone": None})
    assert {name: verdict.status for name, verdict in found.items()} == {
        "heads": "lost", "attention": "unjudged", "start": "lost", "everything": "unjudged",
        "backbone": "met"}
    sure = settle({"backbone": Failure("a"), "attention": Failure("b", "sure")})
    assert sure["attention"].status == "lost" and "before `attention` is met" in sure["backbone"].why


def test_a_copy_of_ours_is_reported(tmp_path):
    copy, text = tmp_path / "my_detr.py", (ROOT / "detr.py").read_text()
    copy.write_text(text.replace('"""Encoding of', '"""My encoding of'))
    assert "in all" in repeated(copy, "detr")[0] and "sine" in repeated(copy, "detr", ["sine"])[0]
    copy.write_text(blank(text, "sine"))
    assert not repeated(copy, "detr") and not repeated(copy, "detr", ["sine"])
