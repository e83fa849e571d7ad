"""Pictures as recipes without latents show them: whole sets in memory, eight bits a channel, one size."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture, fingerprint
from controlroom.training.buckets import Bucket, crop_to
from controlroom.training.held_out import in_parts


class ShownPixels:
    """Pictures cropped around their centre to one size; words and masks are not used.

    Args:
        pictures: each is shown as often an epoch as its ``repeats``.
        size: height and width.
        flip: also show each picture mirrored: numbers beyond the set are its pictures mirrored.

    Raises:
        InputError: no picture, or one that cannot be read.
    """

    def __init__(self, pictures: Sequence[Picture], size: tuple[int, int], flip: bool = False) -> None:
        if not pictures:
            raise InputError("There is no picture to train on.")
        self.pictures, self.size = tuple(pictures), size
        height, width = size
        crops = [crop_to(p.size, Bucket(width, height)).apply(p.read()) for p in self.pictures]
        # Eight bits each, so that a large set fits.
        self.pixels = torch.stack([torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in crops])
        self._places = [i for i, p in enumerate(self.pictures) for _ in range(p.repeats)]
        self._flip = flip

    def __len__(self) -> int:
        return len(self._places) * (2 if self._flip else 1)

    def fingerprint(self) -> str:
        """Of the pictures' contents."""
        return fingerprint(self.pictures)

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return tuple(self.pictures[self._places[i % len(self._places)]].name for i in indices)

    def parts(self) -> list[Tensor]:
        """Every picture once and as it is, a few at a time: what is measured on."""
        return [self._rows(part) for part in in_parts(range(len(self.pictures)))]

    def _rows(self, numbers: Sequence[int]) -> Tensor:
        return self.pixels[list(numbers)].float() / 127.5 - 1.0

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]."""
        rows = self._rows([self._places[i % len(self._places)] for i in indices])
        mirrored = torch.tensor([i >= len(self._places) for i in indices])
        return torch.where(mirrored[:, None, None, None], rows.flip(-1), rows)
