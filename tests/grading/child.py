"""The process that judges a submitted file: started by tests/grading/grader.py, not by hand.

The job comes through stdin. Before the file is loaded, our modules leave sys.modules and sys.path, and the
working folder becomes the one of the file's copy. Each mark adds a line to the report.
"""
import importlib.util
import json
import os
import re
import signal
import sys
import traceback
from pathlib import Path

from tests.grading.files import ROOT, ours_named, path_of
from tests.grading.grader import GIGABYTES


def load_file(path):
    """The file as a module; files next to it can be imported."""
    sys.path.append(str(Path(path).parent))
    spec = importlib.util.spec_from_file_location("student", path)
    module = sys.modules["student"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def hide_ours(like):
    """Our modules cannot be imported any more, except for those that our own file imports."""
    imported = re.findall(r"^(?:import|from) (\w+)", path_of(like).read_text(encoding="utf-8"), re.M)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None) or "/"
        if Path(file).parent in (ROOT, ROOT / "relatives") and name not in imported:
            del sys.modules[name]
    sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != ROOT]


def limit_memory_and_output():
    try:
        import resource

        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        resource.setrlimit(resource.RLIMIT_AS, (size + GIGABYTES * 2**30,) * 2)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**28,) * 2)
    except (ImportError, OSError, ValueError):
        pass  # only Linux counts address space like this


def start_clocks(seconds):
    """Processor time, so that a busy machine gives the same verdict, and the clock for a file that sleeps."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)  # at the end both signals end the process
        signal.alarm(4 * int(seconds))


def sentence(error, path):
    """One sentence about an error, with its place if that is in the student's file."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename == str(path)]
    kind, message = type(error).__name__, " ".join(str(error).split())[:400]
    code = list(traceback.walk_tb(error.__traceback__))[-1][0].f_code
    option = re.search(r"unexpected keyword argument '(\w+)'", message)
    if kind == "NotImplementedError" and theirs and frames[-1] is theirs[-1]:
        return f"not written yet: {getattr(code, 'co_qualname', code.co_name)}"
    if kind == "TypeError" and option and not any("forward" in frame.name for frame in theirs):
        return f"not written yet: the option {option[1]!r}"
    if kind == "MemoryError" or "allocate memory" in message:
        return f"asks for more than {GIGABYTES} GB of memory"
    if kind == "NotFinite" or kind in ("NotLoaded", "NotWritten", "AssertionError", "Sure") and not theirs:
        return message
    return f"{kind}: {message}" + (f" ({theirs[-1].name}, line {theirs[-1].lineno})" if theirs else "")


def main():
    job = json.loads(sys.stdin.readline())
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import torch

    from tests.grading import marks

    torch.set_num_threads(1)  # models are tiny, and a class is graded on all cores
    path, ours = job["file"], ours_named(job["like"])
    ours_named("train")
    hide_ours(job["like"])
    os.chdir(Path(path).parent)
    sys.argv = [path]
    limit_memory_and_output()
    start_clocks(job["seconds"])

    def report(line):
        with open(job["report"], "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    try:
        student = load_file(path)
    except BaseException as error:
        return report(f"cannot be imported: {sentence(error, path)}")
    student.again = lambda: load_file(path)
    report(None)
    for name in job["names"]:
        start_clocks(job["seconds"])
        report(marks.failure_of(name, student, ours, job["seed"], lambda error: sentence(error, path)))
    os._exit(0)  # does not wait for threads of the file


if __name__ == "__main__":
    main()
