"""Somebody else's model file: its mistakes are said with the line, and the contract is checked once."""
import subprocess
import sys

import pytest

import train
from tests.command import QUICK, ROOT


def write(folder, text, name="mine.py"):
    (folder / name).write_text(text)
    return ["--model", str(folder / name), "--steps", "1", "--overfit", "2", *QUICK]


def changed(folder, old, new, name="mine.py"):
    text = (ROOT / "detr.py").read_text()
    assert old in text
    return write(folder, text.replace(old, new, 1), name)


def refused(flags, match):
    with pytest.raises(SystemExit, match=match):
        train.main(flags)


def test_it_trains_is_evaluated_from_anywhere_and_survives_its_own_deletion(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    write(tmp_path, (ROOT / "detr.py").read_text())
    monkeypatch.chdir(tmp_path)
    train.main(["--model", "mine.py", "--steps", "1", "--overfit", "2", *QUICK])
    monkeypatch.chdir(tmp_path / "here")
    train.main(["--eval", "--weights", "../runs/mine-shapes", "--workers", "0"])
    (tmp_path / "mine.py").unlink()
    train.main(["--resume", "../runs/mine-shapes", "--steps", "2", "--workers", "0"])
    assert "taking the copy that the run keeps" in capsys.readouterr().err


def test_a_change_since_the_run_began_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train.main(write(tmp_path, (ROOT / "detr.py").read_text()))
    (tmp_path / "mine.py").write_text((ROOT / "detr.py").read_text() + "\n# a thought\n")
    train.main(["--resume", "runs/mine-shapes", "--steps", "2", "--workers", "0"])
    assert "mine.py has changed since this run began" in capsys.readouterr().out


@pytest.mark.parametrize("text, words", [
    ("RECIPE = {}", "has no build"),
    ("x = (", "line 1: "),
    ("RECIPE = [1]\n\n\ndef build(n, **o):\n    pass\n", "RECIPE must be a dict"),
    ("RECIPE = {}\nLAPTOP = 3\n\n\ndef build(n, **o):\n    pass\n", "LAPTOP must be a dict"),
    ("import nonsense_xyz", "ModuleNotFoundError.*nonsense"),
    ("RECIPE = dict(weight_decay=0)\n\n\ndef build(n, **o):\n    return n.nothing\n",
     "mine.py, line 5: AttributeError"),
    ("RECIPE = dict(weight_decay=0)\ndef build(n, **o):\n    return 3\n", "must return an nn.Module"),
])
def test_its_errors_have_file_and_line(text, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(write(tmp_path, text), words)


def test_latin_1_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_bytes(b"x = 'caf\xe9'\n")
    refused(["--model", "mine.py"], "mine.py.*utf-8|UTF-8")


@pytest.mark.parametrize("old, new, words", [
    ("num_classes + 1)  # the last", "num_classes)  # the last", "4 logits for 4 classes.*needs 5"),
    ("self.box_head(hs).sigmoid()", "self.box_head(hs) * 100", "boxes reach from"),
    ('"logits": self.class_head(hs)', '"logits": self.class_head(hs).long()', "must be floating point"),
    ('"logits": self.class_head(hs)', '"logits": self.class_head(hs)[-1]', r"must be \[S, B, Q, C\]"),
    ('return {"logits"', 'return {"labels"', 'dict with "logits" and "boxes"'),
    ('"logits": self.class_head(hs)', '"logits": 3', "logits are int .* both must be tensors"),
    ('return {"logits"', 'hs = hs[:, :, :0]\n        return {"logits"', "are empty"),
    ('return {"logits"', 'hs = hs @ hs\n        return {"logits"', r"mine.py, line \d+: RuntimeError"),
    ('return {"logits"', 'hs = hs if self.training else 3 / 0\n        return {"logits"',
     r"mine.py, line \d+: ZeroDivisionError"),
    ("    w_class=1,\n", "", "RECIPE's w_class is None, it must be a number"),
    ('class_loss="softmax"', 'class_loss="hinge"', "class_loss is 'hinge', it must be"),
])
def test_a_broken_contract_is_seen_before_the_first_step(old, new, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(changed(tmp_path, old, new), words)
    assert not (tmp_path / "runs").exists()


def test_it_may_import_a_neighbour_and_be_called_torch(tmp_path):
    """In a process of its own: a module called torch must not replace the library."""
    (tmp_path / "neighbour.py").write_text((ROOT / "detr.py").read_text())
    write(tmp_path, "from neighbour import LAPTOP, RECIPE, DETR\n\n\ndef build(num_classes, **options):\n"
                    "    return DETR(num_classes, **options)\n", "torch.py")
    flags = ["--model", "torch.py", "--steps", "1", "--overfit", "2", *QUICK, "--workers", "1"]
    words = [sys.executable, ROOT / "train.py", *flags]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
