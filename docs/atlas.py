"""The family in a browser: a tree of all model files, and behind each edge a diff with notes.

    python docs/atlas.py                     writes site/index.html with its pages, and docs/diffs/*.md
    python docs/atlas.py --source ADDRESS    the pages link files of the repository at this address

changes.py makes the diffs; the notes are in docs/diffs/notes.md.
"""
import argparse
import difflib
import itertools
import json
import os
import re
import shutil
import statistics
import sys
from html import escape
from pathlib import Path
from string import Template
from textwrap import indent

sys.path.insert(0, str(Path(__file__).parent))
from changes import DOCS, KINDS, ROOT, blocks, command, counts, edges, family, ideas, similarity, sizes

RECIPE = "The recipe came with the paper and does not depend on its idea."


def title(edge):
    if edge.child.imports:
        return f"{edge.child.title}, which imports {' and '.join(edge.child.parents)}"
    return f"{edge.child.title}, as a change of {edge.parent.title}"


def tree(parent, show):
    """The children of a file, each as show(edge, its own children, lines of its diff)."""
    out = ""
    for edge in edges():
        if edge.parent.name == parent:
            size = "imports its parents" if edge.child.imports else "{} out, {} in".format(*counts(edge.changes))
            out += show(edge, tree(edge.child.name, show), size)
    return out


# ---- HTML: one form for all pages, atlas_page.html ---------------------------------------------------------
def page(title, **parts):
    template = Template((DOCS / "atlas_page.html").read_text(encoding="utf-8"))
    return template.substitute(parts, title=escape(title))


def paint(line, other=""):
    """A line as HTML: comments in <i>; where `other` is a similar line, words that it does not have in <b>."""
    here, there = (re.findall(r"# .*|\w+|\s+|.", text) for text in (line, other))
    out, similar = "", similarity(line, other)
    for tag, start, end, *_ in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        words = [f"<i>{word}</i>" if word.startswith("# ") else word for word in map(escape, here[start:end])]
        text = "".join(words)
        out += f"<b>{text}</b>" if text and similar and tag != "equal" else text
    return out or "<br>"


def pair(edge, rows):
    """Rows next to each other: all lines of the left, then all of the right, so that each copies alone.

    --r is the place of a line in two columns, --o in one: there a change has its left lines first.
    """
    out, texts, first = ["", ""], (edge.left, edge.right), 0
    for r, (*numbers, equal) in enumerate(rows, 1):
        first = r if equal or first == 0 or rows[r - 2][2] else first
        both = ["" if n is None else lines[n] for n, lines in zip(numbers, texts)]
        for side, (n, line) in enumerate(zip(numbers, both)):
            if n is None:
                continue
            tag = "span" if equal else ("del", "ins")[side]
            mark = f' id="{edge.starts[n]}"' if side and n in edge.starts else ""
            style = f"--r:{r};--o:{2 * first + side};--i:{len(line) - len(line.lstrip())}"
            code = paint(line, both[1 - side])
            out[side] += f'<{tag} class="l"{mark} data-n="{n + 1}" style="{style}">{code}</{tag}>\n'
    return f'<div class="pair"><div class="old">{out[0]}</div><div class="new">{out[1]}</div></div>'


def fold(edge, piece, rows, following):
    """Equal lines, or a change with its note and equal lines around it; only the idea is unfolded."""
    if piece.kind == "equal":
        text = f"{len(rows)} equal line{'s' * (len(rows) > 1)}"
        return f'<details class="fold"><summary>{text}</summary>{pair(edge, rows)}</details>\n'
    out, new = counts([piece])
    sides = "" if out and new else "one out" if out else "one in"
    head = f'class="change {piece.kind} {sides}" id="{piece.id}"{" open" * (piece.kind == "idea")}'
    note = f"<strong>{piece.kind.capitalize()}.</strong> {escape(piece.note)} <small>\u2212{out} +{new}</small>"
    link = f'<p class="next"><a href="#{following.id}">next change</a></p>' if following else ""
    return f"<details {head}><summary>{note}</summary>{pair(edge, rows)}{link}</details>\n"


