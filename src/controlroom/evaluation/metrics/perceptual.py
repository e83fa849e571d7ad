"""A perceptual distance in the features of any extractor, after LPIPS (Zhang et al., "The Unreasonable Effectiveness of
Deep Features as a Perceptual Metric", arXiv 1801.03924).

At every place of every stage's feature map the vector of channels is scaled to length one, for both pictures; the
squared difference is summed over channels, averaged over places, and averaged over stages::

    d(x, y) = 1/S sum_s 1/(h_s w_s) sum_ij | f_s(x)_ij / |f_s(x)_ij| - f_s(y)_ij / |f_s(y)_ij| |^2

It lies in [0, 4]. Deviation: LPIPS weighs channels with numbers fitted to people's judgements and sums over stages;
here all channels count the same (its "baseline"), and the mean keeps the scale whatever the number of stages. Numbers
of different extractors cannot be compared, so `extractor_hash` belongs into every result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from controlroom.core.errors import InputError
from controlroom.training.checkpoint import modules_hash

Features = Callable[[Tensor], Sequence[Tensor]]
"""Pictures [B, C, H, W], as the extractor reads them, -> feature maps of its stages, each [B, channels, h, w]."""
_EPSILON = 1e-10


def perceptual_distance(first: Tensor, second: Tensor, features: Features) -> Tensor:
    """Distance of each pair of pictures; 0 for equal ones, lower is better. A loss where gradients are recorded.

    Args:
        first, second: [B, C, H, W] of one shape, in the range that ``features`` reads.
        features: such as `AttributeReader.features`, which reads [-1, 1].

    Returns:
        float64 [B] in [0, 4].

    Raises:
        InputError: the shapes differ, or the extractor gives no maps.

    Example:
        >>> pictures = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[2.0]]]])
        >>> perceptual_distance(*pictures, lambda x: [x]).tolist()  # at a right angle
        [2.0]
    """
    if first.shape != second.shape or first.ndim != 4:
        raise InputError(
            f"The pictures have shapes {list(first.shape)} and {list(second.shape)}; expected [B, C, H, W] twice."
        )
    stages = list(zip(features(first), features(second), strict=True))
    if not stages or any(x.ndim != 4 for x, _ in stages):
        raise InputError("The extractor gave no feature maps; expected a list of [B, channels, h, w].")
    each = [(_unit(x) - _unit(y)).square().sum(dim=1).mean(dim=(1, 2)) for x, y in stages]
    return torch.stack(each).mean(dim=0)


def _unit(x: Tensor) -> Tensor:
    x = x.to(torch.float64)
    return x / x.norm(dim=1, keepdim=True).clamp_min(_EPSILON)


def extractor_hash(extractor: nn.Module) -> str:
    """First 16 hexadecimal digits of the SHA-256 over an extractor's weights.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> extractor_hash(net) == extractor_hash(nn.Linear(2, 2)), len(extractor_hash(net))
        (False, 16)
    """
    return modules_hash({"extractor": extractor})[:16]
