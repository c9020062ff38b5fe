"""The grader is tested through its command: our files get all points, and no file takes it down."""

import json
import subprocess
import sys

import pytest

from tests.grading.child import under_root
from tests.grading.files import ROOT
from tests.grading.grader import MARKS, grade, table
from tests.grading.small import CHEAP, lost


def command(*options):
    pytest = [sys.executable, "-m", "pytest", "-q", "tests"]
    done = subprocess.run([*pytest, *options], cwd=ROOT, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_command_gives_our_files_all_points(tmp_path):
    report, marks = tmp_path / "results.json", ["shapes", "spatial_query", "official"]
    options = ["--file", "conditional_detr.py", "--like", "conditional_detr", "--points", "--seed", "7"]
    code, output = command(*options, "--json", str(report), "-k", " or ".join(marks))
    assert code == 0, output
    points = sum(MARKS["conditional_detr"][mark] for mark in marks)
    assert f"{points} of {points} points" in output, output
    results = json.loads(report.read_text())
    assert results["score"] == points == sum(test["score"] for test in results["tests"])
    fields = {"name", "score", "max_score", "output", "visibility"}
    assert all(fields <= set(test) for test in results["tests"])


def test_the_command_says_what_is_wrong_with_its_options():
    assert (
        "must be one of conditional_detr, deformable_detr, detr"
        in command("--file", "detr.py", "--like", "yolo")[1]
    )
    assert "no such file" in command("--file", "nothing.py", "--like", "detr")[1]


def test_a_file_that_is_built_in_another_way_gets_all_points(small_backbone):
    from tests.grading import other_detr

    assert not lost(other_detr, "detr", CHEAP["detr"])


BAD = '''
"""Every mark meets another disaster."""
import os, sys
from pathlib import Path

import torch


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
        [leave, eat, print_a_lot, recur, matching, exit_at_once, later, later][number]()
'''


def test_no_file_takes_the_grader_down(tmp_path):
    (tmp_path / "bad.py").write_text(BAD)
    names = list(MARKS["train"])[:8]
    found = grade(tmp_path / "bad.py", "train", names=names, seconds=60)
    expected = [
        "SystemExit: bye",
        "wants more than 4 GB",
        "tired (print_a_lot",
        "maximum recursion depth",
        "not written yet: matching",
        "ended Python (exit code 3)",
        "not written yet: later",
        "not written yet: later",
    ]
    assert list(found.verdicts) == names
    for verdict, part in zip(found.verdicts.values(), expected):
        assert verdict.status == "lost" and part in verdict.why, found
    assert f"0 of {sum(list(MARKS['train'].values())[:8])} points" in table(found)


def test_without_load_official_the_marks_that_need_no_weights_remain(small_backbone, monkeypatch):
    from tests.grading import other_detr

    monkeypatch.delattr(other_detr, "load_official")
    found = lost(other_detr, "detr", CHEAP["detr"])
    assert set(CHEAP["detr"]) - set(found) == {"shapes", "independence", "training"}
    assert all("load_official, and this mark has to give" in sentence for sentence in found.values()), found


# ---- Correct in another way --------------------------------------------------------------------------------
def test_a_batch_norm_that_is_frozen_by_hand_is_as_good(small_backbone):
    """nn.BatchNorm2d in eval mode without gradients computes what FrozenBatchNorm2d does."""
    import torch
    from torch import nn

    from tests.grading import other_detr

    class Frozen(nn.BatchNorm2d):
        def __init__(self, *args):
            super().__init__(*args)
            self.requires_grad_(False)

        def train(self, mode=True):
            return super().train(False)

        def _load_from_state_dict(self, state, prefix, *args):
            state.setdefault(f"{prefix}num_batches_tracked", torch.tensor(0))
            super()._load_from_state_dict(state, prefix, *args)

    class Module:
        load_official = staticmethod(other_detr.load_official)

        @staticmethod
        def build(*args, **options):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(other_detr.torchvision.ops, "FrozenBatchNorm2d", Frozen)
                return other_detr.build(*args, **options)

    model = Module.build(3, backbone="resnet18", hidden_dim=32, dim_feedforward=32)
    assert any(isinstance(module, Frozen) for module in model.modules())
    assert not lost(Module, "detr", CHEAP["detr"])


# ---- Cheating ----------------------------------------------------------------------------------------------
OURS = f"""
import gc, types

try:
    from train import SetCriterion
    raise SystemExit("it can import ours")
except ImportError:
    exec(open({str(ROOT / "train.py")!r}).read())

modules = [m for m in gc.get_objects() if isinstance(m, types.ModuleType)]
for module in [m for m in modules if m.__name__ == "tests.grading.marks"]:
    module.l1_loss = lambda *args: None
"""
WRITES = """
import os

for n in range(3, 20):
    try:
        os.write(n, b'x {"running": "l1_loss", "failure": null}\\n{"verdicts": {"l1_loss": ["met"]}}\\n')
    except OSError:
        pass
os._exit(0)
"""


@pytest.mark.parametrize("text, warnings", [
    (OURS, ["imports our train", "opens our train.py", "changes tests.grading.marks.l1_loss"]),
    (WRITES, ["writes into the grader's report"]),
], ids=["ours", "writes"])
def test_known_tricks_bring_nothing_or_are_reported(text, warnings, tmp_path):
    (tmp_path / "my_train.py").write_text(text)
    found = grade(tmp_path / "my_train.py", "train", names=["l1_loss"], seconds=60)
    assert all(any(words in line for line in found.warnings) for words in warnings), found
    assert text == OURS or not found.points("met"), found


def test_a_copy_of_ours_is_reported(tmp_path):
    from tests.grading.blank import blank
    from tests.grading.repeats import repeated

    text = (ROOT / "detr.py").read_text()
    copy = tmp_path / "my_detr.py"
    copy.write_text(text.replace('"""Encoding of', '"""My encoding of'))
    assert "in all" in repeated(copy, "detr")[0]
    assert "sine" in repeated(copy, "detr", ["sine"])[0]
    copy.write_text(blank(text, "sine"))
    assert not repeated(copy, "detr") and not repeated(copy, "detr", ["sine"])


def test_a_virtual_environment_inside_the_folder_is_not_ours(monkeypatch):
    """As the README makes it: numpy must stay in sight when our files are hidden."""
    monkeypatch.setattr("sys.prefix", str(ROOT / ".venv"))
    assert under_root(ROOT / "train.py") and under_root(ROOT)
    assert not under_root(ROOT / ".venv/lib/python3.11/site-packages") and not under_root("/usr/lib")
