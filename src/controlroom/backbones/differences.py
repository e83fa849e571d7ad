"""A network stored as its difference from another, in about five bits a number.

A network that was tuned from another stays close to it, so that the difference of each weight needs far fewer bits than
the weight: it is counted in steps of a sixth of its output's usual difference, and the counts, of which small ones are
frequent, are coded by Huffman's code (deflate without repetitions). That is under a third of what float16 takes, for an
error of half a step at most. The theatre's tuned copies of its UNet ship so. `stored_whole` writes such a network as
diffusers loads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from controlroom.backbones.completeness import check_keys
from controlroom.backbones.file_header import Header, read_header
from controlroom.backbones.model_files import explained, load_strictly, read_json, read_metadata, read_safetensors
from controlroom.core.errors import ModelError
from controlroom.core.files import atomic_path

FILE = "difference.safetensors"
WHOLE = "diffusion_pytorch_model.safetensors"
_STEP = "::step"
_FINENESS = 6
"""Steps in the root mean square of an output's differences."""
_LARGEST = 127
"""Count that a byte can hold; where the largest difference needs more, the steps are wider."""


def is_difference(folder: Path) -> bool:
    """Whether a folder holds a network as its difference from another."""
    return (folder / FILE).is_file()


def write_difference(
    folder: Path, tuned: Mapping[str, Tensor], base: Path, metadata: Mapping[str, str] | None = None
) -> Path:
    """Store weights as their difference from those of a file.

    Args:
        folder: where it is written; its ``config.json`` stays as it is.
        tuned: all weights of the network. Vectors, and what the base does not have in that shape, are stored whole in
            float16.
        base: ``.safetensors`` file, which is found again by its path from ``folder``.
        metadata: kept in the file.

    Returns:
        The file.
    """
    from safetensors.torch import save_file

    known, stored = read_safetensors(base), dict[str, Tensor]()
    for key, value in tuned.items():
        if value.ndim < 2 or key not in known or known[key].shape != value.shape:
            stored[key] = value.half().contiguous() if value.is_floating_point() else value.contiguous()
            continue
        change = (value.float() - known[key].float()).flatten(1)
        usual = change.square().mean(dim=1, keepdim=True).sqrt() / _FINENESS
        step = torch.maximum(usual, change.abs().amax(dim=1, keepdim=True) / _LARGEST)
        counted = change / step.clamp(min=1e-30)  # an output that did not change has no step
        stored[key] = _coded(counted.round().to(torch.int8))
        stored[key + _STEP] = step.flatten().contiguous()
    about = {
        **(metadata or {}),
        "format": "pt",
        "base": os.path.relpath(base, folder).replace(os.sep, "/"),
        "base_sha256": _digest(base),
    }
    with atomic_path(folder / FILE) as beside:
        save_file(stored, str(beside), about)
    return folder / FILE


def read_difference(folder: Path) -> dict[str, Tensor]:
    """The whole weights, in float32.

    Raises:
        ModelError: broken, or the network that it is the difference from is not there or has changed.
    """
    about, stored = read_metadata(folder / FILE), read_safetensors(folder / FILE)
    base = _base(folder, about)
    if _digest(base) != about["base_sha256"]:
        raise ModelError(
            f"{folder} holds the difference from another version of {base}. Use both from the same checkpoint."
        )
    known, found = read_safetensors(base), dict[str, Tensor]()
    for key, value in stored.items():
        if key.endswith(_STEP):
            continue
        step = stored.get(key + _STEP)
        if step is None:
            found[key] = value.float() if value.is_floating_point() else value
            continue
        counted = _counts(value, known[key].shape) if key in known else None
        if counted is None or step.shape != counted.shape[:1]:
            raise ModelError(f"{folder / FILE} has {key!r} in a form that does not fit {base}. Copy it again.")
        found[key] = known[key].float() + counted.float() * step.reshape(-1, *(1 for _ in counted.shape[1:]))
    return found


