"""PatchGAN: a small network that says of every patch of a picture whether it is real (Isola et al., arXiv 1611.07004).

Convolutions of stride 2, each with twice the channels of the one before, then one verdict for each place; with three
of them a verdict sees 70 x 70 pixels. Deviation: group norm, so that the verdict of a picture does not depend on the
others of its batch.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call


class PatchDiscriminator(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1] -> verdicts [B, 1, h, w]; above 0 means real.

    Args:
        channels: of the first convolution.
        layers: convolutions of stride 2; 3 see patches of 70 x 70.
    """

    def __init__(self, channels: int = 64, layers: int = 3) -> None:
        super().__init__()
        parts: list[nn.Module] = [nn.Conv2d(3, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        inside = channels
        for number in range(1, layers + 1):
            wide, stride = channels * min(2**number, 8), 2 if number < layers else 1
            parts += [nn.Conv2d(inside, wide, 4, stride, 1, bias=False), nn.GroupNorm(1, wide), nn.LeakyReLU(0.2)]
            inside = wide
        self.layers = nn.Sequential(*parts, nn.Conv2d(inside, 1, 4, 1, 1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)

    def fooled(self, made: Tensor) -> Tensor:
        """Mean verdict on made pictures, with gradients for the pictures alone and none for this network."""
        fixed: Mapping[str, Tensor] = {name: value.detach() for name, value in self.named_parameters()}
        return functional_call(self, dict(fixed), (made,)).mean()

    def hinge(self, real: Tensor, made: Tensor) -> Tensor:
        """Its own loss, with gradients for this network alone: real above 1, made below -1."""
        return 0.5 * (torch.relu(1.0 - self(real.detach())).mean() + torch.relu(1.0 + self(made.detach())).mean())
