"""Networks beside the UNet as they are before any training, and what their published trainings draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, T2IAdapter
from PIL import Image
from torch import Tensor

from controlroom.backbones.t2i_adapter import feature_shapes, feature_slots
from controlroom.core.errors import ModelError
from controlroom.training.randomness import StepRandom

THEATRE_WIDTHS = (8, 16, 32, 64, 96)
PUBLISHED_WIDTHS = (16, 32, 96, 256, 512)
"""Of the layers that embed a ControlNet's condition; the first four for autoencoders that halve three times."""
KEEP_ALL, DROP_ALL, DROP_EACH = 0.1, 0.1, 0.5
"""Uni-ControlNet: shares of samples with all conditions and with none; else each is left out so often."""


def new_controlnet(
    unet: Any, halvings: int, channels: int = 3, widths: Sequence[int] = THEATRE_WIDTHS
) -> ControlNetModel:
    """A ControlNet that starts as the UNet's encoder; its condition is halved as often as the autoencoder halves."""
    return ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=tuple(widths[: halvings + 1]), conditioning_channels=channels
    )


def new_t2i_adapter(unet: Any, halvings: int) -> T2IAdapter:
    """A full adapter for a UNet, with fresh weights; its condition is shrunk as far as the autoencoder's pictures.

    For UNets whose first block is without attention (Stable Diffusion XL) it is shrunk once more.

    Raises:
        ModelError: a UNet whose blocks no adapter's features fit.
    """
    hw = (1 << 6, 1 << 6)
    slots = feature_slots(unet, hw)
    late = slots[0][1] != hw
    factor = 2 ** (halvings + late)
    # The feature of the middle may be missing.
    for count in dict.fromkeys((len(slots), len(unet.down_blocks))):
        net = T2IAdapter(
            in_channels=3,
            channels=[width for width, _ in slots[:count]],
            num_res_blocks=2,
            downscale_factor=factor,
            adapter_type="full_adapter_xl" if late else "full_adapter",
        )
        if feature_shapes(net, (hw[0] << halvings, hw[1] << halvings)) == slots[:count]:
            return net
    raise ModelError("No T2I-Adapter fits this UNet: its blocks are of other sizes than Stable Diffusion's.")


def cubic_timesteps(uniform: Tensor, count: int = 1000) -> Tensor:
    """Uniform numbers in [0, 1) -> timesteps 0 to ``count`` - 1, most of them late."""
    return ((1 - uniform**3) * count).long().clamp(0, count - 1)


def kept(rng: StepRandom, conditions: int) -> Tensor:
    """[B, conditions] of 0 and 1: which conditions of each sample Uni-ControlNet keeps."""
    case = rng.uniform("kept")[:, None]
    each = (rng.uniform("kept each", (conditions,)) >= DROP_EACH).float()
    each = torch.where(case < KEEP_ALL + DROP_ALL, torch.zeros_like(each), each)
    return torch.where(case < KEEP_ALL, torch.ones_like(each), each)


def picture_pixels(picture: Image.Image) -> Tensor:
    """[3, H, W] in [0, 1]."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), np.float32) / 255).permute(2, 0, 1)
