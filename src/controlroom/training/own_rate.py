"""Parameters with a learning rate of their own: a share of each step that the optimizer takes.

AdamW and Muon move a parameter in proportion to the learning rate, weight decay included, so a share of the step is the
step at a share of the rate; and a checkpoint holds nothing more for it.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class OwnRate:
    """Call `before` ahead of a step and `after` behind it.

    Args:
        parameters: that move so.
        factor: their learning rate / that of the run.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], factor: float) -> None:
        self.parameters = list(parameters)
        self.factor = factor
        self._before: list[Tensor] = []

    def before(self) -> None:
        """Remember where they are."""
        if self.factor != 1.0:
            self._before = [parameter.detach().clone() for parameter in self.parameters]

    @torch.no_grad()
    def after(self) -> None:
        """Take back what is too much."""
        for parameter, before in zip(self.parameters, self._before, strict=False):
            parameter.lerp_(before, 1.0 - self.factor)
        self._before = []
