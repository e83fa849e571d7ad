"""Strokes on paper: is a picture a doodle, and where is its ink?

The light of a photographed sheet changes slowly and its pen lines are thin and dark; nothing else looks like that. So
the paper's brightness is estimated block by block, what is clearly darker is ink, and a doodle is a picture with smooth
paper nearly everywhere, a little ink, and hardly any ink thicker than a pen.
"""

from __future__ import annotations

from typing import Final, Literal

import numpy as np
from PIL import Image

from controlroom.core.images import ImageSource, load_image

SIDE: Final = 256  # pixels of the longer side of what is looked at
_BLOCKS: Final = 8
_CONTRAST: Final = 0.16  # of the paper's brightness
_PEN: Final = 6  # half the width in pixels of SIDE of the thickest pen


def classify(source: ImageSource) -> Literal["doodle", "photo"]:
    """``'doodle'`` for thin dark strokes on plain light paper, ``'photo'`` for any other picture.

    Raises:
        InputError: the picture cannot be read.
    """
    picture = load_image(source)
    grey = _grey(picture)
    paper = _paper(grey)
    ink = grey < paper * (1 - _CONTRAST)
    blank = ~thickened(ink, 2)
    share = float(ink.mean())
    if not 0.002 < share < 0.25 or blank.mean() < 0.4:
        return "photo"
    # A sheet may lie in uneven light, but it is light everywhere, and between the strokes there is nothing to see.
    light = np.percentile(paper, 50) > 125 and np.percentile(paper, 2) > 0.45 * np.percentile(paper, 98)
    texture = np.percentile(np.abs(grey - paper)[blank] / paper[blank], 90)
    thick = eroded(ink, _PEN).mean() / share
    return "doodle" if light and texture < 0.06 and thick < 0.08 else "photo"


def ink_of(image: Image.Image) -> np.ndarray:
    """bool [H, W], the longer side `SIDE` pixels: where a pen drew."""
    grey = _grey(image)
    return grey < _paper(grey) * (1 - _CONTRAST)


def _grey(image: Image.Image) -> np.ndarray:
    """Brightness in 0..255, the longer side `SIDE` pixels; colours count by their darkest channel, as ink does."""
    scale = SIDE / max(image.size)
    size = max(8, round(image.width * scale)), max(8, round(image.height * scale))
    return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BOX if scale < 1 else None), np.float32).min(
        -1
    )


def _paper(grey: np.ndarray) -> np.ndarray:
    """The brightness of the sheet below everything: the light parts of each block, and smoothly between blocks."""
    rows = np.array_split(np.arange(grey.shape[0]), _BLOCKS)
    columns = np.array_split(np.arange(grey.shape[1]), _BLOCKS)
    level = np.array([[np.percentile(grey[np.ix_(row, column)], 80) for column in columns] for row in rows])
    smooth = Image.fromarray(level.astype(np.float32)).resize(grey.shape[::-1], Image.Resampling.BILINEAR)
    return np.maximum(np.asarray(smooth), 1.0)


def thickened(mask: np.ndarray, steps: int) -> np.ndarray:
    """``mask`` and what is within ``steps`` pixels of it."""
    for _ in range(steps):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def eroded(mask: np.ndarray, steps: int) -> np.ndarray:
    """What of ``mask`` is more than ``steps`` pixels inside it; outside the picture counts as outside."""
    return ~thickened(np.pad(~mask, 1, constant_values=True), steps)[1:-1, 1:-1]


def components(mask: np.ndarray, diagonal: bool = True) -> list[list[tuple[int, int]]]:
    """Connected sets of the true pixels as lists of (x, y), largest first; ``diagonal`` neighbours connect too."""
    steps = [(1, 0), (-1, 0), (0, 1), (0, -1)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if diagonal else [])
    rows, columns = np.nonzero(mask)
    left = set(zip(columns.tolist(), rows.tolist(), strict=True))
    found = []
    while left:
        members = [left.pop()]
        for x, y in members:  # grows while it is walked
            for dx, dy in steps:
                near = (x + dx, y + dy)
                if near in left:
                    left.remove(near)
                    members.append(near)
        found.append(members)
    return sorted(found, key=len, reverse=True)
