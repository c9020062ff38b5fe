"""pytest tests --file my_detr.py --like conditional_detr [--points] [--seed 1]: the marks, each a test."""
import json
from pathlib import Path

import pytest

from tests.grading.grader import grade, gradescope


def pytest_generate_tests(metafunc):
    metafunc.parametrize("mark", list(metafunc.config.grading_marks))


@pytest.fixture(scope="session")
def verdicts(request):
    """The marks run one by one in a process of their own, before the first test says what came out."""
    option = request.config.getoption
    names = [item.callspec.params["mark"] for item in request.session.items]
    found = grade(option("--file"), option("--like"), option("--seed"), names, option("--seconds"))
    request.config.grade = found
    if option("--json"):
        Path(option("--json")).write_text(json.dumps(gradescope(found), indent=1) + "\n", encoding="utf-8")
    return found.verdicts


def test_mark(mark, verdicts):
    if verdicts[mark].status == "lost":
        pytest.fail(verdicts[mark].why, pytrace=False)
    if verdicts[mark].status == "unjudged":
        pytest.skip(verdicts[mark].why)
