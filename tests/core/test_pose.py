"""Geometry of poses."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.core.images import fit
from controlroom.core.pose import JOINTS, L_HIP, L_WRIST, LIMBS, NECK, R_HIP, R_WRIST, Keypoints, Pose, pck


def poses() -> st.SearchStrategy[Pose]:
    def group(count: int) -> st.SearchStrategy[Keypoints]:
        points = hnp.arrays(np.float64, (count, 2), elements=st.floats(-50, 2000))
        return st.builds(Keypoints, points, hnp.arrays(np.float64, count, elements=st.floats(0, 1)))

    def build(body: Keypoints, width: int, height: int, *parts: Keypoints | None) -> Pose:
        return Pose(body.points, body.confidence, width, height, *parts)

    size = st.integers(16, 4000)
    return st.builds(build, group(18), size, size, *(st.none() | group(n) for n in (70, 21, 21)))


def standing() -> Pose:
    points = np.zeros((18, 2))
    points[: len(points)] = np.stack([np.linspace(10, 100, 18), np.linspace(20, 90, 18)], 1)
    points[NECK], points[R_HIP], points[L_HIP] = (50, 30), (44, 70), (56, 70)
    return Pose(points, np.ones(18), 128, 96)


def test_seventeen_limbs_name_joints_once_each_and_form_a_tree() -> None:
    assert len(JOINTS) == 18 and len(LIMBS) == 17
    reached = {NECK}
    for _ in range(17):
        reached |= {b for a, b in LIMBS if a in reached}
    assert reached == set(range(18))


def test_torso_and_box() -> None:
    pose = standing()
    assert pose.torso_length() == 40.0 and pose.has_torso
    assert pose.bounding_box() == (10, 20, 100, 90)
    confidence = np.ones(18)
    confidence[L_HIP] = 0
    one_hip = Pose(pose.keypoints, confidence, 128, 96)
    assert one_hip.torso_length() == pytest.approx(np.hypot(6, 40))


@pytest.mark.parametrize("missing", [[NECK], [R_HIP, L_HIP], list(range(18))])
def test_no_torso_is_an_error(missing: list[int]) -> None:
    confidence = np.ones(18)
    confidence[missing] = 0
    pose = Pose(standing().keypoints, confidence, 128, 96)
    assert not pose.has_torso
    with pytest.raises(InputError, match="torso"):
        pose.torso_length()
    with pytest.raises(InputError):
        Pose(np.ones((18, 2)), np.ones(18), 9, 9).torso_length()


@settings(deadline=None, max_examples=50)
@given(poses())
def test_mirroring_twice_is_the_same_pose(pose: Pose) -> None:
    twice = pose.mirrored().mirrored()
    np.testing.assert_allclose(twice.keypoints, pose.keypoints, atol=1e-9)
    np.testing.assert_array_equal(twice.confidence, pose.confidence)
    assert pose.sides_swapped().sides_swapped() == pose
    for a, b in ((pose.face, twice.face), (pose.right_hand, twice.right_hand), (pose.left_hand, twice.left_hand)):
        assert (a is None) == (b is None)
        assert a is None or b is None or np.allclose(a.points, b.points)


def test_mirrored_swaps_sides_and_flips() -> None:
    pose = standing()
    np.testing.assert_allclose(
        pose.mirrored().keypoints[R_WRIST], [128 - pose.keypoints[L_WRIST, 0], pose.keypoints[L_WRIST, 1]]
    )


def test_a_mirrored_face_keeps_its_shape() -> None:
    """A face that is symmetric about the middle of the canvas is unchanged by the mirror."""
    x = np.zeros(70)
    pairs = [
        (0, 16),
        (7, 9),
        (17, 26),
        (21, 22),
        (36, 45),
        (39, 42),
        (37, 44),
        (41, 46),
        (31, 35),
        (48, 54),
        (60, 64),
        (68, 69),
    ]
    pairs += [(50, 52), (49, 53), (59, 55), (58, 56), (61, 63), (67, 65), (40, 47), (38, 43), (32, 34), (18, 25)]
    for offset, (a, b) in enumerate(pairs, 1):
        x[a], x[b] = -offset, offset
    face = Keypoints(np.stack([64 + x, np.arange(70.0)], 1), np.ones(70))
    mirrored = Pose(np.ones((18, 2)), np.ones(18), 128, 128, face).mirrored().face
    assert mirrored is not None
    np.testing.assert_allclose(mirrored.points[:, 0], 64 + x)


@settings(deadline=None, max_examples=50)
@given(poses(), st.integers(1, 3000), st.integers(1, 3000))
def test_scaling_there_and_back(pose: Pose, width: int, height: int) -> None:
    back = pose.scaled(width, height).scaled(pose.width, pose.height)
    np.testing.assert_allclose(back.keypoints, pose.keypoints, rtol=1e-9, atol=1e-6)
    assert (back.width, back.height) == (pose.width, pose.height)


@pytest.mark.parametrize("mode", ["pad", "crop", "stretch"])
def test_a_fitted_pose_stays_on_its_picture(mode) -> None:
    picture = Image.new("RGB", (200, 100))
    picture.paste((255, 255, 255), (98, 38, 103, 43))
    pose = Pose(np.full((18, 2), (100.5, 40.5)), np.ones(18), 200, 100).fitted(64, 64, mode)
    bright = np.asarray(fit(picture, 64, 64, mode, fill=(0, 0, 0)), float)[..., 0]
    y, x = np.mgrid[:64, :64] + 0.5
    centre = (bright * x).sum() / bright.sum(), (bright * y).sum() / bright.sum()
    np.testing.assert_allclose(pose.keypoints[0], centre, atol=0.5)


def test_translated_moves_what_is_there_only() -> None:
    confidence = np.ones(18)
    confidence[3] = 0
    moved = Pose(standing().keypoints, confidence, 128, 96).translated(5, -2)
    np.testing.assert_allclose(moved.keypoints[NECK], (55, 28))
    np.testing.assert_allclose(moved.keypoints[3], (0, 0))


@settings(deadline=None, max_examples=50)
@given(poses())
def test_values_not_identity_and_frozen(pose: Pose) -> None:
    for other in (copy.deepcopy(pose), pickle.loads(pickle.dumps(pose))):
        assert other == pose and hash(other) == hash(pose)
    assert pose != pose.translated(1, 0) or not pose.visible.any()
    assert pose != "pose"
    with pytest.raises(ValueError):
        pose.keypoints[0] = 1
    with pytest.raises(AttributeError):
        pose.width = 3  # type: ignore[misc]


def test_source_arrays_are_not_shared() -> None:
    points = np.ones((18, 2))
    pose = Pose(points, np.ones(18), 4, 4)
    points[:] = 7
    assert pose.keypoints.max() == 1


@pytest.mark.parametrize(
    ("points", "confidence", "width", "height"),
    [
        (np.zeros((17, 2)), np.ones(17), 4, 4),
        (np.zeros((18, 3)), np.ones(18), 4, 4),
        (np.zeros((18, 2)), np.ones(17), 4, 4),
        (np.full((18, 2), np.nan), np.ones(18), 4, 4),
        (np.full((18, 2), np.inf), np.ones(18), 4, 4),
        (np.full((18, 2), 1e9), np.ones(18), 4, 4),
        (np.zeros((18, 2)), np.full(18, 1.5), 4, 4),
        (np.zeros((18, 2)), np.full(18, -0.1), 4, 4),
        (np.zeros((18, 2)), np.full(18, np.nan), 4, 4),
        (np.zeros((18, 2)), np.ones(18), 0, 4),
        (np.zeros((18, 2)), np.ones(18), 4, -1),
        (np.zeros((18, 2)), np.ones(18), 4.0, 4),
        (np.zeros((18, 2)), np.ones(18), True, 4),
        ("garbage", np.ones(18), 4, 4),
        ([[1, 2], [3]], np.ones(18), 4, 4),
        (None, None, 4, 4),
    ],
)
def test_what_is_no_pose(points, confidence, width, height) -> None:
    with pytest.raises(InputError):
        Pose(points, confidence, width, height)


def test_wrong_parts() -> None:
    hand = Keypoints(np.zeros((21, 2)), np.zeros(21))
    with pytest.raises(InputError, match="face"):
        Pose(np.zeros((18, 2)), np.zeros(18), 4, 4, face=hand)


def test_pck() -> None:
    truth = standing()  # torso 40: within 8 pixels is right
    assert pck(truth, truth) == 1.0
    points = truth.keypoints.copy()
    points[:9] += (7.9, 0)
    points[9:] += (0, 8.1)
    assert pck(Pose(points, np.ones(18), 128, 96), truth) == pytest.approx(0.5)
    assert pck(Pose(points, np.ones(18), 128, 96), truth, threshold=0.21) == 1.0
    confidence = np.ones(18)
    confidence[:6] = 0
    partial = Pose(truth.keypoints, confidence, 128, 96)
    assert pck(partial, truth) == pytest.approx(12 / 18)  # missing ones are wrong, even those at the origin
    confidence = np.ones(18)
    confidence[[4, 7]] = 0
    assert pck(truth, Pose(truth.keypoints, confidence, 128, 96)) == 1.0  # not in the truth: not counted
    with pytest.raises(InputError, match="canvas"):
        pck(truth.scaled(64, 48), truth)
    with pytest.raises(InputError, match="torso"):
        pck(truth, partial)
    with pytest.raises(InputError, match="threshold"):
        pck(truth, truth, 0)


def test_pck_is_the_same_at_any_size() -> None:
    rng = np.random.default_rng(0)
    truth = standing()
    noisy = Pose(truth.keypoints + rng.normal(0, 6, (18, 2)), np.ones(18), 128, 96)
    assert 0 < pck(noisy, truth) < 1
    assert pck(noisy.scaled(256, 192), truth.scaled(256, 192)) == pck(noisy, truth)