def sections(edge):
    """(the file from top to bottom, the list of its definitions)."""
    body, items, following = "", {}, iter([*edge.changes[1:], None])
    for name, pieces in edge.sections:
        changes = [piece for piece in pieces if piece.kind != "equal"]
        kind = min((change.kind for change in changes), key=KINDS.index, default="equal")
        head = f'class="{"" if changes else "equal"}"' + f' id="{name}"' * (name not in items)
        size = " \u2212{}\xa0+{}".format(*counts(changes)) if changes else ""
        items.setdefault(name, f'<li class="{kind}"><a href="#{name}">{name}</a>{size}</li>')
        parts = [fold(edge, piece, rows, piece in changes and next(following)) for piece, rows in blocks(pieces)]
        body += f'<section {head}><h2 class="name">{name}</h2>{"".join(parts)}</section>\n'
    return body, f"<ul>{''.join(items.values())}</ul>"


def diff_page(edge, source):
    body, items = sections(edge)
    first = ""
    for note, changes in ideas(edge):
        names = ", ".join(f'<a href="#{change.id}"><code>{change.section}</code></a>' for change in changes)
        first += f"<li>{names}: {escape(note)}</li>\n"
    legend = re.search(r"# (Shapes in comments:.*?)\n\n", edge.parent.text, re.S)
    legend = escape(legend[1].replace("\n# ", "\n")) if legend else ""
    return page(title(edge), kind="diff", lead=escape(edge.child.idea), label="Definitions of the file", list=items, main=f"""
<h2>The idea, in the order in which to read it</h2>
<ol>{first}</ol>
<p><code>{command(edge)}</code>: {sizes(edge)} {RECIPE} Recipe and bookkeeping are folded.</p>
<p>{" · ".join(links(edge.child, source))}</p>
<p class="keys">The keys <kbd>n</kbd> and <kbd>p</kbd> go to the next and to the previous change.</p>
<div class="legend">{legend}</div>
{body}""", footer="Equal lines are folded. Line numbers are those of the two files.")


def links(file, source):
    """Links to the diff of a file, to the file, to its page and to its paper."""
    found = {f"diff against {parent}": f"{parent}-{file.name}.html" for parent in file.parents[:1]}
    found["file"] = f"{source}/{file.path.relative_to(ROOT).as_posix()}"
    if (DOCS / f"{file.name}.md").exists():
        found["page"] = f"{source}/docs/{file.name}.md"
    if file.arxiv:
        found["paper"] = f"https://arxiv.org/abs/{file.arxiv}"
    return [f'<a href="{address}">{name}</a>' for name, address in found.items()]


def item(edge, below, size):
    """A file in the tree, with a bar as long as its diff."""
    file, bar = edge.child, sum(counts(edge.changes)) / 50
    return f"""<li><a href="#{file.name}"><strong>{escape(file.title)}</strong></a>
<span class="size" style="width:{bar:.1f}rem"></span><a href="{edge.name}.html">{size}</a>
<small>{escape(file.line)}</small><ul>{below}</ul></li>\n"""


def curve(name):
    """AP during the runs of a file in race.json, a line for each seed, as SVG; "" if there are none."""
    race = json.loads((ROOT / "benchmarks/results/race.json").read_text(encoding="utf-8"))
    runs = [entry["evals"] for entry in race.values() if entry.get("name") == name and entry.get("evals")]
    if not runs:
        return ""
    steps = runs[0][-1]["step"]
    final = statistics.mean(points[-1]["AP"] for points in runs)
    lines = "".join('<polyline points="20 100 ' + " ".join(
        f"{20 + 270 * point['step'] / steps:.0f} {100 - 100 * point['AP']:.1f}" for point in points) + '"/>'
        for points in runs)
    text = f"AP {final:.2f} after {steps} steps; seeds: {len(runs)}"
    axis = '<path class="axis" d="M20 0V100H290"/><text x="0" y="9">1</text><text x="0" y="103">0</text>'
    return f'<svg viewBox="0 0 300 104" role="img" aria-label="{text}">{axis}{lines}</svg><p>{text}</p>'


