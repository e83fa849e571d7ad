"""Shapes on paper: what a scene is made of before it becomes pixels.

Drawing a scene first lists its shapes, each with its colour and its truth (part, actor, depth), then fills them with
Pillow: once in colour with anti-aliasing, and, only when asked, once for each map of the truth, without.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

from PIL import Image, ImageDraw

from controlroom.data.theatre.vocabulary import RGB

Point = tuple[float, float]

INK: RGB = (34, 30, 42)
OUTLINE_WIDTH = 1.25  # canvas pixels


class Part(IntEnum):
    """The part segmentation's labels."""

    SKY = 0
    BACKDROP = 1
    GROUND = 2
    HAIR = 3
    HEAD = 4
    TOP = 5
    RIGHT_ARM = 6
    LEFT_ARM = 7
    LOWER = 8
    RIGHT_LEG = 9
    LEFT_LEG = 10
    SHOES = 11
    HAT = 12
    ANIMAL = 13
    THING = 14


GROUND_DEPTH = -1  # filled with a ramp that comes nearer towards the bottom of the picture


class Shape(NamedTuple):
    """One filled form. ``actor`` is 0 for the place and 1 + index for an actor of the scene."""

    form: str  # polygon | ellipse | chord | limb | line
    points: tuple[Point, ...]
    size: tuple[float, float]  # ellipse and chord: radii; limb and line: (radius or width, 0)
    angles: tuple[float, float]  # chord: from, to in degrees, clockwise from the right
    fill: RGB
    outlined: bool
    part: int
    actor: int
    depth: int


class Paper:
    """Collects shapes. Set ``part``, ``actor`` and ``depth``, then draw."""

    def __init__(self) -> None:
        self.shapes: list[Shape] = []
        self.part = int(Part.SKY)
        self.actor = 0
        self.depth = 0

    def _add(
        self,
        form: str,
        points: tuple[Point, ...],
        size: tuple[float, float],
        angles: tuple[float, float],
        fill: RGB,
        outlined: bool,
    ) -> None:
        self.shapes.append(Shape(form, points, size, angles, fill, outlined, self.part, self.actor, self.depth))

    def polygon(self, points: list[Point], fill: RGB, outlined: bool = True) -> None:
        self._add("polygon", tuple(points), (0, 0), (0, 0), fill, outlined)

    def rectangle(self, left: float, top: float, right: float, bottom: float, fill: RGB, outlined: bool = True) -> None:
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], fill, outlined)

    def ellipse(self, centre: Point, rx: float, ry: float, fill: RGB, outlined: bool = True) -> None:
        self._add("ellipse", (centre,), (rx, ry), (0, 0), fill, outlined)

    def chord(
        self, centre: Point, rx: float, ry: float, start: float, end: float, fill: RGB, outlined: bool = True
    ) -> None:
        self._add("chord", (centre,), (rx, ry), (start, end), fill, outlined)

    def limb(self, points: list[Point], radius: float, fill: RGB, outlined: bool = True) -> None:
        """A bent tube with round ends; its joints show no outline."""
        self._add("limb", tuple(points), (radius, 0), (0, 0), fill, outlined)

    def line(self, points: list[Point], width: float, fill: RGB) -> None:
        self._add("line", tuple(points), (width, 0), (0, 0), fill, False)


class Camera(NamedTuple):
    """Canvas point p is drawn at (p - origin) * zoom."""

    zoom: float = 1.0
    left: float = 0.0
    top: float = 0.0

    def to_picture(self, point: Point) -> Point:
        return (point[0] - self.left) * self.zoom, (point[1] - self.top) * self.zoom


def shade(colour: RGB, amount: float) -> RGB:
    """Towards black for ``amount`` < 1, towards white above 1; near-black is lightened, so that the shade shows."""
    if amount < 1 and sum(colour) < 150:
        amount = 2 - amount
    if amount <= 1:
        return (int(colour[0] * amount), int(colour[1] * amount), int(colour[2] * amount))
    return mix(colour, (255, 255, 255), amount - 1)


def mix(first: RGB, second: RGB, share: float) -> RGB:
    """``share`` of the second colour in the first."""
    keep = 1 - share
    return (
        int(first[0] * keep + second[0] * share),
        int(first[1] * keep + second[1] * share),
        int(first[2] * keep + second[2] * share),
    )


def _disc(draw: ImageDraw.ImageDraw, x: float, y: float, rx: float, ry: float, fill: RGB | int) -> None:
    if rx >= 0 and ry >= 0:
        draw.ellipse((x - rx, y - ry, x + rx, y + ry), fill=fill)


def fill_shape(
    draw: ImageDraw.ImageDraw, shape: Shape, fill: RGB | int, ink: RGB | int | None, camera: Camera, scale: float
) -> None:
    """Draw one shape, outlined in ``ink`` unless that is None; ``scale`` is bitmap pixels per canvas pixel."""
    k = scale * camera.zoom
    left, top = camera.left, camera.top
    points = [((x - left) * k, (y - top) * k) for x, y in shape.points]
    edge = OUTLINE_WIDTH * scale * (0.6 + 0.4 * camera.zoom) if ink is not None and shape.outlined else 0.0
    form = shape.form
    if form == "polygon":
        draw.polygon(points, fill=fill)
        if edge:
            draw.line([*points, points[0], points[1]], fill=ink, width=max(1, round(edge)))
    elif form == "ellipse":
        (x, y), rx, ry = points[0], shape.size[0] * k, shape.size[1] * k
        if edge:
            _disc(draw, x, y, rx + edge * 0.5, ry + edge * 0.5, ink)  # type: ignore[arg-type]
            rx, ry = max(rx - edge * 0.5, 0), max(ry - edge * 0.5, 0)
        _disc(draw, x, y, rx, ry, fill)
    elif form == "chord":
        (x, y), rx, ry = points[0], shape.size[0] * k, shape.size[1] * k
        box = (x - rx, y - ry, x + rx, y + ry)
        if edge:
            draw.chord(box, *shape.angles, fill=fill, outline=ink, width=max(1, round(edge)))
        else:
            draw.chord(box, *shape.angles, fill=fill)
    elif form == "limb":
        radius = shape.size[0] * k
        if edge:
            _tube(draw, points, radius + edge * 0.5, ink)  # type: ignore[arg-type]
            radius -= edge * 0.5
        _tube(draw, points, radius, fill)
    else:
        draw.line(points, fill=fill, width=max(1, round(shape.size[0] * k)), joint="curve")


def _tube(draw: ImageDraw.ImageDraw, points: list[Point], radius: float, fill: RGB | int) -> None:
    draw.line(points, fill=fill, width=max(1, round(radius * 2)))
    for x, y in points:
        _disc(draw, x, y, radius - 0.5, radius - 0.5, fill)


def blank(mode: str, size: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty square picture and what draws on it."""
    image = Image.new(mode, (size, size))
    return image, ImageDraw.Draw(image)
