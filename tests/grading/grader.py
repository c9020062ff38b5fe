"""Run the marks on somebody's file, in a process of its own (child.py).

The file may hang, leave Python, print without end or ask for all memory. That costs one mark, and the next
process judges the others. Nothing here stops a person who means to cheat: docs/teaching.md has advice.
"""
import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.grading.files import ROOT, model_files, path_of
from tests.grading.judge import BUILDS_ON, TOGETHER, Failure, Verdict, settle
from tests.grading.repeats import repeated

GIGABYTES = 4  # of memory beyond what torch itself takes
SECONDS = 60  # of processor time for each mark; by the clock it may take four times as long

# The marks of every file and their points. The first sentence of a mark's docstring describes it.
SHARED = {"shapes": 1, "loading": 1, "independence": 1, "start": 1, "backbone": 1, "padding": 2,
          "positions": 2}
WHOLE = {"training": 1, "gradients": 2, "everything": 2, "official": 2}
MARKS = {
    "detr": {**SHARED, "attention": 3, "queries": 1, "heads": 2, **WHOLE},
    "conditional_detr": {**SHARED, "attention": 2, "spatial_query": 4, "references": 2, "heads": 2, **WHOLE},
    "deformable_detr": {**SHARED, "attention": 1, "sampling": 4, "references": 2, "heads": 2, "refinement": 3,
                        "two_stage": 3, **WHOLE},
    "sam_detr": {**SHARED, "attention": 2, "aligner": 4, "references": 2, "heads": 2, "smca": 2, **WHOLE},
    "sqr": {**SHARED, "attention": 1, "sampling": 2, "references": 1, "heads": 1, "refinement": 2,
            "two_stage": 2, "recollection": 4, "recurrent": 2, **WHOLE},
    "train": {"matcher": 4, "pairing": 2, "class_loss": 4, "l1_loss": 2, "giou_loss": 2, "box_counts": 1,
              "stages": 1, "total": 1, "empty": 2, "proposals": 1, "criterion": 2},
}
RELATIVE = {"shapes": 1, "loading": 1, "independence": 1, "start": 2, "training": 2, "noise": 4, "groups": 4,
            "gradients": 4, "everything": 6, "official": 3}


def marks_of(like):
    """{mark: points} of one of our files; the marks of relatives know nothing about the paper's idea."""
    if like in MARKS:
        return MARKS[like]
    text = path_of(like).read_text(encoding="utf-8")
    parts = {"groups": "num_groups|num_one2many|draw_noise", "noise": "draw_noise"}
    without = {mark for mark, words in parts.items() if not re.search(words, text)}
    if not (ROOT / "tests" / "golden" / f"{like}.json").exists():
        without.add("official")
    return {mark: points for mark, points in RELATIVE.items() if mark not in without}


class Grade(NamedTuple):
    file: str
    like: str
    seed: int
    verdicts: dict  # {mark: Verdict}
    warnings: list  # sentences for whoever grades
    seconds: float

    def points(self, status):
        return sum(points for mark, points in self.marks().items() if self.verdicts[mark].status == status)

    def marks(self):
        return {mark: points for mark, points in marks_of(self.like).items() if mark in self.verdicts}


def all_lost(file, like, why, names=None):
    """The Grade of a file that cannot be judged."""
    return Grade(str(file), like, 0, {name: Verdict("lost", why) for name in names or marks_of(like)}, [], 0)


def missing(file):
    """One sentence about a file that is not there."""
    others = sorted(path.name for path in Path(file).parent.glob("*.py"))[:5]
    return f"{file}: no such file; " + (f"there is {', '.join(others)}" if others else "there is no .py file")


def grade(file, like, seed=0, names=None, seconds=SECONDS):
    """The Grade of a file. A mark is judged together with those that it builds on."""
    started, asked = time.monotonic(), list(names or marks_of(like))
    if not Path(file).is_file():
        return all_lost(file, like, missing(file), asked)
    names = [mark for mark in marks_of(like) if mark in with_bases(asked, like)]
    verdicts = settle(failures_of(file, like, seed, names, seconds))
    for name, verdict in verdicts.items():  # the reason may be a mark that nobody asked for
        reasons = [f": {v.why}" for other, v in verdicts.items() if v.status == "lost" and other not in asked]
        if verdict.status == "unjudged" and reasons:
            verdicts[name] = Verdict("unjudged", verdict.why + reasons[0])
    return Grade(str(file), like, seed, {name: verdicts[name] for name in asked}, repeated(file, like),
                 time.monotonic() - started)


