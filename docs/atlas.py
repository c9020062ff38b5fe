"""The family in a browser: a tree of all model files, and behind each edge a diff with notes.

    python docs/atlas.py                     writes site/index.html with its pages, and docs/diffs/*.md
    python docs/atlas.py --source ADDRESS    the pages link files of the repository at this address

changes.py makes the diffs; the notes are in docs/diffs/notes.md.
"""
import argparse
import difflib
import io
import itertools
import json
import keyword
import os
import re
import shutil
import sys
import tokenize
from html import escape
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).parent))
from changes import (  # noqa: E402
    DOCS,
    KINDS,
    ROOT,
    Change,
    blocks,
    command,
    counts,
    definitions,
    edges,
    family,
    ideas,
    similarity,
    sizes,
    stream,
)


# ---- HTML --------------------------------------------------------------------------------------------------
def colours(text):
    """For every line of a file the class of every character: c comment, s string, k keyword, or nothing."""
    classes = [[""] * len(line) for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline) if text else ():
        is_word = token.type == tokenize.NAME and keyword.iskeyword(token.string)
        name = "k" if is_word else {tokenize.COMMENT: "c", tokenize.STRING: "s"}.get(token.type)
        for row in range(token.start[0], token.end[0] + 1) if name else ():
            start = token.start[1] if row == token.start[0] else 0
            end = token.end[1] if row == token.end[0] else len(classes[row - 1])
            classes[row - 1][start:end] = [name] * (end - start)
    return classes


def paint(line, classes, other):
    """A line as HTML; where `other` is a similar line, words that it does not have are marked."""
    marked = [False] * len(line)
    if other and similarity(line, other):
        both, at = [re.findall(r"\w+|\s+|.", text) for text in (line, other)], 0
        blocks = difflib.SequenceMatcher(None, *both, autojunk=False).get_matching_blocks()
        kept = {i for block in blocks for i in range(block.a, block.a + block.size)}
        for i, word in enumerate(both[0]):
            marked[at:at + len(word)] = [i not in kept] * len(word)
            at += len(word)
    out = ""
    for (name, mark), group in itertools.groupby(zip(classes, marked, line), key=lambda x: x[:2]):
        text = escape("".join(character for *_, character in group), quote=False)
        text = f'<span class="{name}">{text}</span>' if name else text
        out += f"<b>{text}</b>" if mark else text
    return out or "<br>"


