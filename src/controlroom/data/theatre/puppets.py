"""How a puppet is cut from paper: garments with patterns, hair, face, hat, seen from four sides."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

from controlroom.data.theatre import poses as p
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.paint import INK, Paper, Part, Point, shade
from controlroom.data.theatre.scene import Garment, Puppet

WHITE: v.RGB = (252, 252, 252)
SHOE: v.RGB = (74, 48, 36)
_LIPS: dict[str, v.RGB] = {
    "pale": (176, 52, 60),
    "tan": (150, 40, 44),
    "brown": (88, 24, 28),
    "dark": (226, 128, 118),
}
_MOUTH_INSIDE: v.RGB = (64, 10, 22)


def second_colour(colour: str) -> v.RGB:
    """What stripes, dots and checks are drawn in."""
    return (120, 128, 150) if colour == "white" else WHITE


def _lerp(a: Point, b: Point, t: float) -> Point:
    return a[0] + (b[0] - a[0]) * t, a[1] + (b[1] - a[1]) * t


class Cloth:
    """A piece of cloth as a stack of rows from top to bottom, so that patterns follow it without clipping."""

    def __init__(self, rows: list[tuple[Point, Point]]) -> None:
        self.rows = rows

    def row(self, t: float) -> tuple[Point, Point]:
        place = min(max(t, 0.0), 1.0) * (len(self.rows) - 1)
        index = min(int(place), len(self.rows) - 2)
        (left0, right0), (left1, right1) = self.rows[index], self.rows[index + 1]
        return _lerp(left0, left1, place - index), _lerp(right0, right1, place - index)

    def at(self, u: float, t: float) -> Point:
        left, right = self.row(t)
        return _lerp(left, right, u)

    def outline(self) -> list[Point]:
        return [left for left, _ in self.rows] + [right for _, right in reversed(self.rows)]

    def patch(self, u0: float, u1: float, t0: float, t1: float) -> list[Point]:
        return [self.at(u0, t0), self.at(u1, t0), self.at(u1, t1), self.at(u0, t1)]


def paint_cloth(
    paper: Paper, cloth: Cloth, garment: Garment, scale: float, bands: int, columns: int = 3, outlined: bool = True
) -> None:
    """Fill ``cloth`` with the garment's colour and pattern; ``bands``: stripes from top to bottom."""
    base, other = v.COLOURS[garment.colour], second_colour(garment.colour)
    paper.polygon(cloth.outline(), base, outlined)
    inset = 0.0
    if garment.pattern == "striped":
        for band in range(bands):
            top = (band + 0.5) / bands
            paper.polygon(cloth.patch(inset, 1 - inset, top, min(top + 0.46 / bands, 1.0)), other, False)
    elif garment.pattern == "dotted":
        rows = max(bands - 1, 2)
        for row in range(rows):
            count = columns if row % 2 == 0 else columns - 1
            for column in range(count):
                centre = cloth.at((column + 0.5 + (row % 2) * 0.5) / columns, (row + 0.5) / rows)
                paper.ellipse(centre, 2.0 * scale, 2.0 * scale, other, False)
    elif garment.pattern == "checked":
        for row in range(bands):
            for column in range(columns + 1):
                if (row + column) % 2 == 0:
                    u, t = column / (columns + 1), row / bands
                    paper.polygon(cloth.patch(u, u + 1 / (columns + 1), t, t + 1 / bands), other, False)
    if outlined and garment.pattern != "plain":
        points = cloth.outline()
        paper.line([*points, points[0]], 1.25, INK)


def _tube_cloth(points: list[Point], radius: float) -> Cloth:
    rows: list[tuple[Point, Point]] = []
    for index, point in enumerate(points):
        before, after = points[max(index - 1, 0)], points[min(index + 1, len(points) - 1)]
        dx, dy = after[0] - before[0], after[1] - before[1]
        length = math.hypot(dx, dy) or 1.0
        nx, ny = -dy / length * radius, dx / length * radius
        rows.append(((point[0] + nx, point[1] + ny), (point[0] - nx, point[1] - ny)))
    return Cloth(rows)


