"""The renderer draws what ControlNet's nets expect: order, colours, proportions."""

from __future__ import annotations

import time

import numpy as np
import pytest
from skimage import draw

from controlroom.core.errors import InputError
from controlroom.core.pose import LIMBS, NECK, R_SHOULDER, Keypoints, Pose
from controlroom.signals.pose.skeleton import COLOURS, default_thickness, draw_skeleton
from tests.signals.pose.figures import random_pose, without


def transcribed(pose: Pose) -> np.ndarray:
    """ControlNet 1.1's drawing written plainly: whole pixels, hard edges, 4 px, limbs at 0.6 below the joints."""
    wheel = [[255, 0, 0], [255, 85, 0], [255, 170, 0], [255, 255, 0], [170, 255, 0], [85, 255, 0], [0, 255, 0]]
    wheel += [[0, 255, 85], [0, 255, 170], [0, 255, 255], [0, 170, 255], [0, 85, 255], [0, 0, 255], [85, 0, 255]]
    wheel += [[170, 0, 255], [255, 0, 255], [255, 0, 170], [255, 0, 85]]
    limbs = [[2, 3], [2, 6], [3, 4], [4, 5], [6, 7], [7, 8], [2, 9], [9, 10], [10, 11], [2, 12], [12, 13], [13, 14]]
    limbs += [[2, 1], [1, 15], [15, 17], [1, 16], [16, 18]]
    canvas = np.zeros((pose.height, pose.width, 3))
    for (one, two), colour in zip(limbs, wheel, strict=False):
        a, b = pose.keypoints[one - 1], pose.keypoints[two - 1]
        length, angle = np.hypot(*(a - b)), np.arctan2(*(a - b)[::-1])
        row, column = draw.ellipse((a[1] + b[1]) / 2, (a[0] + b[0]) / 2, 4, length / 2, canvas.shape, rotation=-angle)
        canvas[row, column] = [int(channel * 0.6) for channel in colour]
    for (x, y), colour in zip(pose.keypoints, wheel, strict=True):
        canvas[draw.disk((y, x), 4, shape=canvas.shape[:2])] = colour
    return canvas


def test_equals_a_plain_transcription_up_to_the_edges() -> None:
    """Differences are thin (anti-aliasing and half pixels); eroded by two pixels nothing is left."""
    for seed in range(3):
        pose = random_pose(np.random.default_rng(seed), 512)
        ours = np.asarray(draw_skeleton(pose), float)
        different = np.abs(ours - transcribed(pose)).max(-1) > 12
        thick = different.copy()
        for dy in (-1, 0, 1):
            for dx in (-1, 0, 1):
                thick &= np.roll(different, (dy, dx), (0, 1))
        assert thick.sum() <= 4
        assert different.sum() < 0.5 * (ours.max(-1) > 0).sum()


def test_joints_have_full_and_limbs_six_tenths_of_their_colour() -> None:
    pose = random_pose(np.random.default_rng(0), 512)
    for joint in range(18):
        alone = without(pose, [j for j in range(18) if j != joint])
        x, y = pose.keypoints[joint]
        assert draw_skeleton(alone).getpixel((int(x), int(y))) == COLOURS[joint]
    for limb, (start, end) in enumerate(LIMBS):
        pair = without(pose, [j for j in range(18) if j not in (start, end)])
        x, y = (pose.keypoints[start] + pose.keypoints[end]) / 2
        assert draw_skeleton(pair).getpixel((int(x), int(y))) == tuple(int(c * 0.6) for c in COLOURS[limb])


def test_thickness_follows_the_size() -> None:
    assert default_thickness(512, 768) == 4 and default_thickness(128, 128) == 1
    pose = without(random_pose(np.random.default_rng(1), 512), [j for j in range(18) if j not in (NECK, R_SHOULDER)])
    areas = [(np.asarray(draw_skeleton(pose, s, s), float)[..., 0].sum() / s**2) for s in (256, 512, 1024)]
    np.testing.assert_allclose(areas, areas[1], rtol=0.08)
    thin, thick = (np.asarray(draw_skeleton(pose, thickness=t), float).sum() for t in (2, 6))
    assert thick > 2.5 * thin


@pytest.mark.parametrize("size", [64, 128, 500, 1500])
def test_a_joint_is_drawn_where_it_is(size: int) -> None:
    for x, y in ((20.0, 31.0), (20.25, 31.5), (20.9, 31.7)):
        points = np.zeros((18, 2))
        points[0] = x, y
        pose = without(Pose(points, np.ones(18), size, size), list(range(1, 18)))
        red = np.asarray(draw_skeleton(pose, thickness=3.0), float)[..., 0]
        rows, columns = np.mgrid[:size, :size] + 0.5
        assert abs((red * columns).sum() / red.sum() - x) < 0.3
        assert abs((red * rows).sum() / red.sum() - y) < 0.3


def test_missing_joints_draw_nothing() -> None:
    pose = random_pose(np.random.default_rng(2))
    assert np.asarray(draw_skeleton(without(pose, list(range(18))))).max() == 0
    lone = np.asarray(draw_skeleton(without(pose, [NECK])))
    x, y = pose.keypoints[NECK]
    assert lone[int(y), int(x)].max() == 0


def test_hands_and_face() -> None:
    pose = without(random_pose(np.random.default_rng(2)), list(range(18)))
    hand = Keypoints(np.stack([np.linspace(20, 100, 21), np.full(21, 50)], 1), np.ones(21))
    face = Keypoints(np.stack([np.linspace(20, 200, 70), np.full(70, 150)], 1), np.ones(70))
    drawn = np.asarray(draw_skeleton(Pose(pose.keypoints, pose.confidence, 256, 256, face, hand, None)))
    assert drawn[50, 20].tolist() == [0, 0, 255]
    assert drawn[150, 20].tolist() == [255, 255, 255]


def test_far_outside_is_cheap_and_harmless() -> None:
    pose = random_pose(np.random.default_rng(3)).translated(-9e5, 9e5)
    start = time.perf_counter()
    assert np.asarray(draw_skeleton(pose)).max() == 0
    assert time.perf_counter() - start < 2


def test_other_sizes_stretch_the_pose() -> None:
    pose = random_pose(np.random.default_rng(4))
    drawn = draw_skeleton(pose, 128, 64, 1.0)
    assert drawn.size == (128, 64) and drawn.mode == "RGB"
    same = draw_skeleton(pose.scaled(128, 64), thickness=1.0)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(same))


def test_bad_sizes() -> None:
    pose = random_pose(np.random.default_rng(4))
    for width, height in ((0, 5), (-1, 5), (2.5, 5), (60_000, 60_000)):
        with pytest.raises(InputError):
            draw_skeleton(pose, width, height)  # type: ignore[arg-type]
    for thickness in (0, -1, float("nan"), float("inf"), "2"):
        with pytest.raises(InputError, match="thickness"):
            draw_skeleton(pose, thickness=thickness)  # type: ignore[arg-type]
