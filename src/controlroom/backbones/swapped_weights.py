"""Other weights in the place of a network's own for a while; its parameters stay the same objects."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.model_files import read_safetensors
from controlroom.core.errors import ModelError


def read_weights(folder: Path, module: Any, what: str) -> dict[str, torch.Tensor]:
    """Weights for every parameter of a module, in its precision, on the CPU.

    Args:
        folder: holds them in one ``.safetensors`` file or several.
        module: they are for.
        what: they are of, for the message.

    Raises:
        ModelError: there are none, one is missing, unknown, or of another shape.
    """
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored |= read_safetensors(path)
    if not stored:
        raise ModelError(f"{folder} holds no weights of {what}. Train them first, or copy them there.")
    own = dict(module.named_parameters())
    missing, unknown = own.keys() - stored.keys(), stored.keys() - own.keys()
    other = [name for name in own.keys() & stored.keys() if own[name].shape != stored[name].shape]
    for names, problem in ((missing, "missing"), (unknown, "unknown"), (other, "of another shape")):
        if names:
            raise ModelError(
                f"{folder} does not fit this model: {len(names)} weights of {what} are {problem} (first: "
                f"{min(names)}). Use the model that it was made with."
            )
    return {name: stored[name].to(parameter.dtype) for name, parameter in own.items()}


@contextmanager
def swapped(module: Any, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Put weights (as `read_weights` gives them) into a module; its own are back afterwards, untouched."""
    parameters = dict(module.named_parameters())
    kept = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter.device)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = kept[name]
