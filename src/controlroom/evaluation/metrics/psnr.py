"""PSNR, the peak signal to noise ratio: 10 log10(range² / mean squared error) in dB.

Two means are in use, and differ: that over the PSNR of each picture (here the first), and the PSNR of the error pooled
over all pictures. The accumulator gives both, under their names.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from controlroom.evaluation.estimates import Estimate
from controlroom.evaluation.metrics.accumulators import Averaged
from controlroom.evaluation.metrics.pixels import as_pair

CEILING = 100.0


def psnr(first: Any, second: Any, data_range: float = 1.0) -> Tensor:
    """PSNR of each pair of pictures in dB; higher is better, infinite for equal ones.

    Args:
        first, second: ``[B, C, H, W]`` of one shape, tensors or arrays.
        data_range: largest possible difference of two values: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.

    Returns:
        float64 [B].

    Raises:
        InputError: other shapes, values that are not finite, or a range that is not positive.

    Example:
        >>> grey = torch.full((1, 3, 4, 4), 0.5)
        >>> round(float(psnr(grey, grey + 0.1)), 4)
        20.0
    """
    x, y = as_pair(first, second, data_range, "PSNR")
    return 10 * torch.log10(data_range**2 / (x - y).square().mean(dim=(1, 2, 3)))


class PSNR:
    """Many pairs. `mean` is over the pictures' PSNR, cut at ``ceiling`` dB (an equal pair is infinitely far above).

    Example:
        >>> found = PSNR()
        >>> found.add(torch.zeros(2, 1, 2, 2), torch.tensor([0.1, 0.01]).view(2, 1, 1, 1).expand(2, 1, 2, 2))
        >>> round(found.mean().mean, 3), round(found.pooled(), 3)
        (30.0, 22.967)
    """

    def __init__(self, data_range: float = 1.0, ceiling: float = CEILING) -> None:
        self.data_range, self.ceiling = data_range, ceiling
        self._each = Averaged()
        self._error, self._count = 0.0, 0

    def add(self, first: Any, second: Any) -> None:
        """A batch of pairs; see `psnr`."""
        x, y = as_pair(first, second, self.data_range, "PSNR")
        self._each.add(psnr(x, y, self.data_range).clamp(max=self.ceiling))
        self._error += float((x - y).square().sum())
        self._count += x.numel()

    def merge(self, other: PSNR) -> None:
        """Take in the pairs of another one (of the same range)."""
        self._each.merge(other._each)
        self._error += other._error * (self.data_range / other.data_range) ** 2
        self._count += other._count

    def mean(self) -> Estimate:
        """Mean over the pictures, with its interval."""
        return self._each.estimate()

    def pooled(self) -> float:
        """PSNR of the error of all pictures together; NaN without pictures."""
        if self._count == 0:
            return math.nan
        return 10 * math.log10(self.data_range**2 * self._count / self._error) if self._error else math.inf
