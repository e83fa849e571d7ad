"""Tiny auxiliary networks with random weights for the miniature pipelines of `tests.tiny`."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import ControlNetModel


def tiny_controlnet(unet: Any, seed: int = 7, strength: float = 0.3, **settings: Any) -> ControlNetModel:
    """A ControlNet for a miniature: halves its condition once, as the miniature autoencoders do.

    Convolutions that start at zero are random here, or nothing would be seen of it.
    """
    torch.manual_seed(seed)
    settings = {"conditioning_embedding_out_channels": (8, 16), "load_weights_from_unet": False, **settings}
    net = ControlNetModel.from_unet(unet, **settings).eval()
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if name.startswith(
                ("controlnet_down_blocks", "controlnet_mid_block", "controlnet_cond_embedding.conv_out")
            ):
                parameter.normal_(0.0, strength)
    return net