def paint_tube(paper: Paper, points: list[Point], radius: float, garment: Garment, scale: float) -> None:
    """A sleeve or a trouser leg: plain tube first, then the pattern across it."""
    paper.limb(points, radius, v.COLOURS[garment.colour])
    if garment.pattern == "plain":
        return
    cloth, other = _tube_cloth(points, radius * 0.86), second_colour(garment.colour)
    length = sum(math.dist(a, b) for a, b in pairwise(points))
    count = max(2, round(length / (6.5 * scale)))
    for band in range(count):
        t = (band + 0.35) / count
        if garment.pattern == "striped":
            paper.polygon(cloth.patch(0, 1, t, t + 0.46 / count), other, False)
        elif garment.pattern == "dotted":
            paper.ellipse(cloth.at(0.5, (band + 0.5) / count), 1.7 * scale, 1.7 * scale, other, False)
        else:
            half = 0.5 * (band % 2)
            paper.polygon(cloth.patch(half, half + 0.5, band / count, (band + 1) / count), other, False)


def draw_puppet(paper: Paper, puppet: Puppet) -> None:
    """List the shapes of a puppet, its shadow first, what is nearest last."""
    points = p.joints(puppet)
    depth = int(150 + (puppet.ground - 100) * 3)
    s, view, one = puppet.scale, puppet.view, puppet.identity
    centre, radius, turn = p.head(puppet, points)

    paper.part, paper.depth = Part.GROUND, int(depth) - 12
    paper.ellipse((puppet.x, puppet.ground + 0.5), 17 * s, 3.2 * s, (0, 0, 0), False)
    if one.hair_length == "long" and view in ("front", "above", "side"):
        paper.part, paper.depth = Part.HAIR, depth - 4
        _long_hair_behind(paper, puppet, centre, radius, points[p.NECK])
    if view == "side":
        _arm(paper, puppet, points, p.L_SHOULDER if puppet.facing > 0 else p.R_SHOULDER, depth - 6)
    _legs(paper, puppet, points, depth)
    paper.part, paper.depth = Part.TOP, depth
    _torso(paper, puppet, points)
    _head(paper, puppet, points, centre, radius, turn, depth)
    if view == "side":
        _arm(paper, puppet, points, p.R_SHOULDER if puppet.facing > 0 else p.L_SHOULDER, depth + 8)
    else:
        _arm(paper, puppet, points, p.R_SHOULDER, depth + 6)
        _arm(paper, puppet, points, p.L_SHOULDER, depth + 6)


def _torso(paper: Paper, puppet: Puppet, points: list[Point]) -> None:
    one, s = puppet.identity, puppet.scale
    neck = points[p.NECK]
    hips = _lerp(points[p.R_HIP], points[p.L_HIP], 0.5)
    ax, ay = hips[0] - neck[0], hips[1] - neck[1]
    length = math.hypot(ax, ay) or 1.0
    px, py = ay / length, -ax / length  # points to the right of the picture
    thin = 0.64 if puppet.view == "side" else 1.0
    shoulder = p.SHOULDERS[one.figure] + 3.2
    waist, hip = (7.6, 10.4) if one.figure == "woman" else (10.6, 9.6)
    widths = [(0.0, shoulder * 0.62), (0.07, shoulder), (0.3, shoulder * 0.97), (0.62, waist), (1.1, hip)]
    rows: list[tuple[Point, Point]] = []
    for t, half in widths:
        x, y, w = neck[0] + ax * t, neck[1] + ay * t, half * s * thin
        rows.append(((x - px * w, y - py * w), (x + px * w, y + py * w)))
    columns = 3 if puppet.view != "side" else 2
    paint_cloth(paper, Cloth(_evenly(rows, widths)), one.top, s, bands=5, columns=columns)


