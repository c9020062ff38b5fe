"""docs/atlas.py: every change has a note, docs/diffs/ is current, and the site works in a real browser."""
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import atlas
import changes

EDGES = {f"{edge.parent.name}-{edge.child.name}": edge for edge in changes.edges()}
each_edge = pytest.mark.parametrize("name", EDGES)


# ---- Without a browser -------------------------------------------------------------------------------------
@each_edge
def test_the_changes_are_those_of_git_and_every_line_is_shown_once(name):
    edge = EDGES[name]
    left = "/dev/null" if edge.child.imports else edge.parent.path
    command = ["git", "diff", "--no-index", "--numstat", left, edge.child.path]
    new, out, _ = subprocess.run(command, capture_output=True, text=True).stdout.split("\t")
    assert changes.counts(edge.changes) == (int(out), int(new))
    rows = [row for _, pieces in changes.stream(edge) for piece in pieces for row in getattr(piece, "rows", piece)]
    for side, lines in enumerate((edge.left, edge.right)):
        assert [row[side] for row in rows if row[side] is not None] == list(range(len(lines)))


@each_edge
def test_every_change_has_a_note_and_every_note_a_change(name):
    edge, used = EDGES[name], []
    for change in edge.changes:
        used.append(changes.noted(edge.parent.name, edge.child.name, change.key, change.text))
        lines = change.text.strip().split("\n")[0]
        assert used[-1], f"docs/diffs/notes.md, {name}: no note for the change of `{change.key}` at {lines!r}"
    for entry in changes.notes().get(f"{edge.parent.name} to {edge.child.name}", []):
        where = " ".join(entry[1])
        assert entry in used, f"docs/diffs/notes.md, {name}: no change of `{where}` with `{entry[2]}` any more"


def test_every_entry_of_the_notes_is_read():
    text = (ROOT / "docs/diffs/notes.md").read_text(encoding="utf-8")
    assert len(re.findall("^- `", text, re.M)) == sum(map(len, changes.notes().values()))
    assert {title.replace(" to ", "-") for title in changes.notes()} == {"All diffs", *EDGES}


def test_the_pages_for_github_are_current():
    pages = atlas.diffs()
    assert {path.name for path in (ROOT / "docs/diffs").iterdir()} == {"notes.md", *pages}
    for name, text in pages.items():
        found = (ROOT / "docs/diffs" / name).read_text(encoding="utf-8")
        assert found == text, f"docs/diffs/{name} is out of date; run python docs/atlas.py"
        for link in re.findall(r"\]\((?!https:)([^)#]+)", re.sub(r"```.*?```", "", text, flags=re.S)):
            assert (ROOT / "docs/diffs" / link).exists(), f"docs/diffs/{name} links {link}"
        for anchor in re.findall(r"\]\(#([^)]+)", text):
            assert anchor in map(atlas.slug, re.findall("^## (.*)", text, re.M)), f"docs/diffs/{name}: {anchor}"


# ---- In a browser ------------------------------------------------------------------------------------------
FLAGS = ("headless no-sandbox disable-gpu disable-quic no-first-run disable-sync disable-background-networking "
         "disable-component-update").split()


class Browser:
    """Chromium through chromedriver, whose protocol is JSON over HTTP."""

    def __init__(self, profile):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL)
        self.address = f"http://127.0.0.1:{port}/session"
        flags = [f"--{flag}" for flag in [*FLAGS, f"user-data-dir={profile}"]]
        wanted = {"goog:chromeOptions": {"args": flags, "binary": shutil.which("chromium")},
                  "goog:loggingPrefs": {"browser": "ALL"}}
        for _ in range(200):
            try:
                self.address += "/" + self("", capabilities={"alwaysMatch": wanted})["sessionId"]
                return
            except URLError as error:  # the driver has not started yet
                assert not hasattr(error, "code"), error.read()
                time.sleep(0.1)

    def __call__(self, command, **arguments):
        body = json.dumps(arguments).encode()
        request = Request(self.address + command, body, {"Content-Type": "application/json"})
        return json.load(urlopen(request, timeout=60))["value"]

    def js(self, script):
        return self("/execute/sync", script=script, args=[])

    def devtools(self, command, **parameters):
        return self("/goog/cdp/execute", cmd=command, params=parameters)

    def show(self, page, width=1400, media="", scheme="light"):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)
        self("/url", url=page.as_uri())

    def act(self, kind, actions):
        self("/actions", actions=[{"type": kind, "id": kind, "actions": actions}])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("site"), time.process_time()
    changes.edges.cache_clear()
    atlas.write_site(folder, ROOT.as_uri())
    assert time.process_time() - start < 10
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("there is no browser: apt-get install chromium chromium-driver")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.driver.terminate()
    browser.driver.wait()


