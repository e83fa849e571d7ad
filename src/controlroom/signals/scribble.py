"""A picture as a scribble: its strongest borders as a few even strokes, white on black.

ControlNet's scribble condition was drawn from soft edges made thin and thick again, so that a person's own strokes look
like it; so it is here. A doodle (dark pen on light paper) is taken as it is, turned to white on black.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.signals.filters import Mask, Plane, connected, ridges, thickened
from controlroom.signals.pose.paper import classify, components, ink_of
from controlroom.signals.recognise import recognise_strokes
from controlroom.signals.signal import SignalMap, white_on_black
from controlroom.signals.soft_edge import soft_edges


@dataclass(frozen=True)
class Scribble:
    """Strokes along the strongest borders of a picture.

    Attributes:
        strength: soft edge from which a stroke begins, in (0, 1]; it goes on down to half of it.
        shortest: length of the shortest stroke, in shorter sides of the picture.
        recognise: pass on a picture that already is a scribble, or a doodle on paper.

    Raises:
        InputError: a setting out of its range.
    """

    strength: float = 0.5
    shortest: float = 0.06
    recognise: bool = True
    kind: Literal["scribble"] = "scribble"

    def __post_init__(self) -> None:
        for name in ("strength", "shortest"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
                raise InputError(f"The {name} of a scribble is {value!r}; expected a number above 0, at most 1.")

    def __call__(self, image: Image.Image) -> SignalMap:
        found = _given(image) if self.recognise else None
        if found is not None:
            return SignalMap(self.kind, found, white_on_black(found), recognised=True)
        soft = soft_edges(image, (3.0, 6.0))
        lines = ridges(soft)
        lines = connected(lines & (soft >= self.strength), lines & (soft >= self.strength / 2))
        lines = _long(lines, self.shortest * min(image.size))
        values = thickened(lines, max(1, round(2 * min(image.size) / 512))).astype(np.float32)
        return SignalMap(self.kind, values, white_on_black(values))


def _given(image: Image.Image) -> Plane | None:
    """The strokes of a picture that is a scribble already."""
    found = recognise_strokes(image, thickest=6)
    if found is None and classify(image) == "doodle":
        ink = Image.fromarray(ink_of(image)).resize(image.size, Image.Resampling.NEAREST)
        found = np.asarray(ink, np.float32)
    return found


def _long(lines: Mask, shortest: float) -> Mask:
    """Only the strokes of at least so many pixels."""
    kept = np.zeros_like(lines)
    for part in components(lines):
        if len(part) < shortest:
            break  # they come in order, the largest first
        x, y = np.array(part).T
        kept[y, x] = True
    return kept
