"""The picture that a run starts from or edits: one for all images of a run, or one for each prompt.

A picture (path, bytes, PIL, 8-bit array or tensor) is stretched to the run's size. A float tensor or array keeps its
precision: [0, 1], or [-1, 1] if any value is negative. Latents, a float tensor [B, 4, h, w], are taken as they are
where a control says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from controlroom.core.errors import InputError
from controlroom.core.images import fit, load_image
from controlroom.core.run import Run

# Beyond 1 by this much, values are brightness of another range and not a rounded 1.
_ROUNDING = 1e-3


def source_pixels(source: Any, run: Run, name: str = "image", size: tuple[int, int] | None = None) -> torch.Tensor:
    """Read the picture of a run: [1 or prompts or images, 3, height, width] in [-1, 1].

    Args:
        source: picture, float tensor or array ([C, H, W] or [H, W, C], or a batch), or a list of these.
        run: gives size, device and precision.
        name: what to call it in an error.
        size: height and width to stretch it to; None: those of the run.

    Raises:
        InputError: unreadable, values outside the range, or a number that does not fit the images.
    """
    rows = [stretched(part, size or run.size) for part in natural_pixels(source, name)]
    pixels = torch.cat(rows)
    check_count(len(pixels), run, name)
    return pixels.to(device=run.device, dtype=run.dtype)


def natural_pixels(source: Any, name: str = "image") -> list[torch.Tensor]:
    """Pictures in sizes of their own: for each item [rows, 3, H, W] in [-1, 1], float32 on the CPU.

    Raises:
        InputError: unreadable, empty, or values outside the range.
    """
    listed = list(source) if isinstance(source, Sequence) and not isinstance(source, str | bytes) else [source]
    if not listed or source is None:
        raise InputError(f"There is no {name}. Give a picture, or one for each prompt.")
    return [_one(item, name) for item in listed]


def stretched(pixels: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[rows, 3, H, W] in [-1, 1] -> that height and width; what has it already stays bit for bit."""
    if tuple(pixels.shape[-2:]) == size:
        return pixels
    if _eight_bit(pixels):
        # Pillow's Lanczos filter, as for every picture.
        height, width = size
        pictures = [load_image(((row + 1) * 127.5).round().to(torch.uint8)) for row in pixels]
        return torch.cat([_pixels(fit(picture, width, height, "stretch")) for picture in pictures])
    return F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)


def is_latents(source: Any, run: Run) -> bool:
    """Whether what was given are latents: a float tensor [B, channels of the latents, h, w]."""
    floats = isinstance(source, torch.Tensor) and source.ndim == 4 and source.is_floating_point()
    return floats and source.shape[1] == run.backbone.latent_channels


def for_each_image(x: torch.Tensor, run: Run) -> torch.Tensor:
    """One row for each image of the run: as many as prompts are repeated for each prompt's images."""
    return x.repeat_interleave(run.images // x.shape[0], dim=0)


def check_count(rows: int, run: Run, name: str) -> None:
    """A number of pictures that the images of a run can be made from.

    Raises:
        InputError: it does not divide them.
    """
    if rows < 1 or run.images % rows:
        raise InputError(f"There are {rows} {name}s for {run.images} images. Give one, or one for each prompt.")


def _one(item: Any, name: str) -> torch.Tensor:
    if isinstance(item, np.ndarray) and item.dtype.kind == "f" and item.ndim >= 3 and item.shape[-1] in (1, 3):
        item = torch.from_numpy(np.ascontiguousarray(np.moveaxis(item, -1, -3)))
    if isinstance(item, torch.Tensor) and item.is_floating_point() and item.ndim in (3, 4) and item.shape[-3] in (1, 3):
        return _floats(item, name)
    if isinstance(item, np.ndarray | torch.Tensor) and item.ndim == 4:
        return torch.cat([_pixels(load_image(each)) for each in item])
    return _pixels(load_image(item))


def _floats(item: torch.Tensor, name: str) -> torch.Tensor:
    pixels = item.detach().cpu().float()
    pixels = pixels[None] if pixels.ndim == 3 else pixels
    if pixels.numel() == 0 or not bool(torch.isfinite(pixels).all()) or float(pixels.abs().max()) > 1 + _ROUNDING:
        raise InputError(
            f"The {name} {list(item.shape)} is empty, or has values that are not finite or beyond 1. Floats lie in "
            "[0, 1], or in [-1, 1] if any is negative."
        )
    pixels = pixels if bool((pixels < 0).any()) else pixels * 2 - 1
    return pixels.expand(-1, 3, -1, -1)


def _pixels(picture: Any) -> torch.Tensor:
    """[1, 3, H, W] in [-1, 1]; divided as diffusers divides, so that results agree to rounding."""
    array = np.asarray(picture, np.float32) / np.float32(255)
    return torch.from_numpy(array).permute(2, 0, 1)[None].contiguous() * 2 - 1


def _eight_bit(pixels: torch.Tensor) -> bool:
    steps = (pixels + 1) * 127.5
    return bool(((steps - steps.round()).abs() < 1e-3).all())
