"""Straight lines of a picture, white on black, by OpenCV's line segment detector (extra ``signals``).

ControlNet's MLSD condition (Gu et al., arXiv 2106.00186) shows the straight lines of buildings and rooms, one pixel
wide at 512. The detector here is LSD (Grompone von Gioi et al., 2010), which needs no weights; it finds more short
lines, so those below a length are dropped. They are not MLSD's numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageDraw

from controlroom.core.errors import InputError, ModelError
from controlroom.signals.recognise import recognise_strokes
from controlroom.signals.signal import SignalMap, white_on_black


@dataclass(frozen=True)
class Lines:
    """Straight lines of a picture.

    Attributes:
        shortest: length of the shortest line, in shorter sides of the picture, in [0, 1].
        recognise: pass on a picture that already is a drawing of lines.

    Raises:
        InputError: a length out of its range.
        ModelError: on use, if OpenCV is not installed.
    """

    shortest: float = 0.06
    recognise: bool = True
    kind: Literal["lines"] = "lines"

    def __post_init__(self) -> None:
        value = self.shortest
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise InputError(f"The shortest line is {value!r}; expected a share of the picture's side from 0 to 1.")

    def __call__(self, image: Image.Image) -> SignalMap:
        if self.recognise and (found := recognise_strokes(image)) is not None:
            return SignalMap(self.kind, found, white_on_black(found), recognised=True)
        grey = np.asarray(image.convert("L"))
        segments: Any = _opencv().createLineSegmentDetector().detect(grey)[0]
        ends = np.zeros((0, 4)) if segments is None else np.asarray(segments, float).reshape(-1, 4)
        side = min(image.size)
        canvas = Image.new("L", image.size)
        draw = ImageDraw.Draw(canvas)
        for x0, y0, x1, y1 in ends:
            if np.hypot(x1 - x0, y1 - y0) >= self.shortest * side:
                draw.line([(x0, y0), (x1, y1)], fill=255, width=max(1, round(side / 512)))
        values = (np.asarray(canvas) > 0).astype(np.float32)
        return SignalMap(self.kind, values, white_on_black(values))


def _opencv() -> Any:
    try:
        import cv2
    except ImportError as error:
        raise ModelError(
            "Finding straight lines needs the package opencv-python-headless: pip install 'controlroom[signals]'."
        ) from error
    return cv2
