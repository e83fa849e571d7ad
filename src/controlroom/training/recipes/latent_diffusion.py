"""Latent diffusion (Rombach et al., arXiv 2112.10752): a new denoiser in the latents of a model's autoencoder.

A UNet with random weights, of the model's own shape or a smaller one, learns to denoise pictures from their captions;
autoencoder and text encoders are the model's and stay. A tenth of the samples has no words, so that it can be guided
(arXiv 2207.12598). Deviation: pictures are encoded to the posterior's mean, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from controlroom.backbones.lora_names import UNET
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.buckets import BucketOrder
from controlroom.training.prior import subject_loss
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.shown import Shown
from controlroom.training.shown_recipe import Batch, ShownRecipe, ShownSettings, without_words


class LatentDiffusionSettings(ShownSettings):
    """How large the network is, and how it learns."""

    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 400_000,
        "batch_size": 64,
        "learning_rate": 1e-4,
        "warmup_steps": 10_000,
        "ema_decay": 0.9999,
    }

    channels: tuple[PositiveInt, ...] | None = None
    """Of each level, as many as the model's UNet has; None: its own."""
    layers: PositiveInt | None = None
    """Residual blocks of a level; None: the model's."""
    prompt: str | None = None
    """Words for pictures without a caption."""
    without_words: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of samples without words."""
    buckets: bool = True
    """Whether pictures keep their shape, each batch of one; otherwise the middle of ``size`` is cut out."""
    seed: int = Field(default=0, ge=0)
    """Of the weights that it starts from."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> LatentDiffusionRecipe:
        fresh = type(pipe)(replace(pipe.backbone, unet=self.network(pipe.backbone.unet), kept={}), None, pipe.model)
        base = self.networks(fresh, [UNET])
        shown, held_out = self.shown(base, pictures, self.prompt, buckets=self.buckets)
        return LatentDiffusionRecipe(base, shown, self, held_out)

    def network(self, like: Any) -> UNet2DConditionModel:
        """A UNet as a model's, with random weights that depend on ``seed`` alone.

        Raises:
            InputError: channels that do not fit the model's shape.
        """
        shape = {key: value for key, value in dict(like.config).items() if not key.startswith("_")}
        if self.channels is not None:
            levels = len(shape["block_out_channels"])
            if len(self.channels) != levels:
                raise InputError(f"channels has {len(self.channels)} levels; the model's UNet has {levels}.")
            shape["block_out_channels"] = self.channels
        if self.layers is not None:
            shape["layers_per_block"] = self.layers
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            try:
                found: Any = UNet2DConditionModel.from_config(shape)
            except (ValueError, TypeError) as error:
                raise InputError(f"No UNet has this shape: {error}. Change channels or layers.") from error
        return found.to(device=like.device, dtype=like.dtype)


class LatentDiffusionRecipe(ShownRecipe[LatentDiffusionSettings]):
    """Recipe: a new UNet on pictures with captions. Exported is the folder ``unet`` in diffusers' layout."""

    name = "latent_diffusion"

    def __init__(
        self, base: BaseModel, shown: Shown, settings: LatentDiffusionSettings, held_out: Shown | None = None
    ) -> None:
        super().__init__(base, shown, settings, held_out=held_out)
        base.unet.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        return self.base.trained()

    def batch_order(self, batch_size: int, seed: int, first_slot: int) -> BucketOrder:
        """Batches of one size."""
        return self.shown.order(batch_size, seed, first_slot)

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[str]) -> Tensor:
        """What the new network predicts."""
        scale = self.base.backbone.pixels_per_latent
        size = (noisy.shape[-2] * scale, noisy.shape[-1] * scale)
        return self.base.predict(noisy, t, self.base.condition(prompts, size))

    def loss(self, batch: Batch, step: int, rng: StepRandom) -> Losses:
        told = without_words(batch[0], self.settings.without_words, rng)
        return subject_loss(self.objective, self.predict, told, None, rng)

    def export(self, folder: Path) -> None:
        self.base.unet.save_pretrained(folder / UNET)

    def load(self, folder: Path) -> None:
        found = UNet2DConditionModel.from_pretrained(folder / UNET).state_dict()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in self.base.unet.state_dict().items()}:
            raise ModelError(f"{str(folder)!r} holds a UNet of another size than the settings say.")
        self.base.unet.load_state_dict(found)
