"""Our files, by name: train.py and every model file, in the project's folder or in relatives/."""
import importlib
import re
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RECIPE = re.compile(r"^(from .*|    )?\bRECIPE\b", re.M)  # written here, or imported from another file
BUILD = re.compile(r"^def build\(", re.M)


@lru_cache
def model_files():
    """{name: path} of all files that keep the contract: they have a RECIPE and a build."""
    paths = [*sorted(ROOT.glob("*.py")), *sorted((ROOT / "relatives").glob("*.py"))]
    texts = {path: path.read_text(encoding="utf-8") for path in paths}
    return {path.stem: path for path, text in texts.items() if RECIPE.search(text) and BUILD.search(text)}


def path_of(name):
    """Raises ValueError that lists the files there are."""
    found = {**model_files(), "train": ROOT / "train.py"}
    if name not in found:
        raise ValueError(f"{name}, it must be one of {', '.join(found)}")
    return found[name]


@lru_cache
def ours_named(name):
    """Our file as a module."""
    return importlib.import_module(".".join(path_of(name).relative_to(ROOT).with_suffix("").parts))


def parent_of(name):
    """The file that a file is to be compared with or imports, according to its docstring, or None."""
    text = path_of(name).read_text(encoding="utf-8")
    found = re.search(r"(?:Diff me against|imports its parents?)\b.*?(\w+)\.py", text, re.S)
    return found[1] if found else None
