"""LPIPS, a perceptual distance fitted to people's judgements (Zhang et al., arXiv 1801.03924).

At every place of a stage's feature map the channels are scaled to length one; the squared difference of two pictures is
weighted by one fitted number for each channel, averaged over places, and summed over stages. Its weights come from the
user's disk (`controlroom.evaluation.extractors.lpips`); without fitted weights see `perceptual`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from controlroom.core.errors import InputError

_EPSILON = 1e-10


def lpips(first: Sequence[Tensor], second: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Distance of each pair of pictures; 0 for equal ones, lower is better.

    Args:
        first, second: feature maps of the stages, each [B, channels, h, w].
        weights: of the stages, each [channels], not negative.

    Returns:
        float32 [B]. Many pairs go into ``Averaged(label_of(lpips))``.

    Raises:
        InputError: numbers of stages or shapes that do not fit.

    Example:
        >>> here, there = torch.tensor([[[[1.0]], [[0.0]]]]), torch.tensor([[[[0.0]], [[2.0]]]])
        >>> lpips([here], [there], [torch.tensor([0.25, 0.5])]).tolist()
        [0.75]
    """
    shapes = [(list(x.shape), list(y.shape), list(w.shape)) for x, y, w in zip(first, second, weights, strict=False)]
    fits = len(first) == len(second) == len(weights) > 0
    if not fits or any(len(x) != 4 or x != y or w != [x[1]] for x, y, w in shapes):
        raise InputError(f"LPIPS got maps and weights of shapes {shapes}; expected [B, C, h, w] twice and [C] each.")
    total = torch.zeros(len(first[0]), device=first[0].device)
    for x, y, weight in zip(first, second, weights, strict=True):
        x, y = (m / (m.norm(dim=1, keepdim=True) + _EPSILON) for m in (x, y))
        total = total + ((x - y).square() * weight[:, None, None]).sum(dim=1).mean(dim=(1, 2))
    return total
