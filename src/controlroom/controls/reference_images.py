"""Pictures that a run refers to (whose person, style or garment it takes over), and masks of their parts.

What is given is a list of references; every picture of the run refers to all of them. A list of lists gives each
prompt references of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from controlroom.core.errors import InputError
from controlroom.core.images import fit, load_image, load_mask
from controlroom.core.run import Run

# Longer than this, a picture is squeezed: it would have no pixels left across.
_MAX_RATIO = 4.0


def listed(source: Any) -> list[list[Any]]:
    """``[prompt or all][reference]``: what is given as one picture, a batch, a list, or a list of lists."""
    if isinstance(source, np.ndarray | torch.Tensor) and source.ndim == 4:
        source = list(source)
    if not isinstance(source, list | tuple):
        return [[source]]
    if any(isinstance(item, list | tuple) for item in source):
        rows = [list(item) if isinstance(item, list | tuple) else [item] for item in source]
        if len({len(row) for row in rows}) > 1:
            raise InputError(f"Prompts have {[len(row) for row in rows]} references. Give each as many.")
        return rows
    return [list(source)]


def count(source: Any) -> int:
    """Number of references of each picture.

    Raises:
        InputError: none, or not the same number for each prompt.
    """
    number = len(listed(source)[0])
    if number == 0 or source is None:
        raise InputError("There is no reference. Give a picture, or a list of them.")
    return number


def reference_pixels(source: Any, run: Run, shape: Literal["run", "own"] = "run") -> list[torch.Tensor]:
    """Read references.

    Args:
        source: picture (path, bytes, PIL, array, tensor), batch, list, or a list of lists, one for each prompt.
        run: gives size and number of images.
        shape: ``run``: stretched to the size of the run; ``own``: of as many pixels as the run's picture has, with
            proportions of their own, to what the network can halve.

    Returns:
        For each reference [1 or images, 3, H, W] in [-1, 1].

    Raises:
        InputError: unreadable, or numbers or sizes that do not fit each other.
    """
    count(source)
    prompts = [[load_image(item) for item in row] for row in listed(source)]
    found = []
    for pictures in zip(*prompts, strict=True):
        sizes = {run.size if shape == "run" else own_size(picture.size, run) for picture in pictures}
        if len(sizes) > 1:
            raise InputError("The references of different prompts have different proportions. Crop them to one.")
        height, width = sizes.pop()
        rows = [np.asarray(fit(picture, width, height, "stretch"), np.float32) for picture in pictures]
        pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1
        found.append(_for_images(pixels.to(device=run.device, dtype=run.dtype), run))
    return found


def own_size(size: tuple[int, int], run: Run) -> tuple[int, int]:
    """Height and width for a picture of ``size`` (width, height): its proportions, the run's area, rounded."""
    levels = len(run.backbone.unet.config.block_out_channels)
    step = run.backbone.pixels_per_latent * 2 ** (levels - 1)
    height, width = run.size
    ratio = min(max(size[0] / size[1], 1 / _MAX_RATIO), _MAX_RATIO)
    if abs(ratio / (width / height) - 1) < step / max(height, width):
        return run.size
    side = (height * width) ** 0.5
    return tuple(max(step, round(s / step) * step) for s in (side / ratio**0.5, side * ratio**0.5))  # type: ignore[return-value]


def reference_masks(source: Any, run: Run, pixels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Read masks of the references: for each [1 or images, 1, H, W] in [0, 1], in its size; a single one serves all.

    Raises:
        InputError: unreadable, black all over, or another number than there are references.
    """
    rows = listed(source)
    if len(rows[0]) == 1 and len(pixels) > 1:
        rows = [row * len(pixels) for row in rows]
    if len(rows[0]) != len(pixels):
        raise InputError(f"There are {len(rows[0])} masks for {len(pixels)} references. Give one, or one for each.")
    found = []
    for masks, picture in zip(zip(*rows, strict=True), pixels, strict=True):
        loaded = [torch.from_numpy(load_mask(m, (picture.shape[3], picture.shape[2])).copy()) for m in masks]
        if not all(bool((mask > 0).any()) for mask in loaded):
            raise InputError("A mask of a reference is black all over, so nothing of it would be seen. Paint white.")
        found.append(_for_images(torch.stack(loaded)[:, None].to(run.device), run))
    return found


def token_bias(mask: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[rows, 1, H, W] in [0, 1] -> [rows, h * w]: logarithm of the share of each token that is white."""
    return F.interpolate(mask.float(), size=hw, mode="area").flatten(1).log()


def _for_images(x: torch.Tensor, run: Run) -> torch.Tensor:
    """One row where all images share it, else one for each image."""
    if x.shape[0] == 1:
        return x
    if run.images % x.shape[0]:
        raise InputError(f"There are references for {x.shape[0]} prompts, but {run.images} images. Give one for each.")
    return x.repeat_interleave(run.images // x.shape[0], dim=0)
