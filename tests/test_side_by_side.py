"""The model files are read side by side: what they share is the same text in the same order."""
import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.model_files import known_files

ROOT = Path(__file__).parents[1]
TEXT = {name: path.read_text() for name, path in known_files().items()}
# Files that stand alone, one for each paper; those that import a parent replace parts of it under its names
PAPERS = {name: text for name, text in TEXT.items() if "sys.path.append" not in text}

# Definitions of the same name that may differ, because they carry the paper's idea.
MAY_DIFFER = {
    "EncoderLayer": "a token of DETR looks at all others, one of Deformable DETR at a few points",
    "Encoder": "it hands Deformable DETR's reference points to its layers",
    "DecoderLayer": "how a query looks at the image is what the papers change",
    "Decoder": "it hands the paper's references from layer to layer",
    "build": "it names the model's class",
    "RECIPE": "each paper trains in its own way",
    "LAPTOP": "what the small preset changes for this file",
    "draw_noise": "DINO also draws a sign for each number of a box",
    "Denoising": "DINO has positives and negatives, DN-DETR a flag in the content",
    "OFFICIAL_NAMES": "each official repository names its parameters in its own way",
}
# The diff against the parent as a reader sees it: lines out and in of `git diff --no-index --shortstat`, at
# most
DIFF = {
    ("detr", "conditional_detr"): 125,
    ("detr", "deformable_detr"): 362,  # the budget is 360; `temperature` of DETR's descendants costs two
    ("conditional_detr", "sam_detr"): 245,
    ("deformable_detr", "sqr"): 90,
}
LINES = {"detr": 410, "conditional_detr": 460, "deformable_detr": 615, "sam_detr": 555, "sqr": 675}


def definitions(text):
    """{name: source text} of everything defined at the top level, in order, with comments right above."""
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        name = getattr(node, "name", None) or (node.targets[0].id if isinstance(node, ast.Assign) else None)
        if name:
            start = node.lineno - 1
            while lines[start - 1].startswith("#") and not lines[start - 1].startswith("# ----"):
                start -= 1
            found[name] = "\n".join(lines[start:node.end_lineno])
    return found


@pytest.mark.parametrize("a, b", list(itertools.combinations(PAPERS, 2)))
def test_what_has_the_same_name_has_the_same_text(a, b):
    first, second = definitions(PAPERS[a]), definitions(PAPERS[b])
    for name in first.keys() & second.keys() - MAY_DIFFER.keys():
        lines = zip(first[name].splitlines() + ["(end)"], second[name].splitlines() + ["(end)"])
        differ = next(((x, y) for x, y in lines if x != y), None)
        assert first[name] == second[name], f"{name}: {a}.py has {differ[0]!r} where {b}.py has {differ[1]!r}"


@pytest.mark.parametrize("a, b", list(itertools.combinations(PAPERS, 2)))
def test_shared_definitions_come_in_the_same_order(a, b):
    first, second = list(definitions(PAPERS[a])), list(definitions(PAPERS[b]))
    assert [n for n in first if n in second] == [n for n in second if n in first]


@pytest.mark.parametrize("name", PAPERS)
def test_a_variant_imports_torch_torchvision_and_the_standard_library_only(name):
    for node in ast.walk(ast.parse(TEXT[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            )
            for module in modules:
                top = module.split(".")[0]
                assert top in {"torch", "torchvision", *sys.stdlib_module_names}, (
                    f"{name}.py imports {module}"
                )
                assert not any(part.startswith("_") for part in module.split(".")), f"{module} is private"


@pytest.mark.parametrize("name", PAPERS)
def test_the_legend_stands_in_every_file_and_lines_fit(name):
    legend = re.search(r"# Shapes in comments:.*?\n\n", TEXT["detr"], re.S)[0]
    assert TEXT[name].count(legend) == 1
    long = [i for i, line in enumerate(TEXT[name].splitlines(), 1) if len(line) > 110]
    assert not long, f"{name}.py has lines of over 110 columns: {long}"


def diff_size(a, b):
    """(lines out, lines in) as git counts them."""
    command = ["git", "diff", "--no-index", "--numstat", f"{a}.py", f"{b}.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    added, removed, _ = done.stdout.split("\t")
    return int(removed), int(added)


@pytest.mark.parametrize("pair", DIFF, ids="-".join)
def test_the_diff_against_the_parent_stays_small(pair):
    removed, added = diff_size(*pair)
    assert removed + added <= DIFF[pair], f"{removed} lines out and {added} in"


@pytest.mark.parametrize("name", LINES)
def test_every_file_keeps_within_its_lines(name):
    count = len(TEXT[name].splitlines())
    assert count <= LINES[name], f"{name}.py has {count} lines"