class Page:
    """One diff as HTML. anchors: the definitions that already have an id."""

    def __init__(self, edge, source):
        self.edge, self.source, self.anchors = edge, source, set()
        self.classes = [colours("\n".join(lines)) for lines in (edge.left, edge.right)]
        self.owner = [name for _, name in definitions(edge.child.text)]

    def anchor(self, name):
        """The attribute id of a definition, at its first line."""
        new = name not in self.anchors
        self.anchors.add(name)
        return f' id="{escape(name)}"' if new else ""

    def lines(self, rows):
        """Rows next to each other: all lines of the left, then all of the right, so that each copies alone.

        --r is the place of a line in two columns, --o in one: there a change has its left lines first.
        """
        out, texts, first = ["", ""], (self.edge.left, self.edge.right), 0
        for r, (*numbers, equal) in enumerate(rows, 1):
            first = r if equal or first == 0 or rows[r - 2][2] else first
            both = [None if n is None else lines[n] for n, lines in zip(numbers, texts)]
            for side, (n, line) in enumerate(zip(numbers, both)):
                if line is None:
                    continue
                tag = "span" if equal else ("del", "ins")[side]
                mark = self.anchor(self.owner[n]) if side and self.owner[n] != self.owner[n - 1] else ""
                style = f"--r:{r};--o:{2 * first + side};--i:{len(line) - len(line.lstrip())}"
                code = paint(line, self.classes[side][n], None if equal else both[1 - side])
                out[side] += f'<{tag} class="l"{mark} data-n="{n + 1}" style="{style}">{code}</{tag}>\n'
        return f'<div class="pair"><div class="old">{out[0]}</div><div class="new">{out[1]}</div></div>'

    def fold(self, rows, names=""):
        """Equal lines, folded."""
        text = f"{len(rows)} equal line{'s' * (len(rows) > 1)}{names}"
        return f'<details class="fold"><summary>{text}</summary>{self.lines(rows)}</details>\n'

    def change(self, change, rows, following):
        """A change with its note, and equal lines around it; only the idea is unfolded."""
        out, new = counts([change])
        sides = "" if out and new else "one out" if out else "one in"
        head = f'class="change {change.kind} {sides}" id="{escape(change.id)}"'
        note = f"<strong>{change.kind.capitalize()}.</strong> {escape(change.note)}"
        link = f'<a href="#{escape(following.id)}">next change</a>' if following else ""
        if change.kind == "idea":
            note = f'<p class="note"><span>{note}</span>{link}</p>'
            return f'<article {head} tabindex="-1">{note}{self.lines(rows)}</article>\n'
        note = f"<summary>{note} <small>\u2212{out} +{new}</small></summary>"
        return f'<details {head}>{note}{self.lines(rows)}<p class="next">{link}</p></details>\n'

    def section(self, name, pieces, following):
        """A definition that has changes."""
        parts = [self.change(change, rows, following.pop(0)) if change else self.fold(rows)
                 for change, rows in blocks(pieces)]
        return f'<section><h2 class="name"{self.anchor(name)}>{escape(name)}</h2>{"".join(parts)}</section>\n'

    def sections(self):
        """(the file from top to bottom, the list of its definitions)."""
        body, items, following = "", "", self.edge.changes[1:] + [None]
        for changed, group in itertools.groupby(
                stream(self.edge), lambda part: any(isinstance(piece, Change) for piece in part[1])):
            group = list(group)
            for name, pieces in group:
                changes = [piece for piece in pieces if isinstance(piece, Change)]
                kind = min((change.kind for change in changes), key=KINDS.index, default="equal")
                size = " \u2212{}\xa0+{}".format(*counts(changes)) if changes else ""
                if name not in self.anchors:
                    items += f'<li class="{kind}"><a href="#{escape(name)}">{escape(name)}</a>{size}</li>'
                if changed:
                    body += self.section(name, pieces, following)
            if not changed:
                rows = [row for _, pieces in group for piece in pieces for row in piece]
                body += self.fold(rows, ": " + ", ".join(escape(name) for name, _ in group))
        return body, f"<ul>{items}</ul>"

    def write(self):
        edge, child = self.edge, self.edge.child
        body, listed = self.sections()
        first = ""
        for note, changes in ideas(edge):
            names = ", ".join(f'<a href="#{escape(change.id)}"><code>{escape(change.section)}</code></a>'
                              for change in changes)
            first += f"<li>{names}: {escape(note)}</li>\n"
        legend = re.search(r"# (Shapes in comments:.*?)\n\n", edge.parent.text, re.S)
        legend = escape(re.sub("(?m)^# ", "", legend[1])) if legend else ""
        return page(title(edge), "diff", f"""<header><p><a href="index.html">The family</a></p>
<h1>{escape(title(edge))}</h1><p>{escape(child.idea)}</p></header>
<nav class="list" aria-label="Definitions of the file">{listed}</nav>
<main><h2>The idea, in the order in which to read it</h2>
<ol>{first}</ol>
<p><code>{escape(command(edge))}</code>: {sizes(edge)} {RECIPE} Recipe and bookkeeping are folded.</p>
<p>{" · ".join(links(child, self.source))}</p>
<p class="keys">The keys <kbd>n</kbd> and <kbd>p</kbd> go to the next and to the previous change.</p>
<div class="legend">{legend}</div>
{body}</main>
<footer>Equal lines are folded. Line numbers are those of the two files.</footer>""")


RECIPE = "The recipe came with the paper and does not depend on its idea."


def title(edge):
    if edge.child.imports:
        return f"{edge.child.title}, which imports {' and '.join(edge.child.parents)}"
    return f"{edge.child.title}, as a change of {edge.parent.title}"


