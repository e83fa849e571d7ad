"""From a scene to pixels: the picture in one of five styles."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

from controlroom.data.theatre import paint, poses
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.paint import INK, Camera, Paper, Part, Shape
from controlroom.data.theatre.places import draw_place
from controlroom.data.theatre.props import draw_prop
from controlroom.data.theatre.puppets import draw_flat_garment, draw_puppet
from controlroom.data.theatre.scene import CANVAS, Dice, Prop, Scene

RGB = v.RGB


def shapes(scene: Scene) -> list[Shape]:
    """The scene as shapes, farthest first."""
    paper = Paper()
    if scene.framing == "flat_lay":
        assert scene.garment is not None
        paper.rectangle(-64, -64, 192, 192, (253, 253, 253), False)
        paper.actor = 1
        draw_flat_garment(paper, scene.garment)
        return paper.shapes
    draw_place(paper, scene.place, scene.backdrop_seed)
    for index in sorted(range(len(scene.actors)), key=lambda i: scene.actors[i].ground):
        actor = scene.actors[index]
        paper.actor = index + 1
        if isinstance(actor, Prop):
            draw_prop(paper, actor)
        else:
            draw_puppet(paper, actor)
    return paper.shapes


def camera(scene: Scene) -> Camera:
    """A portrait shows head and shoulders of the first puppet; everything else the whole canvas."""
    if scene.framing != "portrait" or not scene.puppets:
        return Camera()
    puppet = scene.puppets[0]
    (x, y), radius, _ = poses.head(puppet, poses.joints(puppet))
    side = radius * 4.3
    return Camera(CANVAS / side, x - side / 2, y - side * 0.44)


def render(scene: Scene, size: int = CANVAS, supersample: int = 2) -> Image.Image:
    """The picture of ``scene``: RGB, ``size`` x ``size``. ``supersample`` 2 anti-aliases; 1 is faster."""
    listed, view = shapes(scene), camera(scene)
    big = size * supersample
    image, draw = paint.blank("RGB", big)
    colouring = _COLOURING[scene.style]
    scale = big / CANVAS
    for shape in listed:
        fill, ink = colouring(shape)
        paint.fill_shape(draw, shape, fill, ink, view, scale)
    image = image.reduce(supersample) if supersample > 1 else image
    if scene.style == "watercolour":
        image = _watercolour(image, scene.backdrop_seed)
    elif scene.style == "pixel":
        image = _pixelate(image)
    return image.filter(_LENS)


#: The eye of the theatre is a little soft: weights 1/4, 1/2, 1/4 each way. Nothing sharper survives an autoencoder that
#: keeps four numbers of every 8 x 8 pixels, and what cannot be kept would only be learned as noise.
_LENS = ImageFilter.BoxBlur(0.5)


def _flat(shape: Shape) -> tuple[RGB, RGB]:
    fill = _shadow(shape, (70, 70, 74)) or shape.fill
    return fill, paint.mix(INK, fill, 0.3)


def _shadow(shape: Shape, fallback: RGB) -> RGB | None:
    """Shadows on the ground are listed in pure black, which no object has."""
    return fallback if shape.fill == (0, 0, 0) else None


def _sketch(shape: Shape) -> tuple[RGB, RGB]:
    paper: RGB = (250, 248, 242)
    if shape.part <= Part.GROUND:
        return paint.mix(paper, _shadow(shape, (120, 120, 120)) or shape.fill, 0.22), (110, 110, 116)
    return paint.mix(paper, shape.fill, 0.55), (58, 58, 66)


def _wash(shape: Shape) -> tuple[RGB, RGB]:
    fill = _shadow(shape, (110, 110, 120)) or shape.fill
    return paint.mix(fill, (255, 250, 240), 0.25), paint.shade(paint.mix(fill, INK, 0.25), 0.7)


def _neon(shape: Shape) -> tuple[RGB, RGB]:
    if shape.part <= Part.GROUND:
        fill = _shadow(shape, (0, 0, 0)) or shape.fill
        return paint.mix((10, 6, 28), fill, 0.2), fill
    glow = paint.mix(shape.fill, (255, 255, 255), 0.15) if sum(shape.fill) > 200 else (150, 150, 165)
    return paint.mix((16, 10, 34), shape.fill, 0.42), glow


_COLOURING = {"flat": _flat, "sketch": _sketch, "watercolour": _wash, "pixel": _flat, "neon": _neon}


def _watercolour(image: Image.Image, seed: int) -> Image.Image:
    """Pigment gathers in blotches: a smooth random field lightens and darkens the wash."""
    dice = Dice("wash", seed)
    field = np.array([[dice.between(0.9, 1.06) for _ in range(6)] for _ in range(6)], dtype=np.float32)
    smooth = Image.fromarray(field).resize(image.size, Image.Resampling.BICUBIC)
    pixels = np.asarray(image, dtype=np.float32) * np.asarray(smooth)[..., None]
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _pixelate(image: Image.Image) -> Image.Image:
    small = image.resize((32, 32), Image.Resampling.BOX)
    return small.resize(image.size, Image.Resampling.NEAREST)
