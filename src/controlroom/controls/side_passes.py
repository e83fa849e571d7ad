"""What controls with a network beside the UNet share: which branches go through it together, what they show it, and
how a mask confines what it gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from controlroom.controls.condition_map import resized_mask, rows_of
from controlroom.controls.run_mask import RunMask
from controlroom.core.control import Residuals
from controlroom.core.run import Run
from controlroom.core.step import Step


def shared_passes(step: Step, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Branches that can share a pass, as a network needs that also reads the words.

    Those of other sizes cannot, nor those with texts of other lengths (SDXL's pooled text comes with them).
    """
    groups: dict[tuple[tuple[int, int], int], list[str]] = {}
    for name in names:
        groups.setdefault((step.run.plan.hw_of(name), step.condition(name).tokens.shape[1]), []).append(name)
    return [tuple(group) for group in groups.values()]


@dataclass
class SideRows:
    """Condition and mask, joined for the branches of a pass.

    Attributes:
        condition: [images, C, H, W].
        mask: where the control acts, or None.
        joined: what was joined, for the branches of a pass and the views of its plan.
    """

    condition: torch.Tensor
    mask: RunMask | None
    joined: dict[tuple[tuple[str, ...], int], tuple[torch.Tensor, torch.Tensor | None]] = field(default_factory=dict)

    def of(self, run: Run, names: tuple[str, ...]) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Rows of the condition, and of the mask where there is one, in the order of the branches."""
        key = (names, id(run.plan))
        if key not in self.joined:
            condition = torch.cat([rows_of(self.condition, run, name) for name in names])
            self.joined[key] = condition, None if self.mask is None else self.mask.rows(names)
        return self.joined[key]


def masked(levels: Iterable[torch.Tensor], mask: torch.Tensor | None) -> list[torch.Tensor]:
    """Features [rows, c, h, w] of several sizes times the mask [rows, 1, H, W] at each; as they are without one."""
    if mask is None:
        return list(levels)
    return [x * resized_mask(mask, (x.shape[-2], x.shape[-1])).to(x) for x in levels]


def masked_residuals(
    names: tuple[str, ...], levels: Iterable[torch.Tensor], mask: torch.Tensor | None, dtype: torch.dtype
) -> Residuals:
    """What a ControlNet or its like gives to the branches: the skip connections' residuals, the middle block's last."""
    *down, mid = (x.to(dtype) for x in masked(levels, mask))
    return Residuals(names, tuple(down), mid)