def header_of_difference(folder: Path) -> Header:
    """The header that the whole network's file would have; no weight is read.

    Raises:
        ModelError: broken, or the network that it is the difference from is not there.
    """
    own = read_header(folder / FILE)
    base = _base(folder, own.metadata)
    known = read_header(base).shapes
    shapes: dict[str, tuple[int, ...]] = {}
    for key, shape in own.shapes.items():
        if key.endswith(_STEP):
            continue
        counted = key + _STEP in own.shapes
        if counted and key not in known:
            raise ModelError(f"{folder / FILE} has {key!r}, which {base} has not. Copy it again.")
        shapes[key] = known[key] if counted else shape
    return Header(shapes, own.dtypes, own.metadata, str(folder))


def _base(folder: Path, about: Mapping[str, str]) -> Path:
    """The file that a network is the difference from."""
    if "base" not in about or "base_sha256" not in about:
        raise ModelError(f"{folder / FILE} does not say which network it is the difference from. Copy it again.")
    base = folder / about["base"]
    if not base.is_file():
        raise ModelError(
            f"{folder} holds only the difference from {base}, which is not there. Copy the whole checkpoint."
        )
    return base


def _coded(counts: Tensor) -> Tensor:
    """Bytes of the coded counts, as a tensor of one axis."""
    coder = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS, 9, zlib.Z_HUFFMAN_ONLY)
    coded = coder.compress(counts.numpy().tobytes()) + coder.flush()
    return torch.from_numpy(np.frombuffer(coded, dtype=np.uint8).copy())


def _counts(coded: Tensor, shape: torch.Size) -> Tensor | None:
    """The counts in that shape; None if they are others. Never takes more memory than they do."""
    if coded.dtype != torch.uint8:
        return None
    decoder = zlib.decompressobj()
    try:
        content = decoder.decompress(coded.numpy().tobytes(), shape.numel() + 1)
    except zlib.error:
        return None
    if len(content) != shape.numel() or not decoder.eof:
        return None
    return torch.from_numpy(np.frombuffer(content, dtype=np.int8).copy()).reshape(shape)


def load_unet(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A `UNet2DConditionModel`; see `load_network`."""
    from diffusers import UNet2DConditionModel

    return load_network(UNet2DConditionModel, folder, dtype)


def load_network(kind: Any, folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A network from a folder of diffusers, where its weights lie whole or as a difference.

    Args:
        kind: diffusers' class of it.
        folder: with ``config.json``.
        dtype: precision; None: float32.

    Raises:
        ModelError: broken, weights missing or left over, or the base of a difference is not there.
    """
    precision = dtype or torch.float32
    if is_difference(folder):
        config = read_json(folder / "config.json")
        with torch.device("meta"):
            net: Any = explained(str(folder), lambda: kind.from_config(config))
        net.to_empty(device="cpu")
        load_strictly(net, read_difference(folder), str(folder / FILE), "its config.json")
        return net.to(precision).eval()
    net = explained(
        str(folder),
        lambda: kind.from_pretrained(str(folder), torch_dtype=precision, use_safetensors=True, local_files_only=True),
    )
    check_keys(net, folder)
    return net.eval()


def stored_whole(folder: Path, target: Path, dtype: torch.dtype = torch.float16) -> list[Path]:
    """Write a network that is stored as a difference as diffusers loads it; returns what was written.

    Args:
        folder: with a difference.
        target: folder for the weights and the configuration.
        dtype: precision of the weights.

    Raises:
        ModelError: as `read_difference`.
    """
    from safetensors.torch import save_file

    weights = {key: value.to(dtype).contiguous() for key, value in read_difference(folder).items()}
    target.mkdir(parents=True, exist_ok=True)
    with atomic_path(target / WHOLE) as beside:
        save_file(weights, str(beside), {"format": "pt"})
    shutil.copyfile(folder / "config.json", target / "config.json")
    return [target / WHOLE, target / "config.json"]


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
