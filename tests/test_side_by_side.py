"""The five files are read side by side: what they share is the same text in the same order."""
import ast
import difflib
import itertools
import re
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parents[1]
TEXT = {name: (ROOT / f"{name}.py").read_text() for name in train.MODELS if (ROOT / f"{name}.py").exists()}

# Definitions of the same name that may differ, because they carry the paper's idea.
MAY_DIFFER = {
    "DecoderLayer": "how a query looks at the image is what the papers change",
    "Decoder": "it hands the paper's references from layer to layer",
    "build": "it names the model's class",
    "RECIPE": "each paper trains in its own way",
    "LAPTOP": "what the small preset changes for this file",
    "OFFICIAL_NAMES": "each official repository names its parameters in its own way",
}
PARENT = {"conditional_detr": "detr", "deformable_detr": "detr", "sam_detr": "conditional_detr", "sqr": "deformable_detr"}


def definitions(text):
    """{name: source text} of everything defined at the top level, in order; comments right above belong to it."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if name:
            start = node.lineno - 1
            while lines[start - 1].startswith("#") and not lines[start - 1].startswith("# ----"):
                start -= 1
            found[name] = "\n".join(lines[start:node.end_lineno])
    return found


@pytest.mark.parametrize("a, b", list(itertools.combinations(TEXT, 2)))
def test_what_has_the_same_name_has_the_same_text(a, b):
    first, second = definitions(TEXT[a]), definitions(TEXT[b])
    for name in first.keys() & second.keys() - MAY_DIFFER.keys():
        lines = zip(first[name].splitlines() + ["(end)"], second[name].splitlines() + ["(end)"])
        differ = next(((x, y) for x, y in lines if x != y), None)
        assert first[name] == second[name], f"{name}: {a}.py has {differ[0]!r} where {b}.py has {differ[1]!r}"


@pytest.mark.parametrize("a, b", list(itertools.combinations(TEXT, 2)))
def test_shared_definitions_come_in_the_same_order(a, b):
    first, second = list(definitions(TEXT[a])), list(definitions(TEXT[b]))
    assert [n for n in first if n in second] == [n for n in second if n in first]


@pytest.mark.parametrize("name", TEXT)
def test_a_variant_imports_torch_torchvision_and_the_standard_library_only(name):
    for node in ast.walk(ast.parse(TEXT[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for module in modules:
                top = module.split(".")[0]
                assert top in {"torch", "torchvision", *sys.stdlib_module_names}, f"{name}.py imports {module}"
                assert not any(part.startswith("_") for part in module.split(".")), f"{module} is private"


@pytest.mark.parametrize("name", TEXT)
def test_the_legend_stands_in_every_file_and_lines_fit(name):
    legend = re.search(r"# Shapes in comments:.*?\n\n", TEXT["detr"], re.S)[0]
    assert TEXT[name].count(legend) == 1
    long = [i for i, line in enumerate(TEXT[name].splitlines(), 1) if len(line) > 110]
    assert not long, f"{name}.py has lines of over 110 columns: {long}"


def diff_size(a, b):
    """(removed, added, hunks) of `git diff --no-index --stat a.py b.py`, as difflib counts them."""
    lines = list(difflib.unified_diff(TEXT[a].splitlines(), TEXT[b].splitlines(), n=0, lineterm=""))[2:]
    return tuple(sum(line.startswith(sign) for line in lines) for sign in ("-", "+", "@@"))


@pytest.mark.parametrize("name", [n for n in TEXT if n in PARENT])
def test_the_readme_prints_the_size_of_every_diff(name):
    removed, added, hunks = diff_size(PARENT[name], name)
    row = f"| `{PARENT[name]}.py` → `{name}.py` | {removed} | {added} | {hunks} |"
    assert row in (ROOT / "README.md").read_text(), f"the README should say: {row}"
