"""Two files next to each other as a web page: what differs, and what it is.

    python docs/side_by_side.py detr.py conditional_detr.py     writes pictures/detr--conditional_detr.html
    python docs/side_by_side.py ours.py theirs.py --out page.html

Any two Python files. They are compared definition by definition (class, function, method of a class that
both have); what differs inside one is found by difflib. A difference has a note, which is the one for these
two files in side_by_side_notes.py, or otherwise the first line of the definition's docstring.
"""
import argparse
import ast
import difflib
import html
import io
import itertools
import keyword
import re
import sys
import tokenize
from collections import namedtuple
from pathlib import Path
from string import Template

sys.path.insert(0, str(Path(__file__).parent))
from side_by_side_notes import GENERAL, NOTES  # noqa: E402

CONTEXT, COLLAPSE = 3, 12  # unchanged lines shown around a change; how many it takes to fold the rest


# ---- A file in pieces --------------------------------------------------------------------------------------
# Lines of a file that belong together: a definition with the comments above it, or what stands between two
# key: the same in two files if the pieces belong together; "*" is the model's class, whose name differs
Piece = namedtuple("Piece", "key name summary first_line lines node")


def cut(lines, first, ends):
    """Pieces from [(key, name, summary, last line, node)], each with the blank lines below it."""
    pieces, start, stop = [], first, first + len(lines)
    for key, name, summary, end, node in ends:
        while end + 1 < stop and not lines[end + 1 - first].strip():
            end += 1
        pieces.append(Piece(key, name, summary, start, lines[start - first:end + 1 - first], node))
        start = end + 1
    return pieces


def summary(node):
    """The first line of a definition's docstring, if it has one."""
    found = isinstance(node, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    return (found or "").split("\n")[0]


def pieces_of(text):
    """A file as docstring, imports, every definition, and what runs as a script."""
    ends = []
    for node in ast.parse(text).body:
        kind = {ast.Expr: "docstring", ast.If: "main"}.get(type(node), "imports")
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", kind)
        own = isinstance(node, ast.ClassDef) and "recipe = RECIPE" in map(ast.unparse, node.body)
        if ends and ends[-1][0] == name == "imports":
            ends.pop()  # one piece for all of them
        ends.append(("*" if own else name, name, summary(node), node.end_lineno, node))
    return cut(text.splitlines(), 1, ends)


def methods(piece):
    """A class as what is above its first method, and every method."""
    own = [node for node in piece.node.body if isinstance(node, ast.FunctionDef)]
    head = [node.end_lineno for node in piece.node.body if not own or node.lineno < own[0].lineno]
    ends = [(piece.key, piece.name, piece.summary, max(head, default=piece.node.lineno), None)]
    ends += [(f"{piece.key}.{node.name}", f"{piece.name}.{node.name}", summary(node) or piece.summary,
              node.end_lineno, None) for node in own]
    return cut(piece.lines, piece.first_line, ends)


# ---- Two files, aligned ------------------------------------------------------------------------------------
# Consecutive lines that are equal or not. rows: pairs of line numbers, left and right; None is no line
Hunk = namedtuple("Hunk", "equal rows key summary text")


def pairs(left, right):
    """Two lists of pieces as one of pairs (piece or None, piece or None), by their keys."""
    keys = [piece.key for piece in left], [piece.key for piece in right]
    found, i, j = [], 0, 0
    for block in difflib.SequenceMatcher(None, *keys, autojunk=False).get_matching_blocks():
        found += [(piece, None) for piece in left[i:block.a]] + [(None, piece) for piece in right[j:block.b]]
        i, j = block.a + block.size, block.b + block.size
        found += zip(left[block.a:i], right[block.b:j])
    return found


def hunks(left, right):
    """Two pieces that belong together (one of them may be None) as a list of Hunks."""
    if left and right and isinstance(left.node, ast.ClassDef) and isinstance(right.node, ast.ClassDef) \
            and left.lines != right.lines:
        return [hunk for pair in pairs(methods(left), methods(right)) for hunk in hunks(*pair)]
    one = right or left
    (a, first_a), (b, first_b) = ((p.lines, p.first_line) if p else ([], 0) for p in (left, right))
    # Blank lines are junk: a change is not torn into two because both files have one somewhere in it
    matcher, found = difflib.SequenceMatcher(lambda line: not line.strip(), a, b, autojunk=False), []
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        x, y = i2, j2
        while tag == "equal" and x > i1 or min(x - i1, y - j1) > 0 and a[x - 1] == b[y - 1]:
            x, y = x - 1, y - 1  # equal lines at the end
        if x > i1 or y > j1:
            rows = [(n and n + first_a + i1 - 1, m and m + first_b + j1 - 1)
                    for n, m in alike(a[i1:x], b[j1:y])]
            found.append(Hunk(False, rows, one.key, one.summary, "\n".join(a[i1:x] + b[j1:y])))
        if x < i2:
            rows = list(zip(range(first_a + x, first_a + i2), range(first_b + y, first_b + j2)))
            found.append(Hunk(True, rows, one.key, one.summary, ""))
    return found


def alike(a, b):
    """Rows of a hunk, as numbers from 1: lines that resemble each other stand next to each other."""
    best = [[0.0] * (len(b) + 1) for _ in range(len(a) + 1)]  # similarity of the first i and j lines
    same = [[similarity(x, y) for y in b] for x in a]
    for i in range(len(a)):
        for j in range(len(b)):
            best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], best[i][j] + same[i][j])
    rows, i, j = [], len(a), len(b)
    while i or j:
        if i and j and same[i - 1][j - 1] and best[i][j] == best[i - 1][j - 1] + same[i - 1][j - 1]:
            rows.append((i, j))
            i, j = i - 1, j - 1
        elif j and best[i][j] == best[i][j - 1]:
            rows.append((None, j))
            j -= 1
        else:
            rows.append((i, None))
            i -= 1
    return rows[::-1]


