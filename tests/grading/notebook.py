"""The exercises of docs/exercises.md as a notebook:  python -m tests.grading.notebook detr.py > detr.ipynb

Every exercise is a text, a solution cell between BEGIN SOLUTION and END SOLUTION, and a cell that tests it
with the exercise's marks and their points. nbgrader knows both kinds by their metadata; --student leaves
the solutions out. The notebook runs in the project's folder.
"""

import argparse
import ast
import json
import re
import sys
import types
from pathlib import Path

from tests.grading.blank import functions
from tests.grading.files import ROOT, path_of

EXERCISE = re.compile(
    r"^\*\*(\d+)\. ([^\n]+)\*\*\n\n    python -m tests\.grading\.blank (\S+)\.py ([^\n>]+) > \S+\n\n"
    r"Marks: ([\w, ]+)\.(.*?)(?=^\*\*\d+\. |^## |^---)",
    re.M | re.S,
)


class Lesson:
    """What a notebook works on: a copy of our file, whose blocks are replaced by those that its cells
    define.
    """

    def __init__(self, name):
        from tests.grading.planted import module_from

        self.name, self.module = name, module_from(path_of(name).read_text(encoding="utf-8"), name)

    def use(self, block):
        """Put a function, or the methods of a class, in the place of ours; what they call is found in our
        file.
        """
        if isinstance(block, type):
            ours = getattr(self.module, block.__name__)
            for name, value in vars(block).items():
                if isinstance(value, types.FunctionType):
                    setattr(ours, name, self.moved(value))
        else:
            setattr(self.module, block.__name__, self.moved(block))

    def moved(self, function):
        moved = types.FunctionType(
            function.__code__, vars(self.module), function.__name__, function.__defaults__
        )
        moved.__kwdefaults__, moved.__qualname__ = function.__kwdefaults__, function.__qualname__
        return moved

    def check(self, *marks, seed=0):
        """Raises an AssertionError that says which of the marks are not met, and why."""
        from tests.grading import marks as known
        from tests.grading.child import sentence
        from tests.grading.files import ours_named

        wrong = []
        for mark in marks:
            try:
                getattr(known, mark)(self.module, ours_named(self.name), seed)
            except Exception as error:
                wrong.append(f"{mark}: {sentence(error, '')}")
        assert not wrong, "; ".join(wrong)
        print(f"met: {', '.join(marks)}")


# ---- Cells -------------------------------------------------------------------------------------------------
def cell(kind, number, text, **nbgrader):
    made = {
        "cell_type": kind,
        "id": f"{kind}-{number}",
        "metadata": {},
        "source": text.strip("\n").splitlines(True),
    }
    if kind == "code":
        made.update(execution_count=None, outputs=[])
    if nbgrader:
        made["metadata"]["nbgrader"] = {
            "grade_id": made["id"],
            "schema_version": 3,
            "task": False,
            **nbgrader,
        }
    return made


def solution(text, blocks, student):
    """The text of a cell that defines these blocks; students get their heads and docstrings."""
    tree, lines, cells = ast.parse(text), text.splitlines(), {}
    for name in blocks:
        for node in functions(tree, name):
            indent = " " * node.body[0].col_offset
            begin = (
                node.body[0].end_lineno if ast.get_docstring(node) is not None else node.body[0].lineno - 1
            )
            begin = min(begin, node.body[-1].lineno - 1) if ast.get_docstring(node) is None else begin
            head = lines[node.lineno - 1 : begin]
            body = (
                [f'{indent}raise NotImplementedError("not written yet")']
                if student
                else [
                    f"{indent}### BEGIN SOLUTION",
                    *lines[begin : node.end_lineno],
                    f"{indent}### END SOLUTION",
                ]
            )
            decorators = [lines[d.lineno - 1] for d in node.decorator_list]
            owner = name.partition(".")[0] if node.col_offset else None
            cells.setdefault((owner, name if owner is None else owner), []).append(
                [*decorators, *head, *body]
            )
    parts = []
    for (owner, _), methods in cells.items():
        text = "\n\n".join("\n".join(method) for method in methods)
        parts.append(f"class {owner}:\n{text}" if owner else text)
    names = [owner or name for owner, name in cells]
    return "\n\n\n".join(parts) + "\n\n\n" + "\n".join(f"lesson.use({name})" for name in dict.fromkeys(names))


def notebook(name, student=False):
    """The notebook of one of our files as a dict."""
    from tests.grading.grader import marks_of

    page = (ROOT / "docs" / "exercises.md").read_text(encoding="utf-8")
    found = [match for match in EXERCISE.findall(page) if match[2].rpartition("/")[2] == name]
    if not found:
        raise ValueError(f"docs/exercises.md has no exercise on {name}.py")
    text, points = path_of(name).read_text(encoding="utf-8"), marks_of(name)
    cells = [
        cell(
            "markdown", 0, f"# {name}.py\n\nBegin at the top: every cell uses what the cells before it made."
        ),
        cell("code", 0, f'from tests.grading.notebook import Lesson\n\nlesson = Lesson("{name}")'),
    ]
    for number, title, _, blocks, marks, rest in found:
        marks = marks.split(", ")
        cells.append(cell("markdown", number, f"## {number}. {title}\n\n{rest.strip()}"))
        cells.append(
            cell(
                "code",
                number,
                solution(text, blocks.split(), student),
                grade=False,
                locked=False,
                solution=True,
            )
        )
        tested = ", ".join(f'"{mark}"' for mark in marks)
        cells.append(
            cell(
                "code",
                f"{number}-marks",
                f"lesson.check({tested})",
                grade=True,
                locked=True,
                solution=False,
                points=sum(points[mark] for mark in marks),
            )
        )
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="one of our files: detr.py")
    parser.add_argument("--student", action="store_true", help="without the solutions")
    args = parser.parse_args()
    try:
        json.dump(notebook(Path(args.file).stem, args.student), sys.stdout, indent=1)
    except ValueError as error:
        parser.error(str(error))
    print()


if __name__ == "__main__":
    main()