def _evenly(rows: list[tuple[Point, Point]], widths: list[tuple[float, float]]) -> list[tuple[Point, Point]]:
    """Rows at equal steps along the cloth, so that stripes are equally wide."""
    heights = [t for t, _ in widths]
    even: list[tuple[Point, Point]] = []
    steps = 12
    for step in range(steps + 1):
        t = heights[0] + (heights[-1] - heights[0]) * step / steps
        index = max(i for i in range(len(heights) - 1) if heights[i] <= t + 1e-9)
        share = (t - heights[index]) / (heights[index + 1] - heights[index])
        (l0, r0), (l1, r1) = rows[index], rows[index + 1]
        even.append((_lerp(l0, l1, share), _lerp(r0, r1, share)))
    return even


def _legs(paper: Paper, puppet: Puppet, points: list[Point], depth: int) -> None:
    one, s = puppet.identity, puppet.scale
    skin, lower = v.SKINS[one.skin], one.lower
    sides = [(p.L_HIP, Part.LEFT_LEG), (p.R_HIP, Part.RIGHT_LEG)]
    if puppet.view == "side" and puppet.facing < 0:
        sides.reverse()
    for hip, part in sides:
        leg = points[hip : hip + 3]
        outward = 1.0 if leg[2][0] >= puppet.x else -1.0
        if puppet.view == "side":
            outward = float(puppet.facing)
        paper.depth = depth - 3 if hip == sides[0][0] else depth - 1
        paper.part = Part.SHOES
        paper.ellipse((leg[2][0] + outward * 1.8 * s, leg[2][1] + 0.6 * s), 5.4 * s, 3.2 * s, SHOE)
        if lower.kind == "trousers":
            paper.part = Part.LOWER
            paint_tube(paper, leg, 4.6 * s, lower, s)
            continue
        paper.part = part
        paper.limb(leg, 3.6 * s, skin)
        if lower.kind == "shorts":
            paper.part = Part.LOWER
            paint_tube(paper, [leg[0], _lerp(leg[0], leg[1], 0.8)], 5.4 * s, lower, s)
    paper.part, paper.depth = Part.LOWER, depth
    right, left = points[p.R_HIP], points[p.L_HIP]
    if lower.kind != "skirt":
        paper.limb([right, left], 5.2 * s, v.COLOURS[lower.colour])
        return
    if right[0] > left[0]:
        right, left = left, right
    knees = [points[p.R_KNEE], points[p.L_KNEE]]
    hem = max(hips[1] for hips in (right, left)) + (14.5 if puppet.view != "above" else 9.5) * s
    west = min(min(x for x, _ in knees) - 2.0 * s, right[0] - 8.5 * s)
    east = max(max(x for x, _ in knees) + 2.0 * s, left[0] + 8.5 * s)
    top_left, top_right = (right[0] - 3.8 * s, right[1] - 3.5 * s), (left[0] + 3.8 * s, left[1] - 3.5 * s)
    paint_cloth(paper, Cloth([(top_left, top_right), ((west, hem), (east, hem))]), lower, s, bands=3, columns=3)


def _arm(paper: Paper, puppet: Puppet, points: list[Point], shoulder: int, depth: int) -> None:
    one, s = puppet.identity, puppet.scale
    skin, arm = v.SKINS[one.skin], points[shoulder : shoulder + 3]
    paper.depth = depth
    paper.part = Part.RIGHT_ARM if shoulder == p.R_SHOULDER else Part.LEFT_ARM
    paper.limb(arm if one.top.kind == "shirt" else [_lerp(arm[1], arm[2], 0.8), arm[2]], 3.1 * s, skin)
    paper.ellipse(arm[2], 3.9 * s, 3.9 * s, skin)
    paper.part = Part.TOP
    sleeve = [arm[0], _lerp(arm[0], arm[1], 0.72)]
    if one.top.kind == "sweater":
        sleeve = [arm[0], arm[1], _lerp(arm[1], arm[2], 0.78)]
    paint_tube(paper, sleeve, 4.2 * s, one.top, s)