def similarity(x, y):
    """The share of words that two lines have in common; 0 if it is at most a half."""
    x, y = (set(re.findall(r"\w+|[^\w\s]", line)) for line in (x, y))
    share = 2 * len(x & y) / max(1, len(x) + len(y))
    return share if share > 0.5 else 0.0


def compare(left, right):
    """The texts of two files as [(piece or None, piece or None, [Hunk])]."""
    return [(*pair, hunks(*pair)) for pair in pairs(pieces_of(left), pieces_of(right))]


def note(a, b, hunk):
    """The entry (definition, text, note) for a hunk between the files called a and b, or None."""
    entries = NOTES.get((a, b), []) + GENERAL
    return next((entry for entry in entries if entry[0] == hunk.key and entry[1] in hunk.text), None)


# ---- As a page ---------------------------------------------------------------------------------------------
def colours(text):
    """For every line of a file the class of every character: c comment, s string, k keyword, or nothing."""
    classes = [[""] * len(line) for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
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
        words, at = [re.findall(r"\w+|\s+|.", text) for text in (line, other)], 0
        blocks = difflib.SequenceMatcher(None, *words, autojunk=False).get_matching_blocks()
        kept = {i for block in blocks for i in range(block.a, block.a + block.size)}
        for i, word in enumerate(words[0]):
            marked[at:at + len(word)] = [i not in kept] * len(word)
            at += len(word)
    out = ""
    for (name, mark), group in itertools.groupby(zip(classes, marked, line), key=lambda x: x[:2]):
        text = html.escape("".join(character for *_, character in group))
        text = f"<span class={name}>{text}</span>" if name else text
        out += f"<b>{text}</b>" if mark else text
    return out


def table(rows, lines, equal):
    """Lines next to each other; rows are pairs of their numbers."""
    out = []
    for numbers in rows:
        both = [lines[side][n - 1] if n else (None, None) for side, n in enumerate(numbers)]
        cells = [f"<td class={'n' if equal else kind}>{paint(*own, None if equal else other[0])}" if n else
                 "<td>" for n, own, other, kind in zip(numbers, both, both[::-1], "da")]
        out.append("<tr>" + "".join(f"<th>{n or ''}{cell}" for n, cell in zip(numbers, cells)))
    return f"<table>{''.join(out)}</table>\n" if rows else ""


def folded(rows, lines, before, after):
    """Equal lines: CONTEXT next to a change, the rest behind a click if it is long."""
    start, end = CONTEXT * before, len(rows) - CONTEXT * after
    if end - start < COLLAPSE:
        return table(rows, lines, True)
    first, inner, last = (table(part, lines, True) for part in (rows[:start], rows[start:end], rows[end:]))
    return f"{first}<details><summary>{end - start} equal lines</summary>{inner}</details>\n{last}"


def page(left, right):
    """Two files as one page of HTML."""
    texts, body, counts = [path.read_text() for path in (left, right)], [], [0, 0]
    lines = [list(zip(text.splitlines(), colours(text))) for text in texts]
    for a, b, found in compare(*texts):
        name = html.escape((b or a).name)
        if all(hunk.equal for hunk in found):
            rows = [row for hunk in found for row in hunk.rows]
            body.append(f"<details><summary>{name}: {len(rows)} equal lines</summary>"
                        f"{table(rows, lines, True)}</details>\n")
            continue
        where = "" if a and b else f" <small>only in {html.escape((left if a else right).name)}</small>"
        body.append(f"<h2>{name}{where}</h2>\n")
        for i, hunk in enumerate(found):
            if hunk.equal:
                body.append(folded(hunk.rows, lines, i > 0, i + 1 < len(found)))
                continue
            counts = [n + sum(row[side] is not None for row in hunk.rows) for side, n in enumerate(counts)]
            entry = note(left.stem, right.stem, hunk)
            text = entry[2] if entry else hunk.summary
            body.append(f"<p class=note>{html.escape(text)}</p>\n" if text else "")
            body.append(table(hunk.rows, lines, False))
    template = Template(Path(__file__).with_name("side_by_side_page.html").read_text())
    title = html.escape(f"{left.name} and {right.name}")
    return template.substitute(title=title, left=counts[0], right=counts[1], body="".join(body))


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("left", type=Path, metavar="FILE.py")
    p.add_argument("right", type=Path, metavar="FILE.py")
    p.add_argument("--out", type=Path, metavar="PAGE.html", help="default: pictures/LEFT--RIGHT.html")
    args = p.parse_args(argv)
    out = args.out or Path("pictures", f"{args.left.stem}--{args.right.stem}.html")
    try:
        content = page(args.left, args.right)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(content, encoding="utf-8")
    except (OSError, ValueError, SyntaxError, tokenize.TokenError) as error:
        raise SystemExit(f"docs/side_by_side.py: {error}")
    print(f"written to {out}; open it in a browser")


if __name__ == "__main__":
    main()
