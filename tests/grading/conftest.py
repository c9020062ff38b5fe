"""python -m pytest tests/grading tests the grader; with --file and --like it only grades a file."""
from pathlib import Path

import pytest


def pytest_addoption(parser):
    group = parser.getgroup("grading", "grade a file: --file work/my_detr.py --like detr --points")
    group.addoption("--file", help="run the marks on this file, and nothing else")
    group.addoption("--like", help="the file of ours that it is meant to equal")
    group.addoption("--points", action="store_true", help="print the points in a table")
    group.addoption("--json", help="write the points as Gradescope's results.json")
    group.addoption("--seed", type=int, default=0, help="other weights and images (default 0)")
    group.addoption("--seconds", type=int, default=60, help="processor time for each mark (default 60)")
    group.addoption("--all-planted", action="store_true", help="judge every planted mistake by all marks")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """Before xdist starts its workers: the marks of one file run in a process of their own anyway."""
    if config.getoption("--file", None):
        config.option.numprocesses, config.option.dist = 0, "no"


def pytest_configure(config):
    file = config.getoption("--file", None)
    if not file:
        return
    from tests.grading.grader import all_lost, marks_of, missing, write_results

    like, report = config.getoption("--like"), config.getoption("--json")
    try:
        config.grading_marks = marks_of(like)
    except ValueError as error:
        raise pytest.UsageError(f"--like is {error}")
    if not Path(file).is_file():
        if report:
            write_results(report, all_lost(file, like, missing(file)))
        raise pytest.UsageError(missing(file))
    if config.getoption("--points"):  # the table is enough
        config.option.tbstyle, config.option.reportchars = "no", ""


def pytest_ignore_collect(collection_path, config):
    """With --file only test_grade.py runs, without it all others."""
    if collection_path.name.startswith("test_"):
        return (collection_path.name == "test_grade.py") != bool(config.getoption("--file", None)) or None


def pytest_terminal_summary(terminalreporter, config):
    if hasattr(config, "grade") and config.getoption("--points"):
        from tests.grading.grader import table

        terminalreporter.section("points")
        terminalreporter.write_line(table(config.grade))


@pytest.fixture(scope="session", autouse=True)
def small_backbone(request):
    """Tests of the grader build models with a small ResNet; what is needed is imported late."""
    if request.config.getoption("--file", None):
        return
    import torch
    import torchvision

    from tests.grading.small import SmallResNet

    torchvision.models.get_model = lambda name, norm_layer, **how: SmallResNet(norm_layer)
    torch.set_num_threads(1)  # for tensors this small a second thread is a hindrance