def _long_hair_behind(paper: Paper, puppet: Puppet, centre: Point, radius: float, neck: Point) -> None:
    hair = v.HAIR_COLOURS[puppet.identity.hair_colour]
    x, y = centre
    if puppet.view == "side":
        x -= puppet.facing * radius * 0.45
        paper.limb([(x, y), (x - puppet.facing * radius * 0.2, neck[1] + radius * 0.75)], radius * 0.72, hair)
        return
    bottom = neck[1] + radius * 0.62
    wide = radius * 1.22
    paper.polygon(
        [
            (x - wide * 0.8, y - radius * 0.6),
            (x + wide * 0.8, y - radius * 0.6),
            (x + wide, bottom),
            (x - wide, bottom),
        ],
        hair,
    )


def _head(
    paper: Paper, puppet: Puppet, points: list[Point], centre: Point, radius: float, turn: float, depth: int
) -> None:
    one, view = puppet.identity, puppet.view
    skin, hair = v.SKINS[one.skin], v.HAIR_COLOURS[one.hair_colour]
    degrees = math.degrees(turn)

    def at(x: float, y: float) -> Point:
        dx, dy = x * radius, y * radius
        return (
            centre[0] + dx * math.cos(turn) - dy * math.sin(turn),
            centre[1] + dx * math.sin(turn) + dy * math.cos(turn),
        )

    paper.part, paper.depth = Part.HEAD, depth + 2
    paper.limb([points[p.NECK], at(0, 0.7)], 3.4 * puppet.scale, shade(skin, 0.9))
    if view == "back":
        paper.part, paper.depth = Part.HAIR, depth + 4
        if one.hair_length == "long":
            left, right = at(-1.08, -0.1), at(1.08, -0.1)
            low = points[p.NECK][1] + radius * 0.75
            paper.polygon([left, right, (right[0] + 1, low), (left[0] - 1, low)], hair)
        paper.ellipse(centre, radius * 1.06, radius * 1.06, hair)
        paper.line([at(-0.5, 0.1), at(-0.55, 0.75)], 1.2, shade(hair, 0.75))
        paper.line([at(0.5, 0.1), at(0.55, 0.75)], 1.2, shade(hair, 0.75))
        _hat(paper, puppet, centre, radius, degrees, depth)
        return
    if view == "side":
        f = puppet.facing
        paper.ellipse(at(0.95 * f, 0.15), radius * 0.2, radius * 0.17, skin)
        paper.ellipse(centre, radius, radius, skin)
        paper.part, paper.depth = Part.HAIR, depth + 4
        if f > 0:
            paper.chord(at(-0.06, -0.06), radius * 1.1, radius * 1.1, 95 + degrees, 320 + degrees, hair)
        else:
            paper.chord(at(0.06, -0.06), radius * 1.1, radius * 1.1, 220 + degrees, 445 + degrees, hair)
        paper.part = Part.HEAD
        paper.ellipse(at(-0.14 * f, 0.12), radius * 0.2, radius * 0.24, skin)
        _side_face(paper, puppet, at, radius)
        _hat(paper, puppet, centre, radius, degrees, depth)
        return
    low = 0.3 if view == "above" else 0.0
    if one.hair_length == "short":
        paper.ellipse(at(-0.98, 0.3 + low * 0.5), radius * 0.18, radius * 0.22, skin)
        paper.ellipse(at(0.98, 0.3 + low * 0.5), radius * 0.18, radius * 0.22, skin)
    paper.ellipse(centre, radius, radius, skin)
    paper.part, paper.depth = Part.HAIR, depth + 4
    if view == "above":
        paper.chord(at(0, -0.05), radius * 1.12, radius * 1.08, 168 + degrees, 372 + degrees, hair)
        paper.ellipse(at(0, -0.35), radius * 1.0, radius * 0.72, hair, False)
    else:
        paper.chord(at(0, -0.05), radius * 1.12, radius * 1.12, 198 + degrees, 342 + degrees, hair)
    for side in (-1, 1):  # whatever the hat, hair shows beside the face
        if one.hair_length == "long":
            paper.limb([at(side * 0.98, -0.2), at(side * 1.04, 0.9)], radius * 0.2, hair)
        else:
            paper.limb([at(side * 0.95, -0.3), at(side * 0.93, 0.12 + low * 0.5)], radius * 0.15, hair)
    paper.part = Part.HEAD
    _front_face(paper, puppet, at, radius, low)
    _hat(paper, puppet, centre, radius, degrees, depth)


