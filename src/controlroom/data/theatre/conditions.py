"""The eight conditions of a scene, from what the theatre knows of it: what its ControlNets are trained on.

Everything is a function of the scene. Depth, parts and joints are the truth; normals follow from depth; Canny edges are
those of the drawn picture; soft edges, straight lines and scribbles come from the borders of the shapes that are seen.
The pose is drawn as the theatre's pose ControlNet was trained to read it, with hidden joints; of two puppets both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageDraw

from controlroom.core.images import checked_size
from controlroom.core.pose import Pose
from controlroom.data.theatre import paint
from controlroom.data.theatre.paint import Point, Shape
from controlroom.data.theatre.render import camera, render, shapes
from controlroom.data.theatre.scene import CANVAS, Dice, Puppet, Scene
from controlroom.data.theatre.truth import edges, keypoints, maps
from controlroom.signals.canny import canny
from controlroom.signals.filters import Mask, Plane, gaussian
from controlroom.signals.normal import normals_of, normals_picture
from controlroom.signals.palette import Palette, palette_picture, spread_palette
from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.signals.signal import KINDS, SignalMap, checked_kind, white_on_black

__all__ = ["KINDS", "PART_COLOURS", "condition"]

PART_COLOURS: Final[Palette] = spread_palette(len(paint.Part))
"""[15, 3]: the colour of each `Part` in a segmentation's picture."""
_SHORTEST_LINE = 8.0  # canvas pixels
_WOBBLE = 1.2  # canvas pixels by which the hand that scribbles strays


def condition(scene: Scene, kind: str, size: int = CANVAS) -> SignalMap:
    """The condition of that kind for ``scene``, at ``size`` x ``size`` pixels; the same every time.

    Args:
        scene: what is on the stage. A segmentation's classes are `paint.Part`.
        kind: one of `KINDS`; values and pictures as `controlroom.signals.signal` says.
        size: of the map in pixels.

    Raises:
        InputError: an unknown kind or a size that is none.
    """
    kind = checked_kind(kind)
    size = checked_size(size, size)[0]
    if kind == "pose":
        return _pose(scene, size)
    if kind == "segmentation":
        parts = maps(scene, size).part
        return SignalMap(kind, parts.astype(np.float32), palette_picture(parts, PART_COLOURS))
    if kind in ("depth", "normal"):
        depth = maps(scene, size).depth.astype(np.float32) / np.float32(255)
        if kind == "depth":
            return SignalMap(kind, depth, white_on_black(depth))
        normals = normals_of(depth)
        return SignalMap(kind, normals, normals_picture(normals))
    if kind == "canny":
        values = canny(np.asarray(render(scene, size))).astype(np.float32)
    elif kind == "soft_edge":
        values = _soft_edges(scene, size)
    elif kind == "lines":
        values = _lines(scene, size)
    else:
        values = _scribble(scene, size)
    return SignalMap(kind, values, white_on_black(values))


def _pose(scene: Scene, size: int) -> SignalMap:
    picture, people = Image.new("RGB", (size, size)), []
    for index, actor in enumerate(scene.actors):
        if isinstance(actor, Puppet):
            found = keypoints(scene, index)
            drawn = draw_skeleton(Pose(found[:, :2], found[:, 2], CANVAS, CANVAS), size, size)
            picture = ImageChops.lighter(picture, drawn)
            people.append(found * np.array([size / CANVAS, size / CANVAS, 1], np.float32))
    return SignalMap("pose", np.array(people, np.float32).reshape(-1, 18, 3), picture)


