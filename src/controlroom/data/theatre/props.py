"""Animals and things, each from four sides."""

from __future__ import annotations

import math

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.paint import INK, Paper, Part, Point, shade
from controlroom.data.theatre.scene import Prop

WHITE: v.RGB = (252, 252, 252)
BEAK: v.RGB = (250, 150, 30)
LEAF: v.RGB = (40, 130, 60)
GLASS: v.RGB = (176, 220, 240)
TYRE: v.RGB = (44, 44, 50)


class _Frame:
    """Local coordinates: x to where the prop faces, y up from the ground, in units of the prop's scale."""

    def __init__(self, prop: Prop, mirrored: bool) -> None:
        self.s = prop.scale
        self._x, self._y = prop.x, prop.ground
        self._sign = prop.facing if mirrored else 1

    def __call__(self, x: float, y: float) -> Point:
        return self._x + x * self.s * self._sign, self._y - y * self.s

    def many(self, *points: Point) -> list[Point]:
        return [self(x, y) for x, y in points]


def draw_prop(paper: Paper, prop: Prop) -> None:
    """List the shapes of an animal or a thing, its shadow first."""
    depth = int(150 + (prop.ground - 100) * 3)
    at = _Frame(prop, mirrored=prop.view == "side" or prop.kind in ("cup", "chair"))
    paper.part, paper.depth = Part.GROUND, depth - 12
    paper.ellipse(at(0, 0), 20 * at.s, 3.2 * at.s, (0, 0, 0), False)
    colour = v.COLOURS[prop.colour]
    paper.depth = depth
    if prop.kind in v.ANIMALS:
        paper.part = Part.ANIMAL
        draw = {"side": _animal_side, "above": _animal_above}.get(prop.view, _animal_front)
        draw(paper, prop, at, colour)
    else:
        paper.part = Part.THING
        _THINGS[prop.kind](paper, prop.view, at, colour)


def _ears(
    paper: Paper, kind: str, at: _Frame, colour: v.RGB, x: float, y: float, r: float, sides: tuple[int, ...]
) -> None:
    """Ears on a head of radius ``r`` whose centre is at (x, y)."""
    dark = shade(colour, 0.72)
    for side in sides:
        if kind == "cat":
            points = at.many(
                (x + side * r * 0.95, y + r * 0.2),
                (x + side * r * 0.8, y + r * 1.5),
                (x + side * r * 0.1, y + r * 0.85),
            )
            paper.polygon(points, colour)
        elif kind == "dog":
            paper.limb(
                [at(x + side * r * 0.9, y + r * 0.5), at(x + side * r * 1.15, y - r * 0.4)], r * 0.32 * at.s, dark
            )
        elif kind == "rabbit":
            paper.limb(
                [at(x + side * r * 0.4, y + r * 0.8), at(x + side * r * 0.6, y + r * 2.3)], r * 0.28 * at.s, colour
            )
        elif kind == "elephant":
            paper.ellipse(at(x + side * r * 1.25, y + r * 0.1), r * 0.7 * at.s, r * 0.95 * at.s, dark)