def _front_face(paper: Paper, puppet: Puppet, at: Callable[[float, float], Point], radius: float, low: float) -> None:
    mood, skin = puppet.expression, puppet.identity.skin
    lips = _LIPS[skin]
    brow = shade(v.HAIR_COLOURS[puppet.identity.hair_colour], 0.7)
    if puppet.identity.skin == "dark" and sum(brow) < 200:
        brow = (20, 14, 12)
    for side in (-1, 1):
        big = mood == "surprised"
        paper.ellipse(
            at(0.4 * side, -0.1 + low), radius * (0.27 if big else 0.2), radius * (0.3 if big else 0.22), WHITE, False
        )
        paper.ellipse(at(0.4 * side, -0.08 + low), radius * 0.125, radius * 0.15, INK, False)
        outer, inner = {
            "neutral": (-0.42, -0.42),
            "smiling": (-0.42, -0.48),
            "surprised": (-0.56, -0.6),
            "frowning": (-0.54, -0.26),
        }[mood]
        paper.line([at(0.64 * side, outer + low), at(0.2 * side, inner + low)], radius * 0.13, brow)
    y = 0.52 + low * 0.8
    if mood == "smiling":
        x0, y0 = at(0, y - 0.12)
        paper.chord((x0, y0), radius * 0.5, radius * 0.42, 0, 180, lips, False)
        paper.chord((x0, y0), radius * 0.36, radius * 0.22, 0, 180, WHITE, False)
    elif mood == "surprised":
        x0, y0 = at(0, y + 0.06)
        paper.ellipse((x0, y0), radius * 0.26, radius * 0.32, lips, False)
        paper.ellipse((x0, y0), radius * 0.16, radius * 0.22, _MOUTH_INSIDE, False)
    elif mood == "frowning":
        arc = [at(0.42 * math.cos(a), y + 0.2 - 0.28 * math.sin(a)) for a in (0.15, 0.8, 1.57, 2.34, 2.99)]
        paper.line(arc, radius * 0.17, lips)
    else:
        paper.line([at(-0.26, y), at(0.26, y)], radius * 0.16, lips)


def _side_face(paper: Paper, puppet: Puppet, at: Callable[[float, float], Point], radius: float) -> None:
    mood, f = puppet.expression, puppet.facing
    lips = _LIPS[puppet.identity.skin]
    big = mood == "surprised"
    paper.ellipse(at(0.48 * f, -0.12), radius * (0.26 if big else 0.2), radius * (0.3 if big else 0.22), WHITE, False)
    paper.ellipse(at(0.53 * f, -0.1), radius * 0.125, radius * 0.15, INK, False)
    brow = shade(v.HAIR_COLOURS[puppet.identity.hair_colour], 0.7)
    back, front = {"neutral": (-0.44, -0.44), "smiling": (-0.44, -0.48), "surprised": (-0.58, -0.6)}.get(
        mood, (-0.54, -0.28)
    )
    paper.line([at(0.3 * f, back), at(0.74 * f, front)], radius * 0.13, brow)
    if mood == "smiling":
        paper.chord(at(0.6 * f, 0.42), radius * 0.3, radius * 0.34, 0, 180, lips, False)
    elif mood == "surprised":
        paper.ellipse(at(0.68 * f, 0.56), radius * 0.2, radius * 0.26, _MOUTH_INSIDE if lips[0] > 100 else lips, False)
    elif mood == "frowning":
        paper.line([at(0.38 * f, 0.72), at(0.6 * f, 0.5), at(0.8 * f, 0.56)], radius * 0.16, lips)
    else:
        paper.line([at(0.42 * f, 0.54), at(0.8 * f, 0.54)], radius * 0.16, lips)


