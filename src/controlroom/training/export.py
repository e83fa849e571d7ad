"""Exported weights that know how much they were trained: `samples` in the metadata of every safetensors file.

A recipe writes its weights as it likes (diffusers' `save_pretrained`, for example); the loop then adds the metadata by
rewriting the header, which leaves the tensors as they are, and puts the folder in place of the one before.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from controlroom.backbones.model_files import PICKLES, pickle_refused
from controlroom.core.errors import InputError, OutputError
from controlroom.training.checkpoint import sync
from controlroom.training.recipe import Recipe


def export_weights(recipe: Recipe[Any], folder: Path, metadata: Mapping[str, str]) -> Path:
    """Let the recipe write into a folder beside, stamp every safetensors file, then replace `folder`."""
    beside, old = folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old.tmp")
    try:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        beside.mkdir(parents=True)
        recipe.export(beside)
        for path in sorted(p for p in beside.rglob("*") if p.is_file()):
            if path.suffix == ".safetensors":
                stamp(path, metadata)
            sync(path)
        if folder.exists():
            folder.rename(old)
        beside.rename(folder)
        sync(folder.parent)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if old.exists() and not folder.exists():
            old.rename(folder)
        shutil.rmtree(beside, ignore_errors=True)
        raise OutputError(
            f"The weights could not be exported to {folder}: {error}. Make room and run again."
        ) from error
    return folder


def stamp(path: Path, metadata: Mapping[str, str]) -> None:
    """Add metadata to a safetensors file; its tensors stay byte for byte."""
    header, start = _header(path)
    header["__metadata__"] = {"format": "pt", **header.get("__metadata__", {}), **metadata}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # tensors stay aligned, as the format asks
    beside = path.with_name(path.name + ".stamping")
    with path.open("rb") as source, beside.open("wb") as target:
        source.seek(start)
        target.write(len(encoded).to_bytes(8, "little") + encoded)
        shutil.copyfileobj(source, target, 1 << 22)
    os.replace(beside, path)


def samples_seen(folder: Path) -> int:
    """Samples that exported weights have seen: the largest `samples` in the folder's safetensors files.

    Files without the entry count as 0.

    Raises:
        InputError: the folder has no safetensors file.
        ModelError: it holds a pickle, which a loader might open.
    """
    if folder.is_dir():
        pickle = next((file for file in sorted(folder.rglob("*")) if file.suffix.lower() in PICKLES), None)
        if pickle is not None:
            raise pickle_refused(str(pickle), "network")
    paths = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else []
    if not paths:
        raise InputError(f"{folder} holds no safetensors file; start_from expects a folder of exported weights.")
    return max(int(_header(path)[0].get("__metadata__", {}).get("samples", 0)) for path in paths)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """The JSON header of a safetensors file and where its tensors start."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if not 2 <= size <= 100_000_000:
                raise ValueError("the length of the header is impossible")
            return json.loads(file.read(size)), 8 + size
    except ValueError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from error
