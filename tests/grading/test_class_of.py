"""A folder of submissions is graded in one command, whatever is in it."""
import csv
import json
import subprocess
import sys

import pytest

from tests.grading.class_of import main, seed_of
from tests.grading.files import ROOT


def test_broken_submissions_do_not_keep_the_others_from_their_points(tmp_path):
    ours = (ROOT / "train.py").read_text()
    slip = ours.replace(".abs().sum(1)  # [P]", ".abs().mean(1)  # [P]")
    assert slip != ours
    (tmp_path / "bob").mkdir()
    (tmp_path / "bob" / "my_train.py").write_text(slip)
    (tmp_path / "cem.py").write_text("import torch\nx = 1 / 0\n")
    (tmp_path / "dan.py").write_text("import time\ntime.sleep(1000)\n")
    (tmp_path / "fay").mkdir()
    exercise = "--exercise", "SetCriterion.cost"
    line = [sys.executable, "-m", "tests.grading.class_of", tmp_path, "--like", "train", "--seconds", "2"]
    done = subprocess.run([*line, "--marks", "l1_loss", "giou_loss", *exercise], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "grades.csv", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    earned = {student: row["earned"] for student, row in rows.items()}
    assert earned == {"bob": "2", "cem": "0", "dan": "0", "fay": "0"}, rows
    assert rows["bob"]["l1_loss"] == "0" and rows["bob"]["giou_loss"] == "2"
    assert "SetCriterion.cost" in rows["bob"]["please look"]
    assert rows["bob"]["seed"] == str(seed_of("bob", 0)) != rows["cem"]["seed"]
    outputs = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "grades").iterdir()}
    assert set(outputs) == set(rows) and outputs["bob"]["score"] == 2
    assert "cannot be imported: ZeroDivisionError" in outputs["cem"]["tests"][0]["output"]
    assert "longer than 2 seconds" in outputs["dan"]["tests"][0]["output"]
    assert "there must be one" in outputs["fay"]["tests"][0]["output"]
    hidden = [test for test in outputs["bob"]["tests"] if test["visibility"] == "hidden"]
    assert "word for word" in hidden[0]["output"], "students need not read what the staff is told"


def test_wrong_options_get_a_sentence(tmp_path, capsys):
    for options, words in [((tmp_path / "none",), "is no folder"), ((tmp_path,), "has no submissions"),
                           ((tmp_path, "--marks", "beauty"), "--marks beauty: train has matcher")]:
        with pytest.raises(SystemExit, match="2"):
            main([*map(str, options), "--like", "train"])
        assert words in capsys.readouterr().err
