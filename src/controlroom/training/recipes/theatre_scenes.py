"""Single scenes with their conditions, as adapters learn from them: cached latents, words, maps, and a held-out error.

Several recipes share this: they differ in the network that reads the conditions, in which are left out, and in how
timesteps are drawn and errors weighted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from controlroom.data.theatre.captions import training_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice, Scene, sample_scene
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_controlnet import condition_pixels
from controlroom.training.recipes.theatre_unet import Conditioner, latents_of_scenes, theatre_objective

EMPTY_SHARE = 0.5
"""Samples without words."""
HELD_OUT_SCENES = 16

Predict = Callable[["SceneBatch", Tensor, Tensor], Tensor]
"""Batch, noisy latents and timesteps -> predicted noise."""
Maps = Callable[[Scene], Tensor]
"""What a network reads of a scene, one tensor."""


@dataclass(frozen=True)
class SceneBatch:
    """``latents`` [B, 4, 16, 16], scaled; ``ids`` [B, 77]; ``maps`` [B, ...] as `Maps` gives them."""

    latents: Tensor
    ids: Tensor
    maps: Tensor


def condition_maps(scene: Scene, kinds: Sequence[str]) -> Tensor:
    """[3 * kinds, 128, 128] in [0, 1]: conditions of a scene, three channels each, in the order of ``kinds``."""
    return torch.cat([condition_pixels(scene, kind) for kind in kinds])


class Scenes:
    """Train scenes 0 to ``count`` - 1 and a few held-out ones, with the frozen networks around them.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of scenes are kept; the UNet's are used if they are as many.
        count: number of training scenes.
    """

    def __init__(self, unet_folder: Path, vae_folder: Path, clip_folder: Path, cache_folder: Path, count: int) -> None:
        self.count = count
        self.vae: Any = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
        self.conditioner = Conditioner(clip_folder)
        self.objective = theatre_objective()
        self.cache = latents_of_scenes(self.vae, cache_folder, count)
        self.unet: Any = UNet2DConditionModel.from_pretrained(unet_folder).eval().requires_grad_(False)
        # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        self._held_out: SceneBatch | None = None

    def frozen(self) -> dict[str, nn.Module]:
        """The networks that are used and do not move."""
        return {"unet": self.unet, "text_encoder": self.conditioner.encoder, "vae": self.vae}

    @property
    def halvings(self) -> int:
        """How often the autoencoder halves a picture's sides."""
        return len(self.vae.config.block_out_channels) - 1

    def batch(self, indices: Sequence[int], step: int, maps: Maps, stream: str) -> SceneBatch:
        """Scenes of these numbers, with what ``maps`` reads of them; other words each epoch, of this ``stream``."""
        scenes, texts = [sample_scene(index) for index in indices], []
        for scene, index in zip(scenes, indices, strict=True):
            dice = Dice(stream, index, step)
            texts.append("" if dice.chance(EMPTY_SHARE) else training_caption(scene, dice))
        found = torch.stack([maps(scene) for scene in scenes])
        return SceneBatch(self.cache.read(list(indices)), self.conditioner.ids(texts), found)

    def error(self, batch: SceneBatch, noise: Tensor, t: Tensor, predict: Predict) -> Tensor:
        """[B]: mean squared error of the predicted noise at timesteps ``t`` [B]."""
        drawn = self.objective.at(batch.latents, t, noise)
        return self.objective.errors(predict(batch, drawn.latents, t), drawn)

    def alone(self, batch: SceneBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise as the frozen UNet sees it, from the words alone."""
        return self.unet(noisy, t, self.conditioner(batch.ids)).sample

    @torch.no_grad()
    def held_out(self, predict: Predict, maps: Maps) -> float:
        """Error on held-out scenes without words, at four noise levels; the same noise every time."""
        if self._held_out is None:
            scenes = [sample_scene(index, "held_out") for index in range(HELD_OUT_SCENES)]
            device = self.unet.device
            pixels = to_pixels([render(scene) for scene in scenes]).to(self.vae.device)
            latents = (self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor).to(device)
            ids = self.conditioner.ids([""] * len(scenes)).to(device)
            self._held_out = SceneBatch(latents, ids, torch.stack([maps(scene) for scene in scenes]).to(device))
        batch = self._held_out
        return self.objective.held_out(lambda noisy, t: predict(batch, noisy, t), batch.latents)
