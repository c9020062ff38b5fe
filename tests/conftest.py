"""Options for grading, and what holds for every test. pyproject.toml has the rest of pytest's settings."""
import os
from pathlib import Path

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("grading", "grade a file: --file my_detr.py --like conditional_detr --points")
    group.addoption("--file", help="run the marks on this file, and nothing else")
    group.addoption("--like", help="the file of ours that it is meant to equal")
    group.addoption("--points", action="store_true", help="print the points in a table")
    group.addoption("--json", help="write the points as Gradescope's results.json")
    group.addoption("--seed", type=int, default=0, help="other weights and images (default 0)")
    group.addoption("--all-planted", action="store_true", help="judge every planted mistake by all marks")
    group.addoption("--seconds", type=int, default=120, help="time for each mark (default 120)")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Before xdist starts its workers: the marks of one file run in a process of their own anyway."""
    if config.getoption("--file"):
        config.option.numprocesses, config.option.dist = 0, "no"


def pytest_configure(config):
    if not config.getoption("--file"):
        # Threads cost tiny models more than they give, here, in the workers and in subprocesses
        os.environ["OMP_NUM_THREADS"] = "1"
        return
    from tests.grading.grader import marks_of

    try:
        config.grading_marks = marks_of(config.getoption("--like"))
    except ValueError as error:
        raise pytest.UsageError(f"--like is {error}")
    if not Path(config.getoption("--file")).is_file():
        raise pytest.UsageError(f"--file {config.getoption('--file')}: no such file")
    if config.getoption("--points"):  # the table says all
        config.option.tbstyle, config.option.reportchars = "no", ""


def pytest_ignore_collect(collection_path, config):
    """With --file the marks of that file are tested, and nothing else. tests/grading runs only when named."""
    if collection_path.name == "grading":
        return not (config.getoption("--file") or any("grading" in arg for arg in config.args)) or None
    if collection_path.name.startswith("test_"):
        return (collection_path.name == "test_grade.py") != bool(config.getoption("--file")) or None


def pytest_terminal_summary(terminalreporter, config):
    grade = getattr(config, "grade", None)
    if config.getoption("--points") and grade:
        from tests.grading.grader import table

        terminalreporter.section("points")
        terminalreporter.write_line(table(grade))
