"""A stick figure of a pose, as an unsteady hand would draw it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from controlroom.data.theatre import poses as p
from controlroom.data.theatre.paint import Point
from controlroom.data.theatre.scene import CANVAS, Dice, Puppet

_INKS = ((20, 20, 24), (30, 40, 120), (120, 30, 30), (60, 60, 60))


@dataclass(frozen=True)
class Doodle:
    """``picture`` RGB; ``keypoints`` [18, 3]: where the joints of the meant puppet are, as in `truth.keypoints`.

    A stick figure has no shoulders: its arms start on the spine. The keypoints are the puppet's that stands like it.
    """

    picture: Image.Image
    keypoints: NDArray[np.float32]


def draw_doodle(puppet: Puppet, seed: int, size: int = CANVAS) -> Doodle:
    """Doodle ``puppet``'s pose (front view). The hand's wobble, pen, paper and proportions come from ``seed``."""
    dice = Dice("doodle", seed)
    points = p.joints(puppet)
    points = _other_proportions(points, dice)
    points = _placed(points, dice)
    found = np.zeros((18, 3), dtype=np.float32)
    for joint, (x, y) in enumerate(points):
        inside = 0 <= x < CANVAS and 0 <= y < CANVAS
        found[joint] = (x * size / CANVAS, y * size / CANVAS, 1.0 if inside else 0.0)
    return Doodle(_draw(points, dice, size), found)


def _other_proportions(points: list[Point], dice: Dice) -> list[Point]:
    """Amateurs draw limbs too long, too short, unequal."""
    moved = list(points)
    chains = [(p.R_SHOULDER, 0.16), (p.L_SHOULDER, 0.16), (p.R_HIP, 0.16), (p.L_HIP, 0.16)]
    for start, spread in chains:
        for joint in (start + 1, start + 2):
            factor = 1.0 + dice.normal(spread * 0.6)
            dx, dy = points[joint][0] - points[joint - 1][0], points[joint][1] - points[joint - 1][1]
            moved[joint] = (moved[joint - 1][0] + dx * factor, moved[joint - 1][1] + dy * factor)
    return moved


def _placed(points: list[Point], dice: Dice) -> list[Point]:
    """Fit into a random part of the sheet."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    left, right, top, bottom = min(xs) - 6, max(xs) + 6, min(ys) - 18, max(ys) + 6
    room = CANVAS / max(right - left, bottom - top)
    factor = min(room, 1.25) * dice.between(0.72, 1.0)
    x0 = dice.unit() * max(CANVAS - (right - left) * factor, 0)
    y0 = dice.unit() * max(CANVAS - (bottom - top) * factor, 0)
    return [((x - left) * factor + x0, (y - top) * factor + y0) for x, y in points]


def _wobbly(start: Point, end: Point, dice: Dice, shake: float) -> list[Point]:
    """A stroke from near ``start`` to near ``end`` that is never quite straight."""
    bow, length = dice.normal(0.035), math.dist(start, end)
    nx, ny = -(end[1] - start[1]), end[0] - start[0]
    stroke: list[Point] = []
    steps = max(3, int(length / 5))
    over = dice.normal(0.03)
    for i in range(steps + 1):
        t = -abs(over) + (1 + abs(over) + over) * i / steps
        bend = bow * 4 * t * (1 - t)
        x = start[0] + (end[0] - start[0]) * t + nx * bend + dice.normal(shake)
        y = start[1] + (end[1] - start[1]) * t + ny * bend + dice.normal(shake)
        stroke.append((x, y))
    return stroke


def _draw(points: list[Point], dice: Dice, size: int) -> Image.Image:
    scale = size * 3 / CANVAS
    tone = int(dice.between(232, 256))
    paper = (min(tone + 4, 255), tone, int(tone - dice.between(0, 10)))
    image = Image.new("RGB", (size * 3, size * 3), paper)
    draw = ImageDraw.Draw(image)
    ink = dice.pick(_INKS) if dice.chance(0.4) else _INKS[0]
    width, shake = dice.between(1.4, 4.2), dice.between(0.1, 0.5)

    def stroke(line: list[Point]) -> None:
        scaled = [(x * scale, y * scale) for x, y in line]
        pen = max(1, round(width * scale * dice.between(0.85, 1.15)))
        draw.line(scaled, fill=ink, width=pen, joint="curve")
        for x, y in (scaled[0], scaled[-1]):
            draw.ellipse((x - pen / 2, y - pen / 2, x + pen / 2, y + pen / 2), fill=ink)

    neck = points[p.NECK]
    pelvis = ((points[p.R_HIP][0] + points[p.L_HIP][0]) / 2, (points[p.R_HIP][1] + points[p.L_HIP][1]) / 2)
    slide = dice.between(0.02, 0.25)
    arms_from = (neck[0] + (pelvis[0] - neck[0]) * slide, neck[1] + (pelvis[1] - neck[1]) * slide)
    wide = dice.unit() if dice.chance(0.35) else 0.0  # some draw shoulders and hips

    def between(a: Point, b: Point) -> Point:
        return a[0] + (b[0] - a[0]) * wide, a[1] + (b[1] - a[1]) * wide

    nose = points[p.NOSE]
    radius = math.dist(points[p.R_EAR], points[p.L_EAR]) / 2 * dice.between(0.75, 1.15)
    centre = (neck[0] + (nose[0] - neck[0]) * 1.1, neck[1] + (nose[1] - neck[1]) * 1.1)
    radius = min(radius, math.dist(centre, neck) * 1.05)
    begin, gap = dice.unit() * 6.28, dice.between(-0.5, 0.3)
    ring = []
    for i in range(21):
        turn = begin + (2 * math.pi - gap) * i / 20
        reach = radius * (1 + dice.normal(0.03))
        ring.append((centre[0] + reach * math.cos(turn), centre[1] + reach * math.sin(turn) * dice.between(0.97, 1.03)))
    stroke(ring)
    if dice.chance(0.3):
        for side in (-0.4, 0.4):
            stroke([(centre[0] + radius * side, centre[1] - radius * 0.2)] * 2)
        stroke([(centre[0] + radius * x, centre[1] + radius * (0.4 - 0.3 * x * x)) for x in (-0.4, 0.0, 0.4)])
    stroke(_wobbly((centre[0] + (neck[0] - centre[0]) * 0.95, centre[1] + radius), neck, dice, shake * 0.5))
    stroke(_wobbly(neck, pelvis, dice, shake))
    for first, root in ((p.R_SHOULDER, arms_from), (p.L_SHOULDER, arms_from), (p.R_HIP, pelvis), (p.L_HIP, pelvis)):
        start = between(root, points[first])
        if wide:
            stroke([root, start])
        stroke(_wobbly(start, points[first + 1], dice, shake))
        stroke(_wobbly(points[first + 1], points[first + 2], dice, shake))
        if first in (p.R_HIP, p.L_HIP) and dice.chance(0.4):
            x, y = points[first + 2]
            stroke([(x, y), (x + (4 if x > pelvis[0] else -4), y + 1)])
    return image.reduce(3)
