"""Line numbers in docs/*.md. A piece of the line follows each link to a line, so that it can be found again:

    [detr.py:285](../detr.py#L285) `torch.zeros_like(query_pos)`

    python docs/relink.py    corrects all numbers; fails if a piece is on no line or several
"""
import re
import sys
from pathlib import Path

DOCS = Path(__file__).parent
LINK = re.compile(r"\[([\w./]+):\d+\]\(([\w./]+)#L\d+\)(?:\s+`([^`]+)`)?")


def relink(text, folder=DOCS):
    """(the text with correct numbers, [what cannot be corrected])."""
    problems = []

    def correct(match):
        label, path, piece = match.groups()
        file = folder / path
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        found = [number for number, line in enumerate(lines, 1) if piece and piece in line]
        if len(found) == 1:
            return f"[{label}:{found[0]}]({path}#L{found[0]})" + match[0].partition(")")[2]
        problems.append(
            f"{match[0]}: no such file" if not file.is_file() else
            f"{match[0]}: no `piece of the line` after the link" if not piece else
            f"{label}: `{piece}` is on lines {found}, not on one: give another piece")
        return match[0]

    return LINK.sub(correct, text), problems


if __name__ == "__main__":
    failed = []
    for path in sorted(DOCS.glob("*.md")):
        new, problems = relink(path.read_text(encoding="utf-8"))
        path.write_text(new, encoding="utf-8", newline="\n")
        failed += [f"{path.name}: {problem}" for problem in problems]
    sys.exit("\n".join(failed) or 0)
