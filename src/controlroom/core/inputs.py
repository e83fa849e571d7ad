"""Inputs of a run as data: small pictures and tensors travel inside the manifest, the others by their hash.

A picture that was given in memory becomes ``{"$image": "data:image/png;base64,…"}`` if its PNG is at most
`EMBED_BYTES`, a tensor or array ``{"$tensor": …}`` (NumPy's format); anything larger, and modules, become
``{"$omitted": kind, "sha256": …}``, and reading such a run says what has to be given again. Files stay as paths.
"""

from __future__ import annotations

import base64
import hashlib
import io
import os
from pathlib import Path
from typing import Any

from controlroom.core.errors import InputError

EMBED_BYTES = 192 * 1024


def encode(value: Any) -> Any:
    """JSON for values that pydantic cannot write: pictures, arrays, tensors, modules, paths; others as they are."""
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, bytes):
        return _embed("$bytes", "bytes", value)
    kind = _kind(value)
    if kind == "image":
        from controlroom.core.png import png_bytes

        return _embed("$image", "image", png_bytes(value), prefix="data:image/png;base64,")
    if kind == "tensor":
        return _embed("$tensor", "tensor", _array_bytes(value))
    if kind == "module":
        return {"$omitted": f"module {type(value).__name__}", "sha256": _module_hash(value)}
    return value


def is_opaque(value: Any) -> bool:
    """Whether `encode` has to write a value (or something inside a list or mapping of it)."""
    if isinstance(value, list | tuple):
        return any(is_opaque(item) for item in value)
    if isinstance(value, dict):
        return any(is_opaque(item) for item in value.values())
    return isinstance(value, os.PathLike | bytes) or _kind(value) is not None


def decode(value: Any) -> Any:
    """The value that `encode` wrote.

    Raises:
        InputError: it was too large to be stored, or is damaged.
    """
    if isinstance(value, list | tuple):
        return type(value)(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    if "$omitted" in value:
        raise InputError(
            f"This run was made with a {value['$omitted']} given in memory that was too large to store "
            f"(SHA-256 {str(value.get('sha256'))[:16]}…). Give it again in its place."
        )
    if len(value) == 1:
        key, content = next(iter(value.items()))
        if key in ("$image", "$tensor", "$bytes"):
            return _decode_embedded(key, content)
    return {key: decode(item) for key, item in value.items()}


def as_tensor(value: Any) -> Any:
    """An array as the tensor of the same numbers; a tensor is returned as it is."""
    import numpy as np
    import torch

    return torch.from_numpy(np.array(value)) if isinstance(value, np.ndarray) else value


def file_hash(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 of a file; None if there is no such file."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError):
        return None


def hash_inputs(data: Any, where: str = "") -> dict[str, dict[str, str]]:
    """Place in the run -> path and SHA-256 of every file that a run's data names."""
    found: dict[str, dict[str, str]] = {}
    if isinstance(data, dict):
        for key, item in data.items():
            found.update(hash_inputs(item, f"{where}.{key}" if where else str(key)))
    elif isinstance(data, list | tuple):
        for index, item in enumerate(data):
            found.update(hash_inputs(item, f"{where}.{index}"))
    elif isinstance(data, str) and 0 < len(data) < 4096 and "\0" not in data:
        digest = file_hash(data)
        if digest is not None:
            found[where] = {"path": str(Path(data)), "sha256": digest}
    return found


def _embed(key: str, kind: str, content: bytes, prefix: str = "") -> dict[str, str]:
    if len(content) > EMBED_BYTES:
        return {"$omitted": kind, "sha256": hashlib.sha256(content).hexdigest()}
    return {key: prefix + base64.b64encode(content).decode("ascii")}


def _decode_embedded(key: str, content: Any) -> Any:
    try:
        raw = base64.b64decode(str(content).rpartition(",")[2], validate=True)
        if key == "$bytes":
            return raw
        if key == "$image":
            from PIL import Image

            picture = Image.open(io.BytesIO(raw), formats=("PNG",))
            picture.load()
            return picture
        import numpy as np
        import torch

        return torch.from_numpy(np.load(io.BytesIO(raw), allow_pickle=False))
    except Exception as error:
        raise InputError(f"An input stored in this run is damaged ({error}). Give it again in its place.") from error


def _kind(value: Any) -> str | None:
    """``image``, ``tensor`` or ``module``; by names, so that nothing is imported to find out."""
    names = {f"{cls.__module__.partition('.')[0]}.{cls.__name__}" for cls in type(value).__mro__}
    if "PIL.Image" in names:
        return "image"
    if names & {"torch.Tensor", "numpy.ndarray"}:
        return "tensor"
    return "module" if "torch.Module" in names else None


def _array_bytes(value: Any) -> bytes:
    import numpy as np

    if not isinstance(value, np.ndarray):
        import torch

        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
    return buffer.getvalue()


def _module_hash(module: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
