"""What recipes share whose UNet reads further channels beside the latents: widened, and tuned whole.

The further weights start at zero, so that training starts from the model as it is. The channels are always there, as in
Stable Diffusion's inpainting and depth models (arXiv 2112.10752); words are left out of one sample in ten.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from diffusers import UNet2DConditionModel
from pydantic import Field
from torch import Tensor, nn

from controlroom.backbones.lora_names import UNET
from controlroom.core.branch import Condition
from controlroom.training.base_model import BaseModel
from controlroom.training.conditioned_recipe import ConditionedRecipe, ConditionedSettings
from controlroom.training.instructed import widen
from controlroom.training.shown import Shown


class ChannelSettings(ConditionedSettings):
    """What the settings of these recipes share."""

    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 15_000,
        "batch_size": 16,
        "learning_rate": 5e-5,
        "ema_decay": 0.9999,
    }

    empty_prompts: float = Field(default=0.1, ge=0.0, le=1.0)
    """Share of samples without words."""


ChannelT = TypeVar("ChannelT", bound=ChannelSettings)


class ChannelRecipe(ConditionedRecipe[ChannelT]):
    """Base of such a recipe.

    Args:
        base: the model, whose UNet trains; it gets the further channels here.
        shown: the pictures.
        settings: of the method.
        channels: how many there are beside the latents.
        held_out: pictures that the error is measured on, on the way; None: none.

    Exported is the folder ``unet`` in diffusers' layout; with the other parts of the model it is a checkpoint.

    Raises:
        ModelError: the UNet reads more than latents already.
    """

    def __init__(
        self, base: BaseModel, shown: Shown, settings: ChannelT, channels: int, held_out: Shown | None = None
    ) -> None:
        super().__init__(base, shown, settings, held_out)
        widen(base, channels)
        base.unet.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        return self.base.trained()

    def predict(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Tensor:
        return self.base.predict(torch.cat([noisy, maps], dim=1), t, condition)

    def export(self, folder: Path) -> None:
        self.base.unet.save_pretrained(folder / UNET)

    def load(self, folder: Path) -> None:
        self.base.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder / UNET).state_dict())
