"""How well a map read from a picture matches the one it should have: one number for each kind of condition."""

from __future__ import annotations

from typing import Final

import numpy as np

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.maps import edge_f1, mean_angle, mean_iou, rank_correlation
from controlroom.signals.signal import Kind, SignalMap

MATCHES: Final[dict[Kind, str]] = {
    "canny": "edge F1",
    "soft_edge": "edge F1",
    "lines": "edge F1",
    "scribble": "edge F1",
    "depth": "rank correlation",
    "normal": "angle, degrees",
    "segmentation": "mean IoU",
}
"""Kind -> what `condition_match` gives; lower is better for the angle alone. A pose is judged by PCK (`read_pck`)."""


def condition_match(found: SignalMap, truth: SignalMap) -> float:
    """The measure of `MATCHES` between two maps of one kind and size.

    Raises:
        InputError: maps of two kinds or sizes, or poses.

    Example:
        >>> from controlroom.data.theatre.conditions import condition
        >>> from controlroom.data.theatre.scene import Scene
        >>> depth = condition(Scene("beach", ()), "depth")
        >>> round(condition_match(depth, depth), 6)
        1.0
    """
    if found.kind != truth.kind or truth.kind not in MATCHES:
        raise InputError(
            f"A {found.kind} map cannot be compared with a {truth.kind} map; expected two of one kind among "
            f"{', '.join(MATCHES)}."
        )
    first, second = np.asarray(found.values), np.asarray(truth.values)
    if truth.kind == "depth":
        return rank_correlation(first, second)
    if truth.kind == "normal":
        return mean_angle(first, second)
    if truth.kind == "segmentation":
        return mean_iou(first, second)
    return edge_f1(first, second)