def links(file, source):
    """Links to the file, to its page and to its paper, as HTML."""
    found = {"file": f"{source}/{file.path.relative_to(ROOT).as_posix()}"}
    if (DOCS / f"{file.name}.md").exists():
        found["page"] = f"{source}/docs/{file.name}.md"
    if file.arxiv:
        found["paper"] = f"https://arxiv.org/abs/{file.arxiv}"
    return [f'<a href="{address}">{name}</a>' for name, address in found.items()]


def page(title, kind, body):
    template = Template((DOCS / "atlas_page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), kind=kind, body=body)


# ---- The first page: the tree, and a card for each file ----------------------------------------------------
def tree(parent=None):
    """The children of a file as a list, with their own children in it."""
    out, edge_of = "", {edge.child.name: edge for edge in edges()}
    for file in family().values():
        if file.parents[:1] == [parent] or not file.parents and not parent:
            link = ""
            if parent:
                old, new = counts(edge_of[file.name].changes)
                text = f"imports {', '.join(file.parents)}" if file.imports else f"{old} out, {new} in"
                link = (f'<span class="size" style="width:{(old + new) / 50:.1f}rem"></span>'
                        f'<a href="{parent}-{file.name}.html">{text}</a>')
            out += (f'<li><a href="#{file.name}"><strong>{escape(file.title)}</strong></a> {link}'
                    f"<small>{escape(file.line)}</small>{tree(file.name)}</li>\n")
    return f"<ul{'' if parent else ' class=tree'}>{out}</ul>" if out else ""


def curve(name):
    """AP during the runs of a file in race.json, a line for each seed, as SVG; "" if there are none."""
    path, runs = ROOT / "benchmarks/results/race.json", {}
    for entry in json.loads(path.read_text(encoding="utf-8")).values() if path.exists() else ():
        points = [(point["step"], point["AP"]) for point in entry.get("evals", ())]
        if entry.get("name") == name and points:
            runs.setdefault(points[-1][0], []).append(points)
    if not runs:
        return ""
    steps, lines = max(runs.items(), key=lambda item: (len(item[1]), item[0]))
    final = sum(points[-1][1] for points in lines) / len(lines)
    paths = "".join('<path d="M20 100' + "".join(
        f"L{20 + 270 * x / steps:.0f} {100 - 100 * y:.1f}" for x, y in points) + '"/>' for points in lines)
    text = f"AP {final:.2f} after {steps} steps; seeds: {len(lines)}"
    axis = '<path class="axis" d="M20 0V100H290"/><text x="0" y="9">1</text><text x="0" y="103">0</text>'
    return f'<svg viewBox="0 0 300 104" role="img" aria-label="{text}">{axis}{paths}</svg><p>{text}</p>'


def card(file, source):
    """A file of the family: idea, links, picture and AP."""
    picture, diff = DOCS / f"attention_{file.name}.png", []
    if file.parents:
        diff = [f'<a href="{file.parents[0]}-{file.name}.html">diff against {file.parents[0]}</a>']
    shown = f'<img src="{picture.name}" alt="Attention of {file.title}" loading="lazy">' * picture.exists()
    text = f"<h3>{escape(file.title)}</h3><p>{escape(file.idea)}</p>"
    text += f"<p>{' · '.join(diff + links(file, source))}</p>"
    return f'<article class="card" id="{file.name}">{text}{shown}{curve(file.name)}</article>\n'


def first_page(source):
    return page("DETR, side by side", "index", f"""<header><h1>DETR, side by side</h1></header>
<main><p>Every detector is one file, and is compared with the file that its paper changed. A blue bar is a
diff, and its length is the number of lines. Behind the bar is a page with a note at every change. A change is
the idea of the paper, its recipe, or bookkeeping.</p>
<h2>The family</h2>{tree()}
<h2>The files</h2><div class="cards">{"".join(card(file, source) for file in family().values())}</div></main>
<footer>AP is that of the laptop preset on the embedded shapes, with a line for each seed.</footer>""")


# ---- Markdown, for GitHub ----------------------------------------------------------------------------------
def markdown(edge):
    """One diff as a page of docs/diffs/."""
    child, out = edge.child, []
    own_page = f" · [its page](../{child.name}.md)" if (DOCS / f"{child.name}.md").exists() else ""
    file = os.path.relpath(child.path, DOCS / "diffs").replace(os.sep, "/")
    out += [f"# {title(edge)}", child.idea, f"[The file]({file}){own_page} · [all diffs](README.md)"]
    out += [f"`{command(edge)}`: {sizes(edge)} {RECIPE}", "**The idea, in the order in which to read it**"]
    out += ["\n".join(
        f"1. {', '.join(f'[`{change.section}`](#{slug(change.section)})' for change in changes)}: {note}"
        for note, changes in ideas(edge))]
    for name, pieces in stream(edge):
        changes = [(change, rows) for change, rows in blocks(pieces) if change]
        out += [f"## `{name}`"] if changes else []
        for change, rows in changes:
            code = f"```diff\n{patch(edge, rows)}\n```"
            if change.kind == "idea":
                out += [f"**Idea.** {change.note}", code]
            else:
                note = f"<b>{change.kind.capitalize()}.</b> {escape(change.note, quote=False)}"
                out += [f"<details><summary>{note}</summary>", code, "</details>"]
    return "\n\n".join(out) + "\n"


def patch(edge, rows):
    """Rows as a diff: where lines differ, those of the left file come first."""
    out = []
    for equal, group in itertools.groupby(rows, lambda row: row[2]):
        group = list(group)
        out += [" " + edge.right[m] for _, m, _ in group if equal]
        out += ["-" + edge.left[n] for n, *_ in group if not equal and n is not None]
        out += ["+" + edge.right[m] for _, m, _ in group if not equal and m is not None]
    shown = [n for n, line in enumerate(out) if line.strip()]  # no blank lines around it
    return "\n".join(out[shown[0]:shown[-1] + 1])


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def markdown_tree(parent, indent=""):
    """The children of a file as a list, with their own children in it."""
    out = ""
    for edge in edges():
        if edge.parent.name == parent:
            old, new = counts(edge.changes)
            size = "imports its parents" if edge.child.imports else f"{old} out, {new} in"
            out += (f"{indent}- **{edge.child.title}** [{size}]({parent}-{edge.child.name}.md): "
                    f"{edge.child.line}\n{markdown_tree(edge.child.name, indent + '  ')}")
    return out


def diffs():
    """{name: text} of docs/diffs/, except for the notes."""
    pages = {f"{edge.parent.name}-{edge.child.name}.md": markdown(edge) for edge in edges()}
    return {"README.md": f"""# Every diff, with notes

Each file is compared with the one that its paper changed, beginning with `detr.py`. The links show how many
lines differ. Behind them every change has a note, and is the idea of the paper, its recipe, or bookkeeping.
`python docs/atlas.py` writes these pages from [notes.md](notes.md), and others for a browser into `site/`.

{markdown_tree('detr')}""", **pages}


def write_site(folder, source):
    """index.html, a page for each diff, and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {f"{edge.parent.name}-{edge.child.name}.html": Page(edge, source).write() for edge in edges()}
    for name, text in {"index.html": first_page(source), **pages}.items():
        (folder / name).write_text(text, encoding="utf-8", newline="\n")
    for picture in DOCS.glob("attention_*.png"):
        shutil.copy(picture, folder)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "site", metavar="FOLDER", help="default: site")
    p.add_argument("--source", metavar="ADDRESS", help="where the files can be read; default: this disk")
    args = p.parse_args(argv)
    write_site(args.out, args.source or os.path.relpath(ROOT, args.out).replace(os.sep, "/"))
    for name, text in diffs().items():
        (DOCS / "diffs" / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(edges())} diffs written to docs/diffs, and for a browser to {args.out / 'index.html'}")


if __name__ == "__main__":
    main()
