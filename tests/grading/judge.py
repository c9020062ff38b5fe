"""From marks that fail to points: one slip costs one mark.

Most marks run the whole model, so a slip in one place can make several of them fail. Three things keep
that fair:

* Weights are chosen so that little but the mark's own concept matters (pairs.py, marks.py).
* If a mark fails, and is met as soon as our file has a known slip in it that belongs to another mark which
  is lost anyway, then that slip was all that was wrong: the mark is met.
* If a part that a mark stands on is lost for a reason we do not know, nobody can tell: the mark is not
  judged.
"""

import time
from typing import NamedTuple

from tests.grading import marks
from tests.grading.files import ours_named
from tests.grading.grader import Verdict
from tests.grading.pairs import BOTH, PADDED, NotFinite, NotLoaded, Pair
from tests.grading.planted import MISTAKES, module_of

# Where everything comes together: these say nothing new where another mark is lost
TOGETHER = ("everything", "official", "criterion")
# What a mark cannot do without: whoever misses both should begin with these.
BUILDS_ON = {
    "independence": ["shapes"],
    "backbone": ["heads", "attention"],
    "padding": ["heads", "backbone"],
    "positions": ["heads", "backbone"],
    "attention": ["heads", "backbone", "queries"],
    "sampling": ["heads", "backbone"],
    "references": ["heads"],
    "queries": ["heads"],
    "spatial_query": ["heads", "attention", "positions"],
    "aligner": ["heads", "attention"],
    "smca": ["aligner"],
    "refinement": ["references", "sampling"],
    "two_stage": ["references", "refinement"],
    "recurrent": ["recollection"],
    "gradients": ["heads", "references"],
    "box_counts": ["class_loss", "l1_loss", "giou_loss"],
}


class Failure(NamedTuple):
    """Why a mark is not met at once."""

    sentence: str
    kind: str = ""  # "loading", "not finite", "crash", "apart", or nothing in particular
    belongs: str = ""  # to which mark a NaN belongs


def failure_of(error, sentence):
    if isinstance(error, NotLoaded):
        return Failure(sentence, "loading")
    if isinstance(error, NotFinite):
        return Failure(sentence, "not finite", error.mark)
    if isinstance(error, marks.Apart):
        return Failure(sentence, "apart")
    return Failure(sentence, "" if isinstance(error, AssertionError) else "crash")


def met(mark, student, ours, seed):
    try:
        getattr(marks, mark)(student, ours, seed)
    except Exception:
        return False
    return True


def agrees(student, ours, seed):
    """Whether all numbers of the two files are the same, with all weights at random."""
    try:
        pair = Pair(student, ours, seed, calm=False)
        return all(pair.agree(PADDED, keys=BOTH, train=train) for train in (False, True))
    except Exception:
        return False


def slips(like, lost):
    """Our file with every known mistake in it that belongs to one of these marks: (mistake, module)."""
    texts = set()
    for mistake in MISTAKES:
        if (
            mistake.mark in lost
            and (mistake.file == "train") == (like == "train")
            and (mistake.old, mistake.new) not in texts
        ):
            module = module_of(mistake, like)
            if module:
                texts.add((mistake.old, mistake.new))
                yield mistake, module


def worth_explaining(failures):
    """The lost marks that a slip somewhere else could be the reason of: NaN has a reason of its own."""
    return [
        name
        for name, failure in failures.items()
        if failure and failure.kind not in ("not finite", "loading")
    ]


def explained(student, like, seed, lost, candidates, seconds=60):
    """[(mark, what was done, marks that fail for this alone)], as few slips as explain most of the lost
    marks.
    """
    found, left = [], [mark for mark in lost if mark not in TOGETHER]
    until = time.monotonic() + seconds
    if like != "train":  # those whose numbers are the student's, if there are any
        same = [slip for slip in candidates if time.monotonic() < until and agrees(student, slip[1], seed)]
        candidates = same or candidates
    while len(left) > 1 and time.monotonic() < until:
        best, most = None, []
        for mistake, module in candidates:
            if mistake.mark not in left or time.monotonic() > until:
                continue
            rest = [mark for mark in left if mark != mistake.mark and met(mark, student, module, seed)]
            if len(rest) > len(most):
                best, most = mistake, rest
            if len(most) == len(left) - 1:
                break
        if best is None:
            break
        found.append((best.mark, best.what, most))
        left = [mark for mark in left if mark not in (best.mark, *most)]
    return found


def settle(failures, explanations=()):
    """{mark: Verdict} out of {mark: Failure or None} and what explained() found."""
    excused = {mark: mine for mine, _, rest in explanations for mark in rest}
    lost = {mark: failure for mark, failure in failures.items() if failure and mark not in excused}
    for failure in [failure for failure in lost.values() if failure.kind == "not finite"]:
        if failure.belongs in failures and failure.belongs not in lost:
            lost[failure.belongs] = failure
    concepts = [mark for mark in lost if mark not in TOGETHER]

    def before(mark):
        """The marks that come first, out of those that are lost."""
        failure = lost[mark]
        if failure.kind == "loading":
            if "loading" in lost:
                return ["loading"] if mark != "loading" else []
        if failure.kind == "not finite":
            return [failure.belongs] if failure.belongs in lost and failure.belongs != mark else []
        if failure.kind == "crash":  # the same line of theirs stops both
            first = next(iter(failures))
            return [first] if mark != first and lost.get(first) == failure else []
        if mark in TOGETHER:
            return concepts
        bases = [base for base in BUILDS_ON.get(mark, ()) if base in lost]
        if failure.kind == "apart":  # judged without what it usually stands on
            return [base for base in bases if base in ("heads", "queries")]
        return [
            base for base in bases if (mark, base) != ("backbone", "attention") or lost[base].kind == "apart"
        ]

    verdicts = {}
    for mark in failures:
        if mark in excused:
            verdicts[mark] = Verdict("met", f"but for what `{excused[mark]}` is about")
        elif mark not in lost:
            verdicts[mark] = Verdict("met")
        elif before(mark):
            first = before(mark)
            while any(before(base) for base in first):  # down to those that are lost themselves
                first = list(dict.fromkeys(root for base in first for root in before(base) or [base]))
            names = ", ".join(f"`{base}`" for base in first[:3])
            verdicts[mark] = Verdict(
                "unjudged", f"not judged before {names} {'is' if len(first) == 1 else 'are'} met"
            )
        else:
            verdicts[mark] = Verdict("lost", lost[mark].sentence)
    return verdicts


def judged(student, like, seed, names):
    """{mark: Verdict} of a module in this process: for tests, the grader gives the file a process of its
    own.
    """
    ours, failures = ours_named(like), {}
    for name in names:
        failures[name] = None
        try:
            getattr(marks, name)(student, ours, seed)
        except Exception as error:
            failures[name] = failure_of(error, f"{type(error).__name__}: {error}")
    lost = worth_explaining(failures)
    return settle(failures, explained(student, like, seed, lost, list(slips(like, lost))))
