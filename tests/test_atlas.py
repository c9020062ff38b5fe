"""docs/atlas.py: every change has a note, docs/diffs/ is current, and the site works in a real browser."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "docs"))
import atlas
import changes

EDGES = {edge.name: edge for edge in changes.edges()}
each_edge = pytest.mark.parametrize("name", EDGES)


@each_edge
def test_the_changes_are_those_of_git_and_every_line_is_shown_once(name):
    edge = EDGES[name]
    left = "/dev/null" if edge.child.imports else edge.parent.path
    command = ["git", "diff", "--no-index", "--numstat", left, edge.child.path]
    new, out, _ = subprocess.run(command, capture_output=True, text=True).stdout.split("\t")
    assert changes.counts(edge.changes) == (int(out), int(new))
    shown = [row for _, pieces in edge.sections for _, rows in changes.blocks(pieces) for row in rows]
    for side, lines in enumerate((edge.left, edge.right)):
        assert [row[side] for row in shown if row[side] is not None] == list(range(len(lines)))


@each_edge
def test_every_change_has_a_note_and_every_note_a_change(name):
    edge, used = EDGES[name], []
    for change in edge.changes:
        used.append(changes.noted(edge.parent.name, edge.child.name, change.key, change.text))
        line = change.text.strip().split("\n")[0]
        assert used[-1], f"docs/diffs/notes.md, {name}: no note for the change of `{change.key}` at {line!r}"
    for entry in changes.notes()[f"{edge.parent.name} to {edge.child.name}"]:
        where = f"`{' '.join(entry[1])}` `{entry[2]}`"
        assert entry in used, f"docs/diffs/notes.md, {name}: there is no change any more for {where}"


def test_every_note_is_read():
    text = (ROOT / "docs/diffs/notes.md").read_text(encoding="utf-8")
    assert len(re.findall("^- `", text, re.M)) == sum(map(len, changes.notes().values()))
    assert {title.replace(" to ", "-") for title in changes.notes()} == {"All diffs", *EDGES}


def test_the_pages_for_github_are_current():
    pages, folder = atlas.diffs(), ROOT / "docs/diffs"
    assert {path.name for path in folder.iterdir()} == {"notes.md", *pages}
    for name, text in pages.items():
        old = (folder / name).read_text(encoding="utf-8")
        assert old == text, f"docs/diffs/{name} is out of date; run python docs/atlas.py"
        headings = map(atlas.slug, re.findall("^## (.*)", text, re.M))
        assert set(re.findall(r"\]\(#([^)]+)", text)) <= set(headings)
        for link in re.findall(r"\]\((?!https:)([^)#]+)", re.sub("```.*?```", "", text, flags=re.S)):
            assert (folder / link).exists(), f"docs/diffs/{name} links {link}"


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder, start = tmp_path_factory.mktemp("site"), time.process_time()
    changes.edges.cache_clear()
    atlas.write_site(folder, ROOT.as_uri())
    assert time.process_time() - start < 10
    return folder


def test_every_definition_and_every_link_of_the_site_has_its_end(site):
    for page in sorted(site.glob("*.html")):
        text, edge = page.read_text(encoding="utf-8"), EDGES.get(page.stem)
        ids = re.findall(r' id="([^"]+)"', text)
        assert len(ids) == len(set(ids))
        assert set(re.findall('href="#([^"]+)', text)) <= set(ids)
        named = {name for _, name in changes.definitions(edge.child.text)} if edge else set(changes.family())
        assert named <= set(ids)
        for address in re.findall('(?:href|src)="(?!#|data:)([^"#]+)', text):
            file = site / address.removeprefix("file://")
            assert file.exists() or address.startswith("https://arxiv"), f"{page.name} links {address}"


# ---- In a browser ------------------------------------------------------------------------------------------
FLAGS = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync".split() + [
    "disable-background-networking", "disable-component-update"]


class Browser:
    """Chromium through chromedriver, whose protocol is JSON over HTTP."""

    def __init__(self, binary, profile):
        self.driver = subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True,
                                       start_new_session=True)
        lines = (re.search(r"on port (\d+)\.", line) for line in self.driver.stdout)
        port = next(found[1] for found in lines if found)
        flags = [f"--{flag}" for flag in [*FLAGS, f"user-data-dir={profile}"]]
        wanted = {"goog:loggingPrefs": {"browser": "ALL"}}
        wanted["goog:chromeOptions"] = {"args": flags, "binary": binary}
        self.address = f"http://127.0.0.1:{port}/session"
        for attempt in range(5):  # on a busy machine the browser does not always start
            try:
                self.address += "/" + self("", capabilities={"alwaysMatch": wanted})["sessionId"]
                return
            except HTTPError:
                time.sleep(3)
        self.end()
        pytest.fail("chromedriver cannot start the browser")

    def end(self):
        """Ends chromedriver and the browser, which would outlive it."""
        os.killpg(self.driver.pid, signal.SIGKILL)
        self.driver.wait()

    def __call__(self, command, **arguments):
        body = json.dumps(arguments).encode()
        request = Request(self.address + command, body, {"Content-Type": "application/json"})
        return json.load(urlopen(request, timeout=60))["value"]

    def js(self, script):
        return self("/execute/sync", script=script, args=[])

    def devtools(self, command, **parameters):
        return self("/goog/cdp/execute", cmd=command, params=parameters)

    def look(self, width=1400, media="", scheme="light", height=900):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.devtools("Emulation.setDeviceMetricsOverride", **size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.devtools("Emulation.setEmulatedMedia", media=media, features=features)

    def act(self, kind, actions):
        self("/actions", actions=[{"type": kind, "id": kind, "actions": actions}])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if not binary or not shutil.which("chromedriver"):
        pytest.skip("there is no browser: apt-get install chromium chromium-driver")
    browser = Browser(binary, tmp_path_factory.mktemp("profile"))
    try:
        browser.look()
        yield browser
    finally:
        browser.end()


# The lowest contrast of a text on the page, which has no colours with transparency: [ratio, text]
CONTRAST = """
const channel = x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4;
const light = colour => colour.match(/[\\d.]+/g).slice(0, 3)
  .reduce((sum, x, i) => sum + channel(x / 255) * [0.2126, 0.7152, 0.0722][i], 0);
