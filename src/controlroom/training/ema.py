"""Exponential moving average of the trained parameters, and their exchange for validation and export.

Idea: Polyak averaging with a decay that warms up as (1 + n) / (10 + n), so that the first weights are soon forgotten.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Ema:
    """Averages float32 parameters by name. `decay` is the final one, below 1."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.parameters = dict(parameters)
        self.averages: dict[str, Tensor] = {name: p.detach().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, updates: int) -> None:
        """Take in the current parameters; `updates` is the number of updates before this one."""
        decay = min(self.decay, (1 + updates) / (10 + updates))
        torch._foreach_lerp_(list(self.averages.values()), [p.data for p in self.parameters.values()], 1.0 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the modules hold the averages; after it, the parameters as they were. Nothing is copied."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            self.averages[name], parameter.data = parameter.data, self.averages[name]
