"""Which part of a picture is missing, for models that fill it: parts and boxes by ground truth, brushes, all of it."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.scene import CANVAS, Dice, Puppet, Scene
from controlroom.data.theatre.truth import boxes, maps

HOLES_VERSION = "holes-1"
#: Kind of hole -> its share of the samples.
KINDS = {"part": 0.35, "box": 0.25, "brush": 0.25, "all": 0.15}
#: What people ask to have drawn anew on a puppet: garments with the limbs in them, hair, the head, a hat.
GARMENTS: dict[str, tuple[Part, ...]] = {
    "top": (Part.TOP, Part.RIGHT_ARM, Part.LEFT_ARM),
    "lower": (Part.LOWER, Part.RIGHT_LEG, Part.LEFT_LEG),
    "hair": (Part.HAIR,),
    "head": (Part.HAIR, Part.HEAD, Part.HAT),
}


def hole(scene: Scene, *key: object, size: int = CANVAS) -> NDArray[np.bool_]:
    """[size, size], true where the picture is missing; a function of the scene and the key. Never empty."""
    dice = Dice("hole", HOLES_VERSION, *key)
    kind = dice.weighted(KINDS)
    found = np.ones((size, size), dtype=bool)
    if kind == "part" and scene.actors:
        found = _part(scene, dice, size)
    elif kind == "box":
        found = _box(scene, dice, size)
    elif kind != "all":
        found = _brush(dice, size)
    return found if found.any() else _brush(dice, size)


def garment_hole(scene: Scene, actor: int, garment: str, grow: int = 3, size: int = CANVAS) -> NDArray[np.bool_]:
    """Where an actor's garment (of `GARMENTS`) is seen, and ``grow`` pixels around it: [size, size]."""
    return grown(maps(scene, size).mask(actor, *GARMENTS[garment]), grow)


def grown(mask: NDArray[np.bool_], pixels: int) -> NDArray[np.bool_]:
    """A mask and what is at most that many pixels beside it, in both directions."""
    if pixels < 1:
        return mask
    picture = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MaxFilter(2 * pixels + 1))
    return np.asarray(picture) > 0


def _part(scene: Scene, dice: Dice, size: int) -> NDArray[np.bool_]:
    actor = int(dice.unit() * len(scene.actors))
    grow = int(dice.between(0, 6) * size / CANVAS)
    if isinstance(scene.actors[actor], Puppet):
        return garment_hole(scene, actor, dice.pick(tuple(GARMENTS)), grow, size)
    return grown(maps(scene, size).mask(actor), grow)


def _box(scene: Scene, dice: Dice, size: int) -> NDArray[np.bool_]:
    """The box of an actor, or as often one anywhere."""
    there = [box for box in boxes(scene, size) if box is not None]
    margin = dice.between(0, 0.08) * size
    if there and dice.chance(0.5):
        left, top, right, bottom = dice.pick(there)
    else:
        width, height = (dice.between(0.2, 0.7) * size for _ in range(2))
        left, top = dice.unit() * (size - width), dice.unit() * (size - height)
        right, bottom = left + width, top + height
    found = np.zeros((size, size), dtype=bool)
    rows = slice(max(int(top - margin), 0), math.ceil(bottom + margin))
    found[rows, max(int(left - margin), 0) : math.ceil(right + margin)] = True
    return found


def _brush(dice: Dice, size: int) -> NDArray[np.bool_]:
    """One to four strokes of three to six bends."""
    picture = Image.new("1", (size, size))
    pen = ImageDraw.Draw(picture)
    for _ in range(1 + int(dice.unit() * 4)):
        x, y, turn = dice.unit() * size, dice.unit() * size, dice.unit() * 2 * math.pi
        radius = dice.between(0.04, 0.12) * size
        for _ in range(3 + int(dice.unit() * 4)):
            turn += dice.between(-1.3, 1.3)
            length = dice.between(0.1, 0.35) * size
            ahead = (min(max(x + length * math.cos(turn), 0), size), min(max(y + length * math.sin(turn), 0), size))
            pen.line([(x, y), ahead], fill=1, width=max(1, round(2 * radius)))
            for cx, cy in ((x, y), ahead):
                pen.ellipse((cx - radius, cy - radius, cx + radius, cy + radius), fill=1)
            x, y = ahead
    return np.array(picture)
