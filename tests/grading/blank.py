"""Take a block out of a file, for somebody to write it again.

    python -m tests.grading.blank conditional_detr.py concat_heads > work/my_detr.py

A function or method (CLASS.METHOD) keeps its docstring and loses the rest. Of a class all methods do, except
for __init__, because parameters must exist for weights to be loaded. docs/exercises.md proposes some blocks.
"""
import argparse
import ast
from pathlib import Path


def functions(tree, name):
    """The functions that a block consists of. Raises ValueError that lists what there is."""
    found = {node.name: node for node in tree.body if isinstance(node, (ast.ClassDef, ast.FunctionDef))}
    of, _, method = name.partition(".")
    if isinstance(found.get(of), ast.FunctionDef) and not method:
        return [found[of]]
    methods = [node for node in getattr(found.get(of), "body", []) if isinstance(node, ast.FunctionDef)]
    chosen = [node for node in methods if (node.name == method if method else node.name != "__init__")]
    if not chosen:
        raise ValueError(f"no block {name!r}; there are {', '.join(found)}, and methods as CLASS.METHOD")
    return chosen


def blank(text, *names):
    """The text of a file with the bodies of these blocks replaced."""
    tree, lines = ast.parse(text), text.splitlines(keepends=True)
    chosen = {node.lineno: node for name in names for node in functions(tree, name)}
    for _, node in sorted(chosen.items(), reverse=True):  # from the end, so that line numbers stay right
        begin = node.lineno
        while not lines[begin - 1].split("#")[0].rstrip().endswith(":"):  # the end of a long signature
            begin += 1
        if ast.get_docstring(node) is not None:
            begin = node.body[0].end_lineno
        indent = " " * node.body[0].col_offset
        lines[begin : node.end_lineno] = [f'{indent}raise NotImplementedError("not written yet")\n']
    return "".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("file")
    parser.add_argument("block", nargs="+", help="function, class, or CLASS.METHOD")
    args = parser.parse_args()
    try:
        print(blank(Path(args.file).read_text(), *args.block), end="")
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
