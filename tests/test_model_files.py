"""Somebody else's model file: it runs only if it is named, its mistakes have a line, the contract counts."""
import os
import subprocess
import sys
from pathlib import Path

import pytest

import train
from support import UserError, checkpoints
from tests.command import QUICK, ROOT

SHORT = ["--steps", "1", "--overfit", "2", *QUICK]


def refused(flags, match):
    with pytest.raises(UserError, match=match):
        train.main(flags)


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """mine(text) writes work/mine.py, mine(old, new) a changed copy of detr.py; both return flags."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "work").mkdir()

    def write(old="", new=None):
        text = (ROOT / "detr.py").read_text()
        assert new is None or old in text
        (tmp_path / "work/mine.py").write_text(old if new is None else text.replace(old, new, 1))
        return ["--model", "work/mine.py", *SHORT]
    return write


def test_our_files_are_found_by_their_names_and_a_students_file_is_not_among_them():
    names = list(checkpoints.known_files())
    assert names[:5] == ["detr", "conditional_detr", "deformable_detr", "sam_detr", "sqr"]
    assert {"hdetr", "conditional_detr_ablations"} < set(names)
    assert all(path.parent in (ROOT, ROOT / "relatives") for path in checkpoints.known_files().values())
    assert "/work/" in (ROOT / ".gitignore").read_text().split()


def test_a_file_that_a_checkpoint_names_runs_only_if_the_user_names_it_as_well(mine, capsys):
    train.main(mine("", ""))
    Path("work/mine.py").write_text("raise SystemExit('this must not run')")
    for flags in (["--resume", "runs/mine-shapes"], ["--eval", "--weights", "runs/mine-shapes"],
                  ["--init", "runs/mine-shapes"]):
        refused([*flags, "--steps", "2"], r"mine.py, which is not one of ours.* --model .*mine.py")
        overfit = ["--overfit", "2"] * ("--init" in flags)
        train.main([*flags, *overfit, "--steps", "2", "--model", "runs/mine-shapes/mine.py"])
    assert "has changed" not in capsys.readouterr().out


def test_a_change_since_the_run_began_is_said(mine, capsys):
    train.main(mine("", ""))
    mine("import math", "import math  # a thought")
    train.main(["--resume", "runs/mine-shapes", "--steps", "2", "--model", "work/mine.py"])
    assert "mine.py has changed since this run began" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    ("RECIPE = {}", "has no build"),
    ("x = (", r"SyntaxError.*mine.py, line 1"),
    ("import nonsense_xyz", "ModuleNotFoundError.*nonsense"),
    ("RECIPE = dict(weight_decay=0)\n\n\ndef build(n, **o):\n    return n.nothing\n",
     "mine.py, line 5: AttributeError"),
    ("RECIPE = dict(weight_decay=0)\ndef build(n, **o):\n    return 3\n", "must return an nn.Module"),
])
def test_its_errors_have_file_and_line(text, words, mine):
    refused(mine(text), words)


@pytest.mark.parametrize("old, new, words", [
    ("num_classes + 1)  # the last", "num_classes)  # the last", "4 logits for 4 classes.*needs 5"),
    ("self.box_head(hs).sigmoid()", "self.box_head(hs) * 100", "boxes reach from"),
    ('"logits": self.class_head(hs)', '"logits": list(self.class_head(hs))', "dict with the tensors"),
    ('"logits": self.class_head(hs)', '"logits": self.class_head(hs)[-1]', r"must be \[S, B, Q, C\]"),
    ('return {"logits"', 'return {"labels"', 'dict with the tensors "logits" and "boxes"'),
    ('return {"logits"', 'hs = hs @ hs\n        return {"logits"', r"mine.py, line \d+: RuntimeError"),
    ('return {"logits"', 'hs = hs if hs.shape[1] > 1 else 3 / 0\n        return {"logits"',  # a single image
     r"mine.py, line \d+: ZeroDivisionError"),
    ("    w_class=1,\n", "", "RECIPE has no w_class; see detr.py"),
    ('class_loss="softmax"', 'class_loss="hinge"', 'class_loss in RECIPE must be "softmax" or "focal"'),
])
def test_a_broken_contract_is_seen_before_the_first_step(old, new, words, mine, tmp_path):
    refused(mine(old, new), words)
    assert not (tmp_path / "runs").exists()


def test_it_may_import_a_neighbour_be_called_torch_and_is_read_as_utf_8(tmp_path):
    """In a process of its own: a module called torch must not replace the library."""
    (tmp_path / "neighbour.py").write_text("# \u4e2d\n" + (ROOT / "detr.py").read_text(), encoding="utf-8")
    (tmp_path / "torch.py").write_text(
        "from neighbour import RECIPE, DETR\n\n\ndef build(num_classes, **options):\n"
        "    return DETR(num_classes, **options)\n")
    words = [sys.executable, ROOT / "train.py", "--model", "torch.py", *SHORT, "--workers", "1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True,
                          env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"})
    assert done.returncode == 0, done.stderr
