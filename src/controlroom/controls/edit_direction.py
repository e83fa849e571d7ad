"""The direction from one thing to another among text embeddings (Pix2Pix-Zero, arXiv 2302.03027, section 3.1).

It is the mean embedding of many sentences about the one minus that of many about the other. Added to the embedding of a
prompt it turns the one thing in it into the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Self

import torch
from pydantic import BeforeValidator, PlainSerializer

from controlroom.controls.edit_sentences import sentences_about
from controlroom.core import inputs
from controlroom.core.backbone import Backbone
from controlroom.core.errors import InputError
from controlroom.core.files import write_atomically

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

KEY = "controlroom_direction"


@dataclass(frozen=True, eq=False)
class EditDirection:
    """Mean embeddings of two things.

    Attributes:
        source: [1, length, width] of the sentences about the thing that is there.
        target: [1, length, width] of those about the thing that is wanted.
        source_pooled: [1, width] of Stable Diffusion XL's pooled text; None for Stable Diffusion 1 and 2.
        target_pooled: the same of the other thing.
        backbone: ``sd1``, ``sd2`` or ``sdxl``.
        names: what the two are called, for people.
        counts: number of sentences of each.
    """

    source: torch.Tensor
    target: torch.Tensor
    source_pooled: torch.Tensor | None = None
    target_pooled: torch.Tensor | None = None
    backbone: str = ""
    names: tuple[str, str] = ("", "")
    counts: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> torch.Tensor:
        """[1, length, width] from source to target."""
        return self.target - self.source

    @property
    def pooled(self) -> torch.Tensor | None:
        """[1, width] from source to target."""
        if self.source_pooled is None or self.target_pooled is None:
            return None
        return self.target_pooled - self.source_pooled

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a safetensors file, whole or not at all.

        Raises:
            OutputError: the file could not be written.
        """
        write_atomically(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file."""
        from safetensors.torch import save

        parts = {
            "source_embeds": self.source,
            "target_embeds": self.target,
            "source_pooled": self.source_pooled,
            "target_pooled": self.target_pooled,
        }
        data = {"backbone": self.backbone, "names": self.names, "counts": self.counts}
        tensors = {name: part.detach().cpu().contiguous() for name, part in parts.items() if part is not None}
        return save(tensors, metadata={KEY: json.dumps(data, ensure_ascii=False)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save` wrote, or any safetensors file with ``source_embeds`` and ``target_embeds``.

        Raises:
            InputError: no such file, or not a direction.
        """
        name = repr(os.fspath(path))
        try:
            with open(path, "rb") as file:
                return cls.from_bytes(file.read(), name)
        except FileNotFoundError as error:
            raise InputError(f"{name} does not exist; give a direction that `controlroom direction` wrote.") from error
        except (OSError, ValueError) as error:
            raise InputError(f"{name} cannot be read ({error}).") from error

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "The direction") -> Self:
        """Read what `to_bytes` gave; ``name`` is what an error calls it.

        Raises:
            InputError: not a direction.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        try:
            tensors = load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
            told = json.loads((header.get("__metadata__") or {}).get(KEY, "{}"))
            source, target = (_mean(tensors[f"{side}_embeds"]) for side in ("source", "target"))
            pooled, other_pooled = (
                _mean(tensors[key], 2) if key in tensors else None for key in ("source_pooled", "target_pooled")
            )
            names = [str(text) for text in told.get("names", ("", ""))]
            counts = [int(count) for count in told.get("counts", (0, 0))]
            kind = str(told.get("backbone", ""))
        except InputError:
            raise
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"{name} is not a direction ({reason}). Give a file that `controlroom direction` wrote."
            ) from error
        return cls(source, target, pooled, other_pooled, kind, (names[0], names[1]), (counts[0], counts[1]))


@torch.no_grad()
def edit_direction(
    pipe: Pipeline, source_sentences: str | Sequence[str], target_sentences: str | Sequence[str]
) -> EditDirection:
    """The direction from what some sentences are about to what others are about.

    Args:
        pipe: the model whose text encoder reads them.
        source_sentences: about the thing that is there; a word stands for the sentences that rules make of it.
        target_sentences: about the thing that is wanted.

    Raises:
        InputError: no sentence, or one that is not text.
    """
    sides = [source_sentences, target_sentences]
    names = [side if isinstance(side, str) else "" for side in sides]
    listed = [sentences_about(side) if isinstance(side, str) else list(side) for side in sides]
    with pipe._lock:
        source, target = (mean_embeddings(pipe.backbone, sentences) for sentences in listed)
    return EditDirection(
        source=source[0],
        target=target[0],
        source_pooled=source[1],
        target_pooled=target[1],
        backbone=pipe.backbone.name,
        names=(names[0], names[1]),
        counts=(len(listed[0]), len(listed[1])),
    )


def mean_embeddings(
    backbone: Backbone, sentences: Sequence[str], batch_size: int = 16
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """[1, length, width] mean embedding of sentences, and [1, width] of their pooled text where there is one.

    Raises:
        InputError: no sentence, or one that is not text.
    """
    if not sentences:
        raise InputError("There is no sentence to take a direction from. Give one or more.")
    tokens, pooled = [], []
    for start in range(0, len(sentences), batch_size):
        condition = backbone.encode_text(list(sentences[start : start + batch_size]))
        tokens.append(condition.tokens)
        if condition.pooled is not None:
            pooled.append(condition.pooled)
    return torch.cat(tokens).mean(0)[None], torch.cat(pooled).mean(0)[None] if pooled else None


def _mean(embeds: torch.Tensor, rank: int = 3) -> torch.Tensor:
    """[n, …] or without its first dimension -> [1, …], the mean.

    Raises:
        InputError: another shape, or values that are not finite.
    """
    found = embeds if embeds.ndim == rank else embeds[None]
    if found.ndim != rank or 0 in found.shape or not found.is_floating_point():
        raise InputError(
            f"Embeddings of shape {list(embeds.shape)} ({embeds.dtype}) are none; expected floats "
            f"[sentences, {'length, ' if rank == 3 else ''}width]."
        )
    if not bool(torch.isfinite(found).all()):
        raise InputError("Embeddings of a direction have values that are not finite (NaN or infinity).")
    return found.detach().mean(0, keepdim=True)


def read_direction(backbone: Backbone, source: Any, target: Any) -> EditDirection:
    """The direction that two settings name.

    Args:
        backbone: encodes sentences.
        source: embeddings [sentences, length, width] (or their mean), a list of sentences, or, without ``target``, an
            `EditDirection` or its file.
        target: embeddings or sentences.

    Raises:
        InputError: something else, shapes that do not agree, or a direction of another kind of model.
    """
    if target is None:
        found = source if isinstance(source, EditDirection) else EditDirection.load(source)
        if found.backbone not in ("", backbone.name):
            raise InputError(
                f"The direction was made with a model of the kind {found.backbone}, this one is {backbone.name}. Make "
                "one with this model."
            )
        return found
    parts = [
        (_mean(side), None) if isinstance(side, torch.Tensor) else mean_embeddings(backbone, side)
        for side in (source, target)
    ]
    (first, pooled), (second, other) = parts
    if first.shape != second.shape:
        raise InputError(
            f"source_embeds and target_embeds have different shapes, {list(first.shape)} and {list(second.shape)}."
        )
    both = pooled is not None and other is not None
    return EditDirection(first, second.to(first), pooled if both else None, other if both else None, backbone.name)


def _decode(value: Any) -> Any:
    value = inputs.decode(value)
    if isinstance(value, bytes):
        return EditDirection.from_bytes(value)
    if isinstance(value, list | tuple) and (not value or not all(isinstance(text, str) and text for text in value)):
        raise InputError("A list of embeds is one of sentences, and at least one; give embeddings as one tensor.")
    if value is not None and type(value).__module__.partition(".")[0] == "numpy":
        return torch.from_numpy(value)
    if not isinstance(value, EditDirection | torch.Tensor | str | os.PathLike | list | tuple | None):
        raise InputError(f"A direction is made of embeddings, sentences or a file; got {type(value).__name__}.")
    return value


def _encode(value: Any) -> Any:
    return inputs.encode(value.to_bytes() if isinstance(value, EditDirection) else value)


DirectionInput = Annotated[Any, BeforeValidator(_decode), PlainSerializer(_encode, when_used="json")]
"""Embeddings, sentences, an `EditDirection` or its file, as a setting."""
