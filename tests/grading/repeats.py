"""How much of a submission is ours, word for word: for whoever grades, since an exercise hands most of a file
out."""

import ast
from pathlib import Path

from tests.grading.files import path_of


def blocks(text):
    """{name: its code without docstrings, comments and layout} of every function and method."""
    found = {}
    for node in ast.parse(text).body:
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        for function in inside:
            if isinstance(function, ast.FunctionDef):
                body = function.body[ast.get_docstring(function) is not None :]
                name = f"{node.name}.{function.name}" if function is not node else node.name
                found[name] = "\n".join([ast.dump(function.args), *map(ast.dump, body)])
    return found


def identical(file, like):
    """{block of ours: whether the file has the same code, under whatever name}."""
    try:
        theirs = set(blocks(Path(file).read_text(encoding="utf-8", errors="replace")).values())
    except (SyntaxError, ValueError, RecursionError):
        return {}
    return {name: code in theirs for name, code in blocks(path_of(like).read_text(encoding="utf-8")).items()}


def repeated(file, like, exercise=()):
    """Warnings: nothing but our code, or ours where something was to be written."""
    same = identical(file, like)
    written = [
        name for name in same if any(name == block or name.startswith(f"{block}.") for block in exercise)
    ]
    ours = [name for name in written if same[name]] if exercise else [name for name in same if same[name]]
    if same and ours and len(ours) == len(written or same):
        return [
            f"has our code, word for word, in {', '.join(ours) if exercise else f'all {len(ours)} blocks'}"
        ]
    return []
