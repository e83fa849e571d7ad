"""Encoded data on disk, made once: latents [N, C, H, W] in float16 or float32, read through a memory map.

The key holds whatever the latents depend on (`cache_key`: bytes of the encoder's weights, versions of data and
transform), and is the name of the folder, so latents of another encoder are never read. Building appends chunk by
chunk and notes after each how many rows are safe on disk; a build that was killed continues there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from controlroom.core.errors import InputError, OutputError
from controlroom.core.files import write_atomically
from controlroom.training.checkpoint import modules_hash, sync
from controlroom.training.stop import only_run_in


def cache_key(encoders: Mapping[str, nn.Module], *versions: str) -> str:
    """SHA-256 over the weights of the encoders and the versions of everything else that shapes a latent."""
    return hashlib.sha256("\n".join((modules_hash(encoders), *versions)).encode()).hexdigest()


class LatentCache:
    """Latents of slots 0 to `count` - 1 under `folder/<start of key>/`.

    `shape` is (C, H, W). A cache that was built for fewer slots is continued, not rebuilt. ``exact`` keeps float32, bit
    for bit, in a folder of its own; otherwise half precision is kept.
    """

    def __init__(self, folder: Path, key: str, count: int, shape: tuple[int, int, int], exact: bool = False) -> None:
        self.folder = folder / (f"{key[:24]}-exact" if exact else key[:24])
        self.key, self.count, self.shape = key, count, shape
        self._dtype = np.dtype(np.float32 if exact else np.float16)
        self._row_bytes = int(np.prod(shape)) * self._dtype.itemsize
        self._data = self.folder / ("latents.f32" if exact else "latents.f16")
        self._note = self.folder / "latents.json"
        self._map: np.memmap | None = None

    @property
    def done(self) -> int:
        """How many rows are on disk. Raises InputError if the folder holds latents of another key or shape."""
        try:
            note = json.loads(self._note.read_text())
            key, shape, done = note["key"], tuple(note["shape"]), int(note["done"])
        except FileNotFoundError:
            return 0
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{self._note} cannot be read ({error}); delete {self.folder} to build it anew."
            ) from error
        if (key, shape) != (self.key, self.shape):
            raise InputError(f"{self.folder} holds latents {shape}, expected {self.shape}; delete it to build it anew.")
        size = self._data.stat().st_size if self._data.is_file() else 0
        return min(done, size // self._row_bytes)

    @property
    def complete(self) -> bool:
        """Whether every slot can be read."""
        return self.done >= self.count

    def build(
        self,
        encode: Callable[[Sequence[int]], Tensor],
        *,
        chunk: int = 64,
        report: Callable[[int, int], None] | None = None,
    ) -> LatentCache:
        """Encode the missing slots, `chunk` at a time, and return self.

        `encode` gets slots and returns [len(slots), C, H, W], a function of the slots alone. `report` gets (done,
        count) after each chunk. Raises InputError if a latent has another shape or does not fit float16, OutputError
        if it cannot be written; what was done before stays.
        """
        with only_run_in(self.folder):
            done = self.done
            try:
                with self._data.open("ab") as file:
                    file.truncate(done * self._row_bytes)  # rows of a chunk that was not noted as done
                    while done < self.count:
                        slots = range(done, min(done + chunk, self.count))
                        file.write(self._rows(encode, slots))
                        file.flush()
                        sync(self._data)
                        done = slots.stop
                        self._write_note(done)
                        if report is not None:
                            report(done, self.count)
            except OSError as error:
                raise OutputError(f"{self._data} could not be written: {error}. Make room and run again.") from error
        return self

    def read(self, slots: Sequence[int]) -> Tensor:
        """Latents of the slots, float32 [len(slots), C, H, W]."""
        if self._map is None:
            if not self.complete:
                raise InputError(f"{self.folder} has {self.done} of {self.count} latents; call build() first.")
            self._map = np.memmap(self._data, self._dtype, "r", shape=(self.count, *self.shape))
        return torch.from_numpy(self._map[np.asarray(slots, dtype=np.int64)].astype(np.float32))

    def _rows(self, encode: Callable[[Sequence[int]], Tensor], slots: range) -> bytes:
        with torch.no_grad():
            latents = encode(slots)
        if tuple(latents.shape) != (len(slots), *self.shape):
            raise InputError(f"The encoder gave {tuple(latents.shape)}, expected {(len(slots), *self.shape)}.")
        kept = latents.detach().float().cpu().to(getattr(torch, self._dtype.name))
        if not torch.isfinite(kept).all():
            raise InputError(
                f"A latent of slots {slots[0]} to {slots[-1]} is not finite, or too large for {self._dtype.name}."
            )
        return kept.contiguous().numpy().tobytes()

    def _write_note(self, done: int) -> None:
        note = {"key": self.key, "shape": list(self.shape), "done": done}
        write_atomically(self._note, json.dumps(note).encode())
