"""The theatre's conditions: what each map holds is checked against the truth it comes from."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.theatre.conditions import KINDS, PART_COLOURS, condition
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.truth import edges, keypoints, maps
from controlroom.signals.filters import thickened
from controlroom.training.recipes.theatre_pairs import pair_of, skeleton_map

SCENES = [sample_scene(seed, "held_out") for seed in range(6)]


def near(mask: np.ndarray, to: np.ndarray, steps: int) -> float:
    """Share of ``mask`` within ``steps`` of ``to``."""
    return float(thickened(to, steps)[mask].mean())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [128, 96])
def test_every_kind_has_its_shape_its_range_and_is_deterministic(kind: str, size: int) -> None:
    for scene in SCENES:
        first, second = condition(scene, kind, size), condition(scene, kind, size)
        assert first.kind == kind and first.picture.size == (size, size) and first.picture.mode == "RGB"
        assert first.values.dtype == np.float32 and not first.values.flags.writeable
        assert np.array_equal(first.values, second.values)
        assert first.picture.tobytes() == second.picture.tobytes()
        if kind in ("canny", "lines", "scribble"):
            assert set(np.unique(first.values)) <= {0.0, 1.0}
        if kind in ("soft_edge", "depth"):
            assert first.values.min() >= 0 and first.values.max() <= 1 and np.ptp(first.values) > 0.5
        if kind == "normal":
            assert np.allclose(np.linalg.norm(first.values, axis=-1), 1, atol=1e-5)


def test_the_pose_picture_is_what_the_pose_controlnet_was_trained_on() -> None:
    scene = pair_of(3).target
    trained = (skeleton_map(scene).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    found = condition(scene, "pose")
    assert np.array_equal(np.asarray(found.picture), trained)
    assert np.array_equal(found.values, keypoints(scene)[None])


def test_scenes_without_and_with_two_puppets_have_a_pose_map() -> None:
    empty = condition(Scene("beach", ()), "pose")
    assert empty.values.shape == (0, 18, 3) and not np.asarray(empty.picture).any()
    two = next(s for s in (sample_scene(seed, "train") for seed in range(200)) if len(s.puppets) == 2)
    assert condition(two, "pose").values.shape == (2, 18, 3)


def test_depth_and_parts_are_the_truth() -> None:
    for scene in SCENES:
        truth = maps(scene, 64)
        depth, parts = condition(scene, "depth", 64), condition(scene, "segmentation", 64)
        assert np.array_equal(np.asarray(depth.picture)[..., 1], truth.depth)
        assert np.array_equal(parts.values, truth.part)
        assert np.array_equal(np.asarray(parts.picture), PART_COLOURS[truth.part])
    off = np.abs(PART_COLOURS[:, None].astype(int) - PART_COLOURS[None]).sum(-1) + 999 * np.eye(len(PART_COLOURS))
    assert off.min() > 60, "classes must be told apart by their colours"


def test_edges_of_every_sort_lie_on_borders() -> None:
    for scene in SCENES:
        border = edges(scene) > 0
        soft = condition(scene, "soft_edge").values
        assert near(border, soft > 0.5, 1) > 0.97, "every border between parts is a strong soft edge"
        assert near(condition(scene, "scribble").values > 0, border, 3) > 0.97
        assert near(border, condition(scene, "scribble").values > 0, 3) > 0.9
        lines = condition(scene, "lines").values > 0
        assert near(lines, soft > 0.2, 1) > 0.97, "a line is drawn only where it is seen"
        assert near(condition(scene, "canny").values > 0, soft > 0.1, 2) > 0.6


def test_soft_edges_say_what_a_border_parts() -> None:
    scene = SCENES[0]
    assert len(scene.actors) > 0
    truth, soft = maps(scene), condition(scene, "soft_edge").values
    outline = np.zeros_like(soft, bool)
    outline[1:] = truth.actor[1:] != truth.actor[:-1]
    assert np.median(soft[outline]) > 0.9
    patterned = (truth.part[1:] == truth.part[:-1]) & (soft[1:] > 0.2) & (soft[1:] < 0.6)
    assert patterned.sum() > 20


def test_normals_face_the_viewer_on_flat_and_outwards_on_borders() -> None:
    scene = next(s for s in SCENES if len(s.puppets) == 1)
    normals, truth = condition(scene, "normal").values, maps(scene)
    sky = np.zeros_like(truth.depth, bool)
    sky[:8, :8] = True
    if (truth.depth[:16, :16] == truth.depth[0, 0]).all():
        assert np.allclose(normals[sky], [0, 0, 1], atol=1e-3)
    rows, columns = np.nonzero(truth.actor == 1)
    middle = int(np.median(rows))
    left = columns[rows == middle].min()
    assert normals[middle, left, 0] < -0.5, "the left border of a figure faces left"
    red = np.asarray(condition(scene, "normal").picture)[middle, left, 0]
    assert red > 160, "which ControlNet shows in red"


def test_straight_lines_find_the_horizon_of_a_room() -> None:
    lines = condition(Scene("room", ()), "lines").values
    assert (lines.mean(1) > 0.9).any()


def test_bad_input() -> None:
    with pytest.raises(InputError, match="no signal 'hed'; expected one of canny"):
        condition(SCENES[0], "hed")
    with pytest.raises(InputError):
        condition(SCENES[0], "depth", 0)
    assert isinstance(condition(SCENES[0], "canny").picture, Image.Image)
