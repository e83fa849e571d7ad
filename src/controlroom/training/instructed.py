"""What trainings of InstructPix2Pix (arXiv 2211.09800) share: further input channels, what a sample leaves out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from controlroom.core.errors import ModelError
from controlroom.training.base_model import BaseModel
from controlroom.training.randomness import StepRandom

#: Shares of samples with both, without the picture, without the instruction, without either.
DROPOUT = (0.85, 0.05, 0.05, 0.05)


def widened(unet: Any, channels: int) -> Any:
    """The same UNet with further input channels, which it ignores as yet.

    Raises:
        ModelError: it has them already.
    """
    if int(unet.config.in_channels) != int(unet.config.out_channels):
        raise ModelError(
            f"The UNet reads {unet.config.in_channels} channels already; expected one that draws pictures."
        )
    config = {**unet.config, "in_channels": int(unet.config.in_channels) + channels}
    config.pop("_use_default_values", None)  # names what nobody gave, which would be set to its default again
    wide: Any = UNet2DConditionModel.from_config(config)
    weights = unet.state_dict()
    first = weights["conv_in.weight"]
    weights["conv_in.weight"] = torch.cat([first, first.new_zeros(len(first), channels, *first.shape[2:])], dim=1)
    wide.load_state_dict(weights)
    return wide


def widen(base: BaseModel, channels: int) -> None:
    """Give a model that trains a UNet with further input channels, where its own was."""
    processors = base.unet.attn_processors
    wide = widened(base.unet, channels).to(base.device)
    wide.set_attn_processor(processors)
    base.backbone = replace(base.backbone, unet=wide, kept={})


def left_out(rng: StepRandom, shares: Sequence[float] = DROPOUT) -> tuple[Tensor, Tensor]:
    """Which samples [B] do not see the picture, and which are not told the instruction; exclusive outcomes."""
    outcome = rng.choice("left out", shares)
    return outcome % 2 == 1, outcome >= 2
