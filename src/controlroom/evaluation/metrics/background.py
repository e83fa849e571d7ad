"""Whether an edit left alone what it should: differences outside the region that was allowed to change."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.accumulators import Averaged
from controlroom.evaluation.metrics.pixels import as_pair
from controlroom.evaluation.metrics.psnr import CEILING


class Background(NamedTuple):
    """Of each pair, float64 [B]: PSNR in dB (infinite for equal ones), L1 in [0, 1], and the share of the picture."""

    psnr: Tensor
    l1: Tensor
    share: Tensor


def background(first: Any, second: Any, changed: Any, data_range: float = 1.0) -> Background:
    """Compare two pictures outside a mask.

    Args:
        first, second: ``[B, C, H, W]`` of one shape.
        changed: ``[B, H, W]``; true where the picture may differ. Those pixels are not looked at.
        data_range: largest possible difference of two values.

    Raises:
        InputError: other shapes, or a mask that leaves nothing to compare.

    Example:
        >>> before, after = torch.zeros(1, 1, 1, 4), torch.tensor([[[[1.0, 0.1, 0.0, 0.0]]]])
        >>> found = background(before, after, torch.tensor([[[True, False, False, False]]]))
        >>> round(float(found.psnr), 2), round(float(found.l1), 4), float(found.share)
        (24.77, 0.0333, 0.75)
    """
    x, y = as_pair(first, second, data_range, "Background preservation")
    kept = ~torch.as_tensor(changed).to(device=x.device, dtype=torch.bool)
    if kept.shape != (x.shape[0], *x.shape[2:]):
        raise InputError(f"The mask has the shape {list(kept.shape)}; expected {[x.shape[0], *x.shape[2:]]}.")
    pixels = kept.sum(dim=(1, 2))
    if not pixels.all():
        raise InputError("The mask covers a whole picture: there is no background to compare.")
    count = (pixels * x.shape[1]).to(torch.float64)
    # Not a product with the mask: what is not looked at must not turn into 0 * inf.
    difference = torch.where(kept[:, None], x - y, 0.0)
    error = difference.square().sum(dim=(1, 2, 3)) / count
    return Background(
        10 * torch.log10(data_range**2 / error),
        difference.abs().sum(dim=(1, 2, 3)) / count / data_range,
        pixels / kept[0].numel(),
    )


def only_background(first: Tensor, second: Tensor, changed: Tensor) -> Tensor:
    """``second`` with the first picture's pixels where ``changed``: what any other metric compares with ``first``."""
    return torch.where(changed.to(torch.bool)[:, None], first, second)


class BackgroundKept:
    """Many pairs; PSNR is cut at ``ceiling`` dB.

    Example:
        >>> found, mask = BackgroundKept(), torch.zeros(1, 2, 2, dtype=torch.bool)
        >>> found.add(torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), 0.1), mask)
        >>> round(found.psnr.mean, 3), round(found.l1.mean, 3)
        (20.0, 0.1)
    """

    def __init__(self, data_range: float = 1.0, ceiling: float = CEILING) -> None:
        self.data_range, self.ceiling = data_range, ceiling
        self.psnr, self.l1 = Averaged(), Averaged()

    def add(self, first: Any, second: Any, changed: Any) -> None:
        """A batch of pairs with their masks; see `background`."""
        found = background(first, second, changed, self.data_range)
        self.psnr.add(found.psnr.clamp(max=self.ceiling))
        self.l1.add(found.l1)

    def merge(self, other: BackgroundKept) -> None:
        """Take in the pairs of another one."""
        self.psnr.merge(other.psnr)
        self.l1.merge(other.l1)
