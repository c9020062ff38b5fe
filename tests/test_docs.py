"""The pages about the methods and the files side by side in a browser: nothing in them may go stale."""
import importlib.util
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from support.model_files import default_options, known_files, load_model_file
from support.options import FIXED, make_parser
from support.run import FILES
from visualize import make_parser as visualize_parser

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


relink, side_by_side = load("relink"), load("side_by_side")
TEXT = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
METHODS = [f"{name}.md" for name in known_files() if f"{name}.md" in TEXT]  # pages named after models
HEADINGS = [
    "The idea",
    "The diff to read",
    "Every logged number",
    "Implementation details",
    "Published numbers",
    "Our numbers",
    "Questions people ask",
]
each_page = pytest.mark.parametrize("name", TEXT)
each_method = pytest.mark.parametrize("name", METHODS)


# ---- Pages about the methods -------------------------------------------------------------------------------
def section(name, heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT[name], re.M | re.S)[1]


@each_page
def test_every_link_to_a_line_meets_the_code_that_it_names(name):
    new, problems = relink.relink(TEXT[name])
    assert not problems, f"docs/{name}: {problems[0]}"
    assert new == TEXT[name], f"docs/{name}: lines have moved; run python docs/relink.py"
    found = len(relink.LINK.findall(TEXT[name]))
    assert TEXT[name].count("#L") == found, (
        "a link to a line is written [file.py:1](../file.py#L1) `piece of it`"
    )


def test_relink_follows_a_line_and_refuses_to_guess(tmp_path):
    (tmp_path / "a.py").write_text("import x\n\ny = 1\ny += 2\n")
    text = "1. [a.py:1](a.py#L1) `y = 1`: why [a.py:9](a.py#L9)\n   `import x` it is."
    assert relink.relink(text, tmp_path) == (
        text.replace("1](a.py#L1", "3](a.py#L3").replace("9](a.py#L9", "1](a.py#L1"),
        [],
    )
    for wrong, words in [("`y`", "lines [3, 4]"), ("`z`", "lines []"), ("", "no `piece")]:
        text = f"[a.py:1](a.py#L1) {wrong}"
        new, problems = relink.relink(text, tmp_path)
        assert new == text and words in problems[0]
    assert "no such file" in relink.relink("[b.py:1](b.py#L1) `y`", tmp_path)[1][0]


def anchors(path):
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)", path.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@each_page
def test_every_other_link_leads_somewhere(name):
    for target in re.findall(r"(?<!!)\[[^\]]*\]\(([^)]+)\)", TEXT[name]):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (DOCS / path) if path else DOCS / name
            assert file.exists(), f"docs/{name} links {target}, which does not exist"
            if anchor and file.suffix == ".md":
                assert anchor in anchors(file), f"docs/{name} links {target}, but there is no such heading"


@each_method
def test_the_pages_have_the_same_headings_and_details_are_numbered_and_linked(name):
    assert re.findall(r"^## (.*)", TEXT[name], re.M) == HEADINGS
    details = section(name, "Implementation details")
    numbers = [int(n) for n in re.findall(r"^(\d+)\. ", details, re.M)]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 10
    assert len(relink.LINK.findall(details)) >= len(numbers) - 2  # two may have no line


@each_method
def test_the_idea_is_five_sentences_and_a_picture(name):
    idea, picture = re.fullmatch(
        r"\n(.*?)\n\n!\[[^\]]+\]\((.*?)\)\n\n", section(name, "The idea"), re.S
    ).groups()
    assert len(re.findall(r"\.(?=\s|$)", idea)) == 5
    assert picture == f"attention_{name.removesuffix('.md')}.png"
    assert (DOCS / picture).is_file(), f"docs/{picture} is missing"


@each_method
def test_parameter_counts_are_those_of_the_official_code(name):
    counts = {value for path in (ROOT / "tests/golden").glob("params_*.json")
              for model in json.loads(path.read_text())["counts"].values()
              for key, value in model.items() if key.startswith("n_params")}
    ours = {int(n.replace(",", "")) for n in re.findall(r"\d+(?:,\d{3})+", section(name, "Our numbers"))}
    assert ours and ours <= counts, f"docs/{name}: {ours - counts} are no official counts"


def test_published_numbers_and_ours_never_share_a_table():
    for name in METHODS:
        assert "Nobody measured these here" in section(name, "Published numbers")
        assert not re.search(r"^\|.*\bAP\b", section(name, "Our numbers"), re.M)  # in results.md


# ---- Options, and what a run leaves ------------------------------------------------------------------------
def mentioned(word):
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", TEXT["options.md"])


@pytest.mark.parametrize("parser", [make_parser(""), visualize_parser()], ids=["train", "visualize"])
def test_every_flag_is_explained(parser):
    flags = {
        flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")
    } - {"--help"}
    assert [flag for flag in flags if not mentioned(flag)] == []


def test_options_md_names_no_flag_that_does_not_exist():
    known = {flag for parser in (make_parser(""), visualize_parser()) for action in parser._actions
             for flag in action.option_strings} | {"--nproc-per-node"}
    assert set(re.findall(r"--[a-z][a-z-]*", TEXT["options.md"])) <= known


