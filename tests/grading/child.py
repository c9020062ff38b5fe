"""The process in which a submitted file meets the marks: started by tests/grading/grader.py, not by hand.

The job comes through stdin, together with a key by which every message is signed; the file never sees
either. Before it is loaded, our modules leave sys.modules and sys.path, the working folder becomes the
file's own, and an audit hook notes whatever it imports or opens of ours.
"""

import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from tests.grading.files import ROOT, ours_named, path_of
from tests.grading.grader import GIGABYTES, sign


def load_file(path):
    """The file as a module; files beside it can be imported."""
    import importlib.util

    sys.path.append(str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("student", path)
    module = sys.modules["student"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def limit_memory():
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTES * 2**30,) * 2)
    except (ImportError, OSError, ValueError):
        pass  # not on this system: only Linux counts address space like this


def sentence(error, path):
    """One sentence about what went wrong; where, if it is in the student's file."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == str(path)]
    last_is_theirs = bool(theirs) and frames[-1] is theirs[-1]
    kind, message = type(error).__name__, " ".join(str(error).split())[:300]
    option = re.search(r"unexpected keyword argument '(\w+)'", message)
    if kind in ("NotLoaded", "NotFinite"):
        return message
    if kind == "NotWritten":
        return f"not written yet: {message}"
    if kind == "NotImplementedError" and last_is_theirs:
        return f"not written yet: {qualified_name(error)}"
    if kind == "TypeError" and option and not any("forward" in frame.name for frame in theirs):
        return f"not written yet: the option {option[1]!r}"
    if kind == "MemoryError" or "allocate memory" in message:
        return f"wants more than {GIGABYTES} GB of memory"
    if kind in ("AssertionError", "Apart") and not theirs:
        return message
    return f"{kind}: {message}" + (f" ({theirs[-1].name}, line {theirs[-1].lineno})" if theirs else "")


def qualified_name(error):
    tb = error.__traceback__
    while tb.tb_next:
        tb = tb.tb_next
    return getattr(tb.tb_frame.f_code, "co_qualname", tb.tb_frame.f_code.co_name)


class Hidden:
    """Our modules and folders, out of sight while the student's code runs."""

    def __init__(self, like):
        # What our file imports itself, a file like it may import as well: support/, or the parent of a
        # relative
        text = path_of(like).read_text(encoding="utf-8")
        self.allowed = {"support", *re.findall(r"^(?:import|from) (\w+)", text, re.M)} - {like}
        ours = {name: module for name, module in sys.modules.items() if self.is_ours(module)}
        self.modules, self.paths = ours, [path for path in sys.path if under_root(path or os.getcwd())]
        self.warnings = []

    def is_ours(self, module):
        if module.__name__ == "__main__" or module.__name__.partition(".")[0] in self.allowed:
            return False
        return under_root(getattr(module, "__file__", None) or "/")

    def hide(self):
        for name in self.modules:
            sys.modules.pop(name, None)
        sys.path[:] = [path for path in sys.path if path not in self.paths]

    def __enter__(self):
        """In sight again, for our own imports."""
        sys.modules.update(self.modules)
        sys.path[:0] = self.paths

    def __exit__(self, *error):
        self.modules.update({name: m for name, m in sys.modules.items() if self.is_ours(m)})
        self.hide()

    def listen(self, event, args):
        """Audit hook: notes what is opened and imported of ours, unless our own code asks for it."""
        if event == "open" and isinstance(args[0], (str, bytes)):
            path = os.path.realpath(os.fsdecode(args[0]))
            helper = path.startswith(f"{ROOT}/support/") or Path(path).stem in self.allowed
            if under_root(path) and not helper and not self.asked_by_us():
                self.note(f"opens our {os.path.relpath(path, ROOT)}")
        elif event == "import" and (args[0] in self.modules or args[0].partition(".")[0] == "tests"):
            if not self.asked_by_us():
                self.note(f"imports our {args[0]}")

    def note(self, warning):
        if warning not in self.warnings:
            self.warnings.append(warning)

    @staticmethod
    def asked_by_us():
        """Whether the innermost frame that is neither Python's nor a package's lies in our folder."""
        frame = sys._getframe(2)
        while frame:
            name = frame.f_code.co_filename
            if not name.startswith((sys.prefix, sys.base_prefix, "<frozen")) or under_root(name):
                return under_root(name)
            frame = frame.f_back
        return False


def under_root(path):
    """Whether a path is of this repository; the virtual environment may lie inside it, as in the README."""
    path, library = os.path.realpath(path), os.path.realpath(sys.prefix)
    return (path == str(ROOT) or path.startswith(f"{ROOT}/")) and not path.startswith(f"{library}/")


def fingerprint(modules):
    """What must not change behind our back: functions of ours, and of torch."""
    import torch

    found = {}
    for place in [*modules, torch, torch.Tensor, torch.nn.functional, torch.autograd]:
        for name, value in vars(place).items():
            if callable(value) and not name.startswith("__"):
                found[place.__name__, name] = (id(value), id(getattr(value, "__code__", None)))
    return found


def main():
    job = json.loads(sys.stdin.readline())
    key, path, seed, seconds = job.pop("key").encode(), job["file"], job["seed"], job["seconds"]
    channel, count = os.dup(1), 0
    os.dup2(2, 1)  # what the file prints goes where errors go
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)

    import torch

    from tests.grading import judge, marks

    torch.set_num_threads(min(job["threads"], torch.get_num_threads()))
    like = job["like"]
    ours = ours_named(like)
    if "official" in job["names"]:
        ours_named("train")
    hidden = Hidden(like)
    ours_to_keep = [module for name, module in hidden.modules.items() if name.startswith("tests.grading")]
    before = fingerprint(ours_to_keep)
    hidden.hide()
    os.chdir(Path(path).parent)
    sys.argv = [path]
    limit_memory()
    sys.addaudithook(hidden.listen)

    def say(**message):
        nonlocal count
        text = json.dumps(message).encode()
        os.write(channel, sign(key, count, text) + b" " + text + b"\n")
        count += 1

    alarm = getattr(signal, "alarm", lambda seconds: None)  # ends the process, whatever it is busy with
    alarm(int(seconds))
    try:
        student = load_file(path)
    except BaseException as error:
        if isinstance(error, SystemExit):
            sys.exit(f"leaves Python when it is imported: {error}")
        say(warnings=hidden.warnings)
        sys.exit(f"cannot be imported: {sentence(error, path)}")
    failures = {
        name: judge.Failure(*failure) if failure else None for name, failure in job["failures"].items()
    }
    for name in job["names"]:
        if name in failures:
            continue
        say(running=name)
        alarm(int(seconds))
        try:
            getattr(marks, name)(student, ours, seed)
            failures[name] = None
        except BaseException as error:
            failures[name] = judge.failure_of(
                error, sentence(error.__cause__ if name == "loading" and error.__cause__ else error, path)
            )
        say(failure=failures[name])
    failures = {name: failures[name] for name in job["names"]}
    alarm(int(seconds) + 60)
    lost = judge.worth_explaining(failures)
    with hidden:
        slips = list(judge.slips(like, lost)) if len(lost) > 1 else []
    explanations = judge.explained(student, like, seed, lost, slips, seconds=min(60, seconds))
    after = fingerprint(ours_to_keep)
    changed = [".".join(name) for name in before if after.get(name) != before[name]]
    warnings = hidden.warnings + [f"changes {name} while it is graded" for name in changed[:5]]
    say(verdicts=judge.settle(failures, explanations), warnings=warnings)
    os._exit(0)  # threads that the file may have started do not hold us up


if __name__ == "__main__":
    main()
