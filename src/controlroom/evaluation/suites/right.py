"""One number for how much of a caption is shown: the share of its answers that are right."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from controlroom.data.theatre.scene import Scene
from controlroom.evaluation.suites.captions import CaptionJudge
from controlroom.evaluation.suites.suite import Measure, Shown, Values
from controlroom.evaluation.theatre_quality import JUDGED

RIGHT = "attributes right"


class RightShare:
    """A judge of captions, and the mean of its answers in each picture, whose differences have short intervals."""

    def __init__(self, judge: CaptionJudge) -> None:
        self.judge = judge
        self.fingerprint = f"{judge.fingerprint}, their mean"
        self.measures = (*judge.measures, Measure(RIGHT, extractor=judge.measures[0].extractor))

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found = []
        for verdict in self.judge(shown):
            row: dict[str, dict[str, float | None]] = {}
            for arm, values in verdict.items():
                own = [value for question, value in values.items() if question in JUDGED and value is not None]
                row[arm] = {**values, RIGHT: float(np.mean(own)) if own else None}
            found.append(row)
        return found
