"""PCK of arrays."""

from __future__ import annotations

import numpy as np
import pytest

from controlroom.core.errors import InputError
from controlroom.data.theatre.pairs import sample_pair
from controlroom.data.theatre.truth import keypoints
from controlroom.evaluation.metrics.pck import read_pck


def test_moved_and_missing_joints_are_wrong() -> None:
    truth = keypoints(sample_pair(0, "held_out").target)
    seen = truth[:, 2] > 0
    torso = float(np.linalg.norm(truth[1, :2] - (truth[8, :2] + truth[11, :2]) / 2))
    read = truth.copy()
    read[:, 2] = 0.9
    assert read_pck(read, truth, (128, 128)) == 1.0
    read[4, :2] += (0.19 * torso, 0.0)
    assert read_pck(read, truth, (128, 128)) == 1.0
    read[4, :2] += (0.02 * torso, 0.0)
    assert read_pck(read, truth, (128, 128)) == pytest.approx(1 - 1 / seen.sum())
    read[10, 2] = 0.49
    assert read_pck(read, truth, (128, 128)) == pytest.approx(1 - 2 / seen.sum())
    truth[4, 2] = 0  # outside the picture: not counted
    assert read_pck(read, truth, (128, 128)) == pytest.approx(1 - 1 / (seen.sum() - 1))


def test_no_torso() -> None:
    truth = keypoints(sample_pair(0, "held_out").target)
    with pytest.raises(InputError, match="torso"):
        read_pck(truth, np.concatenate([truth[:, :2], np.zeros((18, 1))], axis=1), (128, 128))
