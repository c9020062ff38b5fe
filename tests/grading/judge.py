"""From marks that fail to points: one slip costs one mark.

Each mark chooses weights for which little but its own concept matters. Where a slip makes several marks fail,
only the first of them is lost, and those that build on it are not judged. Their order is BUILDS_ON.
"""
from typing import NamedTuple

CONTRACT = ["shapes", "loading", "independence", "training!"]
# These need all parts at once, so they add nothing where another mark fails
TOGETHER = ("gradients", "everything", "official", "criterion")
LOSSES = ("class_loss", "l1_loss", "giou_loss")
# Needed before a mark can be judged. "attention!" counts only if that failure is sure: a view without
# any other part has shown it. So two marks may need each other's part, and the evidence decides.
HEADS = [*CONTRACT, "heads"]
BUILDS_ON = {
    "loading": ["shapes"],
    "independence": ["shapes"],
    "start": CONTRACT,
    "training": [*CONTRACT, "attention"],
    "heads": CONTRACT,
    "queries": [*HEADS, "attention!"],
    "attention": [*HEADS, "queries", "backbone", "references"],
    "backbone": [*HEADS, "attention!", "sampling"],
    "sampling": [*HEADS, "attention!", "backbone!", "references"],
    "references": [*HEADS, "attention!"],
    "padding": [*HEADS, "attention", "backbone", "sampling"],
    "positions": [*HEADS, "attention", "backbone", "sampling", "queries", "references", "spatial_query!"],
    "spatial_query": [*HEADS, "attention", "backbone", "positions", "references"],
    "aligner": [*HEADS, "attention", "backbone", "references", "positions"],
    "smca": [*HEADS, "padding", "aligner", "backbone", "attention", "references"],
    "recollection": [*HEADS, "attention!", "training"],
    "recurrent": [*HEADS, "attention!", "training", "recollection"],
    "refinement": [*HEADS, "references", "attention", "training", "sampling", "recollection"],
    "two_stage": [*HEADS, "refinement", "backbone", "attention!", "training", "padding", "positions"],
    "noise": [*CONTRACT, "training"],
    "groups": [*CONTRACT, "training", "noise"],
    "pairing": ["matcher"],
    **dict.fromkeys(LOSSES, ["pairing"]),
    "stages": ["pairing", *LOSSES],
    "total": [*LOSSES],
    "empty": ["stages", *LOSSES],
    "box_counts": ["pairing", "empty", *LOSSES],
    "proposals": ["pairing", "total", "empty", *LOSSES],
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
        bases = BUILDS_ON.get(mark, ())
        if kind == "sure":
            bases = CONTRACT if mark == "training" else HEADS
        if kind == "loading" and mark != "loading":
            bases = CONTRACT
        return [base.rstrip("!") for base in bases if base.rstrip("!") in failed and base.rstrip("!") != mark
                and (base[-1] != "!" or failed[base[:-1]].kind == "sure")]

    def roots(mark, seen=()):
        """The marks that are lost themselves and come before it, or it alone."""
        first = [base for base in before(mark) if base not in seen]
        return list(dict.fromkeys(root for base in first for root in roots(base, (*seen, mark)))) or [mark]

    verdicts = {}
    for mark in failures:
        first = roots(mark) if mark in failed else []
        if not first:
            verdicts[mark] = Verdict("met")
        elif first == [mark]:
            verdicts[mark] = Verdict("lost", failed[mark].sentence)
        else:
            names = ", ".join(f"`{name}`" for name in first[:3]) + (" is" if len(first) == 1 else " are")
            verdicts[mark] = Verdict("unjudged", f"not judged before {names} met")
    return verdicts