def _hat(paper: Paper, puppet: Puppet, centre: Point, radius: float, degrees: float, depth: int) -> None:
    kind = puppet.identity.hat
    if kind == "none":
        return
    colour = v.COLOURS[puppet.identity.hat_colour]
    turn = math.radians(degrees)

    def at(x: float, y: float) -> Point:
        dx, dy = x * radius, y * radius
        return (
            centre[0] + dx * math.cos(turn) - dy * math.sin(turn),
            centre[1] + dx * math.sin(turn) + dy * math.cos(turn),
        )

    paper.part, paper.depth = Part.HAT, depth + 6
    if puppet.view == "above":
        wide = {"top hat": 1.25, "cap": 1.05, "beanie": 1.0}[kind]
        paper.ellipse(at(0, -0.4), radius * wide, radius * wide * 0.72, colour)
        if kind == "top hat":
            paper.ellipse(at(0, -0.45), radius * 0.75, radius * 0.5, shade(colour, 0.8))
        elif kind == "cap":
            paper.chord(at(0, 0.02), radius * 0.9, radius * 0.5, 0 + degrees, 180 + degrees, shade(colour, 0.8))
        else:
            paper.ellipse(at(0, -0.5), radius * 0.34, radius * 0.28, WHITE)
        return
    if kind == "top hat":
        paper.polygon([at(-0.72, -1.62), at(0.72, -1.62), at(0.66, -0.66), at(-0.66, -0.66)], colour)
        paper.polygon([at(-1.25, -0.82), at(1.25, -0.82), at(1.25, -0.56), at(-1.25, -0.56)], colour)
    elif kind == "cap":
        paper.chord(at(0, -0.38), radius * 1.1, radius * 0.85, 180 + degrees, 360 + degrees, colour)
        if puppet.view == "side":
            paper.ellipse(at(1.0 * puppet.facing, -0.42), radius * 0.62, radius * 0.17, shade(colour, 0.8))
        elif puppet.view == "front":
            paper.ellipse(at(0, -0.42), radius * 0.95, radius * 0.2, shade(colour, 0.8))
    else:
        paper.chord(at(0, -0.34), radius * 1.12, radius * 0.98, 180 + degrees, 360 + degrees, colour)
        paper.polygon([at(-1.12, -0.58), at(1.12, -0.58), at(1.12, -0.3), at(-1.12, -0.3)], shade(colour, 0.78))
        paper.ellipse(at(0, -1.36), radius * 0.26, radius * 0.26, WHITE)


def draw_flat_garment(paper: Paper, garment: Garment) -> None:
    """The garment alone, laid flat in the middle of the canvas, as a shop shows it."""
    paper.depth = 180
    if garment.kind in v.TOPS:
        paper.part = Part.TOP
        for side in (-1, 1):
            reach = (27, 12) if garment.kind == "shirt" else (36, 40)
            shoulder = (64 + side * 20, 40)
            end = (64 + side * (20 + reach[0] * 0.62), 40 + reach[1])
            paint_tube(paper, [shoulder, end], 9.5, garment, 2.3)
        rows = [((50.0, 28.0), (78.0, 28.0)), ((39.0, 33.0), (89.0, 33.0)), ((41.0, 66.0), (87.0, 66.0))]
        rows.append(((39.0, 100.0), (89.0, 100.0)))
        heights = [(0.0, 0.0), (0.07, 0.0), (0.53, 0.0), (1.0, 0.0)]
        paint_cloth(paper, Cloth(_evenly(rows, heights)), garment, 2.2, bands=5, columns=3)
        return
    paper.part = Part.LOWER
    if garment.kind == "skirt":
        rows = [((46.0, 32.0), (82.0, 32.0)), ((28.0, 96.0), (100.0, 96.0))]
        paint_cloth(paper, Cloth(rows), garment, 2.2, bands=4, columns=4)
        return
    hem = 110.0 if garment.kind == "trousers" else 70.0
    for side in (-1, 1):
        paint_tube(paper, [(64.0 + side * 10, 32.0), (64.0 + side * 17, hem)], 11.0, garment, 2.2)
    paper.rectangle(42, 20, 86, 34, v.COLOURS[garment.colour])
