"""What the recipes of networks with further input channels share: the theatre's UNet, widened, on its own scenes.

The further weights start at zero, so that training starts from the UNet as it is; all of it is tuned. One caption in
ten is empty; the channels are always there, as in Stable Diffusion's inpainting and depth models. Deviation: the loss
is weighted by min(SNR, 5) / SNR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from controlroom.data.theatre.captions import full_caption, training_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice, Scene, sample_scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_instruct_pix2pix import widened
from controlroom.training.recipes.theatre_unet import EMPTY_SHARE, Conditioner, latents_of_scenes, theatre_objective

HELD_OUT = 16


@dataclass(frozen=True)
class ChannelBatch:
    """``latents`` [B, 4, 16, 16], scaled; ``channels`` [B, c, 16, 16]; ``ids`` [B, 77]."""

    latents: Tensor
    channels: Tensor
    ids: Tensor


class ChannelRecipe:
    """Tunes a widened UNet on train scenes; a subclass says what the channels show.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents are kept; those of the scenes are shared with the UNet's own training.
        scenes: number of train scenes.
        channels: number of further channels.
    """

    name = "theatre_channels"

    def __init__(
        self, unet_folder: Path, vae_folder: Path, clip_folder: Path, cache_folder: Path, scenes: int, channels: int
    ) -> None:
        self.dataset_size: int | None = scenes
        self.vae: Any = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
        self.scale = float(self.vae.config.scaling_factor)
        self.conditioner = Conditioner(clip_folder)
        self.objective = theatre_objective()
        self.unet: Any = widened(UNet2DConditionModel.from_pretrained(unet_folder), channels)
        # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        self.cache = latents_of_scenes(self.vae, cache_folder, scenes)
        self._held_out: ChannelBatch | None = None

    def channels(self, indices: Sequence[int]) -> Tensor:
        """[B, c, 16, 16] for train scenes."""
        raise NotImplementedError

    def channels_of(self, scenes: Sequence[Scene]) -> Tensor:
        """[B, c, 16, 16] for scenes that no cache knows."""
        raise NotImplementedError

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def frozen(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.conditioner.encoder, "vae": self.vae}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} scenes={self.dataset_size} empty={EMPTY_SHARE}"

    def batch(self, indices: Sequence[int], step: int) -> ChannelBatch:
        texts: list[str] = []
        for index in indices:
            dice = Dice(self.name, index, step)  # another caption each epoch
            texts.append("" if dice.chance(EMPTY_SHARE) else training_caption(sample_scene(index), dice))
        return ChannelBatch(self.cache.read(list(indices)), self.channels(indices), self.conditioner.ids(texts))

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Scaled latents (posterior means) of pictures [B, 3, 128, 128] in [-1, 1]."""
        return self.vae.encode(pixels.to(self.vae.device)).latent_dist.mean * self.scale

    def predict(self, batch: ChannelBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise in noisy latents, seen with the channels and the words."""
        return self.unet(torch.cat([noisy, batch.channels], dim=1), t, self.conditioner(batch.ids)).sample

    def loss(self, batch: ChannelBatch, step: int, rng: StepRandom) -> Losses:
        drawn = self.objective.draw(batch.latents, rng)
        each = self.objective.errors(self.predict(batch, drawn.latents, drawn.t), drawn)
        return Losses((each * drawn.weight).mean(), {"mse": each.detach().mean()})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out scenes, at four noise levels, with the same noise every time: with their own channels, and
        with those of another scene, which is worse as far as the network listens to them.
        """
        if self._held_out is None:
            scenes = [sample_scene(index, "held_out") for index in range(HELD_OUT)]
            latents = self.encode(to_pixels([render(scene) for scene in scenes]))
            ids = self.conditioner.ids([full_caption(scene) for scene in scenes]).to(latents.device)
            self._held_out = ChannelBatch(latents, self.channels_of(scenes).to(latents.device), ids)
        batch = self._held_out
        others = replace(batch, channels=batch.channels.roll(1, dims=0))
        return {"held_out": self._measured(batch), "other_channels": self._measured(others)}

    def _measured(self, batch: ChannelBatch) -> float:
        return self.objective.held_out(lambda noisy, t: self.predict(batch, noisy, t), batch.latents)

    def export(self, folder: Path) -> None:
        self.unet.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder).state_dict())
