"""A network stored as its difference from another, in eight bits a number.

A network that was tuned from another stays close to it, so that the difference of each weight needs far fewer bits than
the weight: it is counted in steps of a 127th of the largest difference of its output. That is half of what float16
takes, for an error of half a step at most. The theatre's tuned copies of its UNet ship so. `stored_whole` writes such a
network as diffusers loads it.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlroom.backbones.completeness import check_keys
from controlroom.backbones.model_files import explained, load_strictly, read_json, read_metadata, read_safetensors
from controlroom.core.errors import ModelError
from controlroom.core.files import atomic_path

FILE = "difference.safetensors"
WHOLE = "diffusion_pytorch_model.safetensors"
_STEP = "::step"
_LEVELS = 127


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
        step = change.abs().amax(dim=1, keepdim=True) / _LEVELS
        counted = change / step.clamp(min=1e-30)  # an output that did not change has no step
        stored[key] = counted.round().to(torch.int8).reshape(value.shape).contiguous()
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
    if "base" not in about or "base_sha256" not in about:
        raise ModelError(f"{folder / FILE} does not say which network it is the difference from. Copy it again.")
    base = folder / about["base"]
    if not base.is_file():
        raise ModelError(
            f"{folder} holds only the difference from {base}, which is not there. Copy the whole checkpoint."
        )
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
        if key not in known or known[key].shape != value.shape or step.shape != value.shape[:1]:
            raise ModelError(f"{folder / FILE} has {key!r} in a shape that does not fit {base}. Copy it again.")
        found[key] = known[key].float() + value.float() * step.reshape(-1, *(1 for _ in value.shape[1:]))
    return found


def load_unet(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """A `UNet2DConditionModel` from a folder of diffusers, where its weights lie whole or as a difference.

    Args:
        folder: with ``config.json``.
        dtype: precision; None: float32.

    Raises:
        ModelError: broken, weights missing or left over, or the base of a difference is not there.
    """
    from diffusers import UNet2DConditionModel

    precision = dtype or torch.float32
    if is_difference(folder):
        config = read_json(folder / "config.json")
        with torch.device("meta"):
            unet: Any = explained(str(folder), lambda: UNet2DConditionModel.from_config(config))
        unet.to_empty(device="cpu")
        load_strictly(unet, read_difference(folder), str(folder / FILE), "its config.json")
        return unet.to(precision).eval()
    unet = explained(
        str(folder),
        lambda: UNet2DConditionModel.from_pretrained(
            str(folder), torch_dtype=precision, use_safetensors=True, local_files_only=True
        ),
    )
    check_keys(unet, folder)
    return unet.eval()


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
