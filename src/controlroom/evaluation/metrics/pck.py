"""PCK of keypoints as readers and the theatre give them: arrays [18, 3] instead of `Pose` objects.

The measure itself is `controlroom.core.pose.pck` (Yang and Ramanan 2013, normalised by the torso). A joint that the
reader holds for absent is wrong where the truth has it, hidden or seen.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from controlroom.core.pose import Pose, pck

PRESENT = 0.5
"""Probability from which a joint counts as read; as in `NetworkReader`."""


def read_pck(read: NDArray, truth: NDArray, size: tuple[int, int], threshold: float = 0.2) -> float:
    """Share of the true joints that were read within ``threshold`` torso lengths; higher is better.

    Args:
        read: [18, 3]: x, y in pixels, and the probability that the joint is in the picture.
        truth: [18, 3]: x, y in pixels, and visibility (0: outside the picture, not counted).
        size: width and height of the picture.
        threshold: share of the torso, neck to midpoint of the hips.

    Raises:
        InputError: other shapes, values that are not finite, or a truth without a torso.

    Example:
        >>> truth = np.ones((18, 3)); truth[:, :2] = np.linspace(10, 90, 36).reshape(18, 2)
        >>> read_pck(truth, truth, (100, 100))
        1.0
        >>> away = truth.copy(); away[:9, 0] += 50
        >>> read_pck(away, truth, (100, 100))
        0.5
    """
    found, true = np.array(read, np.float64), np.array(truth, np.float64)
    sure = np.clip(found[:, 2], 0.0, 1.0) * (found[:, 2] >= PRESENT)
    return pck(Pose(found[:, :2], sure, *size), Pose(true[:, :2], np.clip(true[:, 2], 0, 1), *size), threshold)
