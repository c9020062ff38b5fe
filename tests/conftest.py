import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))  # the project's files, from wherever pytest is started

# These start processes and wait for them, half of the time of all tests. When everything runs and there are two
# cores, a second pytest takes them; its report follows the first one's.
SECOND_CORE = ("test_grader.py", "test_train.py", "test_trust.py")


def pytest_addoption(parser):
    group = parser.getgroup("grading", "grade a file: pytest tests --file my_detr.py --like conditional_detr --points")
    group.addoption("--file", help="run the marks on this file, and nothing else")
    group.addoption("--like", help="the file of ours that it is meant to equal")
    group.addoption("--points", action="store_true", help="print the points in a table")
    group.addoption("--seed", type=int, default=0, help="other weights and images (default 0)")
    group.addoption("--seconds", type=int, default=120, help="time for each mark (default 120)")


def pytest_configure(config):
    if not config.getoption("--file"):
        os.environ["OMP_NUM_THREADS"] = "1"  # threads cost tiny models more than they give, here and in subprocesses
        if set(config.invocation_params.args) <= {"-q", "tests"} and os.cpu_count() > 1:
            command = [sys.executable, "-m", "pytest", "-q", *(str(Path(__file__).with_name(f)) for f in SECOND_CORE)]
            config.second_core = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        return
    from grader import MARKS

    if config.getoption("--like") not in MARKS:
        raise pytest.UsageError(f"--like is {config.getoption('--like')}, it must be one of {', '.join(MARKS)}")
    if not Path(config.getoption("--file")).is_file():
        raise pytest.UsageError(f"--file {config.getoption('--file')}: no such file")
    if config.getoption("--points"):  # the table says all
        config.option.tbstyle, config.option.reportchars = "no", ""


def pytest_ignore_collect(collection_path, config):
    """With --file the grading tests run and nothing else, without it all others, on two cores if there are."""
    if hasattr(config, "second_core") and collection_path.name in SECOND_CORE:
        return True
    if collection_path.name.startswith("test_"):
        return (collection_path.name == "test_grade.py") != bool(config.getoption("--file")) or None


def pytest_sessionfinish(session):
    if second := getattr(session.config, "second_core", None):
        if session.exitstatus == pytest.ExitCode.INTERRUPTED:
            second.terminate()
        session.config.second_report = second.communicate()[0]
        session.exitstatus = session.exitstatus or second.returncode


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "second_report"):
        terminalreporter.section("the second core: " + ", ".join(SECOND_CORE))
        terminalreporter.write_line(config.second_report)
    results = getattr(config, "grading_results", None)
    if config.getoption("--points") and results:
        from grader import table

        file, like, seed = (config.getoption(f"--{name}") for name in ("file", "like", "seed"))
        terminalreporter.section("points")
        terminalreporter.write_line(table(file, like, seed, results))
