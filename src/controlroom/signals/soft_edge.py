"""Soft edges without a network: how strongly colours change, over several scales, grey on black.

ControlNet's soft-edge condition is HED's (Xie and Tu, arXiv 1504.06375) or PiDiNet's, which transformers does not have;
these are what a net conditioned on them can be given instead: broad, graded borders of objects with fine texture held
back. They are not HED's numbers. The theatre's dense reader gives learned ones of its world.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.signals.filters import Plane, gaussian, slopes
from controlroom.signals.recognise import recognise_soft_edges, recognise_strokes
from controlroom.signals.signal import SignalMap, white_on_black

_HALF_STRONG = 0.35  # of the strongest borders: a border of this strength becomes half bright


@dataclass(frozen=True)
class SoftEdge:
    """Soft edges of a picture.

    Attributes:
        scales: widths of the blurs whose edges are averaged, in pixels of a picture whose shorter side has 512.
        recognise: pass on a picture that already is a map of edges.

    Raises:
        InputError: no scales, or one that is not positive.
    """

    scales: tuple[float, ...] = (1.5, 3.0, 6.0)
    recognise: bool = True
    kind: Literal["soft_edge"] = "soft_edge"

    def __post_init__(self) -> None:
        if not self.scales or not all(isinstance(scale, int | float) and 0 < scale <= 64 for scale in self.scales):
            raise InputError(f"The scales of soft edges are {self.scales!r}; expected numbers above 0, at most 64.")

    def __call__(self, image: Image.Image) -> SignalMap:
        if self.recognise:
            found = recognise_soft_edges(image)
            found = recognise_strokes(image) if found is None else found
            if found is not None:
                return SignalMap(self.kind, found, white_on_black(found), recognised=True)
        values = soft_edges(image, self.scales)
        return SignalMap(self.kind, values, white_on_black(values))


def soft_edges(image: Image.Image, scales: tuple[float, ...]) -> Plane:
    """How strong a border is, [H, W] in [0, 1]; 0 everywhere in a picture of one colour."""
    pixels = np.asarray(image.convert("RGB"), np.float32) / np.float32(255)
    side = min(image.size)
    total = np.zeros(pixels.shape[:2], np.float32)
    for scale in scales:
        sigma = max(scale * side / 512, 0.5)
        blurred = gaussian(pixels, sigma)
        steepness = np.zeros(total.shape, np.float32)
        for channel in range(3):
            right, down = slopes(blurred[..., channel])
            steepness = np.maximum(steepness, np.hypot(right, down))
        # The slope of a step falls with the blur; times its width it does not.
        total += steepness * np.float32(sigma * np.sqrt(2 * np.pi))
    total /= len(scales)
    strongest = float(np.percentile(total, 99.5))
    if strongest < 0.02:  # only noise is left
        return np.zeros_like(total)
    strong = np.minimum(total / strongest, 1.0) ** 2
    bright = strong / (strong + np.float32(_HALF_STRONG**2)) * np.float32(1 + _HALF_STRONG**2)
    return bright.astype(np.float32)
