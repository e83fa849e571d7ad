"""What a file of weights says before any weight is read: names, shapes and kinds of its tensors, and its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from controlroom.backbones.model_files import PICKLES, explained, pickle_refused
from controlroom.core.errors import ModelError

Shape = tuple[int, ...]
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}


@dataclass(frozen=True)
class Header:
    """Names and shapes of tensors.

    Attributes:
        shapes: of each tensor.
        dtypes: number of tensors of each kind of number.
        metadata: text beside them.
        what: the file, for messages.
    """

    shapes: Mapping[str, Shape]
    dtypes: Mapping[str, int] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    what: str = "the file"

    @property
    def parameters(self) -> int:
        """Numbers in all tensors together."""
        return sum(prod(shape) for shape in self.shapes.values())

    def having(self, end: str, *parts: str) -> Shape | None:
        """Shape of the first tensor with this end and these parts in its name; None: there is none."""
        found = (key for key in self.shapes if key.endswith(end) and all(part in key for part in parts))
        return next((self.shapes[key] for key in found), None)


def read_header(path: Path) -> Header:
    """The header of a ``.safetensors`` file.

    Raises:
        ModelError: a pickle, broken, or no such file.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise ModelError(f"There is no file {str(path)!r}. Check the path.")
    if path.suffix.lower() in PICKLES:
        raise pickle_refused(str(path), "file")

    def read() -> Header:
        shapes: dict[str, Shape] = {}
        dtypes: dict[str, int] = {}
        with safe_open(str(path), framework="pt") as content:
            for key in content.keys():
                part = content.get_slice(key)
                shapes[key] = tuple(part.get_shape())
                kind = _DTYPES.get(part.get_dtype(), str(part.get_dtype()).lower())
                dtypes[kind] = dtypes.get(kind, 0) + 1
            return Header(shapes, dtypes, dict(content.metadata() or {}), str(path))

    return explained(str(path), read)


def header_of(tensors: Mapping[str, torch.Tensor], what: str, metadata: Mapping[str, str] | None = None) -> Header:
    """The header that a file of these tensors would have."""
    dtypes: dict[str, int] = {}
    for value in tensors.values():
        kind = str(value.dtype).removeprefix("torch.")
        dtypes[kind] = dtypes.get(kind, 0) + 1
    return Header({key: tuple(value.shape) for key, value in tensors.items()}, dtypes, metadata or {}, what)
