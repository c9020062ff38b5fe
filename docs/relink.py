"""Line numbers in docs/*.md. A piece of the line follows each link to a line, so that it can be found again:

    [detr.py:285](../detr.py#L285) `torch.zeros_like(query_pos)`

    python docs/relink.py            corrects all numbers; fails if a piece is on no line or several
    python docs/relink.py --check    changes nothing and prints the wrong links
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
        if not piece or not file.is_file():
            what = "no such file" if piece else "no `piece of the line` after the link"
            problems.append(f"{match[0]}: {what}")
            return match[0]
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [number for number, line in enumerate(lines, 1) if piece in line]
        if len(found) != 1:
            problems.append(f"{label}: `{piece}` is on lines {found}, not on one: give another piece")
            return match[0]
        return f"[{label}:{found[0]}]({path}#L{found[0]})" + match[0].partition(")")[2]

    return LINK.sub(correct, text), problems


def main(flags):
    failed = False
    for path in sorted(DOCS.glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new, problems = relink(text)
        for problem in problems:
            print(f"{path.name}: {problem}")
        if new != text:
            count = sum(a[0] != b[0] for a, b in zip(LINK.finditer(text), LINK.finditer(new)))
            print(f"{path.name}: {count} links {'out of date' if '--check' in flags else 'corrected'}")
            if "--check" not in flags:
                path.write_text(new, encoding="utf-8", newline="\n")
        failed |= bool(problems or new != text and "--check" in flags)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