def _animal_side(paper: Paper, prop: Prop, at: _Frame, colour: v.RGB) -> None:
    s, kind, dark = at.s, prop.kind, shade(colour, 0.72)
    if kind == "bird":
        for x in (-2, 4):
            paper.line([at(x, 9), at(x, 0)], 2.0 * s, BEAK)
        paper.polygon(at.many((-12, 20), (-27, 29), (-24, 16)), dark)
        paper.ellipse(at(0, 20), 16 * s, 13 * s, colour)
        paper.polygon(at.many((19, 36), (28, 32), (19, 29)), BEAK)
        paper.ellipse(at(12, 34), 9.5 * s, 9.5 * s, colour)
        paper.ellipse(at(-3, 20), 10 * s, 6.5 * s, dark)
        paper.ellipse(at(14, 36), 2.3 * s, 2.3 * s, INK, False)
        return
    long, high, leg, thick, r = {
        "cat": (17, 19, 12, 3.0, 10.0),
        "dog": (18, 20, 13, 3.4, 10.5),
        "rabbit": (14, 15, 6, 3.4, 9.5),
        "elephant": (21, 26, 15, 5.0, 13.0),
    }[kind]
    head: Point = (long + 3, high + (10 if kind != "elephant" else 6))
    tail = {"cat": (-12, 24), "dog": (-9, 12), "elephant": (-6, -12), "rabbit": (-3, 2)}[kind]
    if kind == "rabbit":
        paper.ellipse(at(-long - 2, high), 5.5 * s, 5.5 * s, WHITE)
    else:
        paper.limb([at(-long + 2, high + 3), at(-long + 2 + tail[0], high + 3 + tail[1])], 1.9 * s, colour)
    for x in (-long + 5, -long + 12, long - 10, long - 3):
        paper.limb([at(x, leg), at(x, 2.5)], thick * s, colour)
    paper.ellipse(at(0, high), long * 1.12 * s, (high - leg + 3) * 1.25 * s, colour)
    if kind == "elephant":
        paper.limb([at(head[0] + 9, head[1]), at(head[0] + 16, head[1] - 12), at(head[0] + 15, 8)], 3.4 * s, colour)
    if kind != "elephant":
        _ears(paper, kind, at, colour, head[0], head[1], r, (-1, 1) if kind == "cat" else (-1,))
    if kind == "rabbit":
        _ears(paper, kind, at, colour, head[0] + 3, head[1], r, (1,))
    paper.ellipse(at(*head), r * s, r * s, colour)
    if kind == "dog":
        paper.limb([at(head[0] + 8, head[1] - 3), at(head[0] + 13, head[1] - 3)], 4.4 * s, colour)
        paper.ellipse(at(head[0] + 17, head[1] - 1), 2.6 * s, 2.4 * s, INK, False)
        _ears(paper, kind, at, colour, head[0] + 2, head[1] + 3, r * 0.9, (-1,))
    if kind == "elephant":
        paper.ellipse(at(head[0] - 8, head[1]), 8.5 * s, 11 * s, dark)
    if kind in ("cat", "rabbit"):
        paper.ellipse(at(head[0] + r * 0.9, head[1] - 2), 1.8 * s, 1.6 * s, (230, 110, 120), False)
    paper.ellipse(at(head[0] + r * 0.4, head[1] + 2.5), 3.0 * s, 3.2 * s, WHITE, False)
    paper.ellipse(at(head[0] + r * 0.5, head[1] + 2.5), 1.8 * s, 2.1 * s, INK, False)


def _animal_front(paper: Paper, prop: Prop, at: _Frame, colour: v.RGB) -> None:
    """Front and back: the same form, with a face or with a tail."""
    s, kind, dark = at.s, prop.kind, shade(colour, 0.72)
    back = prop.view == "back"
    wide = {"elephant": 19, "bird": 15}.get(kind, 14)
    legs = BEAK if kind == "bird" else colour
    for x in (-8, 8):
        paper.limb([at(x, 12), at(x, 2.5)], (1.4 if kind == "bird" else 4.0) * s, legs)
    paper.ellipse(at(0, 18), wide * s, 13 * s, colour)
    if kind == "bird":
        for side in (-1, 1):
            paper.ellipse(at(side * wide * 0.95, 19), 4.5 * s, 9 * s, dark)
    r, y = (13.0, 34.0) if kind != "bird" else (10.5, 34.0)
    _ears(paper, kind, at, colour, 0, y, r, (-1, 1))
    paper.ellipse(at(0, y), r * s, r * s, colour)
    if back:
        if kind == "rabbit":
            paper.ellipse(at(0, 14), 6 * s, 6 * s, WHITE)
        elif kind == "bird":
            paper.polygon(at.many((-5, 14), (5, 14), (8, 3), (-8, 3)), dark)
        else:
            paper.limb([at(0, 14), at(6, 24)], 2.0 * s, dark)
        return
    for side in (-1, 1):
        paper.ellipse(at(side * 5, y + 2), 3.0 * s, 3.2 * s, WHITE, False)
        paper.ellipse(at(side * 5, y + 2), 1.8 * s, 2.1 * s, INK, False)
    if kind == "elephant":
        paper.limb([at(0, y - 4), at(0, y - 22)], 3.6 * s, colour)
    elif kind == "bird":
        paper.polygon(at.many((-4, y - 1), (4, y - 1), (0, y - 8)), BEAK)
    else:
        paper.ellipse(at(0, y - 4), 3.2 * s, 2.6 * s, INK if kind == "dog" else (230, 110, 120), False)


