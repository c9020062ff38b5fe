"""Run the marks of tests/grading/marks.py on somebody's file, in a process of its own
(tests/grading/child.py).

The file may hang, leave Python, print without end or want all memory: that costs it one mark, and the rest
go on. What the process says is signed, its working folder is empty but for the file and its neighbours,
and whatever imports, opens or repeats our files is reported. This is no fence: the file runs with the
rights of whoever grades it, in the same process as the marks. docs/teaching.md says what to do about that.
"""

import ast
import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from tests.grading.files import ROOT, model_files, path_of
from tests.grading.repeats import repeated

GIGABYTES = 4  # of memory beyond what torch itself takes

# The marks of every file and their points. What a mark asks for is the first line of its function.
SHARED = {
    "shapes": 1,
    "independence": 1,
    "loading": 1,
    "start": 1,
    "backbone": 1,
    "padding": 2,
    "positions": 2,
}
WHOLE = {"training": 1, "gradients": 2, "everything": 2, "official": 2}
MARKS = {
    "detr": {**SHARED, "attention": 3, "queries": 1, "heads": 2, **WHOLE},
    "conditional_detr": {**SHARED, "attention": 2, "spatial_query": 4, "references": 2, "heads": 2, **WHOLE},
    "deformable_detr": {
        **SHARED,
        "attention": 1,
        "sampling": 4,
        "references": 2,
        "heads": 2,
        "refinement": 3,
        "two_stage": 3,
        **WHOLE,
    },
    "sam_detr": {
        **SHARED,
        "attention": 2,
        "aligner": 4,
        "references": 2,
        "heads": 2,
        "smca": 2,
        **WHOLE,
    },
    "sqr": {
        **SHARED,
        "attention": 1,
        "sampling": 2,
        "references": 1,
        "heads": 1,
        "refinement": 2,
        "two_stage": 2,
        "recollection": 4,
        "recurrent": 2,
        **WHOLE,
    },
    "train": {
        "matcher": 4,
        "class_loss": 4,
        "l1_loss": 2,
        "giou_loss": 2,
        "box_counts": 1,
        "stages": 2,
        "total": 1,
        "empty": 2,
        "proposals": 1,
        "criterion": 2,
    },
}

RELATIVE = {
    "shapes": 1,
    "independence": 1,
    "loading": 1,
    "start": 2,
    "training": 2,
    "gradients": 4,
    "everything": 6,
    "official": 3,
}


def marks_of(like):
    """{mark: points} of one of our files; relatives have marks that need to know nothing about them."""
    if like in MARKS:
        return MARKS[like]
    text = path_of(like).read_text(encoding="utf-8")
    groups = {"groups": 4} if re.search(r"num_groups|num_one2many", text) else {}
    golden = {} if (ROOT / "tests" / "golden" / f"{like}.json").exists() else {"official": 0}
    return {mark: points for mark, points in {**RELATIVE, **groups, **golden}.items() if points}


class Verdict(NamedTuple):
    status: str  # "met", "lost" or "unjudged"
    why: str = ""


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


def grade(file, like, seed=0, names=None, seconds=120, threads=2):
    """The Grade of a file; `seconds` are for each mark, `threads` for torch."""
    started, names = time.monotonic(), list(names or marks_of(like))
    failures, verdicts, warnings = {}, None, repeated(file, like)
    with tempfile.TemporaryDirectory() as folder:
        copy = copied(Path(file).resolve(), Path(folder))
        while verdicts is None:
            job = dict(
                file=str(copy),
                like=like,
                seed=seed,
                seconds=seconds,
                names=names,
                failures=failures,
                threads=threads,
            )
            child, running = Child(job, folder), None
            for message in child.messages((seconds + 30) * (len(names) + 2)):
                running = message.get("running", running)
                if "failure" in message:
                    failures[running], running = message["failure"], None
                warnings += [w for w in message.get("warnings", []) if w not in warnings]
                verdicts = message.get("verdicts", verdicts)
            if verdicts is not None:
                break
            sentence = child.last_words(seconds)
            if running is None and len(failures) == len(names):
                running = "judging"  # it ended while its marks were compared with known slips
            elif running is None:  # it did not get as far as the first mark: the file cannot be imported
                first, *others = [name for name in names if name not in failures]
                verdicts = {
                    name: ("lost", failures[name][0]) if failures.get(name) else ("met",) for name in failures
                }
                verdicts[first] = ("lost", sentence)
                verdicts.update(
                    {name: ("unjudged", "not judged before the file can be imported") for name in others}
                )
                break
            if running == "judging":
                verdicts = {
                    name: ("lost", failures[name][0]) if failures[name] else ("met",) for name in names
                }
            else:
                failures.setdefault(running, [sentence, "", ""])
        warnings += child.strangers
    verdicts = {name: Verdict(*verdicts[name]) for name in names}
    return Grade(str(file), like, seed, verdicts, warnings, time.monotonic() - started)


def copied(file, folder):
    """A copy of the file in a folder with those of its neighbours that are not ours."""
    ours = {path.name for path in [*model_files().values(), *ROOT.glob("*.py")]}
    neighbours = [path for path in sorted(file.parent.glob("*.py"))[:200] if path.name not in ours]
    for path in {*neighbours, file}:
        shutil.copy(path, folder / path.name)
    return folder / file.name


