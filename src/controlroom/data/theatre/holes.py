"""Which part of a picture is missing, for models that fill it: parts and boxes by ground truth, brushes, all of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from controlroom.data.holes import brush_hole, random_box, with_margin
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
        found = brush_hole(dice, (size, size))
    return found if found.any() else brush_hole(dice, (size, size))


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
    of_actor = bool(there) and dice.chance(0.5)
    return with_margin(dice.pick(there) if of_actor else random_box(dice, (size, size)), margin, (size, size))