@pytest.mark.parametrize("name", known_files())
def test_every_option_of_a_model_is_explained(name):
    pages = TEXT["options.md"] + TEXT.get(f"{name}.md", "")
    options = default_options(load_model_file(name))
    assert options and [option for option in options if f"`{option}" not in pages] == []


def test_every_file_of_a_run_is_explained_and_what_cannot_change():
    table = section("options.md", "What a run leaves")
    assert [file for file in FILES if f"`{file}`" not in table] == []
    refused = re.search(r"^\| is refused \|(.*)\|$", TEXT["options.md"], re.M)[1]
    assert set(re.findall(r"`--([a-z-]+)`", refused)) == {name.replace("_", "-") for name in FIXED}


def test_tables_from_before_the_official_start_say_so():
    for heading in ("The race, ten minutes", "Longer runs", "Does recollection help here\\?"):
        assert re.search(rf"^## {heading} †$", TEXT["results.md"], re.M)
    assert re.search(r"Sections marked † are from .*\sbefore `deformable_detr.py`", TEXT["results.md"], re.S)


# ---- Side by side in a browser -----------------------------------------------------------------------------
PAIRS = list(side_by_side.NOTES)


class Reader(HTMLParser):
    """What a page shows: rows of [left number, left text, right number, right text], and what it loads."""

    def __init__(self, content):
        super().__init__()
        self.rows, self.loads, self.inside = [], [], False
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")] + [tag] * (
            tag == "script"
        )
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")
        self.inside = tag in ("th", "td", "span", "b")

    def handle_endtag(self, tag):
        self.inside = tag in ("span", "b")

    def handle_data(self, data):
        if self.inside and self.rows:
            self.rows[-1][-1] += data


@pytest.mark.parametrize("a, b", [*PAIRS, ("detr", "support/data"), ("support/data", "sqr")])
def test_a_page_shows_every_line_of_both_files_once_and_in_order(a, b):
    left, right = ROOT / f"{a}.py", ROOT / f"{b}.py"
    content = side_by_side.page(left, right)
    page = Reader(content)
    for side, path in ((0, left), (2, right)):
        shown = [(row[side], row[side + 1]) for row in page.rows if row[side]]
        assert shown == [
            (str(n), line) for n, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        ]
    assert not page.loads and not re.search(r"@import|url\(|https?://[^ ]*\"", content)


def test_the_command_writes_a_page_and_says_where(tmp_path):
    (tmp_path / "a.py").write_text("x = 1\n")
    (tmp_path / "b.py").write_text("x = 2\n\n\nclass B:\n    pass\n")
    command = [sys.executable, str(DOCS / "side_by_side.py")]
    done = subprocess.run([*command, "a.py", "b.py"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "written to pictures/a--b.html; open it in a browser\n" and not done.stderr
    assert "<title>a.py and b.py</title>" in (tmp_path / "pictures/a--b.html").read_text()
    (tmp_path / "c.py").write_text("x = (")
    for wrong in ("gone.py", "c.py"):
        done = subprocess.run([*command, "a.py", wrong], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("a, b", PAIRS)
def test_every_hunk_of_a_pair_with_notes_has_one_and_every_note_a_hunk(a, b):
    texts = [(ROOT / f"{name}.py").read_text(encoding="utf-8") for name in (a, b)]
    used = []
    for *_, found in side_by_side.compare(*texts):
        for hunk in (hunk for hunk in found if not hunk.equal and hunk.text.strip()):
            used.append(side_by_side.note(a, b, hunk))
            assert used[-1], (
                f"{a} -> {b}: what is the hunk in {hunk.key}? Say it in docs/side_by_side_notes.py"
            )
    unused = [note for note in side_by_side.NOTES[a, b] if note not in used]
    assert not unused, f"{a} -> {b}: no hunk left for the note {unused[0][:2]} in docs/side_by_side_notes.py"


def test_lines_that_resemble_each_other_stand_next_to_each_other():
    a = ["x = first(a, b)", "gone(1)", "y = second(a)"]
    b = ["new = 5", "x = first(a, b, c)", "y = second(a, b)"]
    assert side_by_side.alike(a, b) == [(None, 1), (1, 2), (2, None), (3, 3)]
    assert side_by_side.paint(b[1], [""] * len(b[1]), a[0]) == "x = first(a, b<b>, c</b>)"


# ---- CONTRIBUTING.md and the workflow ----------------------------------------------------------------------
def test_contributing_names_tests_that_exist():
    named = re.findall(r"`(test_\w+)`", (ROOT / "CONTRIBUTING.md").read_text())
    assert named and [name for name in named if not (ROOT / f"tests/{name}.py").exists()] == []


def test_ci_runs_the_readmes_second_command():
    command = re.search(r"^command=(.*)$", (ROOT / ".ci/run").read_text(), re.M)[1]
    done = subprocess.run(
        ["bash", "-c", f"command={command}; echo $command"], cwd=ROOT, capture_output=True, text=True
    )
    first, second = re.search(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1].splitlines()
    assert done.stdout.strip() == second and "pytest" in second and "train.py" in first