class Child:
    """A process whose signed messages are read; the rest of its output is thrown away but for the last
    lines.
    """

    def __init__(self, job, folder):
        key = secrets.token_hex(16)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.grading.child"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self.key, self.tail, self.lines, self.strangers = key.encode(), b"", [], []
        self.started, self.count = time.monotonic(), 0
        readers = [(self.process.stdout, self.take_report), (self.process.stderr, self.take_output)]
        for stream, take in readers:
            threading.Thread(target=self.drain, args=(stream.fileno(), take), daemon=True).start()
        try:
            self.process.stdin.write(json.dumps({**job, "key": key}).encode() + b"\n")
            self.process.stdin.close()
        except BrokenPipeError:
            pass

    @staticmethod
    def drain(stream, take):
        try:
            while chunk := os.read(stream, 65536):
                take(chunk)
        except (OSError, ValueError):  # closed behind our back
            pass

    def take_output(self, chunk):
        self.tail = (self.tail + chunk)[-2000:]

    def take_report(self, chunk, rest=[b""]):  # noqa: B006, what is left of the last line
        *lines, self.rest = (getattr(self, "rest", b"") + chunk).split(b"\n")
        self.rest = self.rest[-1_000_000:]
        self.lines += lines

    def messages(self, limit):
        """Every message that is signed, until the process has ended."""
        while True:
            ended = self.ended(0.05)
            if ended:
                time.sleep(0.05)  # for the last lines
            lines, self.lines = self.lines, []
            for line in lines:
                signature, _, text = line.partition(b" ")
                if hmac.compare_digest(signature, sign(self.key, self.count, text)):
                    self.count += 1
                    yield json.loads(text)
                elif not self.strangers:
                    self.strangers.append("writes into the grader's report")
            if ended:
                return
            if time.monotonic() - self.started > limit:  # its own alarm clock was switched off
                self.kill()

    def ended(self, wait):
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return False
        self.kill()  # whatever it started
        return True

    def kill(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except AttributeError:  # Windows knows no groups
            self.process.kill()
        except ProcessLookupError:
            pass

    def last_words(self, seconds):
        """Why it ended before its time, in one sentence."""
        code = self.process.returncode
        if code in (-14, -9):  # the alarm clock, or Child.kill
            return f"took longer than {seconds} seconds"
        lines = [line for line in self.tail.decode(errors="replace").splitlines() if line.strip()]
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        return f"ended Python ({how})" + (f"; its last line: {lines[-1][:200]}" if lines else "")


def sign(key, count, text):
    return hmac.new(key, str(count).encode() + text, hashlib.sha256).hexdigest().encode()


# ---- What people see ---------------------------------------------------------------------------------------
SIGNS = {"met": "", "lost": "lost", "unjudged": "not judged"}


def table(grade):
    """The points, mark by mark, with a sentence for every one that is not met at once."""
    lines = [
        f"{grade.file}, graded like {grade.like}, seed {grade.seed}",
        f"  {'mark':14}{'earned':>7}{'lost':>6}{'not judged':>12}",
    ]
    columns = ("met", "lost", "unjudged")
    for mark, points in grade.marks().items():
        verdict = grade.verdicts[mark]
        numbers = [points if verdict.status == column else "" for column in columns]
        lines.append(f"  {mark:14}{numbers[0]:>7}{numbers[1]:>6}{numbers[2]:>12}   {verdict.why}".rstrip())
    earned, lost, unjudged = (grade.points(column) for column in columns)
    lines.append(
        f"  {'total':14}{earned:>7}{lost:>6}{unjudged:>12}   {earned} of {earned + lost + unjudged} points"
    )
    lines += [f"  please look: this file {warning}" for warning in grade.warnings]
    return "\n".join(lines)


def asked_for():
    """{mark: the first line of its docstring}, read and not imported: torch takes seconds."""
    found = {}
    for name in ("marks.py", "criterion_marks.py"):
        for node in ast.parse((ROOT / "tests" / "grading" / name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef):
                found[node.name] = (ast.get_docstring(node) or "").partition("\n")[0]
    return found


def gradescope(grade, visibility="visible"):
    """What Gradescope reads from results.json: a test with points, sentence and visibility for every mark."""
    sentences, tests = asked_for(), []
    for mark, points in grade.marks().items():
        verdict = grade.verdicts[mark]
        what = sentences[mark]
        why = {"met": "met", "lost": "lost: ", "unjudged": ""}[verdict.status] + (
            f" ({verdict.why})" if verdict.status == "met" and verdict.why else verdict.why
        )
        tests.append(
            {
                "name": mark,
                "score": points if verdict.status == "met" else 0,
                "max_score": points,
                "status": "passed" if verdict.status == "met" else "failed",
                "output": f"{what}\n{why}",
                "visibility": visibility,
            }
        )
    if grade.warnings:  # for the course's staff alone
        tests.append(
            {
                "name": "please look",
                "score": 0,
                "max_score": 0,
                "visibility": "hidden",
                "output": "\n".join(f"This file {warning}." for warning in grade.warnings),
            }
        )
    return {
        "score": grade.points("met"),
        "execution_time": round(grade.seconds),
        "tests": tests,
        "visibility": visibility,
        "output": f"like {grade.like}, seed {grade.seed}; {grade.points('unjudged')} points not judged",
    }
