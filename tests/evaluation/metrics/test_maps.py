"""Measures between maps, against SciPy, scikit-learn's definitions written out, and by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import distance_transform_edt
from scipy.stats import spearmanr

from controlroom.core.errors import InputError
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.scene import sample_scene
from controlroom.evaluation.condition_match import MATCHES, condition_match
from controlroom.evaluation.metrics.maps import class_iou, edge_f1, mean_angle, mean_iou, rank_correlation

DICE = np.random.default_rng(0)


def test_rank_correlation_is_scipys_with_ties() -> None:
    for values in (DICE.random((9, 11)), DICE.integers(0, 5, (20, 20))):
        other = values + DICE.normal(0, 0.4, values.shape).round(1)
        assert rank_correlation(values, other) == pytest.approx(spearmanr(values.ravel(), other.ravel())[0], abs=1e-12)
    assert rank_correlation(np.ones((3, 3)), DICE.random((3, 3))) == 0


@pytest.mark.parametrize("tolerance", [0, 1, 1.5, 4])
def test_edge_f1_counts_what_is_near_enough(tolerance: float) -> None:
    found, truth = DICE.random((2, 40, 50)) > 0.97
    precision = (distance_transform_edt(~truth)[found] <= tolerance).mean()
    recall = (distance_transform_edt(~found)[truth] <= tolerance).mean()
    expected = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    assert edge_f1(found, truth, tolerance) == pytest.approx(expected)


def test_edges_of_empty_maps() -> None:
    none, some = np.zeros((8, 8)), np.eye(8)
    assert edge_f1(none, none) == 1 and edge_f1(some, none) == 0 and edge_f1(none, some) == 0


def test_iou_is_that_of_the_confusion_matrix() -> None:
    found, truth = DICE.integers(0, 4, (2, 30, 30))
    matrix = np.histogram2d(found.ravel(), truth.ravel(), bins=range(5))[0]
    expected = np.diag(matrix) / (matrix.sum(0) + matrix.sum(1) - np.diag(matrix))
    assert list(class_iou(found, truth).values()) == pytest.approx(expected.tolist())
    assert mean_iou(found, truth) == pytest.approx(expected.mean())
    assert mean_iou(truth, truth) == 1


def test_angles() -> None:
    tilt = np.array([[[0.0, 0.0, 1.0], [0.0, np.sin(0.3), np.cos(0.3)]]])
    flat = np.array([[[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]])
    assert mean_angle(tilt, flat) == pytest.approx(np.degrees(0.15))


@pytest.mark.parametrize("kind", MATCHES)
def test_a_condition_matches_itself_and_not_another_scenes(kind: str) -> None:
    first, second = (condition(sample_scene(seed, "held_out"), kind) for seed in (0, 1))
    worst = 3.0 if kind == "normal" else 0.9
    best = 0.0 if kind == "normal" else 1.0
    assert condition_match(first, first) == pytest.approx(best, abs=0.03)
    other = condition_match(second, first)
    assert other > worst if kind == "normal" else other < worst


def test_bad_input() -> None:
    for measure in (edge_f1, rank_correlation, mean_iou, mean_angle):
        with pytest.raises(InputError, match="shapes"):
            measure(np.zeros((3, 4)), np.zeros((4, 3)))
    with pytest.raises(InputError, match="tolerance"):
        edge_f1(np.eye(3), np.eye(3), -1)
    with pytest.raises(InputError, match=r"expected \[H, W, 3\]"):
        mean_angle(np.zeros((2, 2, 4)), np.zeros((2, 2, 4)))
    scene = sample_scene(0, "held_out")
    with pytest.raises(InputError, match="two of one kind"):
        condition_match(condition(scene, "depth"), condition(scene, "canny"))
    with pytest.raises(InputError, match="two of one kind"):
        condition_match(condition(scene, "pose"), condition(scene, "pose"))
