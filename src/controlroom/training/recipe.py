"""What a recipe gives the loop: modules, batches, a loss, and the weights to export.

A recipe is a class in `training/recipes/`; it needs no base class, only these methods. The methods under "optional"
are found with `isinstance` on their protocol, so a recipe has those it needs and no others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar, runtime_checkable

from PIL.Image import Image
from torch import Tensor, nn

from controlroom.training.randomness import StepRandom

Batch = TypeVar("Batch")


@dataclass(frozen=True, slots=True)
class Losses:
    """`total` is the scalar to differentiate (float32, shape []); `parts` are named numbers for the log."""

    total: Tensor
    parts: Mapping[str, float | Tensor] = field(default_factory=dict)


class Recipe(Protocol[Batch]):
    """One method of training. It owns its modules and says where they live (device)."""

    name: str

    def modules(self) -> dict[str, nn.Module]:
        """Every module that trains, by name; those parameters that require a gradient are moved, in float32."""
        ...

    def frozen(self) -> dict[str, nn.Module]:
        """Modules that are used and must not move; gradients may flow through them."""
        ...

    def batch(self, indices: Sequence[int], step: int) -> Batch:
        """Data of these samples: a function of the indices (and the recipe's own seed) only, never of a running state.

        For an endless procedural dataset an index is the number of the sample since training began and never repeats;
        a recipe with `dataset_size` gets indices in [0, dataset_size), each once an epoch, shuffled anew each epoch.
        """
        ...

    def loss(self, batch: Batch, step: int, rng: StepRandom) -> Losses:
        """Loss of the batch; every random number comes from `rng`. Runs under autocast if the settings say so."""
        ...

    def export(self, folder: Path) -> None:
        """Write the weights in their exchange format (safetensors); called with the averaged weights in place."""
        ...


# -- optional ---------------------------------------------------------------------------------------------------------


@runtime_checkable
class FiniteData(Protocol):
    """Data of a known size, shown in epochs."""

    dataset_size: int | None
    """Number of samples of a finite dataset; None if it is endless."""


class Order(Protocol):
    """Which datum each sample of a step shows."""

    def indices(self, slots: Sequence[int]) -> list[int]:
        """Data of these slots, all of one step."""
        ...


@runtime_checkable
class Ordered(Protocol):
    """A recipe whose data has an order of its own: batches of one bucket."""

    def batch_order(self, batch_size: int, seed: int, first_slot: int) -> Order:
        """The order for batches of that size, of a run whose first sample has that number."""
        ...


@runtime_checkable
class Validates(Protocol):
    """A recipe that measures itself on the way."""

    def validate(self, step: int) -> dict[str, float]:
        """Measure (and draw) something; runs without gradients, with the averaged weights, in eval mode."""
        ...


@runtime_checkable
class HoldsOut(Protocol):
    """A recipe that can measure itself only on held-out data, which it may not have been given."""

    @property
    def has_held_out(self) -> bool:
        """Whether there is something for `validate` to measure on."""
        ...


@runtime_checkable
class Reloads(Protocol):
    """A recipe that can continue from what it exported."""

    def load(self, folder: Path) -> None:
        """Read into the modules what `export` wrote (needed for `start_from`)."""
        ...


@runtime_checkable
class AfterStep(Protocol):
    """A recipe that corrects its weights after the optimizer."""

    def after_step(self, step: int) -> None:
        """Runs after each optimizer step and before averaging: restore rows that must not move, renormalise."""
        ...


@runtime_checkable
class Fingerprinted(Protocol):
    """A recipe whose data or objective has a version."""

    def fingerprint(self) -> str:
        """Whatever else a resumed run must share: version of the world, of the vocabulary, dropout table."""
        ...


@runtime_checkable
class Distance(Protocol):
    """A perceptual distance of two pictures: a network with its rule, such as LPIPS."""

    name: str
    hash: str

    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1], twice -> [B]; 0 for equal ones. A loss where gradients are recorded."""
        ...


@runtime_checkable
class Compares(Protocol):
    """A recipe whose loss sees more than pixels. Who builds it gives it the distance: extractors are a room above."""

    @property
    def perceptual(self) -> str | None:
        """The distance that is asked for: ``theatre``, or ``lpips-vgg=TRUNK,HEADS``; None: none."""
        ...

    def see_with(self, distance: Distance) -> None:
        """Take the distance, before the training begins."""
        ...


@runtime_checkable
class Previews(Protocol):
    """A recipe that shows what it has learned so far."""

    def preview(self, step: int) -> Sequence[tuple[str, Image]]:
        """Named pictures, drawn without gradients, with the averaged weights, in eval mode.

        The global generators of torch, numpy and Python hold the same numbers at every preview, so that pictures of
        different steps compare, and are put back afterwards: the run is the same with and without.
        """
        ...


@runtime_checkable
class Named(Protocol):
    """A recipe that can say which samples are which."""

    def names(self, indices: Sequence[int]) -> Sequence[str]:
        """A name of each sample (a file, a caption) for the message about a batch that is not finite."""
        ...
