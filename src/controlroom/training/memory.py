"""How much memory a training needs, before it begins."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from controlroom.training.hardware import usable_device
from controlroom.training.recipe import Recipe
from controlroom.training.recompute import recomputing
from controlroom.training.settings import TrainSettings
from controlroom.training.step import computes_in_bfloat16, loss_of, order_of, place_modules


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training needs on its device.

    Attributes:
        trained, frozen: number of parameters.
        weights: of all networks.
        gradients, optimizer, average: of what trains.
        activations: kept for the backward pass, counted in one forward pass of the recipe; with gradient checkpointing
            what is kept of it, and the largest part that is computed again.
    """

    trained: int
    frozen: int
    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """All together."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations


def estimate_memory(recipe: Recipe[Any], loop: TrainSettings) -> MemoryEstimate:
    """What a training needs, with one forward pass to count what is kept for the backward one."""
    device = usable_device(loop.device)
    modules, frozen = recipe.modules(), recipe.frozen()
    place_modules(modules, frozen, device)
    trained = {id(p): p for m in modules.values() for p in m.parameters() if p.requires_grad}
    every = {id(p): p for m in (*modules.values(), *frozen.values()) for p in m.parameters()}
    moving = sum(p.numel() for p in trained.values())
    moments = {"adafactor": 0.1, "muon": 1.0, "adamw8bit": 0.5, "prodigy": 3.0}.get(str(loop.optimizer), 2.0)
    seen = _Kept({t.untyped_storage().data_ptr() for t in every.values()})

    rows = min(loop.batch_size, 2)
    order = order_of(recipe, rows, loop.seed)
    with torch.random.fork_rng():
        with torch.no_grad():
            batch = recipe.batch(order.indices(range(rows)), 0)
        with ExitStack() as stack:
            if loop.gradient_checkpointing:
                stack.enter_context(recomputing((*modules.values(), *frozen.values()), seen.recomputed))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(seen.pack, lambda tensor: tensor))
            loss_of(recipe, batch, 0, range(rows), loop.seed, device, computes_in_bfloat16(loop, device))
    return MemoryEstimate(
        trained=moving,
        frozen=sum(p.numel() for p in every.values()) - moving,
        weights=sum(p.numel() * p.element_size() for p in every.values()),
        gradients=4 * moving,
        optimizer=int(4 * moments * moving),
        average=0 if loop.ema_decay is None else 4 * moving,
        activations=seen.nbytes * loop.batch_size // rows,
    )


class _Kept:
    """What a forward pass keeps for the backward one; of parts that recompute, their inputs and the largest of them.

    Args:
        known: memory that is counted elsewhere.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        # Held, so that no later tensor takes the place of one that was counted.
        self._kept: dict[int, torch.UntypedStorage] = {}
        self._into, self._largest = self._kept, 0

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """A hook for saved tensors."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._into[storage.data_ptr()] = storage
        return tensor

    def recomputed(self, part: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """A part that recomputes: only one at a time is held whole, on the way back."""
        for value in (*given, *named.values()):
            if isinstance(value, torch.Tensor):
                self.pack(value)
        outside, self._into = self._into, {}
        try:
            return part(*given, **named)
        finally:
            self._largest = max(self._largest, _nbytes(self._into))
            self._into = outside

    @property
    def nbytes(self) -> int:
        """At the most."""
        return _nbytes(self._kept) + self._largest


def _nbytes(storages: Mapping[int, torch.UntypedStorage]) -> int:
    return sum(storage.nbytes() for storage in storages.values())
