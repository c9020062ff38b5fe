"""The family of model files, and each diff in it as a list of changes with notes.

Edges are the lines "Diff me against: X.py" of the files. A file that imports its parents cannot be compared
with them, so all its lines are new. git makes the diffs: the counts are git's. docs/diffs/notes.md has the
notes, and sorts changes into idea, recipe and bookkeeping.
"""
import ast
import itertools
import re
import subprocess
from collections import Counter, namedtuple
from functools import lru_cache
from pathlib import Path

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
KINDS = "idea", "recipe", "bookkeeping"
CONTEXT, FOLD = 3, 6  # equal lines shown around a change; fewer other ones than this are not folded


# ---- The family --------------------------------------------------------------------------------------------
# A model file. page: its name in docs/. parents: the one to diff against, or those that it imports
File = namedtuple("File", "name path text title idea line arxiv page parents imports")
# name: "PARENT-CHILD". command: shows the same diff. left, right: lines of the two files. changes: its pieces
# that differ. sections: the child, as [(definition, [Piece])]. starts: {line: definition inside a piece}
Edge = namedtuple("Edge", "name title command parent child left right sections changes starts")
# key: the definition, with "*" for the model's class, whose name differs. section: its name on the page
# rows: [(line of the left file or None, of the right or None, whether they are equal)], lines from 0
# text: the lines that differ. kind: one of KINDS, or "equal"
Piece = namedtuple("Piece", "key section rows text kind note id")


def read(path):
    """A model file as a File."""
    text, page = path.read_text(encoding="utf-8"), DOCS / f"{path.stem}.md"
    page = page if page.exists() else None
    title = page.read_text(encoding="utf-8").split("\n")[0].strip("# ") if page else path.stem
    doc = ast.get_docstring(ast.parse(text)) + "\n\n"
    arxiv, diff = re.search(r"arXiv:(\d+\.\d+)", doc), re.search(r"^Diff me against: (\w+)\.py", doc, re.M)
    imported = {name for name in re.findall(r"^(?:import|from) (\w+)", text, re.M) if f"{name}.py" in doc}
    parents = [diff[1]] if diff else sorted(imported, key=lambda name: doc.index(f"{name}.py"))
    tables = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/relatives.md"))
    row = re.search(rf"^\| \[{path.stem}\][^|]*\| ([^|]+?) \|", tables, re.M)
    line = row[1] if row else doc.split("\n")[0]  # the idea in a line
    idea = re.search(r"^The idea: (.*?)\n\n", doc, re.S | re.M)
    idea = " ".join(idea[1].split()) if idea else f"{line}."
    return File(path.stem, path.relative_to(ROOT).as_posix(), text, title, idea[0].upper() + idea[1:], line,
                arxiv and arxiv[1], page and page.name, parents, bool(parents) and not diff)


@lru_cache
def family():
    """{name: File} by the number of their paper, which has its date."""
    paths = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("relatives/*.py"))
             if re.search(r"^def build\(", path.read_text(encoding="utf-8"), re.M)]
    return {file.name: file for file in sorted(map(read, paths), key=lambda x: (x.arxiv or "z", x.name))}


@lru_cache
def edges():
    """[Edge] in the order of family()."""
    files = family()
    return [compare(files[file.parents[0]], file) for file in files.values() if file.parents]


# ---- A diff as changes -------------------------------------------------------------------------------------
def definitions(text):
    """For every line of a file its definition, as (key, name); comments belong to what is below them."""
    ends = []
    for node in ast.parse(text).body:
        kind = "main" if isinstance(node, ast.If) else "imports" if ends else "docstring"
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", kind)
        own = isinstance(node, ast.ClassDef) and (
            "recipe = RECIPE" in map(ast.unparse, node.body) or f"return {name}(num_classes" in text)
        key = "*" if own else name
        inner = node.body if isinstance(node, ast.ClassDef) else []
        methods = [x for x in inner if isinstance(x, ast.FunctionDef)]
        ends.append((methods[0].lineno - 1 if methods else node.end_lineno, key, name))
        ends += [(x.end_lineno, f"{key}.{x.name}", f"{name}.{x.name}") for x in methods]
    found, at = [], 0
    for n, line in enumerate(text.splitlines(), 1):
        while at + 1 < len(ends) and n > ends[at][0] and line.strip():
            at += 1
        found.append(ends[at][1:])
    return found


