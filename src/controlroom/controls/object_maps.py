"""Where a thing is, how large, of what outline and look, read from attention maps and features (arXiv 2306.00986).

Pure functions of maps [..., h, w], with gradients. Coordinates go from 0 at the left or upper edge of the picture to 1
at the right or lower one; a pixel stands at its middle. (The published demonstration has the middle of the first pixel
at 0 and that of the last at 1; the middle of the picture is 0.5 in both.)
"""

from __future__ import annotations

import math

import torch
from torch.nn import functional as F

_FLAT = 1e-4
"""A map whose values lie closer together than this shows nothing; its gradient would only grow without bounds."""
_NOTHING = 1e-6
"""Against division by a sum of nothing."""


def pixel_middles(count: int, like: torch.Tensor) -> torch.Tensor:
    """[count] coordinates of pixels along one side."""
    return (torch.arange(count, device=like.device, dtype=like.dtype) + 0.5) / count


def centroid(maps: torch.Tensor) -> torch.Tensor:
    """[..., h, w], not negative -> [..., 2]: x and y of the centre of mass."""
    height, width = maps.shape[-2:]
    total = maps.sum((-2, -1)).clamp(min=_NOTHING)
    x = (maps.sum(-2) * pixel_middles(width, maps)).sum(-1) / total
    y = (maps.sum(-1) * pixel_middles(height, maps)).sum(-1) / total
    return torch.stack([x, y], dim=-1)


def normalized(maps: torch.Tensor) -> torch.Tensor:
    """[..., h, w] brought to 0 … 1, each map by itself."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=_FLAT)


def shape(maps: torch.Tensor, sharpness: float = 10.0) -> torch.Tensor:
    """[..., h, w] in 0 … 1: a soft threshold half way between the least and the most attention."""
    # Brought to 0 … 1 again as published; the least and the most of a sigmoid of 0 … 1 are known.
    least = 1 / (1 + math.exp(sharpness / 2))
    return (torch.sigmoid(sharpness * (normalized(maps) - 0.5)) - least) / (1 - 2 * least)


def size(maps: torch.Tensor, sharpness: float = 10.0) -> torch.Tensor:
    """[..., h, w] -> [...]: share of the picture that the thing covers."""
    return shape(maps, sharpness).mean((-2, -1))


def carried(shapes: torch.Tensor, by: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Shapes moved and resized about their centres; what leaves the picture is lost.

    Args:
        shapes: [n, h, w].
        by: [n, 2] shift in x and y, in shares of width and height.
        factor: [n] factor on width and height, above 0.
    """
    height, width = shapes.shape[-2:]
    y, x = torch.meshgrid(pixel_middles(height, shapes), pixel_middles(width, shapes), indexing="ij")
    here = torch.stack([x, y], dim=-1)[None]
    centre, by = centroid(shapes)[:, None, None], by.to(shapes)[:, None, None]
    before = centre + (here - centre - by) / factor.to(shapes)[:, None, None, None]
    return F.grid_sample(shapes[:, None], 2 * before - 1, padding_mode="zeros", align_corners=False)[:, 0]


def appearance(features: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
    """Mean feature under each shape.

    Args:
        features: [channels, H, W].
        shapes: [n, h, w]; brought to the features' size.

    Returns:
        [n, channels].
    """
    if shapes.shape[-2:] != features.shape[-2:]:
        shapes = F.interpolate(shapes[:, None], size=features.shape[-2:], mode="bilinear", align_corners=False)[:, 0]
    total = shapes.sum((-2, -1)).clamp(min=_NOTHING)
    return torch.einsum("nhw,chw->nc", shapes, features) / total[:, None]
