"""From what a person has to what an image prompt reads: pixels for CLIP, or features made before."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.core.errors import InputError, ModelError
from controlroom.core.images import load_image


def prompt_pixels(source: Any, side: int, images: int) -> torch.Tensor:
    """Pictures as CLIP's image encoder reads them.

    Args:
        source: a picture, a list of pictures, or a list of one list for each prompt. A tensor or array of four
            dimensions is a list. A float tensor ``[3, side, side]`` with values outside [0, 1] is taken as it is.
        side: of the encoder's input.
        images: number of images of the run.

    Returns:
        [1 or images, pictures, 3, side, side]

    Raises:
        InputError: unreadable; lists of different lengths; a number of lists that does not fit the images.
    """
    rows = source if isinstance(source, list | tuple) and any(isinstance(x, list | tuple) for x in source) else [source]
    pixels = []
    for row in rows:
        listed = _listed(row)
        if not listed:
            raise InputError("The list of pictures of an image prompt is empty. Give at least one.")
        pixels.append(torch.cat([_pixels(item, side) for item in listed]))
    if len({len(row) for row in pixels}) > 1:
        raise InputError("Every prompt needs as many pictures as the others.")
    if len(rows) == 1:
        return torch.stack(pixels)
    if images % len(rows):
        raise InputError(f"There are pictures for {len(rows)} prompts, and {images} images.")
    return torch.stack(pixels).repeat_interleave(images // len(rows), dim=0)


def check_width(features: torch.Tensor, reads: int, reader: str = "adapter") -> None:
    """Features [..., width] must be those that an image prompt's model was trained with.

    Raises:
        ModelError: they have another width.
    """
    if features.shape[-1] != reads:
        raise ModelError(
            f"The features are {features.shape[-1]} wide, this {reader} reads {reads}. Give the image encoder that "
            "belongs to it (image_encoder=…)."
        )


def squared(source: Any, side: int) -> Any:
    """Pictures (also in lists of lists) stretched to a square; a float tensor that is normalised stays as it is.

    Raises:
        InputError: one cannot be read.
    """
    if isinstance(source, torch.Tensor | np.ndarray) and source.ndim == 4:
        return [squared(each, side) for each in source]
    if isinstance(source, list | tuple):
        return [squared(each, side) for each in source]
    if isinstance(source, torch.Tensor) and source.is_floating_point() and source.numel() and float(source.min()) < 0:
        return source
    return load_image(source).resize((side, side), Image.Resampling.BICUBIC)


def given_features(embeds: Any, width: int, rank: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Features that were made before: [1, pictures, …] of the pictures, and those without a prompt if given.

    Args:
        embeds: ``[2, pictures, …]`` (without a prompt first, as diffusers has them), ``[1, pictures, …]``,
            ``[pictures, …]`` or one picture's; a list of one of these is taken too.
        width: of the features.
        rank: 1 for a vector of each picture, 2 for states ``[length, width]``.

    Raises:
        InputError: other shapes, or values that are not finite.
    """
    if isinstance(embeds, list | tuple) and len(embeds) == 1:
        embeds = embeds[0]
    if isinstance(embeds, np.ndarray):
        embeds = torch.from_numpy(embeds)
    if not isinstance(embeds, torch.Tensor) or not embeds.is_floating_point():
        raise InputError(f"embeds must be a float tensor, got {type(embeds).__name__}.")
    shape, features = list(embeds.shape), embeds.detach()
    while features.ndim < rank + 2:
        features = features[None]
    if features.ndim != rank + 2 or features.shape[0] not in (1, 2) or 0 in shape or shape[-1] != width:
        dims = f"{width}" if rank == 1 else f"length, {width}"
        raise InputError(
            f"embeds has the shape {shape}; this adapter reads [pictures, {dims}] or [2, pictures, {dims}]."
        )
    if not bool(torch.isfinite(features).all()):
        raise InputError("embeds has values that are not finite (NaN or infinity).")
    return features[-1:], features[:1] if features.shape[0] == 2 else None


def _listed(source: Any) -> list[Any]:
    if isinstance(source, torch.Tensor | np.ndarray) and source.ndim == 4:
        return list(source)
    return list(source) if isinstance(source, list | tuple) else [source]


def _pixels(source: Any, side: int) -> torch.Tensor:
    """[1 or more, 3, side, side]"""
    if isinstance(source, torch.Tensor) and source.ndim == 4:
        return torch.cat([_pixels(item, side) for item in source])
    if isinstance(source, torch.Tensor) and source.is_floating_point() and tuple(source.shape) == (3, side, side):
        if not bool(torch.isfinite(source).all()):
            raise InputError("The picture of an image prompt has values that are not finite (NaN or infinity).")
        if float(source.min()) < 0 or float(source.max()) > 1:
            return source.detach().cpu().float()[None]
    picture = load_image(source)
    short, long = sorted(picture.size)
    if long > 100 * short:
        raise InputError(f"A picture of {picture.width} x {picture.height} pixels is too narrow for an image prompt.")
    return clip_pixels([picture], side)
