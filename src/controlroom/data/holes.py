"""Holes of any picture, for models that learn to fill them: strokes of a brush, boxes, all of it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from controlroom.data.theatre.scene import Dice

KINDS = {"brush": 0.5, "box": 0.25, "all": 0.25}
"""Kind of hole -> its share. Stable Diffusion's inpainting models learned from a quarter of whole pictures."""


def random_hole(size: tuple[int, int], *key: object) -> NDArray[np.bool_]:
    """[height, width], true where the picture is missing; a function of size and key. Never empty."""
    dice = Dice("random hole", *key)
    kind = dice.weighted(KINDS)
    if kind == "all":
        return np.ones(size, dtype=bool)
    found = brush_hole(dice, size) if kind == "brush" else box_hole(dice, size)
    # A stroke may lie in a corner, and of that next to nothing.
    return found if found.any() else np.ones(size, dtype=bool)


def box_hole(dice: Dice, size: tuple[int, int]) -> NDArray[np.bool_]:
    """A box somewhere, of 20 to 70 % of each side."""
    margin = dice.between(0, 0.08) * min(size)
    return with_margin(random_box(dice, size), margin, size)


def random_box(dice: Dice, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Left, top, right, bottom."""
    width, height = (dice.between(0.2, 0.7) * side for side in reversed(size))
    left, top = dice.unit() * (size[1] - width), dice.unit() * (size[0] - height)
    return left, top, left + width, top + height


def with_margin(box: tuple[float, float, float, float], margin: float, size: tuple[int, int]) -> NDArray[np.bool_]:
    """[height, width], true within a box and that many pixels around it."""
    left, top, right, bottom = box
    found = np.zeros(size, dtype=bool)
    rows = slice(max(int(top - margin), 0), math.ceil(bottom + margin))
    found[rows, max(int(left - margin), 0) : math.ceil(right + margin)] = True
    return found


def brush_hole(dice: Dice, size: tuple[int, int]) -> NDArray[np.bool_]:
    """One to four strokes of three to six bends."""
    height, width = size
    side = min(size)
    picture = Image.new("1", (width, height))
    pen = ImageDraw.Draw(picture)
    for _ in range(1 + int(dice.unit() * 4)):
        x, y, turn = dice.unit() * width, dice.unit() * height, dice.unit() * 2 * math.pi
        radius = dice.between(0.04, 0.12) * side
        for _ in range(3 + int(dice.unit() * 4)):
            turn += dice.between(-1.3, 1.3)
            length = dice.between(0.1, 0.35) * side
            ahead = (min(max(x + length * math.cos(turn), 0), width), min(max(y + length * math.sin(turn), 0), height))
            pen.line([(x, y), ahead], fill=1, width=max(1, round(2 * radius)))
            for cx, cy in ((x, y), ahead):
                pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=1)
            x, y = ahead
    return np.array(picture)
