"""T2I-Adapter (Mou et al., arXiv 2302.08453) on pictures of one's own: a small network that reads a condition alone.

It learns to add one feature to each block of the frozen UNet's encoder, and sees neither noise nor words. Timesteps are
drawn as published, t = (1 - u^3) T with u uniform: layout is decided early, where the noise is strong. Deviation: half
of the samples are without words, so that the adapter also acts where there are none; ``empty_prompts = 0`` is as
published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from controlroom.backbones.t2i_adapter import check_fit, load_t2i_adapter
from controlroom.controls.spatial.t2i_adapter import T2IAdapter
from controlroom.core.branch import Condition
from controlroom.core.control import Control, Residuals
from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.conditioned_recipe import SideRecipe, SideSettings
from controlroom.training.conditions import ConditionMaps, Row
from controlroom.training.objective import Noised
from controlroom.training.randomness import StepRandom
from controlroom.training.shown import Shown
from controlroom.training.side_networks import cubic_timesteps, new_t2i_adapter


class T2IAdapterSettings(SideSettings):
    """How a T2I-Adapter is trained; rate, steps and batch of diffusers' example, which its authors wrote."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 15_000, "batch_size": 4, "learning_rate": 1e-5}

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> T2IAdapterRecipe:
        base, shown, held_out = self.sources(pipe, pictures)
        return T2IAdapterRecipe(base, shown, self, self.conditions(folder), held_out)


class T2IAdapterRecipe(SideRecipe[T2IAdapterSettings]):
    """Recipe: one condition of each picture into the frozen UNet, through an adapter.

    Args:
        base: the model, all of it frozen.
        shown: the pictures.
        settings: see `T2IAdapterSettings`.
        conditions: of the pictures.
        held_out: pictures that the error is measured on, on the way; None: none.

    Exported is a folder in diffusers' layout, for `cr.T2IAdapter`.

    Raises:
        InputError: sides of pictures that the adapter cannot shrink; an adapter to go on from that reads one channel.
        ModelError: it is to go on from one for another base model.
    """

    name = "t2i_adapter"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: T2IAdapterSettings,
        conditions: ConditionMaps,
        held_out: Shown | None = None,
    ) -> None:
        start, scale = settings.found("T2I-Adapter"), base.backbone.pixels_per_latent
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            net: Any = (
                new_t2i_adapter(base.unet, scale.bit_length() - 1)
                if start is None
                else load_t2i_adapter(start, base.unet, scale)
            )
        factor = int(net.config.downscale_factor)
        for crop in (*shown.crops, *(() if held_out is None else held_out.crops)):
            if crop.bucket.height % factor or crop.bucket.width % factor:
                raise InputError(
                    f"This adapter shrinks pictures {factor} times; {crop.bucket.height} x {crop.bucket.width} is no "
                    f"multiple of it. Give a size that is one, or set buckets = false."
                )
        if net.config.in_channels != 3:
            raise InputError(
                f"{settings.start_from} reads {net.config.in_channels} channel; go on from one that reads pictures."
            )
        check_fit(net, base.unet, shown.crops[0].bucket.size, scale, str(start or "made here"))
        super().__init__(base, shown, settings, conditions, net, held_out)

    def draw(self, latents: Tensor, rng: StepRandom) -> Noised:
        first = self.objective.settings.first_timestep
        t = first + cubic_timesteps(rng.uniform("timestep"), self.objective.last + 1 - first)
        return self.objective.at(latents, t, self.objective.noise(latents, rng))

    def residuals(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Residuals:
        return Residuals(("cond",), intrablock=tuple(self.net(maps)))

    def controls(self, row: Row) -> list[Control]:
        return [T2IAdapter(self.net, self.maps(self.shown, [row], 0)[0])]

    def export(self, folder: Path) -> None:
        self.net.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.take(load_t2i_adapter(folder, self.base.unet, self.base.backbone.pixels_per_latent), folder)
