"""A face as five points: eyes, nose and corners of the mouth, drawn as InstantID's IdentityNet reads them.

InstantID (Wang et al., arXiv 2401.07519) draws, on black, an ellipse from the nose to each other point in that point's
colour at 0.6 of its intensity, of half-width 4, then each point as a disc of radius 10; its pictures have about 1024
pixels. Deviations: anti-aliased, positions are not rounded to pixels, and thicknesses follow the size of the picture.

A pose without face keypoints has eyes and a nose; the mouth is then put where it is in the mean face that recognisers
are aligned to (ArcFace, arXiv 1801.07698).
"""

from __future__ import annotations

import math
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from controlroom.core.errors import InputError
from controlroom.core.images import checked_size
from controlroom.core.pose import L_EYE, MAX_COORDINATE, NOSE, R_EYE, Pose

FACE_NAMES: Final = ("right eye", "left eye", "nose", "right mouth corner", "left mouth corner")
"""The person's own right and left, as everywhere; face detectors give them in this order."""
COLOURS: Final = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255))
_NOSE: Final = 2
_INTENSITY: Final = 0.6
_HALF_WIDTH, _RADIUS, _SIDE = 4.0, 10.0, 1024.0
_RIM: Final = np.stack([f(np.linspace(0, 2 * math.pi, 24, endpoint=False)) for f in (np.cos, np.sin)], axis=1)
# Of the 70 face keypoints: the rings of the eyes, the tip of the nose, the corners of the mouth.
_OF_FACE: Final = (tuple(range(36, 42)), tuple(range(42, 48)), (30,), (48,), (54,))
# Where the mean face has them, in pixels of a crop of 112.
_MEAN_FACE: Final = np.array(
    [(38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041)]
)

Points = NDArray[np.float64]


def five_points(pose: Pose) -> Points:
    """Eyes, nose and mouth of a pose: [5, 2] in its pixels, in the order of `FACE_NAMES`.

    Raises:
        InputError: the face is turned away, or an eye or the nose is missing.
    """
    face = pose.face
    if face is not None and all(face.visible[list(part)].any() for part in _OF_FACE):
        parts = [[index for index in part if face.visible[index]] for part in _OF_FACE]
        return np.stack([face.points[part].mean(axis=0) for part in parts])
    joints = (R_EYE, L_EYE, NOSE)
    if not pose.visible[list(joints)].all():
        raise InputError("The pose shows no face: an eye or the nose is missing. Give five points, or another pose.")
    found = pose.keypoints[list(joints)]
    # The affine map that takes the mean face's eyes and nose to these takes its mouth to where theirs is.
    mean = np.concatenate([_MEAN_FACE, np.ones((5, 1))], axis=1)
    return np.concatenate([found, mean[3:] @ np.linalg.solve(mean[:3], found)])


def checked_points(points: Any) -> Points:
    """Five points that somebody gave: [5, 2] of finite numbers.

    Raises:
        InputError: anything else.
    """
    try:
        found = np.asarray(points, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"The points of a face must be numbers; {error}.") from error
    if found.shape != (5, 2) or not np.isfinite(found).all() or (np.abs(found) > MAX_COORDINATE).any():
        raise InputError(
            f"The points of a face have the shape {list(found.shape)}; expected five finite (x, y) in pixels: "
            f"{', '.join(FACE_NAMES)}."
        )
    return found


def draw_face(points: Points, width: int, height: int) -> Image.Image:
    """Five points [5, 2], in pixels of the picture, as IdentityNet reads them: RGB on black.

    Raises:
        InputError: points or a size that are none.
    """
    width, height = checked_size(width, height)
    factor = 4 if max(width, height) <= 512 else 2 if max(width, height) <= 2048 else 1
    found, scale = checked_points(points) * factor, factor * min(width, height) / _SIDE
    canvas = Image.new("RGB", (width * factor, height * factor))
    draw = ImageDraw.Draw(canvas)
    for index, point in enumerate(found):
        along = (found[_NOSE] - point) / 2
        length = float(np.hypot(*along))
        if index != _NOSE and length > 0:
            across = np.array([-along[1], along[0]]) * (_HALF_WIDTH * scale / length)
            dim = tuple(int(channel * _INTENSITY) for channel in COLOURS[index])
            _fill(draw, point + along + _RIM @ np.stack([along, across]), dim)
    for point, colour in zip(found, COLOURS, strict=True):
        _fill(draw, point + _RIM * (_RADIUS * scale), colour)
    return canvas.reduce(factor)


def head_crop(picture: Image.Image, points: Points, side: float = 6.5) -> Image.Image:
    """The square around a head: what an encoder of faces is shown.

    Args:
        picture: RGB.
        points: the face's, in pixels of the picture.
        side: of the square, in distances from the eyes to the mouth. 2.75 is the crop of face recognisers; the default
            shows hair and hat too.

    Returns:
        RGB, black where the square leaves the picture.

    Raises:
        InputError: points that are none, or all on one place.
    """
    found = checked_points(points)
    eyes, mouth = found[:2].mean(axis=0), found[3:].mean(axis=0)
    reach = float(np.linalg.norm(mouth - eyes))
    if reach < 1e-3:
        raise InputError("The points of the face lie on one place, so its size is not known.")
    half = reach * side / 2
    x, y = (eyes + mouth) / 2 - (0.0, reach / 2)
    box = (round(x - half), round(y - half), round(x - half) + max(1, round(2 * half)))
    return picture.convert("RGB").crop((*box, box[1] + box[2] - box[0]))


def _fill(draw: ImageDraw.ImageDraw, outline: Points, colour: tuple[int, ...]) -> None:
    draw.polygon([(float(x), float(y)) for x, y in outline], fill=colour)
