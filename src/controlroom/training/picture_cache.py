"""Encoded training pictures on disk: mean and deviation of the autoencoder's posterior, and the mask.

An entry's key is a hash of the picture's bytes, of how it is cropped, of the encoder's weights and of the precision it
is kept in. Nothing has to be told when pictures come, go or change, or when another autoencoder is used: what is there
is used, what is missing or broken is made. Unlike `latent_cache.LatentCache`, which keeps one size under running
numbers, it holds any sizes and allows sampling from the posterior.

Pictures are encoded one by one, so that an entry does not depend on which others were missing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.training.buckets import Crop
from controlroom.training.checkpoint import modules_hash
from controlroom.training.entry_store import EntryStore, key_of

_VERSION = "picture latents 2"

Shown = tuple[Picture, Crop]
"""A picture and how it gets to its size."""
Posterior = Callable[[Tensor], Any]
"""Pixels [1, 3, H, W] in [-1, 1] -> a distribution with ``mean`` and ``std``, as diffusers' autoencoders give it."""


@dataclass(frozen=True)
class PictureLatents:
    """Encoded pictures of one size.

    Attributes:
        mean, std: of the posterior, as the autoencoder gives them (not scaled), float32 [B, C, h, w].
        mask: share of each latent pixel that counts, [B, 1, h, w] in [0, 1]; 1 where a picture has no mask.
        time_ids: [B, 6], as `Crop.time_ids`.
        shift, scale: what brings a posterior's sample to latents.
    """

    mean: Tensor
    std: Tensor
    mask: Tensor
    time_ids: Tensor
    shift: Tensor
    scale: Tensor

    def latents(self, noise: Tensor | None = None) -> Tensor:
        """Latents as the denoiser has them: of the mean, or of the sample that standard normal ``noise`` picks."""
        found = self.mean if noise is None else self.mean + self.std * noise.to(self.mean)
        return (found - self.shift) * self.scale

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pictures in pixels."""
        return int(self.time_ids[0, 4]), int(self.time_ids[0, 5])


class PictureEncoder:
    """Encodes pictures one by one and keeps nothing.

    Args:
        vae: diffusers' autoencoder.
        dtype: of what it gives.
        posterior: how the autoencoder is asked; None: as it is. A backbone's `posterior` knows which overflow.
    """

    def __init__(self, vae: Any, dtype: torch.dtype = torch.float32, posterior: Posterior | None = None) -> None:
        self.vae, self.dtype, self._posterior = vae, dtype, posterior or self._asked
        self.shift, self.scale = latent_scale(vae)

    def read(self, shown: Sequence[Shown]) -> PictureLatents:
        """Encoded pictures of one bucket, in order, on the CPU.

        Raises:
            InputError: a picture that cannot be decoded, a mask that shows nothing, latents that are not finite, or
                pictures of several sizes.
        """
        sizes = {crop.bucket for _, crop in shown}
        if len(sizes) != 1:
            raise InputError(f"A batch has pictures of {len(sizes)} sizes; expected one. Use BucketOrder.")
        entries = [self._entry(one) for one in shown]
        mean, std = (torch.stack([entry[name].float() for entry in entries]) for name in ("mean", "std"))
        open_mask = torch.ones(1, *mean.shape[2:])
        return PictureLatents(
            mean,
            std,
            torch.stack([entry["mask"].float() if "mask" in entry else open_mask for entry in entries]),
            torch.tensor([crop.time_ids for _, crop in shown], dtype=torch.float32),
            self.shift,
            self.scale,
        )

    @torch.no_grad()
    def _asked(self, pixels: Tensor) -> Any:
        return self.vae.encode(pixels.to(next(self.vae.parameters()))).latent_dist

    @torch.no_grad()
    def _entry(self, shown: Shown) -> dict[str, Tensor]:
        picture, crop = shown
        # Divided and laid out as controls do it, so that latents are the same bit for bit.
        pixels = torch.from_numpy(np.asarray(crop.apply(picture.read()), np.float32) / np.float32(255))
        posterior = self._posterior(pixels.permute(2, 0, 1)[None].contiguous() * 2 - 1)
        entry = {"mean": posterior.mean[0], "std": posterior.std[0]}
        if picture.read_mask is not None:
            mask = np.asarray(crop.apply_mask(picture.read_mask()), np.float32) / 255
            if not mask.any():
                raise InputError(f"The mask of {picture.name} is black within the crop; nothing of it would count.")
            entry["mask"] = F.adaptive_avg_pool2d(torch.from_numpy(mask)[None], entry["mean"].shape[1:])
        entry = {name: value.cpu().to(self.dtype) for name, value in entry.items()}
        if not all(bool(torch.isfinite(value).all()) for value in entry.values()):
            raise InputError(
                f"The latents of {picture.name!r} are not finite in {self.dtype}, encoded in "
                f"{next(self.vae.parameters()).dtype}. Give the autoencoder in float32, or keep them in float32."
            )
        return entry


class PictureCache(PictureEncoder):
    """Encoded pictures in a folder; several processes and several autoencoders may share it.

    Args:
        folder: where entries are kept.
        vae: diffusers' autoencoder; only its encoder decides what is kept.
        dtype: that entries are kept in.
        posterior: as of `PictureEncoder`.
    """

    def __init__(
        self, folder: Path, vae: Any, dtype: torch.dtype = torch.float16, posterior: Posterior | None = None
    ) -> None:
        super().__init__(vae, dtype, posterior)
        self.store = EntryStore(folder)

    @cached_property
    def encoder_hash(self) -> str:
        """Of the weights that decide what is kept."""
        parts = {name: getattr(self.vae, name, None) for name in ("encoder", "quant_conv")}
        return modules_hash({name: part for name, part in parts.items() if part is not None})

    def key(self, shown: Shown) -> str:
        """Of the entry of a picture."""
        picture, crop = shown
        return key_of(_VERSION, picture.content, crop.key, self.encoder_hash, str(self.dtype))

    def fill(self, shown: Sequence[Shown], report: Callable[[int, int], None] | None = None) -> int:
        """Encode what is missing or broken; returns how many that were.

        What is done stays when this is interrupted. ``report`` gets (done, count) after each picture that was encoded.

        Raises:
            InputError: a picture that cannot be decoded, a mask that shows nothing, or latents that are not finite.
            OutputError: an entry that cannot be written.
        """
        unique = {self.key(one): one for one in shown}
        made = 0
        for number, (key, one) in enumerate(unique.items(), 1):
            if self.store.read(key) is None:
                self._make(key, one)
                made += 1
                if report is not None:
                    report(number, len(unique))
        return made

    def _entry(self, shown: Shown) -> dict[str, Tensor]:
        """What is kept; what is missing or broken is made first."""
        key = self.key(shown)
        found = self.store.read(key)
        return self._make(key, shown) if found is None else found

    def _make(self, key: str, shown: Shown) -> dict[str, Tensor]:
        entry = super()._entry(shown)
        self.store.write(key, entry)
        return entry


def latent_scale(vae: Any) -> tuple[Tensor, Tensor]:
    """Shift and scale that bring what the autoencoder gives to latents; each [1, 1, 1, 1] or [1, C, 1, 1]."""
    config = vae.config
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    factor = torch.tensor(float(config.scaling_factor))
    if mean is None or std is None:
        return torch.zeros(1, 1, 1, 1), factor.view(1, 1, 1, 1)
    return torch.tensor(mean).view(1, -1, 1, 1), factor / torch.tensor(std).view(1, -1, 1, 1)
