"""The pages about the methods and the files side by side in a browser: nothing in them may go stale."""
import importlib.util
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def load(name):
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


relink, side_by_side = load("relink"), load("side_by_side")
TEXT = {path.name: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md"))}
METHODS = [f"{name}.md" for name in side_by_side.MODELS]
HEADINGS = ["The idea", "The diff to read", "Every logged number", "Implementation details", "Published numbers",
            "Our numbers", "Questions people ask"]
each_page = pytest.mark.parametrize("name", TEXT)
each_method = pytest.mark.parametrize("name", METHODS)


# ---- Pages about the methods ---------------------------------------------------------------------------------------
def section(name, heading):
    return re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", TEXT[name], re.M | re.S)[1]


@each_page
def test_every_link_to_a_line_meets_the_code_that_it_names(name):
    new, problems = relink.relink(TEXT[name])
    assert not problems, f"docs/{name}: {problems[0]}"
    assert new == TEXT[name], f"docs/{name}: lines have moved; run python docs/relink.py"
    found = len(relink.LINK.findall(TEXT[name]))
    assert TEXT[name].count("#L") == found, "a link to a line is written [file.py:1](../file.py#L1) `piece of it`"


def test_relink_follows_a_line_and_refuses_to_guess(tmp_path):
    (tmp_path / "a.py").write_text("import x\n\ny = 1\ny += 2\n")
    text = "1. [a.py:1](a.py#L1) `y = 1`: why [a.py:9](a.py#L9)\n   `import x` it is."
    assert relink.relink(text, tmp_path) == (text.replace("1](a.py#L1", "3](a.py#L3").replace("9](a.py#L9", "1](a.py#L1"), [])
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
    assert len(relink.LINK.findall(details)) >= len(numbers) - 2  # two may be about something that has no line


@each_method
def test_the_idea_is_five_sentences_and_a_picture(name):
    idea, picture = re.fullmatch(r"\n(.*?)\n\n!\[[^\]]+\]\((.*?)\)\n\n", section(name, "The idea"), re.S).groups()
    assert len(re.findall(r"\.(?=\s|$)", idea)) == 5
    assert picture == f"attention_{name.removesuffix('.md')}.png"
    if not list(DOCS.glob("attention_*.png")):
        pytest.skip("the pictures are not there yet: python visualize.py --weights RUN --attention")
    assert (DOCS / picture).is_file(), f"docs/{picture} is missing"


@each_method
def test_parameter_counts_are_those_of_the_official_code(name):
    counts = {value for path in (ROOT / "tests/golden").glob("params_*.json")
              for model in json.loads(path.read_text())["counts"].values()
              for value in (model["n_params"], model["n_params_trainable"])}
    ours = {int(n.replace(",", "")) for n in re.findall(r"\d+(?:,\d{3})+", section(name, "Our numbers"))}
    assert ours and ours <= counts, f"docs/{name}: {ours - counts} are no official counts"


def test_published_numbers_and_ours_never_share_a_table():
    for name in METHODS:
        assert "Nobody measured these here" in section(name, "Published numbers")
        assert not re.search(r"^\|.*\bAP\b", section(name, "Our numbers"), re.M)  # they are in the README, once


# ---- Side by side in a browser -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def pages():
    return side_by_side.pages()


class Reader(HTMLParser):
    """What a page shows of both files: {"l": [(line number, text)], "r": ...}."""

    def __init__(self, content):
        super().__init__()
        self.shown, self.ids, self.links, self.line = {"l": [], "r": []}, [], [], None
        self.feed(content)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.append(attributes.get("id"))
        self.links.append(attributes.get("href"))
        if tag == "code" and "data-n" in attributes:
            self.line = self.shown[attributes["class"].split()[0]]
            self.line.append((int(attributes["data-n"]), ""))

    def handle_data(self, data):
        if self.line is not None:
            self.line[-1] = (self.line[-1][0], self.line[-1][1] + data)

    def handle_endtag(self, tag):
        self.line = None if tag == "code" else self.line


def test_the_pages_are_made_from_the_files_of_today(pages):
    stale = [path.name for path, content in pages.items()
             if not path.exists() or path.read_text(encoding="utf-8") != content]
    assert not stale, f"{stale[0]} and {len(stale) - 1} more are out of date; run python docs/side_by_side.py"
    assert {*DOCS.glob("*.html"), *DOCS.glob("side_by_side/*")} == set(pages), "there is a page that nobody makes"


@pytest.mark.parametrize("a, b", side_by_side.PAIRS)
def test_a_page_shows_every_line_of_both_files_once_and_in_order(a, b, pages):
    path = DOCS / f"side_by_side/{a}--{b}.html"
    page = Reader(pages[path])
    for side, model in (("l", a), ("r", b)):
        lines = (ROOT / f"{model}.py").read_text(encoding="utf-8").splitlines()
        assert page.shown[side] == list(enumerate(lines, 1))
    for link in filter(None, page.links):
        file, _, anchor = link.partition("#")
        assert not file or (path.parent / file).exists(), f"{path.name} links {file}, which does not exist"
        assert not anchor or anchor in page.ids


def test_pages_are_small_and_load_nothing(pages):
    for path, content in pages.items():
        assert len(content.encode()) < 300_000, f"{path.name} is too large to open on a phone"
        assert not re.search(r"<script|<link|<img|@import|url\(|src=|https?://", content)


@pytest.mark.parametrize("a, b", side_by_side.MAIN_PAIRS)
def test_every_hunk_of_a_main_pair_has_a_note_and_every_note_a_hunk(a, b):
    used = []
    for hunk in side_by_side.hunks(a, b):
        used.append(side_by_side.entry(a, b, hunk))
        assert used[-1], f"{a} -> {b}: what is the hunk in {hunk.key}? Say it in NOTES of docs/side_by_side.py"
    unused = [note for note in side_by_side.NOTES[a, b] if note not in used]
    assert not unused, f"{a} -> {b}: no hunk left for the note {unused[0][:2]} in docs/side_by_side.py"


def test_lines_that_resemble_each_other_stand_next_to_each_other():
    a = ["x = first(a, b)", "gone(1)", "y = second(a)"]
    b = ["new = 5", "x = first(a, b, c)", "y = second(a, b)"]
    assert side_by_side.align_lines([1, 2, 3], [1, 2, 3], a, b) == [(None, 1), (1, 2), (2, None), (3, 3)]
    marked_a, marked_b = side_by_side.different(a[0], b[1])
    assert marked_a == ((14, 14),) and [b[1][i:j] for i, j in marked_b] == [", c"]
