"""The theatre's inpainting network: nine input channels, as Stable Diffusion's (arXiv 2112.10752).

The theatre's UNet gets five further channels (`theatre_channels`): the mask, and the scaled latents of the picture
without the masked part. Holes are parts and boxes of actors by ground truth, random brushes, and in 15 % the whole
picture; each scene has one hole.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlroom.data.theatre.holes import HOLES_VERSION, KINDS, hole
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.latent_cache import LatentCache, cache_key
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_channels import ChannelRecipe


class TheatreInpaint(ChannelRecipe):
    """Recipe: the scene out of its words, a mask, and what is outside of it."""

    name = "theatre_inpaint"

    def __init__(
        self, unet_folder: Path, vae_folder: Path, clip_folder: Path, cache_folder: Path, scenes: int = 25_600
    ) -> None:
        super().__init__(unet_folder, vae_folder, clip_folder, cache_folder, scenes, channels=5)
        key = cache_key({"vae": self.vae}, WORLD_VERSION, HOLES_VERSION, "scenes with holes")
        self.known = LatentCache(cache_folder, key, scenes, self.cache.shape)
        self.known.build(
            lambda slots: self.encode_known([sample_scene(index) for index in slots], holes_of(slots)),
            chunk=16,
            report=_report,
        )

    def fingerprint(self) -> str:
        return f"{super().fingerprint()} {HOLES_VERSION} {KINDS}"

    def encode_known(self, scenes: Sequence[Scene], masks: Tensor) -> Tensor:
        """Scaled latents of the pictures outside of masks [B, 1, 128, 128]; the holes are grey."""
        return self.encode(to_pixels([render(scene) for scene in scenes]) * (masks < 0.5))

    def channels(self, indices: Sequence[int]) -> Tensor:
        known = self.known.read(list(indices))
        return torch.cat([_small(holes_of(indices), known), known], dim=1)

    def channels_of(self, scenes: Sequence[Scene]) -> Tensor:
        masks = torch.stack([_tensor(hole(scene, "held_out", i)) for i, scene in enumerate(scenes)])
        known = self.encode_known(scenes, masks)
        return torch.cat([_small(masks, known), known], dim=1)


def holes_of(indices: Sequence[int]) -> Tensor:
    """[B, 1, 128, 128] in {0, 1}: 1 where a train scene is missing."""
    return torch.stack([_tensor(hole(sample_scene(index), "train", index)) for index in indices])


def _tensor(mask: np.ndarray) -> Tensor:
    return torch.from_numpy(mask.astype(np.float32))[None]


def _small(masks: Tensor, known: Tensor) -> Tensor:
    """Masks in the size of latents, by the nearest pixel as in a run."""
    return F.interpolate(masks, size=known.shape[-2:]).to(known.device)


def _report(done: int, total: int) -> None:
    if done % 6400 < 16:
        print(f"latents of scenes with holes: {done} of {total}", flush=True)
