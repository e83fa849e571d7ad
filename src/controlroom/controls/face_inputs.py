"""From what a person has to what controls of faces read: five points drawn as a map, and vectors of identity."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image, ImageChops
from safetensors import SafetensorError
from safetensors.torch import load_file

from controlroom.backbones.image_encoder import check_image_encoder, clip_pixels, image_features, load_image_encoder
from controlroom.backbones.loading import find_model
from controlroom.controls.condition_map import condition_map, is_pose
from controlroom.core.backbone import Backbone
from controlroom.core.errors import InputError
from controlroom.core.images import load_image
from controlroom.core.pose import Pose
from controlroom.core.run import Run
from controlroom.signals.face import checked_points, draw_face, five_points, head_crop


@runtime_checkable
class FaceEncoder(Protocol):
    """Gives what tells a person from others, such as a face recogniser."""

    def embed(self, picture: Image.Image) -> Any:
        """A vector, for an RGB picture with one face in it.

        Raises:
            InputError: there is no face.
        """
        ...


# Where a face is.


def face_map(source: Any, run: Run) -> torch.Tensor:
    """Faces as IdentityNet reads them: [images, 3, height, width].

    Args:
        source: five points [5, 2] in pixels of the run; a `Pose` or OpenPose document, whose canvas is fitted to the
            run's; a picture that is drawn already; or a list of these, one for each prompt.
        run: gives size and number of images.

    Raises:
        InputError: unreadable, a pose without a face, or a number that does not fit the images.
    """
    rows = [source] if _are_points(source) or not isinstance(source, list | tuple) else list(source)
    return condition_map([_face_picture(item, run.size) for item in rows], run)


def _are_points(source: Any) -> bool:
    if isinstance(source, np.ndarray | torch.Tensor):
        # A map of two pixels across is none, so another number of points is an error that says so.
        return source.ndim == 2 and source.shape[1] == 2
    return isinstance(source, list | tuple) and len(source) == 5 and all(_is_pair(item) for item in source)


def _is_pair(item: Any) -> bool:
    return isinstance(item, list | tuple) and len(item) == 2 and all(isinstance(x, int | float) for x in item)


def _face_picture(source: Any, size: tuple[int, int]) -> Any:
    """Five points and poses drawn; what is a picture already as it is."""
    height, width = size
    if _are_points(source):
        return draw_face(checked_points(source), width, height)
    if not is_pose(source):
        return source
    drawn = [draw_face(five_points(pose.fitted(width, height)), width, height) for pose in people(source)]
    picture = drawn[0]
    for other in drawn[1:]:
        picture = ImageChops.lighter(picture, other)
    return picture


def people(source: Any) -> list[Pose]:
    """Everybody in a pose or an OpenPose document.

    Raises:
        InputError: nobody.
    """
    from controlroom.signals.pose.openpose_json import read_document

    found = (
        [source] if isinstance(source, Pose) else [pose for pose in read_document(source).people if pose is not None]
    )
    if not found:
        raise InputError("There is nobody in the pose. Give one with keypoints.")
    return found


# Who it is.


def face_vectors(source: Any, width: int, images: int) -> torch.Tensor:
    """Vectors of identity that were made before: [1 or images, pictures of the person, width], float32.

    Args:
        source: tensor or array ``[width]``, ``[pictures, width]`` or ``[prompts, pictures, width]``; an ``.npy`` or
            ``.safetensors`` file with one; or a list of these, one for each prompt.
        width: that is read.
        images: number of images of the run.

    Raises:
        InputError: unreadable, of another width, not finite, or a number that does not fit the images.
    """
    rows = source if isinstance(source, list | tuple) else [source]
    if isinstance(source, list | tuple) and source and all(isinstance(item, int | float) for item in source):
        rows = [torch.tensor(source, dtype=torch.float32)]
    parts = [_vector(item, width) for item in rows]
    if not parts or len({part.shape[1] for part in parts}) > 1:
        raise InputError(f"Faces have {[part.shape[1] for part in parts]} vectors. Give each prompt as many.")
    return _for_images(torch.cat(parts), images)


def _vector(source: Any, width: int) -> torch.Tensor:
    """[prompts, pictures, width]"""
    if isinstance(source, str | os.PathLike):
        source = _from_file(Path(source))
    found = torch.from_numpy(np.asarray(source)) if isinstance(source, np.ndarray) else source
    if not isinstance(found, torch.Tensor) or not found.is_floating_point():
        raise InputError(f"face_embeds must be a vector of floats or a file with one, got a {type(source).__name__}.")
    shape = list(found.shape)
    if not 1 <= found.ndim <= 3 or 0 in shape or shape[-1] != width:
        raise InputError(
            f"face_embeds has the shape {shape}; this model reads [{width}], [pictures, {width}] or [prompts, "
            f"pictures, {width}]."
        )
    if not bool(torch.isfinite(found).all()):
        raise InputError("face_embeds has values that are not finite (NaN or infinity).")
    return found.detach().cpu().float().reshape(-1 if found.ndim == 3 else 1, shape[-2] if found.ndim > 1 else 1, width)


def _from_file(path: Path) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        if path.suffix == ".safetensors":
            tensors = load_file(str(path))
            if len(tensors) == 1:
                return next(iter(tensors.values()))
            raise InputError(f"{path} holds {len(tensors)} tensors; expected one, the vector of a face.")
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"{path} cannot be read as the vector of a face ({error}).") from error
    raise InputError(f"{path} is no file with the vector of a face; expected .npy or .safetensors.")


def face_features(pictures: Any, points: Any, encoder: Any, backbone: Backbone, images: int) -> torch.Tensor:
    """Vectors of identity of pictures: [1 or images, pictures of the person, width], float32.

    Args:
        pictures: a picture, several of one person, or a list of lists, one for each prompt.
        points: where the face of each picture is, as many as pictures: five points in its pixels, or a pose; the head
            is then cut out. None: the pictures show the face alone.
        encoder: a `FaceEncoder`, or a CLIP image encoder or its folder, whose feature is taken.
        backbone: the network, where a folder is loaded for.
        images: number of images of the run.

    Raises:
        InputError: unreadable, or numbers that do not fit.
        ModelError: the encoder is none.
    """
    rows = (
        pictures if isinstance(pictures, list | tuple) and any(isinstance(x, list | tuple) for x in pictures) else None
    )
    rows = [list(row) if isinstance(row, list | tuple) else [row] for row in (rows or [pictures])]
    if not all(rows) or len({len(row) for row in rows}) > 1:
        raise InputError(f"Faces have {[len(row) for row in rows]} pictures. Give each prompt as many.")
    flat = [load_image(item) for row in rows for item in row]
    if points is not None:
        flat = [head_crop(picture, where) for picture, where in zip(flat, _places(points, len(flat)), strict=True)]
    if isinstance(encoder, str | os.PathLike):
        encoder = load_image_encoder(find_model(encoder, "face encoder"), backbone).to(backbone.device)
    found = identity_vectors(flat, encoder)
    return _for_images(found.unflatten(0, (len(rows), -1)), images)


def _places(points: Any, count: int) -> list[Any]:
    listed = [points] if _are_points(points) or not isinstance(points, list | tuple) else list(points)
    if len(listed) != count:
        raise InputError(f"There are points of {len(listed)} faces for {count} pictures. Give one set for each.")
    return [five_points(people(item)[0]) if is_pose(item) else checked_points(item) for item in listed]


def identity_vectors(pictures: Sequence[Image.Image], encoder: Any) -> torch.Tensor:
    """Vectors of identity of RGB pictures: [n, width], float32, on the CPU.

    Args:
        pictures: as the encoder reads them.
        encoder: a `FaceEncoder`, or a CLIP image encoder, whose feature is taken.

    Raises:
        InputError: a picture that the encoder finds no face in.
        ModelError: the encoder is none.
    """
    if isinstance(encoder, FaceEncoder):
        vectors = [np.asarray(encoder.embed(picture), np.float32).reshape(-1) for picture in pictures]
        return torch.from_numpy(np.stack(vectors))
    check_image_encoder(encoder)
    side, found = int(encoder.config.image_size), []
    with torch.no_grad():
        for i in range(0, len(pictures), 32):
            found.append(image_features(encoder, clip_pixels(pictures[i : i + 32], side), states=False).float().cpu())
    return torch.cat(found)


def _for_images(rows: torch.Tensor, images: int) -> torch.Tensor:
    if len(rows) == 1:
        return rows
    if images % len(rows):
        raise InputError(f"There are faces for {len(rows)} prompts, and {images} images. Give one, or one for each.")
    return rows.repeat_interleave(images // len(rows), dim=0)
