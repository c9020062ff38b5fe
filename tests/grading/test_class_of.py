"""A folder of submissions is graded in one command, whatever is in it."""
import csv
import json

from tests.grading.class_of import main, seed_of
from tests.grading.files import ROOT


def test_broken_submissions_do_not_keep_the_others_from_their_points(tmp_path):
    slip = (ROOT / "train.py").read_text().replace(".abs().sum(1)  # [P]", ".abs().mean(1)  # [P]")
    for path, text in {"bob/my_train.py": slip, "cem.py": "x = 1 / 0\n", "fay/empty.txt": "",
                       "dan.py": "import time\ntime.sleep(1000)\n"}.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    main([str(tmp_path), "--like", "train", "--seconds", "2", "--marks", "l1_loss", "giou_loss", "--exercise",
          "SetCriterion.cost"])
    with open(tmp_path / "grades.csv", newline="") as file:
        rows = {row["student"]: row for row in csv.DictReader(file)}
    assert [(name, rows[name]["earned"]) for name in sorted(rows)] == [(x, "20"[x != "bob"]) for x in (
        "bob", "cem", "dan", "fay")]
    assert rows["bob"]["l1_loss"] == "0" and rows["bob"]["giou_loss"] == "2"
    assert rows["bob"]["seed"] == str(seed_of("bob", 0)) != rows["cem"]["seed"]
    outputs = {path.stem: json.loads(path.read_text())["tests"] for path in (tmp_path / "grades").iterdir()}
    for student, words in [("cem", "cannot be imported: ZeroDivisionError"), ("fay", "there must be one"),
                           ("dan", "longer than 2 seconds")]:
        assert words in outputs[student][0]["output"]
    assert "word for word" in outputs["bob"][-1]["output"] and outputs["bob"][-1]["visibility"] == "hidden"
