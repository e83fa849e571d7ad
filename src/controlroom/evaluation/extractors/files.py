"""Weights of extractors from disk: ``.safetensors``, or a torch file whose tensors alone are read."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from controlroom.backbones.model_files import read_safetensors
from controlroom.core.errors import ModelError

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def read_tensors(path: str | os.PathLike[str], what: str) -> dict[str, Tensor]:
    """Tensors by name. A torch file is opened with ``weights_only``, which runs no code of it.

    Args:
        path: ``.safetensors``, or a state dict saved by torch (``.pt``, ``.pth``, ``.bin``, ``.ckpt``), also one under
            the key ``state_dict``.
        what: what is looked for, for the message.

    Raises:
        ModelError: no such file, broken, or more than tensors in it.
    """
    place = Path(path).expanduser()
    if not place.is_file():
        raise ModelError(f"There is no {what} at {str(path)!r}. Give the file of its weights; nothing is downloaded.")
    if place.suffix == ".safetensors":
        return read_safetensors(place)
    if place.suffix.lower() not in _TORCH:
        raise ModelError(f"{str(path)!r} is no file of weights; expected .safetensors or {', '.join(_TORCH)}.")
    try:
        data: Any = torch.load(place, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise ModelError(
            f"{str(path)!r} cannot be read as plain tensors ({' '.join(str(error).split())[:200]}). Files that hold "
            "more (a whole network, TorchScript) are not opened; save its state dict."
        ) from error
    if isinstance(data, Mapping) and isinstance(data.get("state_dict"), Mapping):
        data = data["state_dict"]
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise ModelError(f"{str(path)!r} holds no state dict; expected a mapping of names to tensors.")
    return {str(name): value for name, value in data.items()}


def fill(module: nn.Module, tensors: Mapping[str, Tensor], name: str) -> None:
    """Load a state dict into a network; every parameter must be there in its shape, and nothing else.

    Args:
        module: the network; in evaluation mode and without gradients afterwards.
        tensors: its state dict.
        name: of the file, for the message.

    Raises:
        ModelError: names or shapes that do not fit; the message has the first of them.
    """
    wanted = module.state_dict()
    missing = [key for key in wanted if key not in tensors and not key.endswith("num_batches_tracked")]
    other = [key for key, value in tensors.items() if key not in wanted or value.shape != wanted[key].shape]
    if missing or other:
        first = f"lacks {missing[0]!r}" if missing else f"has {other[0]!r} {list(tensors[other[0]].shape)}"
        raise ModelError(f"{name!r} is not the network it is given for: it {first}. Check which file it is.")
    module.load_state_dict(dict(tensors), strict=False)
    module.eval().requires_grad_(False)