def failures_of(file, like, seed, names, seconds=SECONDS):
    """{mark: Failure, or None where it is met}, from as many processes as the file ends."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(file).resolve(), Path(folder) / "submission")
        while left := [name for name in names if name not in found]:
            job = dict(file=str(copy), like=like, seed=seed, names=left, seconds=seconds)
            found.update(judged_by_child(job, Path(folder)))
    return {name: found[name] for name in names}


def with_bases(names, like):
    """These marks, and all that they build on."""
    found, left = set(), list(names)
    while left:
        if (name := left.pop().rstrip("!")) not in found:
            found.add(name)
            left += marks_of(like) if name in TOGETHER else BUILDS_ON.get(name, ())
    return found


def copied(file, folder):
    """A copy of the file in a folder with its neighbours, except for files of ours."""
    ours = {path.name for path in [*model_files().values(), *ROOT.glob("*.py")]}
    folder.mkdir()
    for path in {file, *(path for path in sorted(file.parent.glob("*.py"))[:200] if path.name not in ours)}:
        shutil.copy(path, folder / path.name)
    return folder / file.name


def judged_by_child(job, folder):
    """{mark: Failure or None} of at least one mark; the process may end before it has judged them all."""
    report, output = folder / "report", folder / "output"
    report.write_bytes(b"")
    with open(output, "wb") as sink:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.grading.child"], cwd=ROOT, stdin=subprocess.PIPE, stdout=sink,
            stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            child.communicate(json.dumps({**job, "report": str(report)}).encode(),
                              timeout=4 * job["seconds"] * (len(job["names"]) + 2))
        except (subprocess.TimeoutExpired, BrokenPipeError):
            pass
        kill(child)
    lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()]
    why = why_ended(child.returncode, output, job["seconds"])
    if not lines or lines[0]:  # the file cannot be imported, and that would not change
        return dict.fromkeys(job["names"], Failure(lines[0] if lines else why, "stops"))
    found = {name: line and Failure(*line) for name, line in zip(job["names"], lines[1:])}
    for name in job["names"][len(found):][:1]:
        found[name] = Failure(why, "stops")
    return found


def kill(child):
    """The process and whatever it has started."""
    try:
        os.killpg(child.pid, signal.SIGKILL)
    except (AttributeError, ProcessLookupError):  # Windows has no groups; or it has ended
        child.kill()
    child.wait()


def why_ended(code, output, seconds):
    """One sentence about a process that ended before its time."""
    if code in (-getattr(signal, name, 99) for name in ("SIGPROF", "SIGALRM", "SIGKILL", "SIGXCPU")):
        return f"takes longer than {seconds} seconds of processor time, or four times as long by the clock"
    last = output.read_bytes()[-2000:].decode(errors="replace").strip().rpartition("\n")[2]
    how = f"signal {-code}" if code < 0 else f"exit code {code}"
    return f"ends Python ({how})" + (f"; its last line: {last[:200]}" if last else "")


# ---- Results for people and programs -----------------------------------------------------------------------
def table(grade):
    """The points of each mark, with a sentence for every mark that is not met."""
    lines = [f"{grade.file}, graded like {grade.like}, seed {grade.seed}",
             f"  {'mark':14}{'earned':>7}{'lost':>6}{'not judged':>12}"]
    columns = ("met", "lost", "unjudged")
    for mark, points in grade.marks().items():
        status, why = grade.verdicts[mark]
        a, b, c = (points if status == column else "" for column in columns)
        lines.append(f"  {mark:14}{a:>7}{b:>6}{c:>12}   {why}".rstrip())
    a, b, c = (grade.points(column) for column in columns)
    lines.append(f"  {'total':14}{a:>7}{b:>6}{c:>12}   {a} of {a + b + c} points")
    return "\n".join(lines + [f"  please look: this file {warning}" for warning in grade.warnings])


def asked_for():
    """{mark: the first paragraph of its docstring}, read and not imported: torch takes seconds."""
    texts = [(ROOT / "tests" / "grading" / f"{name}.py").read_text(encoding="utf-8")
             for name in ("marks", "criterion_marks")]
    return {node.name: " ".join((ast.get_docstring(node) or "").partition("\n\n")[0].split())
            for text in texts for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def gradescope(grade):
    """The dict of Gradescope's results.json: a test with points, sentence and visibility for every mark."""
    sentences, tests = asked_for(), []
    for mark, points in grade.marks().items():
        status, why = grade.verdicts[mark]
        tests.append({"name": mark, "score": points if status == "met" else 0, "max_score": points,
                      "status": "passed" if status == "met" else "failed", "visibility": "visible",
                      "output": f"{sentences[mark]}\n{'lost: ' * (status == 'lost')}{why or 'met'}"})
    if grade.warnings:  # only the course's staff sees these
        tests.append({"name": "please look", "score": 0, "max_score": 0, "visibility": "hidden",
                      "output": "\n".join(f"This file {warning}." for warning in grade.warnings)})
    return {"score": grade.points("met"), "execution_time": round(grade.seconds), "tests": tests,
            "output": f"like {grade.like}, seed {grade.seed}; {grade.points('unjudged')} points not judged"}


def write_results(path, grade):
    Path(path).write_text(json.dumps(gradescope(grade), indent=1) + "\n", encoding="utf-8")