def _pieces(scene: Scene, size: int) -> tuple[NDArray[np.int32], list[tuple[int, int]]]:
    """What is seen at every pixel, as the number [h, w] of a piece, and actor and part of each piece.

    A piece is what one actor shows of one part in one colour: a stripe is a piece, the two bones of an arm are one.
    """
    view, scale = camera(scene), size / CANVAS
    image, draw = paint.blank("RGB", size)
    numbers: dict[tuple[int, int, tuple[int, int, int]], int] = {}
    for shape in shapes(scene):
        if shape.fill == (0, 0, 0):
            continue  # a shadow is no object
        number = numbers.setdefault((shape.actor, shape.part, shape.fill), len(numbers))
        code = (number // 256, number % 256, 0)
        paint.fill_shape(draw, shape, code, code if shape.outlined else None, view, scale)
    high, low, _ = np.moveaxis(np.asarray(image, np.int32), -1, 0)
    return high * 256 + low, [(actor, part) for actor, part, _ in numbers]


def _borders(piece: NDArray[np.int32]) -> Mask:
    """The pixels on both sides of every border between pieces."""
    border = np.zeros(piece.shape, bool)
    for first, second in _sides():
        differ = piece[first] != piece[second]
        border[first] |= differ
        border[second] |= differ
    return border


def _sides() -> tuple[tuple[tuple[slice, slice], tuple[slice, slice]], ...]:
    whole, ahead, behind = slice(None), slice(1, None), slice(None, -1)
    return ((whole, ahead), (whole, behind)), ((ahead, whole), (behind, whole))


def _soft_edges(scene: Scene, size: int) -> Plane:
    """Borders by what they part: actors 1, parts of one actor 0.75, patterns and details 0.45; a little blurred."""
    piece, owners = _pieces(scene, size)
    actor, part = (np.array([owner[which] for owner in owners])[piece] for which in (0, 1))
    strength = np.zeros(piece.shape, np.float32)
    for first, second in _sides():
        step = np.where(part[first] != part[second], 0.75, 0.45)
        step = np.where(actor[first] != actor[second], 1.0, step) * (piece[first] != piece[second])
        strength[first] = np.maximum(strength[first], step)
        strength[second] = np.maximum(strength[second], step)
    soft = gaussian(strength, 0.8 * size / CANVAS)
    # A straight border, two pixels wide before the blur, keeps its strength.
    sigma = 0.8 * size / CANVAS * math.sqrt(2)
    return np.minimum(soft / np.float32(0.5 * (math.erf(1.5 / sigma) + math.erf(0.5 / sigma))), 1.0)


def _lines(scene: Scene, size: int) -> Plane:
    """The straight borders of shapes, where they are seen, one pixel thick."""
    view, scale = camera(scene), size / CANVAS
    seen = _borders(_pieces(scene, size)[0])
    image = Image.new("L", (size, size))
    draw = ImageDraw.Draw(image)
    for shape in shapes(scene):
        if shape.fill == (0, 0, 0):
            continue
        for start, end in _straight(shape):
            a, b = view.to_picture(start), view.to_picture(end)
            for first, last in _seen_runs(a, b, seen, scale):
                draw.line([(x * scale, y * scale) for x, y in (first, last)], fill=255)
    return (np.asarray(image) > 0).astype(np.float32)


def _straight(shape: Shape) -> list[tuple[Point, Point]]:
    """The straight borders of a shape, on the canvas."""
    if shape.form == "polygon":
        corners = _corners([*shape.points, shape.points[0]])
        return list(pairwise(corners))
    found: list[tuple[Point, Point]] = []
    if shape.form == "limb":
        for (ax, ay), (bx, by) in pairwise(shape.points):
            length = math.hypot(bx - ax, by - ay) or 1.0
            radius = shape.size[0] + (paint.OUTLINE_WIDTH / 2 if shape.outlined else 0.0)
            nx, ny = -(by - ay) / length * radius, (bx - ax) / length * radius
            found += [((ax + s * nx, ay + s * ny), (bx + s * nx, by + s * ny)) for s in (-1, 1)]
    return found


def _corners(points: Sequence[Point], tolerance: float = 0.6) -> list[Point]:
    """A chain of points without those that lie within ``tolerance`` of a straight line (Douglas and Peucker)."""
    if len(points) < 3:
        return list(points)
    (ax, ay), (bx, by) = points[0], points[-1]
    length = math.hypot(bx - ax, by - ay)

    def off(point: Point) -> float:
        if length < 1e-9:
            return math.hypot(point[0] - ax, point[1] - ay)
        return abs((bx - ax) * (point[1] - ay) - (by - ay) * (point[0] - ax)) / length

    far = max(range(1, len(points) - 1), key=lambda index: off(points[index]))
    if off(points[far]) <= tolerance:
        return [points[0], points[-1]]
    return _corners(points[: far + 1], tolerance)[:-1] + _corners(points[far:], tolerance)


def _seen_runs(a: Point, b: Point, seen: Mask, scale: float) -> list[tuple[Point, Point]]:
    """The stretches of the line from ``a`` to ``b`` that lie on a visible border; canvas pixels, gaps of 2 closed."""
    length = math.dist(a, b)
    if length < _SHORTEST_LINE:
        return []
    count = int(length * 2) + 1
    share = np.linspace(0, 1, count)[:, None]
    points = np.array(a) + share * (np.array(b) - np.array(a))
    inside = ((points >= 0) & (points < CANVAS)).all(1)
    x, y = np.clip((points * scale).astype(int), 0, len(seen) - 1).T
    on = np.flatnonzero(seen[y, x] & inside)
    if not len(on):
        return []
    breaks = np.flatnonzero(np.diff(on) > 4)
    runs = zip(on[[0, *(breaks + 1)]], on[[*breaks, -1]], strict=True)
    return [
        ((float(points[i, 0]), float(points[i, 1])), (float(points[j, 0]), float(points[j, 1])))
        for i, j in runs
        if (j - i) / 2 >= _SHORTEST_LINE
    ]


def _scribble(scene: Scene, size: int) -> Plane:
    """The borders of actors and parts, drawn by a hand that strays: strokes of two pixels at 128."""
    border = edges(scene, size) > 0
    dice = Dice("scribble", scene.backdrop_seed, len(scene.actors))
    field = np.array([[[dice.between(-1, 1) for _ in range(7)] for _ in range(7)] for _ in range(2)], np.float32)
    moves = [np.asarray(Image.fromarray(one).resize((size, size), Image.Resampling.BICUBIC)) for one in field]
    ys, xs = np.mgrid[:size, :size]
    amount, pairs = _WOBBLE * size / CANVAS, zip((xs, ys), moves, strict=True)
    source_x, source_y = (np.clip(np.rint(at + amount * by), 0, size - 1).astype(int) for at, by in pairs)
    strokes = border[source_y, source_x]
    wide = max(2, round(2 * size / CANVAS))
    thick = strokes.copy()
    for dy in range(wide):
        for dx in range(wide):
            thick[dy:, dx:] |= strokes[: size - dy, : size - dx]
    return thick.astype(np.float32)
