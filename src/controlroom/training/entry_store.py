"""Tensors on disk under a key: whole or not there, checked when read, safe for several processes at once.

One safetensors file an entry, written beside its place and renamed, with a hash of its tensors in its header. What was
cut off, changed or is another entry reads as missing, so whoever asked makes it again. Two processes that make the same
entry at once both write it; the content of an entry follows from its key, so it does not matter who is last.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from controlroom.core.errors import OutputError
from controlroom.core.files import atomic_path

_NOTE = "entry"


def key_of(*parts: str) -> str:
    """SHA-256 over whatever an entry depends on."""
    return hashlib.sha256("\n".join(f"{len(part)} {part}" for part in parts).encode()).hexdigest()


class EntryStore:
    """Entries in a folder, in subfolders by the start of their keys. It may be deleted whenever nothing uses it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the entry of a key is, if there is one."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """The tensors of a key; None if there are none, or they are not what was written."""
        try:
            with safe_open(self.path(key), "pt") as file:
                told = (file.metadata() or {}).get(_NOTE)
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError, ValueError):  # not there, or cut off
            return None
        return tensors if told == f"{key} {_hash(tensors)}" else None

    def write(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Keep the tensors, in place of what was there.

        Raises:
            OutputError: they cannot be written; nothing half-written is left.
        """
        path = self.path(key)
        kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{path.parent} cannot be written: {error}. Give another folder.") from error
        with atomic_path(path) as temporary:
            # One note: safetensors writes several in any order, and the same entry should be the same bytes.
            save_file(kept, temporary, {_NOTE: f"{key} {_hash(kept)}"})


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
