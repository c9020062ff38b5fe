"""pytest tests/grading --file work/my_detr.py --like conditional_detr [--points]: each mark is a test."""
import pytest

from tests.grading.grader import grade, write_results


def pytest_generate_tests(metafunc):
    metafunc.parametrize("mark", list(metafunc.config.grading_marks))


@pytest.fixture(scope="session")
def verdicts(request):
    """The marks run one by one in a process of their own, before the first test reports its result."""
    option = request.config.getoption
    names = [item.callspec.params["mark"] for item in request.session.items]
    found = grade(option("--file"), option("--like"), option("--seed"), names, option("--seconds"))
    request.config.grade = found
    if option("--json"):
        write_results(option("--json"), found)
    return found.verdicts


def test_mark(mark, verdicts):
    if verdicts[mark].status != "met":
        pytest.fail(verdicts[mark].why, pytrace=False)
