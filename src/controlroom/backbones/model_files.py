"""Where the files of a model lie on this machine, and how they are read. No pickle is ever opened."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from controlroom.core.errors import ModelError

THEATRE = "theatre"
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".pickle")


def theatre_folder() -> Path:
    """Folder of the embedded checkpoint."""
    return Path(__file__).resolve().parent.parent / "assets" / "theatre"


def find_model(model: str | os.PathLike[str], what: str = "model") -> Path:
    """Where something that a control names lies on this machine: a folder, or a ``.safetensors`` file.

    Nothing is downloaded: a run may have been written by somebody else, and drawing a picture again must not fetch
    what it names.

    Args:
        model: a path; a name of the theatre such as ``theatre/pose``; a hub id that has been downloaded, with or
            without a path inside (``h94/IP-Adapter/models/ip-adapter_sd15.safetensors``).
        what: what is looked for, for the message.

    Raises:
        ModelError: nothing there, or a pickle.
    """
    name = os.fspath(model)
    if not isinstance(name, str) or not name or "\0" in name or len(name) > 4096:
        raise ModelError(f"{str(name)[:80]!r} does not name a {what}. Give a path, a hub id or a name of the theatre.")
    if name.lower().endswith(PICKLES):
        raise ModelError(
            f"{name!r} is a pickle, which can run code when it is opened. Use the .safetensors file of that {what}, or "
            "convert it where you trust it."
        )
    parts = name.split("/")
    if parts[0] == THEATRE and len(parts) > 1 and not Path(name).exists():
        place = theatre_folder().joinpath(*parts[1:])
        if ".." in parts or not place.exists():
            known = sorted(
                p.name for p in theatre_folder().glob("*") if p.is_dir() and not p.name.startswith((".", "_"))
            )
            raise ModelError(
                f"The theatre of this installation has no {name!r}. It has: {', '.join(known) or 'nothing'}."
            )
        return place
    path = Path(name).expanduser()
    try:
        if path.is_dir() or (path.is_file() and path.suffix == ".safetensors"):
            return path
        if path.is_file():
            raise ModelError(f"{name!r} is not a .safetensors file. Give one, or a folder in diffusers' layout.")
    except OSError as error:
        raise ModelError(f"{name!r} cannot be read: {error.strerror}.") from error
    if len(parts) < 2 or "" in parts or parts[0] in (".", "..", "~") or "\\" in name:
        raise ModelError(f"There is no {what} at {name!r}. Check the path.")
    return _find_downloaded(parts, name, what)


def _find_downloaded(parts: list[str], name: str, what: str) -> Path:
    from huggingface_hub import snapshot_download

    repository = "/".join(parts[:2])
    try:
        folder = Path(snapshot_download(repository, local_files_only=True))
    except Exception as error:
        raise ModelError(
            f"There is no {what} at {name!r}, and {repository!r} has not been downloaded. Check the path, or download "
            f"it with: hf download {repository}"
        ) from error
    place = folder.joinpath(*parts[2:])
    if ".." in parts or not place.exists():
        raise ModelError(f"{repository!r} was downloaded, but has no {'/'.join(parts[2:])!r}. Check the name.")
    return place


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file, on the CPU.

    Raises:
        ModelError: the file is broken.
    """
    from safetensors.torch import load_file

    return explained(str(path), lambda: load_file(str(path)))


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
    return ModelError(
        f"{name!r} cannot be loaded: {reason[:400]}. Give the word theatre, a folder in diffusers' layout, a hub "
        "id, or a .safetensors file."
    )
