"""Canny edges, to the pixel those of OpenCV's ``Canny`` (aperture 3, L1 norm), without OpenCV.

Canny, "A Computational Approach to Edge Detection" (1986), as ControlNet (arXiv 2302.05543) prepares its condition:
Sobel gradients, maxima across the edge, and hysteresis between two thresholds. The gradient of a colour picture is
that of the channel where it is steepest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.signals.filters import Mask, connected
from controlroom.signals.recognise import recognise_strokes
from controlroom.signals.signal import SignalMap, white_on_black

# OpenCV's fixed-point tangent of 22.5 degrees.
_TAN_22, _SHIFT = 13573, 15


@dataclass(frozen=True)
class Canny:
    """Canny edges of a picture.

    Attributes:
        low: a weaker edge is dropped; of the Sobel gradient's L1 norm over 8-bit values.
        high: a stronger edge is kept; what lies between is kept where it is joined to one that is.
        recognise: pass on a picture that already is an edge map.

    Raises:
        InputError: thresholds that are not numbers or below zero.
    """

    low: float = 100.0
    high: float = 200.0
    recognise: bool = True
    kind: Literal["canny"] = "canny"

    def __post_init__(self) -> None:
        for value in (self.low, self.high):
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"A threshold of Canny is {value!r}; expected a number from 0 (ControlNet: 100, 200).")

    def __call__(self, image: Image.Image) -> SignalMap:
        if self.recognise and (found := recognise_strokes(image)) is not None:
            return SignalMap(self.kind, found, white_on_black(found), recognised=True)
        values = canny(np.asarray(image.convert("RGB")), self.low, self.high).astype(np.float32)
        return SignalMap(self.kind, values, white_on_black(values))


def canny(pixels: NDArray[np.uint8], low: float = 100.0, high: float = 200.0) -> Mask:
    """Edges of uint8 ``pixels`` [H, W] or [H, W, C]: bool [H, W]. Thresholds are swapped if ``low`` is above."""
    low, high = (math.floor(value) for value in sorted((low, high)))
    dx, dy = _steepest(pixels if pixels.ndim == 3 else pixels[..., None])
    norm = np.abs(dx) + np.abs(dy)
    around = np.pad(norm, 1)
    height, width = norm.shape

    def near(y: int, x: int) -> NDArray[np.int64]:
        return around[1 + y : 1 + y + height, 1 + x : 1 + x + width]

    across, along = np.abs(dx), np.abs(dy) << _SHIFT
    flat = across * _TAN_22
    upright = along > flat + (across << (_SHIFT + 1))
    level = along < flat
    falling = (dx ^ dy) < 0
    slanted = np.where(
        falling,
        (norm > near(-1, 1)) & (norm > near(1, -1)),
        (norm > near(-1, -1)) & (norm > near(1, 1)),
    )
    peak = np.where(
        level,
        (norm > near(0, -1)) & (norm >= near(0, 1)),
        np.where(upright, (norm > near(-1, 0)) & (norm >= near(1, 0)), slanted),
    )
    weak = peak & (norm > low)
    return connected(weak & (norm > high), weak)


def _steepest(pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sobel gradients [H, W] of the channel of [H, W, C] whose L1 norm is the largest; the first of equal ones."""
    padded = np.pad(pixels.astype(np.int64), ((1, 1), (1, 1), (0, 0)), mode="edge")
    columns = padded[:-2] + 2 * padded[1:-1] + padded[2:]
    rows = padded[:, :-2] + 2 * padded[:, 1:-1] + padded[:, 2:]
    dx, dy = columns[:, 2:] - columns[:, :-2], rows[2:] - rows[:-2]
    best = (np.abs(dx) + np.abs(dy)).argmax(-1)[..., None]
    return np.take_along_axis(dx, best, -1)[..., 0], np.take_along_axis(dy, best, -1)[..., 0]
