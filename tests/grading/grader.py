"""Run the marks of tests/grading/marks.py on somebody's file, in a process of its own.

The file may hang, leave Python, print without end or want all memory: that costs it one mark, and the rest go on.
This is no fence against cheating: the file runs with the rights of whoever grades it.
"""
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

from tests.grading.files import ROOT, ours_named, parent_of

GIGABYTES = 4  # of memory beyond what torch itself takes

# The marks of every file and their points. What a mark asks for is the first line of its function in marks.py.
SHARED = {"shapes": 1, "independence": 1, "loading": 1, "start": 1, "backbone": 1, "padding": 2, "positions": 2}
WHOLE = {"training": 1, "gradients": 2, "everything": 2, "official": 2}
MARKS = {
    "detr": {**SHARED, "attention": 3, "queries": 1, "heads": 2, **WHOLE},
    "conditional_detr": {**SHARED, "attention": 2, "spatial_query": 4, "references": 2, "heads": 2, **WHOLE},
    "deformable_detr": {**SHARED, "sampling": 4, "references": 2, "heads": 2, "refinement": 3, "two_stage": 3,
                        **WHOLE},
    "sam_detr": {**SHARED, "attention": 2, "aligner": 4, "references": 2, "heads": 2, "smca": 2, "multiscale": 2,
                 **WHOLE},
    "sqr": {**SHARED, "sampling": 2, "references": 1, "heads": 1, "refinement": 2, "two_stage": 2, "recollection": 4,
            "recurrent": 2, **WHOLE},
    "train": {"matcher": 4, "class_loss": 4, "l1_loss": 2, "giou_loss": 2, "stages": 2, "total": 1, "empty": 2,
              "proposals": 1, "criterion": 2},
}
# A mark that cannot be met before others are: whoever misses both should begin with the other.
BUILDS_ON = {
    "padding": ["heads", "backbone"],
    "positions": ["heads", "backbone"],
    "attention": ["heads", "backbone"],
    "sampling": ["heads", "backbone"],
    "references": ["heads"],
    "queries": ["heads"],
    "spatial_query": ["heads", "attention", "positions"],
    "aligner": ["heads", "attention"],
    "smca": ["aligner"],
    "multiscale": ["aligner"],
    "refinement": ["references", "sampling"],
    "two_stage": ["references", "refinement"],
    "recurrent": ["recollection"],
    "gradients": ["heads", "references"],
    "criterion": ["matcher", "class_loss", "l1_loss", "giou_loss", "stages", "total"],
    "everything": ["heads", "backbone", "padding", "positions", "attention", "sampling", "references", "queries",
                   "spatial_query", "aligner", "recollection"],
    "official": ["everything", "gradients"],
}


def marks_of(like):
    """{mark: points} of one of our files; relatives have those of their parent."""
    while like not in MARKS:
        like = parent_of(like)
    return MARKS[like]


def grade(file, like, seed=0, names=None, seconds=120):
    """Yields (mark, None if it is met or else a sentence) one by one; `seconds` are for each."""
    left = list(names or marks_of(like))
    while left:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "report.jsonl"
            child = Child(Path(file).resolve(), like, seed, seconds, report, *left)
            running, told = None, 0
            while True:
                ended = child.ended(0.05)
                lines = report.read_text().split("\n")[:-1] if report.exists() else []
                for line in map(json.loads, lines[told:]):
                    running = line["mark"]
                    if line["done"]:
                        left.remove(running)
                        yield running, line["lost"]
                        running = None
                told = len(lines)
                if ended:
                    break
                if child.seconds() > (seconds + 30) * (len(left) + 1):  # its own alarm clock was switched off
                    child.kill()
            sentence = child.last_words(seconds)
        if running in left:
            left.remove(running)
            yield running, sentence
        elif left:  # it did not get as far as the first mark: the file cannot be imported
            for name in left:
                yield name, sentence
            return


