"""Randomness by name: image i of a batch has the noise it would have alone, whatever else the run draws.

With ``seed=s`` image i draws its initial noise and the noise of its steps from ``torch.Generator("cpu")`` seeded with
s + i, in diffusers' order, so that ``seed=s`` and diffusers' ``generator=[manual_seed(s), manual_seed(s + 1), ...]``
agree. Everything else comes from streams of its own, seeded from (s + i, name), so that a control more or less never
changes the noise of the others. With ``generator`` (the caller's), the picture's draws are made from it exactly as
diffusers makes them, and the named streams are seeded from its initial seed. Noise is drawn on the CPU unless the
caller's generator lives elsewhere, so it is the same on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch

_MASK = (1 << 63) - 1


def stream_seed(seed: int, name: str) -> int:
    """Seed of the stream ``name`` of an image with seed ``seed``: the first 63 bits of a SHA-256."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "big") & _MASK


class Streams:
    """The generators of a run.

    Args:
        seeds: one seed for each image.
        generator: the caller's generator (one for the whole batch) or one for each image; None: from the seeds.
    """

    def __init__(
        self, seeds: Sequence[int], generator: torch.Generator | Sequence[torch.Generator] | None = None
    ) -> None:
        self.seeds = tuple(seeds)
        self._named: dict[str, list[torch.Generator]] = {}
        self.main: torch.Generator | list[torch.Generator]
        if isinstance(generator, torch.Generator):
            self.main = generator
        elif generator is not None:
            self.main = list(generator)
        else:
            self.main = [torch.Generator("cpu").manual_seed(seed) for seed in self.seeds]

    def stream(self, name: str) -> list[torch.Generator]:
        """Generators of the stream ``name``, one for each image; the same objects every time."""
        if name not in self._named:
            self._named[name] = [torch.Generator("cpu").manual_seed(stream_seed(s, name)) for s in self.seeds]
        return self._named[name]

    def normal(
        self,
        name: str,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        """Standard normal noise [rows, ...] from the stream ``name``, row i from image i (drawn on the CPU)."""
        return draw(self.stream(name)[: shape[0]], shape, device, dtype)

    def copy_main(self) -> torch.Generator | list[torch.Generator]:
        """Generators in the present state of the picture's, for a state that shares its noise."""
        return [clone(g) for g in self.main] if isinstance(self.main, list) else clone(self.main)


def draw(
    generator: torch.Generator | Sequence[torch.Generator],
    shape: Sequence[int],
    device: torch.device | str,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Noise as diffusers draws it: at once from one generator, or row by row from one for each."""
    if isinstance(generator, torch.Generator):
        return torch.randn(tuple(shape), generator=generator, device=generator.device, dtype=dtype).to(device)
    if len(generator) != shape[0]:
        raise ValueError(f"{shape[0]} rows need as many generators, got {len(generator)}")
    rows = [torch.randn((1, *shape[1:]), generator=g, device=g.device, dtype=dtype).to(device) for g in generator]
    return torch.cat(rows)


def clone(generator: torch.Generator) -> torch.Generator:
    """A generator that will draw what ``generator`` would draw next."""
    copy = torch.Generator(generator.device)
    copy.set_state(generator.get_state())
    return copy
