"""A pose drawn as ControlNet's OpenPose nets were trained to read it.

ControlNet (Zhang et al., arXiv 2302.05543) draws each limb as an ellipse in its colour of an 18-hue wheel at 0.6 of its
intensity, then each joint as a disc at full intensity, on black: at 512 px the ellipse's half-width and the disc's
radius are 4 px. Hands are lines in running hues with blue dots, faces white dots.

Deviations: anti-aliased (drawn larger, then averaged), positions are not rounded to pixels, and the thickness follows
the size of the picture, so a skeleton at 128 px looks like one at 512 px made smaller.
"""

from __future__ import annotations

import colorsys
import math
from typing import Final

import numpy as np
from PIL import Image, ImageDraw

from controlroom.core.errors import InputError
from controlroom.core.images import checked_size
from controlroom.core.pose import LIMBS, Keypoints, Pose

Colour = tuple[int, int, int]

# Steps of 20 degrees around the wheel, to the integers that ControlNet has.
COLOURS: Final[tuple[Colour, ...]] = (
    *((255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0)),
    *((0, 255, 0), (0, 255, 85), (0, 255, 170), (0, 255, 255), (0, 170, 255), (0, 85, 255)),
    *((0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85)),
)
LIMB_INTENSITY: Final = 0.6
_LIMB_COLOURS: Final = tuple(tuple(int(channel * LIMB_INTENSITY) for channel in colour) for colour in COLOURS)
_THICKNESS_AT_512: Final = 4.0
_FINGERS: Final = tuple((0 if i == 0 else f + i, f + i + 1) for f in range(0, 20, 4) for i in range(4))
_FINGER_COLOURS: Final = tuple(
    tuple(round(255 * channel) for channel in colorsys.hsv_to_rgb(i / 20, 1.0, 1.0)) for i in range(20)
)
_CIRCLE: Final = np.stack([f(np.linspace(0, 2 * math.pi, 24, endpoint=False)) for f in (np.cos, np.sin)], axis=1)


def default_thickness(width: int, height: int) -> float:
    """Half the width of a limb in pixels: 4 where the shorter side has 512, in proportion elsewhere."""
    return _THICKNESS_AT_512 * min(width, height) / 512


def draw_skeleton(
    pose: Pose, width: int | None = None, height: int | None = None, thickness: float | None = None
) -> Image.Image:
    """Draw ``pose`` in ControlNet's colours on black.

    Args:
        pose: is stretched to the picture; use `Pose.fitted` before to keep its proportions.
        width: of the picture in pixels; None takes the pose's canvas.
        height: likewise.
        thickness: half the width of a limb, and the radius of a joint, in pixels of the picture; None takes
            `default_thickness`.

    Returns:
        RGB picture of that size.

    Raises:
        InputError: a size that is none, or a thickness that is not a positive number.
    """
    width, height = checked_size(pose.width if width is None else width, pose.height if height is None else height)
    if (width, height) != (pose.width, pose.height):
        pose = pose.scaled(width, height)
    radius = default_thickness(width, height) if thickness is None else thickness
    if not (isinstance(radius, int | float) and 0 < radius < 1e4):
        raise InputError(f"The thickness of a skeleton is {radius!r}; expected a positive number of pixels.")
    # The wide limbs of large pictures need fewer samples at their edges.
    factor = 4 if max(width, height) <= 512 else 2 if max(width, height) <= 2048 else 1
    canvas = Image.new("RGB", (width * factor, height * factor))
    draw = ImageDraw.Draw(canvas)
    points, there, thick = pose.keypoints * factor, pose.visible, radius * factor
    for (start, end), colour in zip(LIMBS, _LIMB_COLOURS, strict=False):
        if there[start] and there[end]:
            _ellipse(draw, points[start], points[end], thick, colour)
    for point in np.flatnonzero(there):
        _disc(draw, points[point], thick, COLOURS[point])
    for hand in (pose.left_hand, pose.right_hand):
        if hand is not None:
            _draw_hand(draw, hand, factor, thick)
    if pose.face is not None:
        for point in pose.face.points[pose.face.visible] * factor:
            _disc(draw, point, thick * 0.75, (255, 255, 255))
    return canvas.reduce(factor)


def _draw_hand(draw: ImageDraw.ImageDraw, hand: Keypoints, factor: int, thick: float) -> None:
    points, there = hand.points * factor, hand.visible
    for (start, end), colour in zip(_FINGERS, _FINGER_COLOURS, strict=True):
        if there[start] and there[end]:
            ends = [_pair(points[start]), _pair(points[end])]
            draw.line(ends, fill=colour, width=max(1, round(thick / 2)))
    for point in points[there]:
        _disc(draw, point, thick, (0, 0, 255))


def _ellipse(
    draw: ImageDraw.ImageDraw, start: np.ndarray, end: np.ndarray, half_width: float, colour: tuple[int, ...]
) -> None:
    """An ellipse whose long axis runs from ``start`` to ``end``."""
    along = (end - start) / 2
    length = float(np.hypot(*along))
    if length == 0:
        return
    across = np.array([-along[1], along[0]]) * (half_width / length)
    outline = (start + end) / 2 + _CIRCLE @ np.stack([along, across])
    draw.polygon([_pair(point) for point in outline], fill=colour)


def _disc(draw: ImageDraw.ImageDraw, centre: np.ndarray, radius: float, colour: tuple[int, ...]) -> None:
    outline = centre + _CIRCLE * radius
    draw.polygon([_pair(point) for point in outline], fill=colour)


def _pair(point: np.ndarray) -> tuple[float, float]:
    return float(point[0]), float(point[1])
