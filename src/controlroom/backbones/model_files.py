"""Reading the files of a model. No pickle is ever opened."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from controlroom.core.errors import ModelError

PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def pickle_refused(name: str, what: str) -> ModelError:
    """The one error for a pickle that was given where weights belong: what to do instead."""
    return ModelError(
        f"{name!r} is a pickle, which can run code when it is opened, and is not opened here. Use the .safetensors "
        f"file of that {what}, or make one: controlroom convert {shlex.quote(name)} -o "
        f"{shlex.quote(str(Path(name).with_suffix('.safetensors')))}"
    )


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, on the CPU.

    Raises:
        ModelError: the file is broken.
    """
    from safetensors.torch import load_file

    return explained(str(path), lambda: load_file(str(path)))


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a file says beside its tensors.

    Raises:
        ModelError: the file is broken.
    """
    from safetensors import safe_open

    def read() -> dict[str, str]:
        with safe_open(str(path), framework="pt") as content:
            return dict(content.metadata() or {})

    return explained(str(path), read)


def load_strictly(module: torch.nn.Module, stored: Mapping[str, torch.Tensor], name: str, said_by: str) -> None:
    """Load weights into a module whose sizes a file says.

    Args:
        module: of these sizes.
        stored: all of its weights and no others.
        name: where they are from.
        said_by: what says the sizes.

    Raises:
        ModelError: one is missing, of another shape, or left over.
    """
    expected = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    for key, wanted in expected.items():
        if key not in stored or tuple(stored[key].shape) != wanted:
            found = f"has {list(stored[key].shape)} for" if key in stored else "lacks"
            raise ModelError(f"{name} {found} {key!r}; {said_by} ask for {list(wanted)}.")
    if left := sorted(stored.keys() - expected.keys()):
        raise ModelError(f"{name} has {len(left)} weights that nothing reads, such as {left[0]!r}.")
    module.load_state_dict(dict(stored))


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        ModelError: missing, broken, or not an object.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing. Restore it.") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}). Copy it again.") from error
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object. Copy it again.")
    return data


def explained(name: str, load: Any) -> Any:
    """Whatever the libraries raise on a broken or missing model becomes one error that names it."""
    try:
        return load()
    except ModelError:
        raise
    except Exception as error:
        raise failure(name, error) from error


def failure(name: str, error: Exception) -> ModelError:
    """The one error for what a library raised on a model."""
    reason = " ".join(str(error).split())
    folder = Path(name)
    if os.path.isdir(name) and not any(folder.glob("*.safetensors")):
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() in PICKLES:
                return pickle_refused(str(file), "model")
    return ModelError(
        f"{name!r} cannot be loaded: {reason[:400]}. Give the word theatre, a folder in diffusers' layout, a hub "
        "id, or a .safetensors file."
    )
