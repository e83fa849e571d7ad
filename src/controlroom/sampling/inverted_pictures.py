"""The pictures of an inversion: read, named, and compared with what came back."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from controlroom.core.errors import InputError
from controlroom.core.images import FitMode, fit, load_image


def paired(image: Any, prompt: str | list[str]) -> tuple[list[Any], list[str]]:
    """One picture for each prompt, and the other way round.

    Raises:
        InputError: numbers of them that do not fit each other.
    """
    batched = isinstance(image, np.ndarray | torch.Tensor) and image.ndim == 4
    sources = list(image) if batched or isinstance(image, list | tuple) else [image]
    prompts = list(prompt) if isinstance(prompt, list) else [prompt]
    if not sources or not prompts or not (len(sources) == len(prompts) or 1 in (len(sources), len(prompts))):
        raise InputError(f"{len(sources)} pictures and {len(prompts)} prompts. Give one, or one of each for the other.")
    count = max(len(sources), len(prompts))
    return sources * (count // len(sources)), prompts * (count // len(prompts))


def read_pixels(sources: list[Any], size: tuple[int, int], mode: FitMode) -> torch.Tensor:
    """[B, 3, height, width] in [-1, 1].

    Raises:
        InputError: a picture that cannot be read.
    """
    height, width = size
    rows = [np.asarray(fit(load_image(source), width, height, mode), np.float32) for source in sources]
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).contiguous() / 255 * 2 - 1


def names(sources: list[Any]) -> tuple[str, ...]:
    """What to call each picture."""
    found = []
    for index, source in enumerate(sources):
        path = source if isinstance(source, str) or hasattr(source, "__fspath__") else getattr(source, "filename", "")
        number = f"picture {index + 1}" if len(sources) > 1 else "the picture"
        found.append(repr(str(path)) if path else number)
    return tuple(found)


def decibels(found: torch.Tensor, wanted: torch.Tensor) -> tuple[float, ...]:
    """Peak signal to noise ratio of each picture of [B, 3, H, W] in [-1, 1]; 120 where they are the same."""
    error = ((found.clamp(-1, 1) - wanted.clamp(-1, 1)).double() / 2) ** 2
    return tuple(-10 * math.log10(max(float(row.mean()), 1e-12)) for row in error)
