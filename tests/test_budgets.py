"""Lines, at most: each folder has a budget, so an addition names what it replaces. See CONTRIBUTING.md."""
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUDGETS = {"train.py": 350, "visualize.py": 120, "support/*.py": 3300, "benchmarks/*.py": 900,
           "tests/*.py": 6500, "tests/grading/*.py": 2700, "docs/*.py": 700}
EACH = 300  # of the files in support/, except readers.py, which reads three formats


def lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("files", BUDGETS)
def test_a_folder_fits_its_budget(files):
    count = sum(map(lines, ROOT.glob(files)))
    assert count <= BUDGETS[files], f"{files} has {count} lines, at most {BUDGETS[files]}"


def test_each_file_of_support_fits_its_budget():
    counts = {path.name: lines(path) for path in (ROOT / "support").glob("*.py")}
    assert {name: n for name, n in counts.items() if n > (450 if name == "readers.py" else EACH)} == {}


def test_contributing_names_the_same_budgets():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for files, most in BUDGETS.items():
        assert re.search(rf"^\| `{re.escape(files)}` \|.*\b{most:,}\b", text, re.M), f"{files}: {most:,}"


def test_contributing_names_every_test():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")))
    assert named == {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def test_train_py_takes_little_from_support_and_support_nothing_from_train_py():
    text = (ROOT / "train.py").read_text(encoding="utf-8")
    imports = re.findall(r"^from support(\.\w+)? import (.*)", text, re.M)
    names = [name for _, found in imports for name in found.split(", ")]
    modules = [module for module, _ in imports if module] + [
        name for module, found in imports if not module for name in found.split(", ")]
    assert len(modules) <= 7 and len(names) <= 11, imports
    for path in (ROOT / "support").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"^\s*(from|import) (train|visualize)\b", text, re.M), path