def card(file, source):
    """A file of the family: idea, links, picture and AP."""
    picture = DOCS / f"attention_{file.name}.png"
    shown = f'<img src="{picture.name}" alt="Attention of {file.title}" loading="lazy">' * picture.exists()
    return f"""<article class="card" id="{file.name}"><h3>{escape(file.title)}</h3><p>{escape(file.idea)}</p>
<p>{" · ".join(links(file, source))}</p>{shown}{curve(file.name)}</article>\n"""


def first_page(source):
    cards = "".join(card(file, source) for file in family().values())
    return page("DETR, side by side", kind="index", lead="""Every detector is one file, and is compared with the file
that its paper changed. A blue bar is a diff, and its length is the number of lines. Behind the bar is a page with
a note at every change. A change is the idea of the paper, its recipe, or bookkeeping.""",
                label="The family", list=f"""<ul class="tree"><li><a href="#detr"><strong>DETR</strong></a>
<ul>{tree("detr", item)}</ul></li></ul>""", main=f'<h2>The files</h2><div class="cards">{cards}</div>',
                footer="AP is that of the laptop preset on the embedded shapes, with a line for each seed.")


# ---- Markdown, for GitHub ----------------------------------------------------------------------------------
def markdown(edge):
    """One diff as a page of docs/diffs/."""
    child = edge.child
    own_page = f" · [its page](../{child.name}.md)" if (DOCS / f"{child.name}.md").exists() else ""
    out = [f"# {title(edge)}", child.idea,
           f"[The file](../../{child.path.relative_to(ROOT).as_posix()}){own_page} · [all diffs](README.md)",
           f"`{command(edge)}`: {sizes(edge)} {RECIPE}", "**The idea, in the order in which to read it**"]
    out += ["\n".join(
        f"1. {', '.join(f'[`{change.section}`](#{slug(change.section)})' for change in changes)}: {note}"
        for note, changes in ideas(edge))]
    for name, pieces in edge.sections:
        changes = [(piece, rows) for piece, rows in blocks(pieces) if piece.kind != "equal"]
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
        out += [("-", " ")[equal] + edge.left[n] for n, *_ in group if n is not None]
        out += ["+" + edge.right[m] for _, m, _ in group if not equal and m is not None]
    return re.sub(r"\A(\s*\n)+|\s+\Z", "", "\n".join(out))  # no blank lines around it


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def diffs():
    """{name: text} of docs/diffs/, except for the notes."""
    def show(edge, below, size):
        text = f"- **{edge.child.title}** [{size}]({edge.name}.md): {edge.child.line}\n"
        return text + indent(below, "  ")
    return {"README.md": f"""# Every diff, with notes

Each file is compared with the one that its paper changed, beginning with `detr.py`. The links show how many
lines differ. Behind them every change has a note, and is the idea of the paper, its recipe, or bookkeeping.
`python docs/atlas.py` writes these pages from [notes.md](notes.md), and others for a browser into `site/`.

{tree("detr", show)}""", **{f"{edge.name}.md": markdown(edge) for edge in edges()}}


def write_site(folder, source):
    """index.html, a page for each diff, and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    pages = {"index": first_page(source), **{edge.name: diff_page(edge, source) for edge in edges()}}
    for name, text in pages.items():
        (folder / f"{name}.html").write_text(text, encoding="utf-8", newline="\n")
    for picture in DOCS.glob("attention_*.png"):
        shutil.copy(picture, folder)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=ROOT / "site", metavar="FOLDER", help="default: site")
    p.add_argument("--source", metavar="ADDRESS", help="where the files can be read; default: this disk")
    args = p.parse_args()
    write_site(args.out, args.source or os.path.relpath(ROOT, args.out).replace(os.sep, "/"))
    for name, text in diffs().items():
        (DOCS / "diffs" / name).write_text(text, encoding="utf-8", newline="\n")
    print(f"{len(edges())} diffs written to docs/diffs, and for a browser to {args.out / 'index.html'}")


if __name__ == "__main__":
    main()
