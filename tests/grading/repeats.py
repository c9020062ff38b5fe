"""Which blocks of a submission are ours, word for word: an exercise hands most of a file out, but not all."""
import ast
from pathlib import Path

from tests.grading.files import path_of


def blocks(path):
    """{name: its code without docstrings, comments and layout} of every function and method."""
    found, text = {}, Path(path).read_text(encoding="utf-8", errors="replace")
    for node in ast.parse(text).body:
        for function in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(function, ast.FunctionDef):
                body = function.body[ast.get_docstring(function) is not None:]
                name = node.name if function is node else f"{node.name}.{function.name}"
                found[name] = "\n".join(map(ast.dump, [function.args, *body]))
    return found


def identical(file, like):
    """{block of ours: whether the file has the same code, under whatever name}."""
    try:
        theirs = set(blocks(file).values())
    except (OSError, SyntaxError, ValueError, RecursionError):
        return {}
    return {name: code in theirs for name, code in blocks(path_of(like)).items()}


def repeated(file, like, exercise=()):
    """A warning if the file has only our code, or our code in all blocks of the exercise."""
    same = {name: copied for name, copied in identical(file, like).items()
            if not exercise or name in exercise or name.partition(".")[0] in exercise}
    where = ", ".join(same) if exercise else f"all {len(same)} blocks"
    return [f"has our code, word for word, in {where}"] if same and all(same.values()) else []
