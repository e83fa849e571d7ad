"""L1, the mean absolute difference of two pictures."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from controlroom.evaluation.metrics.pixels import as_pair


def l1(first: Any, second: Any, data_range: float = 1.0) -> Tensor:
    """Mean absolute difference of each pair of pictures, as a share of the range; lower is better.

    Args:
        first, second: ``[B, C, H, W]`` of one shape, tensors or arrays.
        data_range: largest possible difference of two values: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.

    Returns:
        float64 [B] in [0, 1]. Many pairs go into `accumulators.Averaged`.

    Raises:
        InputError: other shapes, values that are not finite, or a range that is not positive.

    Example:
        >>> import torch
        >>> black = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
        >>> float(l1(black, black + 51, 255))
        0.2
    """
    x, y = as_pair(first, second, data_range, "L1")
    return (x - y).abs().mean(dim=(1, 2, 3)) / data_range