class Child:
    """A process whose output is read and thrown away but for the last lines."""

    def __init__(self, *arguments):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.grading.grader", *map(str, arguments)], cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, start_new_session=True)
        self.tail = b""
        threading.Thread(target=self.drain, daemon=True).start()
        self.started = time.monotonic()

    def drain(self):
        while chunk := os.read(self.process.stdout.fileno(), 65536):
            self.tail = (self.tail + chunk)[-2000:]

    def ended(self, wait):
        try:
            self.process.wait(wait)
        except subprocess.TimeoutExpired:
            return False
        self.kill()  # whatever it started
        return True

    def seconds(self):
        return time.monotonic() - self.started

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


def advice(name, results):
    """The marks to be met first, out of those that are lost as well."""
    first = [base for base in BUILDS_ON.get(name, ()) if results.get(base)]
    return f" (begin with: {', '.join(first)})" if first else ""


def table(file, like, seed, results):
    """The points, mark by mark, with a sentence for every one that is lost."""
    points = marks_of(like)
    lines = [f"{file}, graded like {like}, seed {seed}"]
    for name, sentence in results.items():
        why = f"   {sentence}{advice(name, results)}" if sentence else ""
        lines.append(f"  {name:14}{0 if sentence else points[name]:3} / {points[name]}{why}")
    reached = sum(points[name] for name, sentence in results.items() if not sentence)
    lines.append(f"  {'total':14}{reached:3} / {sum(points[name] for name in results)}")
    return "\n".join(lines)


# ---- The other side: what runs in the process --------------------------------------------------------------
def load_file(path):
    import importlib.util

    sys.path.append(str(Path(path).parent))  # behind ours, for files that a student's file imports
    spec = importlib.util.spec_from_file_location("student", path)
    module = sys.modules["student"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit_memory():
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTES * 2 ** 30,) * 2)
    except (ImportError, OSError, ValueError):
        pass  # not on this system: only Linux counts address space like this


def sentence(error, path):
    """One sentence about what went wrong; where, if it is in the student's file."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == str(path)]
    last_is_theirs = bool(theirs) and frames[-1] is theirs[-1]
    kind, message = type(error).__name__, " ".join(str(error).split())[:300]
    option = re.search(r"unexpected keyword argument '(\w+)'", message)
    if kind == "NotLoaded":
        return message
    if kind == "NotWritten":
        return f"not written yet: {message}"
    if kind == "NotImplementedError" and last_is_theirs:
        return f"not written yet: {qualified_name(error)}"
    if kind == "TypeError" and option and not any("forward" in frame.name for frame in theirs):
        return f"not written yet: the option {option[1]!r}"
    if kind == "MemoryError" or "allocate memory" in message:
        return f"wants more than {GIGABYTES} GB of memory"
    if kind == "AssertionError" and not theirs:
        return message
    return f"{kind}: {message}" + (f" ({theirs[-1].name}, line {theirs[-1].lineno})" if theirs else "")


def qualified_name(error):
    tb = error.__traceback__
    while tb.tb_next:
        tb = tb.tb_next
    return getattr(tb.tb_frame.f_code, "co_qualname", tb.tb_frame.f_code.co_name)


def main(path, like, seed, seconds, report, *names):
    import torch

    from tests.grading import marks

    torch.set_num_threads(min(2, torch.get_num_threads()))
    ours = ours_named(like)
    limit_memory()

    def say(mark, done, lost=None):
        with open(report, "a") as file:
            file.write(json.dumps({"mark": mark, "done": done, "lost": lost}) + "\n")

    alarm = getattr(signal, "alarm", lambda seconds: None)  # ends the process, whatever it is busy with
    alarm(int(seconds))
    try:
        student = load_file(path)
    except BaseException as error:
        if isinstance(error, SystemExit):
            sys.exit(f"leaves Python when it is imported: {error}")
        sys.exit(f"cannot be imported: {sentence(error, path)}")
    for name in names:
        say(name, done=False)
        alarm(int(seconds))
        try:
            getattr(marks, name)(student, ours, int(seed))
            lost = None
        except BaseException as error:
            lost = sentence(error, path)
        say(name, done=True, lost=lost)
    os._exit(0)  # threads that the file may have started do not hold us up


if __name__ == "__main__":
    main(*sys.argv[1:])