document.querySelectorAll("details").forEach(part => part.open = true);
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
let lowest = [99, ""];
while (walk.nextNode()) {
  const part = walk.currentNode.parentElement, style = getComputedStyle(part);
  if (!walk.currentNode.data.trim() || !part.checkVisibility()) continue;
  let behind = part;
  while (getComputedStyle(behind).backgroundColor == "rgba(0, 0, 0, 0)") behind = behind.parentElement;
  const front = part.closest("svg") ? style.fill : style.color;
  const pair = [front, getComputedStyle(behind).backgroundColor].map(light).sort();
  const ratio = (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05);
  if (ratio < lowest[0]) lowest = [ratio, walk.currentNode.data];
}
return lowest"""


def test_no_page_scrolls_sideways_or_is_pale_or_complains(site, browser):
    for page in sorted(site.glob("*.html")):
        browser("/url", url=page.as_uri())
        for width, media, scheme in [(1400, "", "light"), (1400, "", "dark"), (800, "", "light"),
                                     (390, "", "light"), (700, "print", "light")]:
            browser.look(width, media, scheme)
            if width != 800:
                ratio, text = browser.js(CONTRAST)
                assert ratio >= 4.5, f"{page.name}, {width} {scheme}: {text!r} has a contrast of {ratio:.2f}"
            wide = browser.js("return document.documentElement.scrollWidth")
            assert wide <= width, f"{page.name} is {wide} pixels wide at {width}"
        browser.look()
    assert browser("/se/log", type="browser") == []


@each_edge
def test_the_keys_reach_and_open_every_change(name, site, browser):
    browser("/url", url=(site / f"{name}.html").as_uri())
    ids = [change.id for change in EDGES[name].changes]
    browser.js("""window.seen = []; document.addEventListener("focusin", event => {
        const part = event.target.closest(".change"), lines = [...part.querySelectorAll(".l")];
        if (lines.some(line => line.checkVisibility())) seen.push(part.id) })""")
    keys = "n" * len(ids) + "p" * (len(ids) - 1)
    browser.act("key", [{"type": kind, "value": key} for key in keys for kind in ("keyDown", "keyUp")])
    assert browser.js("return seen") == ids + ids[-2::-1]
    assert browser.js("return document.querySelectorAll('.change > summary').length") == len(ids)  # for Tab


def test_a_selection_copies_the_lines_of_one_side(site, browser):
    edge = EDGES["detr-conditional_detr"]
    browser.look(height=6000)
    browser("/url", url=(site / "detr-conditional_detr.html").as_uri())
    browser.js("""document.addEventListener("copy", event => {
        copied = event.clipboardData.getData("text/plain") })""")
    for side, lines in (("old", edge.left), ("new", edge.right)):
        box = browser.js(f"""const ids = ["DecoderLayer.__init__-3", "DecoderLayer.forward-3"];
            const [a, b] = ids.map(id => [...document.getElementById(id).querySelectorAll(".{side} .l")]);
            const [x, y] = [a[0], b[5]].map(line => line.getBoundingClientRect());
            return [x.left + 70, x.top + 5, y.left + 99, y.top + 5, a[0].dataset.n, b[5].dataset.n]""")
        browser.js("getSelection().removeAllRanges()")  # or the mouse would drag what is selected
        first, last = ({"type": "pointerMove", "x": round(box[i]), "y": round(box[i + 1])} for i in (0, 2))
        down, up = ({"type": kind, "button": 0} for kind in ("pointerDown", "pointerUp"))
        browser.act("pointer", [first, down, last, last, up])
        control, c = "\ue009", "c"
        browser.act("key", [{"type": kind, "value": key} for kind, key in (
            ("keyDown", control), ("keyDown", c), ("keyUp", c), ("keyUp", control))])
        wanted = lines[int(box[4]) - 1:int(box[5])]
        assert len(wanted) > 12 and browser.js("return copied").splitlines() == wanted
