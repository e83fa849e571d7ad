"""Branches, states and conditions: what the rows of the UNet batch are.

A *state* is a set of latents; a *branch* is one way to look at a state (with a prompt, without one, with the layers of
another picture); a *condition* is what the network is told. Rows are found by the name of their branch, never by their
position: a `Layout` maps names to static slices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import torch

    from controlroom.core.step import Step

IMAGE = "image"
"""Name of the state that becomes the picture."""


@dataclass(frozen=True)
class State:
    """A set of latents [rows, channels, height, width].

    Attributes:
        name: ``image`` is the picture itself.
        advance: ``solver``: the scheduler moves it every step (each state has a scheduler of its own). ``pinned``:
            given anew at every step by `Run.pin`, e.g. a reference noised to the step's level. ``derived``: given by
            `Run.derive` from other states.
        rows: number of rows; None: one for each image of the run.
        hw: latent height and width; None: those of the picture. States of other sizes get passes of their own.
        noise_from: the state whose noise (initial and of every step) this one shares. Solver states only; None: noise
            of its own, from the stream named after the state.
    """

    name: str
    advance: Literal["solver", "pinned", "derived"] = "solver"
    rows: int | None = None
    hw: tuple[int, int] | None = None
    noise_from: str | None = None


@dataclass(frozen=True)
class Branch:
    """A named set of rows of the UNet batch.

    Attributes:
        name: ``uncond`` and ``cond`` exist in every guided run; a control adds ``source/cond``, ``edit:0`` and so on.
        state: the state whose latents it reads.
        role: ``cond`` and ``uncond`` enter the base combination of their state; ``extra`` only supplies something.
        purpose: ``picture`` denoises the picture, ``variant`` a variant of it: both receive spatial and image-prompt
            controls. ``reference`` only supplies features and receives none unless a control names it.
        needs: branches whose features it reads in the same pass.
        read_by: branches of others (``cond``) that read its features in the main pass. Only checked: in passes without
            this branch they run alone.
        weights: tag of the weights it runs with; branches of other weights run in a pass of their own.
        timestep: fixed timestep (0 for a clean reference); None: the step's.
        steps: steps at which it runs; None: those of the control that declared it (all, for solver states).
    """

    name: str
    state: str = IMAGE
    role: Literal["uncond", "cond", "extra"] = "extra"
    purpose: Literal["picture", "variant", "reference"] = "variant"
    needs: tuple[str, ...] = ()
    read_by: tuple[str, ...] = ()
    weights: str = "base"
    timestep: float | None = None
    steps: frozenset[int] | None = None


@dataclass(frozen=True)
class Condition:
    """What the network is told about some rows. A leading dimension of 1 is shared by all rows.

    Attributes:
        tokens: [rows, length, width] states of the text encoder.
        mask: [rows, length], 1 keeps a token, 0 hides it; None: all are kept.
        pooled: [rows, width], Stable Diffusion XL only.
        time_ids: [rows, 6], Stable Diffusion XL only: original size, crop, target size.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None = None
    pooled: torch.Tensor | None = None
    time_ids: torch.Tensor | None = None

    def take(self, rows: Sequence[int]) -> Condition:
        """The condition whose row i is row ``rows[i]`` of this one; what is shared by all rows stays so."""

        def taken(part: torch.Tensor | None) -> torch.Tensor | None:
            return part if part is None or (part.shape[0] == 1 < self.tokens.shape[0]) else part[list(rows)]

        tokens = self.tokens[list(rows)]
        return Condition(tokens, taken(self.mask), taken(self.pooled), taken(self.time_ids))

    def expand(self, rows: int) -> Condition:
        """The same condition with exactly ``rows`` rows; what has a divisor of that many is tiled (for views)."""
        mask = None if self.mask is None else _tile(self.mask, rows)
        pooled = None if self.pooled is None else _tile(self.pooled, rows)
        time_ids = None if self.time_ids is None else _tile(self.time_ids, rows)
        return Condition(_tile(self.tokens, rows), mask, pooled, time_ids)


ConditionSource = Condition | Callable[["Step"], Condition]
"""A condition, or a function that gives it for a step (null-text optimisation, prompt schedules)."""


def _tile(part: torch.Tensor, rows: int) -> torch.Tensor:
    if part.shape[0] == rows:
        return part
    if rows % part.shape[0]:
        raise ValueError(f"a condition of {part.shape[0]} rows cannot be tiled to {rows}")
    return part.repeat(rows // part.shape[0], *(1 for _ in part.shape[1:]))


@runtime_checkable
class Views(Protocol):
    """How a large canvas is seen through windows that the network can handle (MultiDiffusion).

    Rows of a viewed branch are ordered view by view: all images of view 0, then all of view 1.
    """

    @property
    def count(self) -> int:
        """Number of views."""
        ...

    @property
    def hw(self) -> tuple[int, int]:
        """Latent height and width of one view."""
        ...

    def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """[B, C, H, W] -> [count * B, C, h, w]; ``factor`` is pixels per latent for pictures at full resolution."""
        ...

    def merge(self, predictions: torch.Tensor) -> torch.Tensor:
        """[count * B, C, h, w] -> [B, C, H, W], overlaps averaged as the method says."""
        ...


@dataclass(frozen=True)
class ViewsPart:
    """Some of the views of a canvas, for passes that take them in turns."""

    whole: Views
    first: int
    count: int

    @property
    def hw(self) -> tuple[int, int]:
        """Latent height and width of one view."""
        return self.whole.hw

    def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """[B, C, H, W] -> [count * B, C, h, w]."""
        images = canvas.shape[0]
        return self.whole.split(canvas, factor)[self.first * images : (self.first + self.count) * images]

    def merge(self, predictions: torch.Tensor) -> torch.Tensor:
        """Not possible: the other views are missing."""
        raise RuntimeError("a part of the views cannot be merged")


class Layout:
    """The rows of one pass: which slice of the batch belongs to which branch."""

    def __init__(self, sizes: Iterable[tuple[str, int]]) -> None:
        self.slices: dict[str, slice] = {}
        self.total = 0
        for name, size in sizes:
            self.slices[name] = slice(self.total, self.total + size)
            self.total += size

    @property
    def names(self) -> tuple[str, ...]:
        """Branches in the order of their rows."""
        return tuple(self.slices)

    def __contains__(self, name: str) -> bool:
        return name in self.slices

    def rows(self, name: str) -> slice:
        """Slice of a branch.

        Raises:
            KeyError: the branch is not in this pass.
        """
        return self.slices[name]

    def size(self, name: str) -> int:
        """Number of rows of a branch."""
        part = self.slices[name]
        return part.stop - part.start

    def __repr__(self) -> str:
        return "Layout(" + ", ".join(f"{n}={s.start}:{s.stop}" for n, s in self.slices.items()) + ")"
