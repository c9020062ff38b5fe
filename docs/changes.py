"""The family of model files, and each diff in it as a list of changes with notes.

Edges are the lines "Diff me against: X.py" of the files. A file that imports its parents cannot be compared
with them, so all its lines are new. git makes the diffs: the counts are git's. docs/diffs/notes.md has the
notes, and sorts changes into idea, recipe and bookkeeping.
"""
import ast
import difflib
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
# A model file. parents: the one to diff against, or those that it imports (then imports is true)
File = namedtuple("File", "name path text title idea line arxiv parents imports")
Edge = namedtuple("Edge", "parent child left right changes")  # two Files, their lines, and [Change]


def read(path):
    """A model file as a File."""
    text, page = path.read_text(encoding="utf-8"), DOCS / f"{path.stem}.md"
    title = page.read_text(encoding="utf-8").split("\n")[0].strip("# ") if page.exists() else path.stem
    doc = ast.get_docstring(ast.parse(text))
    arxiv, diff = re.search(r"arXiv:(\d+\.\d+)", doc), re.search(r"^Diff me against: (\w+)\.py", doc, re.M)
    imported = re.findall(r"^(?:import|from) (\w+)", text, re.M)
    imported = sorted({n for n in imported if f"{n}.py" in doc}, key=lambda n: doc.index(f"{n}.py"))
    parents = [diff[1]] if diff else imported
    tables = "".join((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/relatives.md"))
    row = re.search(rf"^\| \[{path.stem}\][^|]*\| ([^|]+?) \|", tables, re.M)
    line = row[1] if row else doc.split("\n")[0]  # the idea in a line
    idea = re.search(r"^The idea: (.*?)\n\n", doc + "\n\n", re.S | re.M)
    idea = re.sub(r"\s+", " ", idea[1] if idea else f"{line}.")
    idea = idea[0].upper() + idea[1:]
    imports = bool(parents) and not diff
    return File(path.stem, path, text, title, idea, line, arxiv and arxiv[1], parents, imports)


@lru_cache
def family():
    """{name: File} as a walk through the tree; children by the number of their paper, which has its date."""
    paths = [path for path in (*ROOT.glob("*.py"), *ROOT.glob("relatives/*.py"))
             if re.search(r"^def build\(", path.read_text(encoding="utf-8"), re.M)]
    files = sorted(map(read, paths), key=lambda file: (file.arxiv or "z", file.name))

    def walk(file):
        yield file
        for child in files:
            if child.parents[:1] == [file.name]:
                yield from walk(child)
    return {file.name: file for root in files if not root.parents for file in walk(root)}


@lru_cache
def edges():
    """[Edge] in the order of family()."""
    files = family()
    return [compare(files[file.parents[0]], file) for file in files.values() if file.parents]


# ---- A diff as changes -------------------------------------------------------------------------------------
# key: the definition, with "*" for the model's class, whose name differs. section: its name on the page
# rows: [(line of the left file or None, of the right or None, whether they are equal)], lines from 0
Change = namedtuple("Change", "key section rows text kind note id")


def definitions(text):
    """For every line of a file its definition, as (key, name); comments belong to what is below them."""
    ends, lines = [], text.splitlines()
    for node in ast.parse(text).body:
        kind = "main" if isinstance(node, ast.If) else "imports" if ends else "docstring"
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else getattr(node, "name", kind)
        own = isinstance(node, ast.ClassDef) and (
            "recipe = RECIPE" in map(ast.unparse, node.body) or f"return {name}(num_classes" in text)
        key = "*" if own else name
        methods = [x for x in getattr(node, "body", []) if isinstance(x, ast.FunctionDef)]
        if isinstance(node, ast.ClassDef) and methods:
            ends.append((methods[0].lineno - 1, key, name))
            ends += [(x.end_lineno, f"{key}.{x.name}", f"{name}.{x.name}") for x in methods]
        else:
            ends.append((node.end_lineno, key, name))
    found, at = [], 0
    for n, line in enumerate(lines, 1):
        while at + 1 < len(ends) and n > ends[at][0] and line.strip():
            at += 1
        found.append(ends[at][1:])
    return found


def git_hunks(left, right):
    """What differs, as git says: [(first and end on the left, first and end on the right)], lines from 0."""
    command = ["git", "diff", "--no-index", "-U0", "--no-color", "--no-ext-diff", "--diff-algorithm=myers"]
    text = subprocess.run([*command, left, right], capture_output=True, text=True, encoding="utf-8").stdout
    found = []
    for a, n, b, m in re.findall(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", text, re.M):
        n, m = int(n or 1), int(m or 1)
        i, j = int(a) - (n > 0), int(b) - (m > 0)
        found.append((i, i + n, j, j + m))
    return found


def parts(numbers, lines, keys):
    """Lines of one side of a hunk by their definitions: [(key, [line])]; blank ones go with the next line."""
    filled = [n for n in numbers if lines[n].strip()] or list(numbers)
    owner = [keys[next((m for m in filled if m >= n), filled[-1])] for n in numbers]
    return [(key, [n for n, _ in group])
            for key, group in itertools.groupby(zip(numbers, owner), key=lambda pair: pair[1])]


def heirs(hunks, a, b, owners):
    """{old key: new key} of renamed definitions: at least half of their lines are in the new one."""
    equal, i, j = Counter(), 0, 0
    for start, end_i, other, end_j in [*hunks, (len(a), len(a), len(b), len(b))]:
        equal.update((owners[0][n][0], owners[1][m][0]) for n, m in zip(range(i, start), range(j, other))
                     if a[n].strip())
        i, j = end_i, end_j
    size = Counter(key for line, (key, _) in zip(a, owners[0]) if line.strip())
    new = {key for key, _ in owners[1]}
    return {old: key for (old, key), n in equal.items() if old not in new and 2 * n >= size[old]}


def split(hunk, a, b, keys):
    """A hunk of git by definitions: [(key, rows)]."""
    i, end_i, j, end_j = hunk
    old, new = parts(range(i, end_i), a, keys[0]), parts(range(j, end_j), b, keys[1])
    names = [[key for key, _ in side] for side in (old, new)]
    matcher = difflib.SequenceMatcher(None, *names, autojunk=False)
    for tag, i1, i2, j1, j2 in matcher.get_opcodes():
        if tag == "equal":
            yield from ((x[0], alike(x[1], y[1], a, b)) for x, y in zip(old[i1:i2], new[j1:j2]))
        else:
            yield from ((key, alike(n, [], a, b)) for key, n in old[i1:i2])
            yield from ((key, alike([], n, a, b)) for key, n in new[j1:j2])


def compare(parent, child):
    """Two Files as an Edge."""
    left = "" if child.imports else parent.text
    a, b, owners = left.splitlines(), child.text.splitlines(), [definitions(left), definitions(child.text)]
    hunks = git_hunks("/dev/null" if child.imports else parent.path, child.path)
    renamed = heirs(hunks, a, b, owners)
    keys = [renamed.get(key, key) for key, _ in owners[0]], [key for key, _ in owners[1]]
    found, i, j = [], 0, 0
    for hunk in hunks:
        gap = [(n, m, True) for n, m in zip(range(i, hunk[0]), range(j, hunk[2]))]
        for key, rows in split(hunk, a, b, keys):
            last, before = found[-1] if found else ("", [])
            sides = {(n is None, m is None) for n, m, _ in before + rows}
            # Parts of a class that is new or gone are one change, unless a note names them
            whole = last == key.split(".")[0] and sides in ({(True, False)}, {(False, True)})
            joined = last == key or whole and not noted(parent.name, child.name, key)
            if joined and not any(a[n].strip() for n, *_ in gap):
                before.extend(gap + rows)
            else:
                found.append((key, rows))
            gap = []
        i, j = hunk[1], hunk[3]
    changes, names, count = [], dict(owners[0] + owners[1]), Counter()
    for key, rows in found:
        text = "\n".join(a[n] if m is None else b[m] if n is None else f"{a[n]}\n{b[m]}"
                         for n, m, same in rows if not same)
        kind, *_, note = noted(parent.name, child.name, key, text) or ("idea", "", "", "")
        count[key] += 1
        changes.append(Change(key, names[key], rows, text, kind, note, f"{names[key]}-{count[key]}"))
    return Edge(parent, child, a, b, changes)


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
    """Rows of a change: lines that resemble each other stand next to each other."""
    best = [[0.0] * (len(new) + 1) for _ in range(len(old) + 1)]  # similarity of the first i and j lines
    for i, j in itertools.product(range(len(old)), range(len(new))):
        here = best[i][j] + similarity(a[old[i]], b[new[j]])
        best[i + 1][j + 1] = max(best[i][j + 1], best[i + 1][j], here)
    rows, i, j = [], len(old), len(new)
    while i or j:
        same = i and j and similarity(a[old[i - 1]], b[new[j - 1]])
        if same and best[i][j] == best[i - 1][j - 1] + same:
            i, j = i - 1, j - 1
            rows.append((old[i], new[j], False))
        elif j and best[i][j] == best[i][j - 1]:
            j -= 1
            rows.append((None, new[j], False))
        else:
            i -= 1
            rows.append((old[i], None, False))
    return rows[::-1]


@lru_cache(None)
def words(line):
    return frozenset(re.findall(r"\w+|[^\w\s]", line))


def similarity(x, y):
    """The share of words that two lines have in common; 0 if it is at most a half."""
    x, y = words(x), words(y)
    share = 2 * len(x & y) / max(1, len(x) + len(y))
    return share if share > 0.5 else 0.0


def counts(changes):
    """Lines out and in, as git counts them."""
    rows = [row for change in changes for row in change.rows if not row[2]]
    return sum(n is not None for n, *_ in rows), sum(m is not None for _, m, _ in rows)


def stream(edge):
    """The child from top to bottom, by definitions: [(name, [[equal rows] or Change])]."""
    owner = [name for _, name in definitions(edge.child.text)]
    pieces, i, j = [], 0, 0
    for change in [*edge.changes, None]:
        rows = change.rows if change else [(len(edge.left), len(edge.right), True)]
        n, m = (next((row[side] for row in rows if row[side] is not None), None) for side in (0, 1))
        length = n - i if n is not None else m - j
        equal = [(i + x, j + x, True) for x in range(length)]
        pieces += [(name, list(rows)) for name, rows in itertools.groupby(equal, lambda row: owner[row[1]])]
        pieces += [(change.section, change)] if change else []
        i += length + sum(row[0] is not None for row in rows)
        j += length + sum(row[1] is not None for row in rows)
    return [(name, [piece for _, piece in group])
            for name, group in itertools.groupby(pieces, lambda pair: pair[0])]


def blocks(pieces):
    """Pieces of a definition as [(Change, its rows and equal ones around it) or (None, other equal rows)]."""
    found, around = [], [[] for _ in range(len(pieces) + 1)]  # what the following change begins with
    for i, piece in enumerate(pieces):
        if isinstance(piece, Change):
            found.append((piece, around[i] + piece.rows))
            continue
        after, before = i > 0, i + 1 < len(pieces)
        start, end = CONTEXT * after, len(piece) - CONTEXT * before
        if (after or before) and end - start < FOLD:
            start = end = len(piece) // 2 if after and before else len(piece) * after
        if after:
            found[-1][1].extend(piece[:start])
        if end > start:
            found.append((None, piece[start:end]))
        around[i + 1] = piece[end:]
    return found


def ideas(edge):
    """[(note, [its first Change in each definition])] of the idea; the heart of the paper comes first."""
    order = [note for *_, note in notes().get(f"{edge.parent.name} to {edge.child.name}", [])]
    found = [change for change in edge.changes if change.kind == "idea"]
    found.sort(key=lambda change: order.index(change.note) if change.note in order else len(order))
    groups = {}
    for change in found:
        groups.setdefault(change.note, {}).setdefault(change.section, change)
    return [(note, list(group.values())) for note, group in groups.items()]


def sizes(edge):
    """The lines of the diff, and those of each kind, as a sentence each."""
    kinds = [(kind, counts([change for change in edge.changes if change.kind == kind])) for kind in KINDS]
    return "{} lines out, {} in. ".format(*counts(edge.changes)) + ", ".join(
        f"{kind} {out} out, {new} in".capitalize() if kind == "idea" else f"{kind} {out} and {new}"
        for kind, (out, new) in kinds if out or new) + "."


def command(edge):
    """What to type to see the same diff."""
    if edge.child.imports:
        return f"cat {edge.child.path.relative_to(ROOT).as_posix()}"
    return "git diff --no-index " + " ".join(
        file.path.relative_to(ROOT).as_posix() for file in (edge.parent, edge.child))
