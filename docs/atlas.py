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
from html import escape
from pathlib import Path
from string import Template
from textwrap import indent

from changes import DOCS, KINDS, ROOT, blocks, counts, edges, family, ideas, similarity, sizes


def tree(parent, show):
    """The children of a file, each as show(edge, size of its diff, its own children)."""
    out = ""
    for edge in (edge for edge in edges() if edge.parent.name == parent):
        size = "imports its parents" if edge.child.imports else "{} out, {} in".format(*counts(edge.changes))
        out += show(edge, size, tree(edge.child.name, show))
    return out


# ---- HTML --------------------------------------------------------------------------------------------------
def page(kind, **parts):
    """A page of a kind, diff or index, from templates."""
    texts = [(DOCS / f"atlas_{name}.html").read_text(encoding="utf-8") for name in (kind, "page")]
    body, whole = map(Template, texts)
    return whole.substitute(parts, kind=kind, body=body.substitute(parts))


def paint(line, other):
    """A line as HTML: comments in <i>, and in <b> the words that a similar line `other` does not have."""
    here, there = (re.findall(r"# .*|\w+|\s+|.", text) for text in (line, other))
    out, similar = "", similarity(line, other)
    for tag, start, end, *_ in difflib.SequenceMatcher(None, here, there, autojunk=False).get_opcodes():
        words = [f"<i>{word}</i>" if word[0] == "#" else word for word in map(escape, here[start:end])]
        out += "<b>{}</b>".format("".join(words)) if similar and words and tag != "equal" else "".join(words)
    return out or "<br>"


def pair(edge, rows):
    """Rows next to each other: all lines of the left, then all of the right, so that each can be copied.

    --r is the place of a line in two columns, --o in one: there a change has its left lines first.
    """
    out, numbered = ["", ""], enumerate(rows, 1)
    for o, (equal, group) in enumerate(itertools.groupby(numbered, lambda row: row[1][2])):
        for r, (*numbers, _) in group:
            both = ["" if n is None else lines[n] for n, lines in zip(numbers, (edge.left, edge.right))]
            for side, (n, line) in enumerate(zip(numbers, both)):
                if n is None:
                    continue
                tag = "span" if equal else ("del", "ins")[side]
                mark = f' id="{edge.starts[n]}"' if side and n in edge.starts else ""
                style = f"--r:{r};--o:{2 * o + side};--i:{len(line) - len(line.lstrip())}"
                code = paint(line, both[1 - side])
                out[side] += f'<{tag} class="l"{mark} data-n="{n + 1}" style="{style}">{code}</{tag}>\n'
    return '<div class="pair"><div class="old">{}</div><div class="new">{}</div></div>'.format(*out)


def fold(edge, piece, rows, following):
    """Equal lines, or a change with its note and equal lines around it; only the idea is unfolded."""
    if piece.kind == "equal":
        text = f"{len(rows)} equal line{'s' * (len(rows) > 1)}"
        return f'<details class="fold"><summary>{text}</summary>{pair(edge, rows)}</details>\n'
    out, new = counts([piece])
    sides = "" if out and new else "one out" if out else "one in"
    head = f'class="change {piece.kind} {sides}" id="{piece.id}"{" open" * (piece.kind == "idea")}'
    note = f"<strong>{piece.kind.capitalize()}.</strong> {escape(piece.note)} <small>−{out} +{new}</small>"
    link = f'<p class="next"><a href="#{following.id}">next change</a></p>' if following else ""
    return f"<details {head}><summary>{note}</summary>{pair(edge, rows)}{link}</details>\n"


