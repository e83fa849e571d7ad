"""Random people for tests: free joint angles, all joints on the canvas."""

from __future__ import annotations

import numpy as np

from controlroom.core.pose import Pose


def random_pose(rng: np.random.Generator, size: int = 256) -> Pose:
    s = size * rng.uniform(0.14, 0.24)  # the torso
    lean = rng.normal(0, 0.25)
    down = np.array([np.sin(lean), np.cos(lean)])
    right = np.array([-down[1], down[0]])
    p = np.zeros((18, 2))
    shoulder = rng.uniform(0.25, 0.4)
    p[2], p[5] = (right * shoulder + down * 0.05) * s, (-right * shoulder + down * 0.05) * s
    p[8], p[11] = (down + right * 0.25) * s, (down - right * 0.25) * s
    for first, side, length in ((2, -1, 0.55), (5, 1, 0.55), (8, -1, 0.7), (11, 1, 0.7)):
        upper = rng.uniform(-0.3, 2.9) if first < 8 else rng.uniform(-0.2, 1.2)
        lower = upper + rng.uniform(-1.6, 1.6)
        p[first + 1] = p[first] + np.array([side * np.sin(upper), np.cos(upper)]) * length * s
        p[first + 2] = p[first + 1] + np.array([side * np.sin(lower), np.cos(lower)]) * length * s
    p[0] = -down * 0.45 * s + rng.normal(0, 0.04 * s, 2)
    p[14], p[15] = p[0] + (right * 0.14 - down * 0.13) * s, p[0] + (-right * 0.14 - down * 0.13) * s
    p[16], p[17] = p[0] + (right * 0.32 - down * 0.05) * s, p[0] + (-right * 0.32 - down * 0.05) * s
    margin = 0.04 * size
    low, high = p.min(0) - margin, p.max(0) + margin
    shrink = min(1.0, float((size / (high - low)).min()))
    p, low, high = p * shrink, low * shrink, high * shrink
    p += -low + rng.uniform(0, 1, 2) * (size - (high - low))
    return Pose(p, np.ones(18), size, size)


def without(pose: Pose, joints: list[int]) -> Pose:
    confidence = pose.confidence.copy()
    confidence[joints] = 0
    return Pose(pose.keypoints, confidence, pose.width, pose.height)
