"""The model files are read side by side: their shared definitions are the same text in the same order."""
import ast
import itertools
import re
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import known_files

ROOT, FILES = Path(__file__).parents[1], known_files()
TEXT = {name: path.read_text() for name, path in FILES.items()}
# Self-contained files, one for each paper; those that import a parent replace parts of it under its names
PAPERS = {name: text for name, text in TEXT.items() if "sys.path.append" not in text}
PARENT = {name: found[1] for name, text in PAPERS.items()
          if (found := re.search(r"Diff me against: (\w+)\.py", text))}

# Definitions of the same name that may differ, because they carry the paper's idea
MAY_DIFFER = {
    "EncoderLayer": "a token of DETR looks at all others, one of Deformable DETR at a few points",
    "Encoder": "it hands Deformable DETR's reference points to its layers",
    "DecoderLayer": "how a query looks at the image is what the papers change",
    "Decoder": "it hands the paper's references from layer to layer",
    "build": "it names the model's class",
    "RECIPE": "each paper trains in its own way",
    "LAPTOP": "the laptop preset is the file's own",
    "draw_noise": "DINO also draws a sign for each number of a box",
    "Denoising": "DINO has positives and negatives, DN-DETR a flag in the content",
    "OFFICIAL_NAMES": "each official repository names its parameters in its own way",
}
# Lines out and in of `git diff --no-index --shortstat` against the parent, and lines of the file, at most
DIFF = {"conditional_detr": 125, "deformable_detr": 365, "sam_detr": 260, "sqr": 90, "group_detr": 70,
        "dab_detr": 140, "smca_detr": 150, "hdetr": 140, "adamixer": 400, "dn_detr": 190, "dino": 310}
LINES = {"detr": 410, "conditional_detr": 460, "deformable_detr": 615, "sam_detr": 560, "sqr": 675}


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
def test_the_same_name_has_the_same_text_and_the_same_place(a, b):
    first, second = definitions(PAPERS[a]), definitions(PAPERS[b])
    for name in first.keys() & second.keys() - MAY_DIFFER.keys():
        lines = zip(first[name].splitlines() + ["(end)"], second[name].splitlines() + ["(end)"])
        differ = next(((x, y) for x, y in lines if x != y), None)
        assert first[name] == second[name], f"{name}: {a}.py has {differ[0]!r} where {b}.py has {differ[1]!r}"
    assert [n for n in first if n in second] == [n for n in second if n in first]


@pytest.mark.parametrize("name", PAPERS)
def test_a_file_imports_torch_torchvision_and_the_standard_library_only(name):
    for node in ast.walk(ast.parse(TEXT[name])):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for module in [node.module] if hasattr(node, "module") else [a.name for a in node.names]:
                assert module.split(".")[0] in {"torch", "torchvision", *sys.stdlib_module_names}, module
                assert not any(part.startswith("_") for part in module.split(".")), f"{module} is private"


@pytest.mark.parametrize("name", PAPERS)
def test_the_legend_stands_in_every_file_and_lines_fit(name):
    legend = re.search(r"# Shapes in comments:.*?\n\n", TEXT["detr"], re.S)[0]
    assert TEXT[name].count(legend) == 1
    long = [i for i, line in enumerate(TEXT[name].splitlines(), 1) if len(line) > 110]
    assert not long, f"{name}.py has lines of over 110 columns: {long}"


@pytest.mark.parametrize("name", PARENT)
def test_the_diff_against_the_parent_stays_small(name):
    command = ["git", "diff", "--no-index", "--numstat", FILES[PARENT[name]], FILES[name]]
    added, removed, _ = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\t")
    assert int(added) + int(removed) <= DIFF.get(name, 250), f"{removed} lines out and {added} in"


@pytest.mark.parametrize("name", LINES)
def test_every_file_keeps_within_its_lines(name):
    count = len(TEXT[name].splitlines())
    assert count <= LINES[name], f"{name}.py has {count} lines"
