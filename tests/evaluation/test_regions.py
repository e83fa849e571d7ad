"""The region of a part holds what an edit of it truly changes, and leaves most of the picture out."""

from __future__ import annotations

import numpy as np
import pytest

from controlroom.core.errors import InputError
from controlroom.data.theatre.truth import keypoints
from controlroom.evaluation.regions import part_region
from controlroom.evaluation.suites.editing import ABOUT
from controlroom.evaluation.suites.prompt_to_prompt import edit_number


@pytest.mark.parametrize(
    ("kind", "held", "least"),
    [("top colour", 0.998, 0.97), ("lower colour", 0.99, 0.8), ("hair colour", 0.99, 0.93)],
)
def test_true_changes_lie_in_the_region(kind: str, held: float, least: float) -> None:
    shares, covered = [], []
    for number in range(60):
        edit = edit_number(number, kind)
        region, changed = part_region(keypoints(edit.before), ABOUT[kind][0], (128, 128)), edit.changed()
        shares.append(float((region & changed).sum() / changed.sum()))
        covered.append(float(region.mean()))
    assert np.mean(shares) >= held and min(shares) >= least
    assert np.mean(covered) < 0.2 and max(covered) < 0.45


def test_region_follows_size_and_joints() -> None:
    edit = edit_number(0, "top colour")
    points = keypoints(edit.before)
    small, big = part_region(points, "top", (128, 128)), part_region(points * (2, 2, 1), "top", (256, 256))
    assert float((small == big[::2, ::2]).mean()) > 0.98
    # Without an arm its sleeve is not looked for.
    armless = points.copy()
    armless[[3, 4], 2] = 0.0
    less = part_region(armless, "top", (128, 128))
    assert less.sum() < small.sum() and not (less & ~small).any()
    assert not part_region(np.zeros((18, 3)), "hair", (32, 32)).any()
    for wrong in ((np.zeros((17, 3)), "top"), (points, "shoe")):
        with pytest.raises(InputError, match=r"keypoints \[18, 3\]"):
            part_region(wrong[0], wrong[1], (32, 32))  # type: ignore[arg-type]
