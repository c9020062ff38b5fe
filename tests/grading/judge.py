"""From marks that fail to points: one slip costs one mark.

Each mark chooses weights for which little but its own concept matters. Where a slip makes several marks fail,
only the first of them is lost, and those that build on it are not judged. Their order is BUILDS_ON.
"""
from typing import NamedTuple

CONTRACT = ["shapes", "loading", "independence"]
# These need all parts at once, so that they say nothing new where another mark fails
TOGETHER = ("gradients", "everything", "official", "criterion")
# What a mark needs before it can be judged. "attention!" counts only if that failure is sure: a view without
# any other part has shown it. So two marks may need each other's part, and the evidence decides.
BUILDS_ON = {
    "loading": ["shapes"],
    "independence": ["shapes"],
    "start": CONTRACT,
    "training": CONTRACT,
    "heads": CONTRACT,
    "queries": [*CONTRACT, "heads", "attention!", "positions!"],
    "attention": [*CONTRACT, "heads", "queries", "backbone", "references"],
    "backbone": [*CONTRACT, "heads", "attention!", "sampling"],
    "sampling": [*CONTRACT, "heads", "attention!", "backbone!"],
    "padding": [*CONTRACT, "heads", "attention", "backbone", "sampling"],
    "positions": [*CONTRACT, "heads", "attention", "backbone", "sampling", "queries"],
    "references": [*CONTRACT, "heads", "attention!"],
    "spatial_query": [*CONTRACT, "heads", "attention", "backbone", "positions", "references!"],
    "aligner": [*CONTRACT, "heads", "attention", "backbone", "references"],
    "smca": [*CONTRACT, "aligner", "heads", "backbone", "attention", "references"],
    "refinement": [*CONTRACT, "heads", "references", "attention", "training", "sampling", "recollection"],
    "two_stage": [*CONTRACT, "heads", "references", "refinement", "backbone", "attention!", "training"],
    "recollection": [*CONTRACT, "heads", "attention!", "training"],
    "recurrent": [*CONTRACT, "heads", "attention!", "training", "recollection"],
    "groups": [*CONTRACT, "training"],
    "class_loss": ["pairing"],
    "l1_loss": ["pairing"],
    "giou_loss": ["pairing"],
    "stages": ["pairing", "l1_loss"],
    "box_counts": ["pairing", "class_loss", "l1_loss", "giou_loss"],
    "total": ["class_loss", "l1_loss", "giou_loss"],
    "empty": ["class_loss", "l1_loss", "giou_loss"],
    "proposals": ["total", "pairing", "class_loss", "l1_loss", "giou_loss"],
}


class Verdict(NamedTuple):
    status: str  # "met", "lost" or "unjudged"
    why: str = ""


class Failure(NamedTuple):
    """The reason why a mark is not met."""

    sentence: str
    kind: str = ""  # "sure", "loading", "not finite", "stops", or nothing in particular
    belongs: str = ""  # the mark that a NaN belongs to


def settle(failures):
    """{mark: Verdict} from {mark: Failure, or None where it is met}."""
    failed = {mark: failure for mark, failure in failures.items() if failure}
    for failure in list(failed.values()):
        if failure.kind == "not finite" and failure.belongs in failures:
            failed[failure.belongs] = failure

    def before(mark):
        """The marks that come first, out of those that fail."""
        sentence, kind, belongs = failed[mark]
        same = next(name for name in failed if failed[name].sentence == sentence)
        if kind == "stops" and same != mark:  # the same line of the file stops both
            return [same]
        if kind == "not finite" and belongs in failed:
            return [belongs] if belongs != mark else []
        if mark in TOGETHER:
            return [name for name in failed if name not in TOGETHER]
        bases = [*CONTRACT, "heads"] if kind == "sure" else BUILDS_ON.get(mark, ())
        if kind == "loading" and mark != "loading":
            bases = CONTRACT
        return [base for base in map(str, bases) if base.rstrip("!") in failed and base != mark
                and (base[-1] != "!" or failed[base[:-1]].kind == "sure")]

    verdicts = {}
    for mark in failures:
        first = [base.rstrip("!") for base in before(mark)] if mark in failed else []
        while again := [base for base in first if before(base)]:  # down to those that are lost themselves
            first = [base for base in first if base not in again] + [
                base.rstrip("!") for name in again for base in before(name)]
        if mark not in failed:
            verdicts[mark] = Verdict("met")
        elif first:
            names = list(dict.fromkeys(f"`{base}`" for base in first))
            verdicts[mark] = Verdict("unjudged", f"not judged before {', '.join(names[:3])} "
                                                 f"{'is' if len(names) == 1 else 'are'} met")
        else:
            verdicts[mark] = Verdict("lost", failed[mark].sentence)
    return verdicts