def _animal_above(paper: Paper, prop: Prop, at: _Frame, colour: v.RGB) -> None:
    s, kind, dark = at.s, prop.kind, shade(colour, 0.72)
    if kind == "bird":
        for side in (-1, 1):
            paper.ellipse(at(side * 16, 22), 12 * s, 7 * s, dark)
        paper.polygon(at.many((-6, 34), (6, 34), (0, 46)), dark)
    elif kind == "rabbit":
        paper.ellipse(at(0, 42), 5.5 * s, 5.5 * s, WHITE)
    else:
        paper.limb([at(0, 36), at(5, 49)], 2.0 * s, dark)
    paper.ellipse(at(0, 25), (15 if kind == "elephant" else 12) * s, 16 * s, colour)
    if kind == "elephant":
        paper.limb([at(0, 8), at(0, -4)], 3.2 * s, colour)
    elif kind == "bird":
        paper.polygon(at.many((-4, 3), (4, 3), (0, -5)), BEAK)
    _ears(paper, kind, at, colour, 0, 11, 9.5, (-1, 1))
    paper.ellipse(at(0, 11), 9.5 * s, 9.5 * s, colour)
    if kind != "bird":
        paper.ellipse(at(0, 3), 2.4 * s, 2.0 * s, INK, False)


def _ball(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    paper.ellipse(at(0, 18), 18 * at.s, 18 * at.s, colour)
    paper.ellipse(at(-6, 25), 4.5 * at.s, 4.5 * at.s, shade(colour, 1.75), False)


def _box(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    ribbon = shade(colour, 1.7) if sum(colour) < 600 else shade(colour, 0.7)
    if view == "above":
        paper.polygon(at.many((-18, 2), (18, 2), (18, 36), (-18, 36)), colour)
        paper.polygon(at.many((-3.5, 2), (3.5, 2), (3.5, 36), (-3.5, 36)), ribbon, False)
        paper.polygon(at.many((-18, 16), (18, 16), (18, 22), (-18, 22)), ribbon, False)
        return
    paper.polygon(at.many((12, 0), (21, 8), (21, 38), (12, 30)), shade(colour, 0.7))
    paper.polygon(at.many((-18, 30), (12, 30), (21, 38), (-9, 38)), shade(colour, 1.3))
    paper.polygon(at.many((-18, 0), (12, 0), (12, 30), (-18, 30)), colour)
    if view == "front":
        paper.polygon(at.many((-6, 0), (0, 0), (0, 30), (-6, 30)), ribbon, False)
    elif view == "side":
        paper.polygon(at.many((-18, 12), (12, 12), (12, 18), (-18, 18)), ribbon, False)


def _cone(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    if view == "above":
        paper.ellipse(at(0, 19), 18 * at.s, 18 * at.s, colour)
        paper.ellipse(at(0, 19), 6 * at.s, 6 * at.s, shade(colour, 1.5))
        return
    paper.polygon(at.many((-19, 2), (0, 42), (19, 2)), colour)
    paper.ellipse(at(0, 2), 19 * at.s, 4 * at.s, shade(colour, 0.8))


def _star(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    narrow, flat = (0.3 if view == "side" else 1.0), (0.35 if view == "above" else 1.0)
    points: list[Point] = []
    for corner in range(10):
        reach = 21.0 if corner % 2 == 0 else 9.5
        turn = math.pi * corner / 5
        points.append(at(math.sin(turn) * reach * narrow, (19 + math.cos(turn) * reach) * flat))
    paper.polygon(points, colour)


def _car(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    s, dark = at.s, shade(colour, 0.72)
    if view == "side":
        paper.polygon(at.many((-14, 19), (-9, 31), (9, 31), (16, 19)), colour)
        paper.polygon(at.many((-10, 20), (-7, 28), (0, 28), (0, 20)), GLASS, False)
        paper.polygon(at.many((2, 20), (2, 28), (8, 28), (12, 20)), GLASS, False)
        paper.polygon(at.many((-24, 6), (-24, 18), (-14, 20), (16, 20), (25, 16), (25, 6)), colour)
        for x in (-13, 13):
            paper.ellipse(at(x, 5.5), 6 * s, 6 * s, TYRE)
            paper.ellipse(at(x, 5.5), 2.4 * s, 2.4 * s, WHITE, False)
        return
    if view == "above":
        paper.polygon(at.many((-14, 0), (14, 0), (14, 46), (-14, 46)), colour)
        paper.polygon(at.many((-11, 8), (11, 8), (9, 16), (-9, 16)), GLASS)
        paper.polygon(at.many((-9, 34), (9, 34), (11, 40), (-11, 40)), GLASS)
        paper.polygon(at.many((-9, 17), (9, 17), (9, 33), (-9, 33)), dark)
        return
    for x in (-12, 12):
        paper.polygon(at.many((x - 4, 0), (x + 4, 0), (x + 4, 8), (x - 4, 8)), TYRE)
    paper.polygon(at.many((-13, 20), (-9, 34), (9, 34), (13, 20)), colour)
    paper.polygon(at.many((-10, 21), (-7, 31), (7, 31), (10, 21)), GLASS, False)
    paper.polygon(at.many((-18, 5), (18, 5), (18, 21), (-18, 21)), colour)
    for x in (-12, 12):
        paper.ellipse(at(x, 14), 4 * s, 4 * s, (255, 244, 170) if view == "front" else (150, 16, 24))
    paper.polygon(at.many((-6, 8), (6, 8), (6, 12), (-6, 12)), dark if view == "front" else WHITE, False)


def _chair(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    dark = shade(colour, 0.72)
    if view == "above":
        paper.polygon(at.many((-16, 0), (16, 0), (16, 30), (-16, 30)), colour)
        paper.polygon(at.many((-16, 30), (16, 30), (16, 38), (-16, 38)), dark)
        return
    if view == "side":
        for x in (-12, 12):
            paper.limb([at(x, 2), at(x, 16)], 2.4 * at.s, dark)
        paper.polygon(at.many((-16, 15), (16, 15), (16, 22), (-16, 22)), colour)
        paper.polygon(at.many((-16, 22), (-10, 22), (-12, 48), (-18, 48)), colour)
        return
    for x in (-13, 13):
        paper.limb([at(x, 2), at(x, 16)], 2.4 * at.s, dark)
    paper.polygon(at.many((-15, 22), (15, 22), (15, 48), (-15, 48)), colour)
    if view == "front":
        paper.polygon(at.many((-18, 15), (18, 15), (15, 25), (-15, 25)), shade(colour, 1.25))
    else:
        for x in (-6, 6):
            paper.polygon(at.many((x - 2, 24), (x + 2, 24), (x + 2, 45), (x - 2, 45)), dark, False)


def _cup(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    s, spot = at.s, shade(colour, 1.7) if sum(colour) < 600 else shade(colour, 0.7)
    if view == "above":
        paper.limb([at(14, 18), at(25, 18)], 3 * s, colour)
        paper.ellipse(at(0, 18), 17 * s, 17 * s, colour)
        paper.ellipse(at(0, 18), 12 * s, 12 * s, (92, 54, 32))
        return
    if view == "side":
        paper.ellipse(at(17, 17), 9 * s, 9 * s, colour)
        paper.ellipse(at(17, 17), 4.5 * s, 4.5 * s, shade(colour, 0.5))
    paper.polygon(at.many((-14, 0), (14, 0), (17, 34), (-17, 34)), colour)
    paper.ellipse(at(0, 34), 17 * s, 4 * s, shade(colour, 0.72))
    if view == "front":
        paper.ellipse(at(0, 16), 6 * s, 6 * s, spot, False)


def _flower(paper: Paper, view: str, at: _Frame, colour: v.RGB) -> None:
    s = at.s
    if view != "above":
        paper.line([at(0, 0), at(0, 30)], 3 * s, LEAF)
        paper.ellipse(at(7, 10), 7 * s, 3.4 * s, LEAF)
    y, flat = (20.0, 1.25) if view == "above" else (34.0, 1.0)
    if view == "side":
        for x in (-9, 0, 9):
            paper.ellipse(at(x, 38), 6.5 * s, 9 * s, colour)
        paper.chord(at(0, 33), 10 * s, 9 * s, 0, 180, LEAF)
        return
    for petal in range(6):
        turn = math.pi * petal / 3
        paper.ellipse(
            at(math.sin(turn) * 10 * flat, y + math.cos(turn) * 10 * flat), 6.6 * s * flat, 6.6 * s * flat, colour
        )
    heart = LEAF if view == "back" else (250, 214, 54) if colour != v.COLOURS["yellow"] else (126, 78, 44)
    paper.ellipse(at(0, y), 6 * s * flat, 6 * s * flat, heart)


_THINGS = {
    "ball": _ball,
    "box": _box,
    "cone": _cone,
    "star": _star,
    "car": _car,
    "chair": _chair,
    "cup": _cup,
    "flower": _flower,
}