def diff_page(edge, source):
    """The idea, the file from top to bottom, and the list of its definitions."""
    body, items, first, following = "", {}, "", iter([*edge.changes[1:], None])
    for name, pieces in edge.sections:
        changes = [piece for piece in pieces if piece.kind != "equal"]
        kind = min((change.kind for change in changes), key=KINDS.index, default="equal")
        head = f'class="{"" if changes else "equal"}"' + f' id="{name}"' * (name not in items)
        size = " −{}\xa0+{}".format(*counts(changes)) if changes else ""
        items.setdefault(name, f'<li class="{kind}"><a href="#{name}">{name}</a>{size}</li>')
        parts = [fold(edge, piece, rows, piece.kind != "equal" and next(following))
                 for piece, rows in blocks(pieces)]
        body += f'<section {head}><h2 class="name">{name}</h2>{"".join(parts)}</section>\n'
    for note, changes in ideas(edge):
        names = ", ".join(f'<a href="#{change.id}"><code>{change.section}</code></a>' for change in changes)
        first += f"<li>{names}: {escape(note)}</li>\n"
    legend = re.search(r"# (Shapes in comments:.*?)\n\n", edge.parent.text, re.S)[1].replace("\n# ", "\n")
    return page("diff", title=escape(edge.title), lead=escape(edge.child.idea), items="".join(items.values()),
                ideas=first, command=edge.command, sizes=sizes(edge), links=links(edge.child, source),
                legend=escape(legend), sections=body)


def links(file, source):
    """Links to the file, to its page and to its paper."""
    found = [("file", f"{source}/{file.path}"), ("page", file.page and f"{source}/docs/{file.page}"),
             ("paper", file.arxiv and f"https://arxiv.org/abs/{file.arxiv}")]
    return " · ".join(f'<a href="{address}">{name}</a>' for name, address in found if address)


def item(edge, size, below):
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
    steps, final = runs[0][-1]["step"], sum(points[-1]["AP"] for points in runs) / len(runs)
    lines = ""
    for points in runs:
        places = [f"{20 + 270 * x['step'] / steps:.0f} {100 - 100 * x['AP']:.1f}" for x in points]
        lines += f'<polyline points="20 100 {" ".join(places)}"/>'
    text = f"AP {final:.2f} after {steps} steps; seeds: {len(runs)}"
    axis = '<path class="axis" d="M20 0V100H290"/><text x="0" y="9">1</text><text x="0" y="103">0</text>'
    return f'<svg viewBox="0 0 300 104" role="img" aria-label="{text}">{axis}{lines}</svg><p>{text}</p>'


def card(file, source):
    """A file of the family: idea, links, picture and AP."""
    picture = DOCS / f"attention_{file.name}.png"
    shown = f'<img src="{picture.name}" alt="Attention of {file.title}" loading="lazy">' * picture.exists()
    return f"""<article class="card" id="{file.name}"><h3>{escape(file.title)}</h3><p>{escape(file.idea)}</p>
<p>{links(file, source)}</p>{shown}{curve(file.name)}</article>\n"""


# ---- Markdown, for GitHub ----------------------------------------------------------------------------------
def markdown(edge):
    """One diff as a page of docs/diffs/."""
    own_page = f" · [its page](../{edge.child.page})" if edge.child.page else ""
    out = [f"# {edge.title}", edge.child.idea,
           f"[The file](../../{edge.child.path}){own_page} · [all diffs](README.md)",
           f"`{edge.command}`: {sizes(edge)}", "**The idea, in the order in which to read it**"]
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
    return re.sub(r"\A\s*\n|\s+\Z", "", "\n".join(out))  # no blank lines around it


def slug(heading):
    """The anchor that GitHub makes of a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def diffs():
    """{name: text} of docs/diffs/, except for the notes."""
    def show(edge, size, below):
        return f"- **{edge.child.title}** [{size}]({edge.name}.md): {edge.child.line}\n{indent(below, '  ')}"
    return {"README.md": f"""# Every diff, with notes

Each file is compared with the one that its paper changed, beginning with `detr.py`. The links show how many
lines differ. Behind them every change has a note, and is the idea of the paper, its recipe, or bookkeeping.
`python docs/atlas.py` writes these pages from [notes.md](notes.md), and others for a browser into `site/`.

{tree("detr", show)}""", **{f"{edge.name}.md": markdown(edge) for edge in edges()}}


def write_site(folder, source):
    """index.html, a page for each diff, and pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    cards = "".join(card(file, source) for file in family().values())
    pages = {"index": page("index", title="DETR, side by side", tree=tree("detr", item), cards=cards)}
    pages |= {edge.name: diff_page(edge, source) for edge in edges()}
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
