"""Faces in training pictures: where each is, and the vector that tells whose it is.

A recogniser of real faces is not part of the package, so what it says can lie in a folder: for each picture a
``.safetensors`` file of the same name with ``points`` [5, 2] (person's right eye, left eye, nose, right and left corner
of the mouth, in pixels) and ``vector`` [n].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from controlroom.controls.face_inputs import identity_vectors
from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.signals.face import Points, checked_points, five_points, head_crop
from controlroom.signals.pose.source import PoseReader


@dataclass(frozen=True, eq=False)
class Face:
    """A face in a picture: ``points`` [5, 2] in pixels, ``vector`` [n]."""

    points: Points
    vector: Tensor


PointsOf = Callable[[Picture, Image.Image], Points]
"""A picture and what is in it -> where its face is."""


def read_by(reader: PoseReader) -> PointsOf:
    """Points found by a reader of poses.

    Raises:
        InputError: (when called) a picture without a face.
    """

    def points(picture: Picture, image: Image.Image) -> Points:
        try:
            return five_points(reader.read(image))
        except InputError as error:
            raise InputError(f"{picture.name}: {error} Leave the picture out.") from error

    return points


def encoded_faces(pictures: Sequence[Picture], points_of: PointsOf, encoder: Any) -> tuple[Face, ...]:
    """Faces that an encoder is shown cut out of the pictures.

    Raises:
        InputError: a picture without a face.
        ModelError: the encoder is none.
    """
    points: list[Points] = []
    vectors: list[Tensor] = []
    for start in range(0, len(pictures), 64):
        heads = []
        for picture in pictures[start : start + 64]:
            image = picture.read()
            points.append(checked_points(points_of(picture, image)))
            heads.append(head_crop(image, points[-1]))
        vectors += list(identity_vectors(heads, encoder))
    return tuple(Face(*pair) for pair in zip(points, vectors, strict=True))


def faces_in(folder: Path, pictures: Sequence[Picture]) -> tuple[Face, ...]:
    """Faces that were read before.

    Raises:
        InputError: a file is missing or broken, or vectors have different widths.
    """
    found = tuple(_stored(folder / Path(picture.name).with_suffix(".safetensors")) for picture in pictures)
    widths = {len(face.vector) for face in found}
    if len(widths) > 1:
        raise InputError(f"The vectors in {folder} are {sorted(widths)} wide; one encoder gives one width.")
    return found


@dataclass(frozen=True)
class StoredFaces:
    """What a recogniser said before, in place of an encoder of faces: see `faces_in`."""

    folder: Path

    def vectors(self, pictures: Sequence[Picture]) -> Tensor:
        """[pictures, n]

        Raises:
            InputError: as `faces_in`.
        """
        return torch.stack([face.vector for face in faces_in(self.folder, pictures)])


def _stored(path: Path) -> Face:
    try:
        tensors = load_file(str(path))
        vector = tensors["vector"].float().reshape(-1)
        face = Face(checked_points(tensors["points"].double().numpy()), vector)
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} does not hold points [5, 2] and vector [n] of a face ({error}).") from error
    if not bool(torch.isfinite(vector).all()):
        raise InputError(f"{path} has a vector with values that are not finite.")
    return face
