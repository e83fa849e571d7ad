"""The Inception network of FID and IS, with the user's weights (Szegedy et al., arXiv 1512.00567).

The file is ``pt_inception-2015-12-05-*.pth`` (pytorch-fid) or ``weights-inception-2015-12-05-*.pth`` (torch-fidelity),
the same tensors: Google's network of 2015 with 1008 classes. It differs from torchvision's Inception v3, whose file is
refused: averages leave out the border, the last block pools by maximum, and the classifier has more classes.

How pictures get to 299 x 299 changes FID as much as another sample does. ``legacy`` is TensorFlow 1's bilinear
interpolation without antialiasing, as in the published numbers and torchmetrics; ``clean`` is Pillow's bicubic with
antialiasing (Parmar et al., arXiv 2104.11222). The name of the extractor says which.
"""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from controlroom.core.errors import InputError
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.files import fill, read_tensors
from controlroom.evaluation.metrics.pixels import as_bytes

SIDE, CLASSES = 299, 1008
Resize = Literal["legacy", "clean"]
_Size = int | tuple[int, int]


class _Conv(nn.Module):
    """Convolution, batch norm, ReLU; the border keeps the size unless ``pad`` is False."""

    def __init__(self, inside: int, outside: int, size: _Size = 1, stride: int = 1, pad: bool = True) -> None:
        super().__init__()
        height, width = (size, size) if isinstance(size, int) else size
        padding = (height // 2, width // 2) if pad else 0
        self.conv = nn.Conv2d(inside, outside, (height, width), stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(outside, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


class _Mixed(nn.Module):
    """Branches side by side. Each is a chain of convolutions by their published names; a pair in a chain forks it.

    Args:
        branches: chains; the layers of one are applied in turn, and a tuple's results are joined.
        pool: what the last branch does first.
    """

    def __init__(
        self,
        layers: dict[str, _Conv],
        branches: tuple[tuple[str | tuple[str, str], ...], ...],
        pool: Literal["average", "same maximum", "smaller maximum"],
    ) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.branches, self.pool = branches, pool

    def forward(self, x: Tensor) -> Tensor:
        found = []
        for chain in self.branches:
            y = x
            for step in chain:
                y = self._apply(step, y)
            found.append(y)
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        elif self.pool == "same maximum":
            pooled = F.max_pool2d(x, 3, 1, 1)
        else:
            pooled = F.max_pool2d(x, 3, 2)
        found.append(self.get_submodule("branch_pool")(pooled) if hasattr(self, "branch_pool") else pooled)
        return torch.cat(found, dim=1)

    def _apply(self, step: str | tuple[str, str], x: Tensor) -> Tensor:
        if isinstance(step, str):
            return self.get_submodule(step)(x)
        return torch.cat([self.get_submodule(name)(x) for name in step], dim=1)


def _grid35(inside: int, pooled: int) -> _Mixed:
    layers = {
        "branch1x1": _Conv(inside, 64),
        "branch5x5_1": _Conv(inside, 48),
        "branch5x5_2": _Conv(48, 64, 5),
        "branch3x3dbl_1": _Conv(inside, 64),
        "branch3x3dbl_2": _Conv(64, 96, 3),
        "branch3x3dbl_3": _Conv(96, 96, 3),
        "branch_pool": _Conv(inside, pooled),
    }
    chains = (("branch1x1",), ("branch5x5_1", "branch5x5_2"), tuple(f"branch3x3dbl_{i}" for i in (1, 2, 3)))
    return _Mixed(layers, chains, "average")


def _to_grid17(inside: int) -> _Mixed:
    layers = {
        "branch3x3": _Conv(inside, 384, 3, 2, False),
        "branch3x3dbl_1": _Conv(inside, 64),
        "branch3x3dbl_2": _Conv(64, 96, 3),
        "branch3x3dbl_3": _Conv(96, 96, 3, 2, False),
    }
    return _Mixed(layers, (("branch3x3",), tuple(f"branch3x3dbl_{i}" for i in (1, 2, 3))), "smaller maximum")


def _grid17(inside: int, width: int) -> _Mixed:
    layers = {
        "branch1x1": _Conv(inside, 192),
        "branch7x7_1": _Conv(inside, width),
        "branch7x7_2": _Conv(width, width, (1, 7)),
        "branch7x7_3": _Conv(width, 192, (7, 1)),
        "branch7x7dbl_1": _Conv(inside, width),
        "branch7x7dbl_2": _Conv(width, width, (7, 1)),
        "branch7x7dbl_3": _Conv(width, width, (1, 7)),
        "branch7x7dbl_4": _Conv(width, width, (7, 1)),
        "branch7x7dbl_5": _Conv(width, 192, (1, 7)),
        "branch_pool": _Conv(inside, 192),
    }
    seven = tuple(f"branch7x7_{i}" for i in (1, 2, 3))
    return _Mixed(layers, (("branch1x1",), seven, tuple(f"branch7x7dbl_{i}" for i in range(1, 6))), "average")


def _to_grid8(inside: int) -> _Mixed:
    layers = {
        "branch3x3_1": _Conv(inside, 192),
        "branch3x3_2": _Conv(192, 320, 3, 2, False),
        "branch7x7x3_1": _Conv(inside, 192),
        "branch7x7x3_2": _Conv(192, 192, (1, 7)),
        "branch7x7x3_3": _Conv(192, 192, (7, 1)),
        "branch7x7x3_4": _Conv(192, 192, 3, 2, False),
    }
    seven = tuple(f"branch7x7x3_{i}" for i in (1, 2, 3, 4))
    return _Mixed(layers, (("branch3x3_1", "branch3x3_2"), seven), "smaller maximum")


def _grid8(inside: int, pool: Literal["average", "same maximum"]) -> _Mixed:
    layers = {
        "branch1x1": _Conv(inside, 320),
        "branch3x3_1": _Conv(inside, 384),
        "branch3x3_2a": _Conv(384, 384, (1, 3)),
        "branch3x3_2b": _Conv(384, 384, (3, 1)),
        "branch3x3dbl_1": _Conv(inside, 448),
        "branch3x3dbl_2": _Conv(448, 384, 3),
        "branch3x3dbl_3a": _Conv(384, 384, (1, 3)),
        "branch3x3dbl_3b": _Conv(384, 384, (3, 1)),
        "branch_pool": _Conv(inside, 192),
    }
    chains = (
        ("branch1x1",),
        ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
        ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    )
    return _Mixed(layers, chains, pool)


class FidInception(nn.Module):
    """Features [B, 2048] before the classifier, and its 1008 logits without their bias, as IS is computed."""

    def __init__(self, resize: Resize = "legacy") -> None:
        super().__init__()
        if resize not in ("legacy", "clean"):
            raise InputError(f"Pictures are resized legacy or clean for Inception, not {resize!r}.")
        self.resize: Resize = resize
        self.Conv2d_1a_3x3 = _Conv(3, 32, 3, 2, False)
        self.Conv2d_2a_3x3 = _Conv(32, 32, 3, 1, False)
        self.Conv2d_2b_3x3 = _Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = _Conv(64, 80)
        self.Conv2d_4a_3x3 = _Conv(80, 192, 3, 1, False)
        self.Mixed_5b, self.Mixed_5c, self.Mixed_5d = _grid35(192, 32), _grid35(256, 64), _grid35(288, 64)
        self.Mixed_6a = _to_grid17(288)
        self.Mixed_6b, self.Mixed_6c = _grid17(768, 128), _grid17(768, 160)
        self.Mixed_6d, self.Mixed_6e = _grid17(768, 160), _grid17(768, 192)
        self.Mixed_7a = _to_grid8(768)
        self.Mixed_7b, self.Mixed_7c = _grid8(1280, "average"), _grid8(2048, "same maximum")
        self.fc = nn.Linear(2048, CLASSES)
        self.name, self.hash = f"inception-{resize}", ""

    @classmethod
    def load(cls, weights: str | os.PathLike[str], resize: Resize = "legacy") -> FidInception:
        """From the file of its weights.

        Raises:
            ModelError: not there, broken, or of another network (torchvision's has other classes).
        """
        net = cls(resize)
        fill(net, read_tensors(weights, "Inception"), os.fspath(weights))
        net.hash = content_hash(net, resize)
        return net

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> [B, 2048]."""
        x = (self._resized(as_bytes(images)) - 128) / 128
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c"):
            x = self.get_submodule(f"Mixed_{name}")(x)
        return x.mean(dim=(2, 3))

    @torch.no_grad()
    def logits(self, images: Tensor) -> Tensor:
        """Pictures -> [B, 1008], without the bias."""
        return self.features(images) @ self.fc.weight.T

    def _resized(self, images: Tensor) -> Tensor:
        if self.resize == "clean":
            return _clean(images)
        return _legacy(_legacy(images.float(), 2), 3)


def _legacy(x: Tensor, axis: int) -> Tensor:
    """One axis to 299, TensorFlow 1's way: output i lies at i * (in / 299), between two neighbours."""
    length = x.shape[axis]
    place = torch.arange(SIDE, dtype=x.dtype, device=x.device) * (length / SIDE)
    low = place.long().clamp(max=length - 1)
    high = (low + 1).clamp(max=length - 1)
    share = (place - low).view([-1 if i == axis else 1 for i in range(x.ndim)])
    return x.index_select(axis, low) * (1 - share) + x.index_select(axis, high) * share


def _clean(images: Tensor) -> Tensor:
    """Each channel by Pillow in floats, so that nothing is rounded on the way."""
    planes = images.flatten(0, 1).cpu().numpy().astype(np.float32)
    sized = [np.asarray(Image.fromarray(p).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for p in planes]
    found = torch.from_numpy(np.stack(sized)).clamp(0, 255)
    return found.unflatten(0, tuple(images.shape[:2])).to(images.device)