def lines_of_git(left, right):
    """Both files from top to bottom, as git compares them: rows as in Piece."""
    command = "git diff --no-index -U99999 --no-color --no-ext-diff --diff-algorithm=myers".split()
    text = subprocess.run([*command, left, right], capture_output=True, text=True, encoding="utf-8").stdout
    old, new = itertools.count(), itertools.count()
    signs = re.findall("^[-+ ]", text.partition(" @@\n")[2], re.M)
    return [(None if sign == "+" else next(old), None if sign == "-" else next(new), sign == " ")
            for sign in signs]


def parts(numbers, lines, owners):
    """Lines of one side by their definitions: {key: [line]}; blank ones go with the next line."""
    found, key = {}, None
    for n in reversed(numbers):
        key = owners[n][0] if lines[n].strip() or not key else key
        found[key] = [n, *found.pop(key, [])]
    return dict(reversed(found.items()))


def split(rows, a, b, owners):
    """Different lines by definitions: [(key, rows)]."""
    old = parts([n for n, *_ in rows if n is not None], a, owners[0])
    new = parts([m for _, m, _ in rows if m is not None], b, owners[1])
    for key, numbers in new.items():
        while (gone := next(iter(old), key)) != key and (key in old or gone not in new):
            yield gone, alike(old.pop(gone), [], a, b)
        yield key, alike(old.pop(key, []), numbers, a, b)
    yield from ((key, alike(numbers, [], a, b)) for key, numbers in old.items())


def heirs(rows, owners):
    """{old key: new key} of renamed definitions: at least half of their lines are in the new one."""
    size = Counter(key for key, _ in owners[0])
    kept = Counter((owners[0][n][0], owners[1][m][0]) for n, m, equal in rows if equal)
    return {old: new for (old, new), n in kept.items() if old not in dict(owners[1]) and 2 * n >= size[old]}


def equals(rows, owners):
    """Equal lines by definitions: [(key, rows)]."""
    return [(key, list(group)) for key, group in itertools.groupby(rows, lambda row: owners[row[1]][0])]


def compare(parent, child):
    """Two Files as an Edge."""
    left, path, command = parent.text, ROOT / parent.path, f"git diff --no-index {parent.path} {child.path}"
    title = f"{child.title}, as a change of {parent.title}"
    if child.imports:
        left, path, command = "", "/dev/null", f"cat {child.path}"
        title = f"{child.title}, which imports {' and '.join(child.parents)}"
    a, b, owners = left.splitlines(), child.text.splitlines(), [definitions(left), definitions(child.text)]
    names, count, both = dict(owners[0] + owners[1]), Counter(), lines_of_git(path, ROOT / child.path)
    renamed = heirs(both, owners)
    owners[0] = [(renamed.get(key, key), name) for key, name in owners[0]]
    found, gap = [], []  # [(key, rows)], and equal rows since the last of them
    for equal, group in itertools.groupby(both, lambda row: row[2]):
        if equal:
            gap = list(group)
            continue
        for key, rows in split(list(group), a, b, owners):
            last, before = found[-1] if found else ("", [])
            sides = {(n is None, m is None) for n, m, _ in before + rows}
            # Parts of a class that is new or gone are one change, unless a note names them
            whole = last == key.split(".")[0] and sides in ({(True, False)}, {(False, True)})
            joined = last == key or whole and not noted(parent.name, child.name, key)
            if joined and not any(b[m].strip() for _, m, _ in gap):
                before.extend(gap + rows)
            else:
                found += equals(gap, owners[1]) + [(key, rows)]
            gap = []
    pieces = []
    for key, rows in found + equals(gap, owners[1]):
        text = "\n".join(a[n] if m is None else b[m] if n is None else f"{a[n]}\n{b[m]}"
                         for n, m, equal in rows if not equal)
        kind, *_, note = noted(parent.name, child.name, key, text) or ("idea", "")
        kind = "equal" if rows[0][2] else kind
        count[key] += kind != "equal"
        pieces.append(Piece(key, names[key], rows, text, kind, note, f"{names[key]}-{count[key]}"))
    sections = [(name, list(group)) for name, group in itertools.groupby(pieces, lambda x: x.section)]
    first = {name: n for n, (_, name) in reversed(list(enumerate(owners[1])))}
    starts = {n: name for name, n in first.items() if name not in dict(sections)}
    changes = [piece for piece in pieces if piece.kind != "equal"]
    return Edge(f"{parent.name}-{child.name}", title, command, parent, child, a, b, sections, changes, starts)


