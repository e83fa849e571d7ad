"""Random numbers and data order that depend on nothing but (seed, slot, name): training without hidden state.

A slot is the number of a sample since training began, counted over all batches and processes. The step of a slot
follows from it, so the step is left out of the key: a sample then keeps its noise when the batch is split or resized.
Every draw seeds a generator anew (a few microseconds), so a resumed run needs no saved generator to be bit-equal.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def seed_of(seed: int, number: int, name: str) -> int:
    """A 64-bit seed for a stream: blake2b of (seed, number, name), the same on every machine."""
    key = struct.pack("<QQ", seed, number) + name.encode()
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def slots_of(step: int, batch_size: int, start_samples: int = 0, rank: int = 0, world: int = 1) -> range:
    """The slots that process `rank` of `world` shows at a step; together they are the same for any `world`."""
    share = batch_size // world
    first = start_samples + step * batch_size + rank * share
    return range(first, first + share)


def parts_of(slots: range, parts: int) -> list[range]:
    """The slots of a process at a step in equal parts, in order: one for each pass forward and back."""
    size = len(slots) // parts
    return [slots[part * size : (part + 1) * size] for part in range(parts)]


class StepRandom:
    """Random numbers for the samples of one batch, drawn sample by sample on the CPU.

    `name` is the stream: the same name gives the same numbers each time it is asked, different names are independent.
    All results have a first axis over the slots, in order, and lie on `device`.
    """

    def __init__(self, seed: int, step: int, slots: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.seed = seed
        self.step = step
        self.slots = tuple(slots)
        self.device = torch.device(device)
        self._generator = torch.Generator("cpu")

    def generator(self, name: str, slot: int) -> torch.Generator:
        """A fresh CPU generator of this stream and slot, for draws not offered here."""
        return torch.Generator("cpu").manual_seed(seed_of(self.seed, slot, name))

    def normal(self, name: str, shape: Sequence[int] = ()) -> Tensor:
        """Standard normal, float32 [slots, *shape]."""
        return self._fill(name, torch.empty(len(self.slots), *shape), lambda row, g: row.normal_(generator=g))

    def uniform(self, name: str, shape: Sequence[int] = (), low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform in [low, high), float32 [slots, *shape]."""
        return self._fill(
            name, torch.empty(len(self.slots), *shape), lambda row, g: row.uniform_(low, high, generator=g)
        )

    def integers(self, name: str, low: int, high: int, shape: Sequence[int] = ()) -> Tensor:
        """Whole numbers in [low, high), int64 [slots, *shape]; timesteps, for example."""
        rows = torch.empty(len(self.slots), *shape, dtype=torch.int64)
        return self._fill(name, rows, lambda row, g: row.random_(low, high, generator=g))

    def choice(self, name: str, weights: Sequence[float]) -> Tensor:
        """Which of several exclusive outcomes each sample has (a joint dropout table), int64 [slots].

        `weights` are non-negative and need not sum to one.
        """
        edges = torch.tensor(weights, dtype=torch.float64).cumsum(0)
        drawn = self.uniform(name).cpu().double() * edges[-1]
        return torch.searchsorted(edges, drawn, right=True).clamp_(max=len(weights) - 1).to(self.device)

    def _fill(self, name: str, rows: Tensor, draw: Callable[[Tensor, torch.Generator], object]) -> Tensor:
        flat = rows.view(len(self.slots), -1)
        for row, slot in zip(flat, self.slots, strict=True):
            draw(row, self._generator.manual_seed(seed_of(self.seed, slot, name)))
        return rows.to(self.device)


class DataOrder:
    """Which datum a slot shows: the slot itself for an endless dataset, else a permutation keyed by (seed, epoch)."""

    def __init__(self, seed: int, size: int | None) -> None:
        self.seed = seed
        self.size = size
        self._epoch = -1
        self._order: list[int] = []

    def indices(self, slots: Sequence[int]) -> list[int]:
        return list(slots) if self.size is None else [self._index(slot, self.size) for slot in slots]

    def _index(self, slot: int, size: int) -> int:
        epoch, place = divmod(slot, size)
        if epoch != self._epoch:
            generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, epoch, "data order"))
            self._order, self._epoch = torch.randperm(size, generator=generator).tolist(), epoch
        return self._order[place]
