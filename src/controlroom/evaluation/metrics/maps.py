"""How well two maps of one picture agree: edges by F1, depth by rank correlation, classes by IoU, normals by angle.

Arrays [H, W] in, one number out; averaging over pictures is the caller's.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray

from controlroom.core.errors import InputError

EDGE_TOLERANCE = 0.0075
"""Of the picture's diagonal: how far an edge may lie off, as the benchmark of BSDS500 has it."""


def edge_f1(found: ArrayLike, truth: ArrayLike, tolerance: float | None = None) -> float:
    """F1 of edges: the harmonic mean of how many found ones are true and how many true ones are found.

    Args:
        found, truth: [H, W], an edge where above 0.5.
        tolerance: pixels that an edge may lie off; None: `EDGE_TOLERANCE` of the diagonal, at least 1.

    Returns:
        In [0, 1]; 1 where neither has any edge, 0 where only one has. One true edge may answer for several found ones
        (BSDS pairs them one to one, which is stricter for thick edges).

    Raises:
        InputError: other shapes, or a negative tolerance.

    Example:
        >>> line = np.zeros((9, 9)); line[4] = 1
        >>> edge_f1(np.roll(line, 1, axis=0), line), edge_f1(np.roll(line, 3, axis=0), line)
        (1.0, 0.0)
    """
    first, second = (values > 0.5 for values in _pair(found, truth))
    reach = max(1.0, EDGE_TOLERANCE * math.hypot(*first.shape)) if tolerance is None else tolerance
    if not 0 <= reach < 1e4:
        raise InputError(f"The tolerance of edges is {tolerance!r}; expected pixels from 0.")
    if not first.any() or not second.any():
        return float(first.any() == second.any())
    precision = float(_spread(second, reach)[first].mean())
    recall = float(_spread(first, reach)[second].mean())
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def rank_correlation(found: ArrayLike, truth: ArrayLike) -> float:
    """Spearman's correlation of all values, in [-1, 1]: whether what is nearer in one is nearer in the other.

    Equal values share their mean rank. 0 where one of the two is the same everywhere, so that it orders nothing.

    Raises:
        InputError: other shapes.

    Example:
        >>> depth = np.array([[0.1, 0.2], [0.5, 0.9]])
        >>> round(rank_correlation(depth**3, depth), 6), round(rank_correlation(-depth, depth), 6)
        (1.0, -1.0)
    """
    first, second = (_ranks(values.ravel()) for values in _pair(found, truth))
    first, second = first - first.mean(), second - second.mean()
    length = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / length if length else 0.0


def class_iou(found: ArrayLike, truth: ArrayLike) -> dict[int, float]:
    """Intersection over union of every class that either map has.

    Raises:
        InputError: other shapes.

    Example:
        >>> class_iou([[0, 0, 1, 1]], [[0, 1, 1, 1]])
        {0: 0.5, 1: 0.6666666666666666}
    """
    first, second = _pair(found, truth)
    iou: dict[int, float] = {}
    for label in np.union1d(first, second):
        own, true = first == label, second == label
        iou[int(label)] = float((own & true).sum() / (own | true).sum())
    return iou


def mean_iou(found: ArrayLike, truth: ArrayLike) -> float:
    """Mean of `class_iou` over the classes that either map has, in [0, 1].

    Raises:
        InputError: other shapes.

    Example:
        >>> mean_iou([[0, 0, 1, 1]], [[0, 0, 2, 2]])
        0.3333333333333333
    """
    return float(np.mean(list(class_iou(found, truth).values())))


def mean_angle(found: ArrayLike, truth: ArrayLike) -> float:
    """Mean angle in degrees between unit normals [H, W, 3]; lower is better.

    Raises:
        InputError: other shapes.

    Example:
        >>> mean_angle([[[0.0, 0.0, 1.0]]], [[[1.0, 0.0, 0.0]]])
        90.0
    """
    first, second = _pair(found, truth, 3)
    if first.shape[-1] != 3:
        raise InputError(f"Normals have shape {list(first.shape)}; expected [H, W, 3].")
    return float(np.degrees(np.arccos(np.clip((first * second).sum(-1), -1.0, 1.0))).mean())


def _pair(found: ArrayLike, truth: ArrayLike, dimensions: int = 2) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    first, second = np.asarray(found, np.float64), np.asarray(truth, np.float64)
    if first.shape != second.shape or first.ndim != dimensions or not first.size:
        raise InputError(
            f"Two maps have shapes {list(first.shape)} and {list(second.shape)}; expected one shape of {dimensions} "
            "dimensions. Bring one to the other's size."
        )
    return first, second


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[which.reshape(-1)]


def _spread(mask: NDArray[np.bool_], reach: float) -> NDArray[np.bool_]:
    """All within ``reach`` pixels of ``mask``."""
    steps, (height, width) = int(reach), mask.shape
    padded, found = np.pad(mask, steps), np.zeros_like(mask)
    for dy in range(-steps, steps + 1):
        for dx in range(-steps, steps + 1):
            if math.hypot(dy, dx) <= reach:
                found |= padded[steps + dy : steps + dy + height, steps + dx : steps + dx + width]
    return found
