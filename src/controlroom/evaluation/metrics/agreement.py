"""Attribute agreement: whether a reader finds in a picture what its truth, or its caption, says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from controlroom.evaluation.estimates import Estimate
from controlroom.evaluation.extractor import require_same
from controlroom.evaluation.metrics.accumulators import Counted

ALL = "all of these"


def agreement(
    read: Mapping[str, str], truth: Mapping[str, str | None], questions: Sequence[str] = ()
) -> dict[str, bool]:
    """Question -> whether the answer that was read is the true one.

    Args:
        read: question -> answer of the reader.
        truth: question -> true answer; None where there is none (a hidden sleeve, a colour that was not said).
        questions: the ones to look at; all that have a truth if empty.

    Example:
        >>> agreement({"top": "shirt", "hat": "cap"}, {"top": "shirt", "hat": "none", "skin": None})
        {'top': True, 'hat': False}
    """
    asked = questions or tuple(truth)
    return {q: read.get(q) == truth[q] for q in asked if truth.get(q) is not None}


class Agreement:
    """Many pictures: the share of right answers by question, and of pictures with all answers right.

    Example:
        >>> found = Agreement()
        >>> found.add([{"top": True, "hat": True}, {"top": True, "hat": False}])
        >>> {question: estimate.mean for question, estimate in found.estimates().items()}
        {'top': 1.0, 'hat': 0.5, 'all of these': 0.5}
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor = extractor
        self._shares: dict[str, Counted] = {}
        self._all = Counted(extractor)

    def add(self, answers: Sequence[Mapping[str, bool]]) -> None:
        """`agreement` of each picture of a batch; one without any question says nothing about all."""
        for one in answers:
            for question, right in one.items():
                self._shares.setdefault(question, Counted(self.extractor)).add([right])
            if one:
                self._all.add([all(one.values())])

    def merge(self, other: Agreement) -> None:
        """Take in the pictures of another one."""
        require_same(self.extractor, other.extractor, "Attribute agreement")
        for question, counted in other._shares.items():
            self._shares.setdefault(question, Counted(self.extractor)).merge(counted)
        self._all.merge(other._all)

    def estimates(self) -> dict[str, Estimate]:
        """Question -> share with Wilson's interval; `ALL` last."""
        return {**{q: counted.estimate() for q, counted in self._shares.items()}, ALL: self._all.estimate()}