# The lowest contrast of a text on the page: [ratio, text]; alpha is not used
CONTRAST = """
const light = c => c.match(/[\\d.]+/g).slice(0, 3).map(x => x / 255)
  .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4)
  .reduce((sum, x, i) => sum + x * [0.2126, 0.7152, 0.0722][i], 0);
let lowest = [99, ""];
document.querySelectorAll("details").forEach(part => part.open = true);
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walk.nextNode()) {
  const part = walk.currentNode.parentElement;
  if (!walk.currentNode.data.trim() || !part.checkVisibility() || part.tagName == "SCRIPT") continue;
  let behind = part;
  while (behind.parentElement && getComputedStyle(behind).backgroundColor == "rgba(0, 0, 0, 0)")
    behind = behind.parentElement;
  const style = getComputedStyle(part);
  const pair = [part.closest("svg") ? style.fill : style.color, getComputedStyle(behind).backgroundColor].map(light);
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (ratio < lowest[0]) lowest = [ratio, walk.currentNode.data];
}
return lowest"""


@pytest.mark.parametrize("width, media, scheme", [
    (390, "", "light"), (800, "", "light"), (1400, "", "light"), (1400, "", "dark"), (700, "print", "light")])
def test_no_page_scrolls_sideways_or_is_pale(site, browser, width, media, scheme):
    for page in sorted(site.glob("*.html")):
        browser.show(page, width, media, scheme)
        ratio, text = browser.js(CONTRAST)
        assert ratio >= 4.5, f"{page.name}: {text!r} has a contrast of {ratio:.2f}"
        wide = browser.js("return document.documentElement.scrollWidth")
        assert wide <= width, f"{page.name} is {wide} pixels wide"
    assert browser("/se/log", type="browser") == []


def test_links_lead_somewhere_and_nothing_is_loaded_from_elsewhere(site, browser):
    for page in sorted(site.glob("*.html")):
        browser.show(page)
        gone = browser.js("""return [...document.querySelectorAll('a[href^="#"]')].map(a => a.hash.slice(1))
            .filter(id => !document.getElementById(decodeURIComponent(id)))""")
        twice = browser.js("""const ids = [...document.querySelectorAll("[id]")].map(part => part.id);
            return ids.filter((id, i) => ids.indexOf(id) != i)""")
        assert (gone, twice) == ([], []), page.name
        text = page.read_text(encoding="utf-8")
        files = re.findall(r'(?:href|src)="(?!#|https://arxiv|data:)([^"#]+)', text)
        files = [Path(file.replace("file://", "")) for file in files]
        assert files and [file for file in files if not (site / file).exists()] == []
        assert not re.search(r'(?:src|<link[^>]*href)="https?:', text)
        edge = EDGES.get(page.stem)
        names = {name for _, name in changes.definitions(edge.child.text)} if edge else set()
        assert [name for name in names if f'id="{name}"' not in text] == []


@each_edge
def test_the_keys_reach_every_change(name, site, browser):
    browser.show(site / f"{name}.html")
    for change in EDGES[name].changes:
        browser.act("key", [{"type": kind, "value": "n"} for kind in ("keyDown", "keyUp")])
        at, shown = browser.js("""const part = document.activeElement.closest(".change");
            return [part.id, [...part.querySelectorAll(".l")].some(line => line.checkVisibility())]""")
        assert (at, shown) == (change.id, True)
    links = browser.js("return document.querySelectorAll('.change a, summary').length")
    assert links >= len(EDGES[name].changes) - 1  # without a script the tabulator does
    browser.act("key", [{"type": kind, "value": "p"} for kind in ("keyDown", "keyUp")])
    assert browser.js("return document.activeElement.closest('.change').id") == EDGES[name].changes[-2].id


def test_a_selection_has_one_side_only(site, browser):
    edge = EDGES["detr-conditional_detr"]
    browser.show(site / "detr-conditional_detr.html")
    browser.js("location.hash = 'DecoderLayer.forward-3'")
    for side, lines in (("old", edge.left), ("new", edge.right)):
        box = browser.js(f"""const lines = document.getElementById("DecoderLayer.forward-3")
            .querySelectorAll(".{side} .l"), last = lines[lines.length - 1], a = lines[0].getBoundingClientRect(),
            b = last.getBoundingClientRect();
            return [a.left + 60, a.top + 8, b.right - 4, b.bottom - 4, lines[0].dataset.n - 1, +last.dataset.n]""")
        moves = [{"type": "pointerMove", "x": round(box[i]), "y": round(box[i + 1])} for i in (0, 2)]
        browser.act("pointer", [moves[0], {"type": "pointerDown", "button": 0}, moves[1],
                                {"type": "pointerUp", "button": 0}])
        found = [line.strip() for line in browser.js("return getSelection().toString()").split("\n")]
        assert found == [line.strip() for line in lines[box[4]:box[5]]]