@lru_cache
def notes():
    """docs/diffs/notes.md as {"PARENT to CHILD": [(kind, definitions, piece, note)]}."""
    found, text = {}, (DOCS / "diffs/notes.md").read_text(encoding="utf-8")
    for title, section in re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", text, re.M):
        found[title] = [
            (kind, where.split(), piece, " ".join(note.split()))
            for kind, part in re.findall(r"^### (\w+)\n((?:(?!###).*\n?)*)", section, re.M)
            for where, piece, note in re.findall(r"^- `(.+?)`(?: `(.+?)`)?: (.*\n(?:  .*\n)*)", part, re.M)]
    return found


def noted(parent, child, key, text=None):
    """The first note for a definition, or for these lines of it, as in notes(); None if there is none."""
    own = sorted(notes().get(f"{parent} to {child}", []), key=lambda entry: not entry[2])
    return next((entry for entry in own + notes()["All diffs"]
                 if key in entry[1] and (text is None or entry[2] in text)), None)


def alike(old, new, a, b):
    """Rows of a change: the most similar lines stand next to each other, then those before and after them."""
    pairs = [(similarity(a[n], b[m]), i, j) for i, n in enumerate(old) for j, m in enumerate(new)]
    best, i, j = max(pairs, key=lambda pair: pair[0], default=(0, 0, 0))
    if not best:
        return [(n, None, False) for n in old] + [(None, m, False) for m in new]
    return [*alike(old[:i], new[:j], a, b), (old[i], new[j], False), *alike(old[i + 1:], new[j + 1:], a, b)]


@lru_cache(None)
def similarity(*lines):
    """The share of words that two lines have in common; 0 if it is at most a half."""
    x, y = (set(re.findall(r"\w+|[^\w\s]", line)) for line in lines)
    share = 2 * len(x & y) / max(1, len(x) + len(y))
    return share if share > 0.5 else 0


def counts(changes):
    """Lines out and in, as git counts them."""
    rows = [row for change in changes for row in change.rows if not row[2]]
    return sum(n is not None for n, *_ in rows), sum(m is not None for _, m, _ in rows)


def blocks(pieces):
    """Pieces of a definition as [(Piece, rows)]; changes have equal rows around them, others are folded."""
    found, before = [], []  # before: what the following change begins with
    for i, piece in enumerate(pieces):
        if piece.kind != "equal":
            found.append((piece, before + piece.rows))
            before = []
            continue
        size, after, ahead = len(piece.rows), i > 0, i + 1 < len(pieces)
        start, end = CONTEXT * after, size - CONTEXT * ahead
        if (after or ahead) and end - start < FOLD:
            start = end = size * after // (after + ahead)
        if after:
            found[-1][1].extend(piece.rows[:start])
        if end > start:
            found.append((piece, piece.rows[start:end]))
        before = piece.rows[end:]
    return found


def ideas(edge):
    """[(note, [its first change in each definition])] of the idea; the heart of the paper comes first."""
    groups = {note: {} for *_, note in notes().get(f"{edge.parent.name} to {edge.child.name}", [])}
    for change in edge.changes:
        if change.kind == "idea":
            groups.setdefault(change.note, {}).setdefault(change.section, change)
    return [(note, list(group.values())) for note, group in groups.items() if group]


def sizes(edge):
    """The lines of the diff, and those of each kind, as a sentence each."""
    kinds = [(kind, *counts([change for change in edge.changes if change.kind == kind])) for kind in KINDS]
    texts = [f"Idea {out} out, {new} in" if kind == "idea" else f"{kind} {out} and {new}"
             for kind, out, new in kinds if out or new]
    return "{} lines out, {} in. {}. The recipe came with the paper and does not depend on its idea.".format(
        *counts(edge.changes), ", ".join(texts))
