"""LPIPS with the user's weights: a trunk as torchvision saves it, and the fitted heads (arXiv 1801.03924).

Trunks are torchvision's ``alexnet-owt-*.pth``, ``vgg16-*.pth`` or ``squeezenet1_1-*.pth``, heads the small files
``alex.pth``, ``vgg.pth`` and ``squeeze.pth`` of the packages lpips and torchmetrics. Only the layers up to the last
stage that is read are made. Weights of trunks: BSD licence, trained on ImageNet.
"""

from __future__ import annotations

import os
from typing import Literal

import torch
from torch import Tensor, nn

from controlroom.core.errors import InputError, ModelError
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.files import fill, read_tensors
from controlroom.evaluation.metrics.lpips import lpips

Trunk = Literal["alex", "vgg", "squeeze"]
# ImageNet's mean and deviation as LPIPS applies them, to pictures in [-1, 1].
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class _Fire(nn.Module):
    """SqueezeNet's block: a narrow 1 x 1 convolution, then 1 x 1 and 3 x 3 side by side."""

    def __init__(self, inside: int, narrow: int, wide: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(inside, narrow, 1)
        self.expand1x1 = nn.Conv2d(narrow, wide, 1)
        self.expand3x3 = nn.Conv2d(narrow, wide, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], dim=1)


def _alex() -> list[nn.Module]:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    layers += [nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2)]
    for inside, outside in ((192, 384), (384, 256), (256, 256)):
        layers += [nn.Conv2d(inside, outside, 3, padding=1), nn.ReLU()]
    return layers


def _vgg() -> list[nn.Module]:
    layers: list[nn.Module] = []
    inside = 3
    for stage, (width, depth) in enumerate(((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))):
        layers += [nn.MaxPool2d(2, 2)] if stage else []
        for _ in range(depth):
            layers += [nn.Conv2d(inside, width, 3, padding=1), nn.ReLU()]
            inside = width
    return layers


def _squeeze() -> list[nn.Module]:
    def pool() -> nn.Module:
        return nn.MaxPool2d(3, 2, ceil_mode=True)

    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool()]
    layers += [_Fire(64, 16, 64), _Fire(128, 16, 64), pool()]
    layers += [_Fire(128, 32, 128), _Fire(256, 32, 128), pool()]
    return [*layers, _Fire(256, 48, 192), _Fire(384, 48, 192), _Fire(384, 64, 256), _Fire(512, 64, 256)]


# Layers, the numbers of those whose output is a stage, and the channels of the stages.
_TRUNKS = {
    "alex": (_alex, (1, 4, 7, 9, 11), (64, 192, 384, 256, 256)),
    "vgg": (_vgg, (3, 8, 15, 22, 29), (64, 128, 256, 512, 512)),
    "squeeze": (_squeeze, (1, 4, 7, 9, 10, 11, 12), (64, 128, 256, 384, 384, 512, 512)),
}


class LpipsDistance(nn.Module):
    """LPIPS. `features` are its stages' maps averaged over places, for those who want a vector."""

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: Trunk) -> None:
        super().__init__()
        if trunk not in _TRUNKS:
            raise InputError(f"LPIPS has no trunk {trunk!r}. There are: {', '.join(_TRUNKS)}.")
        make, self.stages, widths = _TRUNKS[trunk]
        self.layers = nn.Sequential(*make())
        self.heads = nn.ParameterList([torch.zeros(width) for width in widths])
        self.register_buffer("shift", torch.tensor(_SHIFT).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(_SCALE).view(1, 3, 1, 1), persistent=False)
        self.name, self.hash = f"lpips-{trunk}", ""

    @classmethod
    def load(cls, trunk: Trunk, weights: str | os.PathLike[str], heads: str | os.PathLike[str]) -> LpipsDistance:
        """From the file of the trunk and that of the heads.

        Raises:
            ModelError: not there, broken, or of another network.
        """
        net = cls(trunk)
        tensors = read_tensors(weights, f"trunk {trunk!r} of LPIPS")
        own = {key.removeprefix("features."): value for key, value in tensors.items() if key.startswith("features.")}
        fill(net.layers, own, os.fspath(weights))
        fitted = read_tensors(heads, "heads of LPIPS")
        for index, head in enumerate(net.heads):
            # Index 1 where the file was saved with a dropout before the convolution, as the published ones are.
            names = (f"lin{index}.model.1.weight", f"lin{index}.model.0.weight")
            found = next((fitted[name] for name in names if name in fitted), None)
            if found is None or found.numel() != head.numel():
                raise ModelError(
                    f"{os.fspath(heads)!r} has no {names[0]!r} of {head.numel()} numbers; it is not the file of heads "
                    f"for {trunk!r}."
                )
            head.data = found.reshape(-1).float()
        net.eval().requires_grad_(False)
        net.hash = content_hash(net)
        return net

    def maps(self, images: Tensor) -> list[Tensor]:
        """Pictures [B, 3, H, W] in [0, 1] -> feature maps of the stages."""
        x, found = (images * 2 - 1 - self.shift) / self.scale, []
        for number, layer in enumerate(self.layers):
            x = layer(x)
            if number in self.stages:
                found.append(x)
        return found

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """[B, D]: means of all maps over their places."""
        return torch.cat([m.mean(dim=(2, 3)) for m in self.maps(images)], dim=1)

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """LPIPS of each pair [B]."""
        return lpips(self.maps(first), self.maps(second), list(self.heads))
