"""Several pictures of one subject as one prompt, between the image encoder and an IP-Adapter's projection.

The maximum or the average of their features makes one picture of them. Self-attention (one head, without a residual)
lets the features of nine pictures look at each other and hands on nine, which the projection makes into nine times its
tokens; it is trained by leaving a tenth picture out and drawing it. It starts near the average: every picture sees all
nearly alike. Variants: a residual (starts as the pictures themselves), several heads, and one group of tokens from the
mean of what the pictures became.

A file has the attention as ``aggregator.to_{q,k,v}.weight`` (``to_out`` with several heads) beside ``image_proj.*`` and
``ip_adapter.*``, and its settings, without which the weights mean nothing, as JSON in the metadata ``aggregator``.
diffusers reads such a file and ignores both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError
from torch import Tensor, nn

from controlroom.core.errors import ModelError

Aggregate = Literal["tokens", "max", "average", "attention"]
"""What becomes of several pictures: their tokens joined; features pooled; or attention between the pictures."""
METADATA = "aggregator"
PICTURES = 9


class AggregatorSettings(BaseModel):
    """How an adapter was trained to read several pictures; kept in its file's metadata."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    aggregate: Aggregate = "attention"
    pictures: PositiveInt = PICTURES
    """That attention reads: of more the first ones, and fewer are filled up with some of them again."""
    residual: bool = False
    heads: PositiveInt = 1
    tokens: Literal["all", "mean"] = "all"
    """Of attention: tokens of every picture, or of the mean of what the pictures became."""
    seed: int = Field(default=0, ge=0)
    """Which pictures are taken again where there are too few."""

    def to_metadata(self) -> dict[str, str]:
        """For the header of a safetensors file."""
        return {METADATA: self.model_dump_json()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str], name: str) -> AggregatorSettings | None:
        """What a file says; None: nothing.

        Raises:
            ModelError: something that cannot be read.
        """
        if METADATA not in metadata:
            return None
        try:
            return cls.model_validate(json.loads(metadata[METADATA]))
        except (ValueError, ValidationError) as error:
            raise ModelError(f"{name} says of its aggregator what cannot be read: {metadata[METADATA]!r}.") from error


class PictureAttention(nn.Module):
    """Self-attention between the pictures of a subject.

    Args:
        width: of the features.
        settings: residual, heads, tokens.
        seed: of the first queries and keys.
    """

    def __init__(self, width: int, settings: AggregatorSettings | None = None, seed: int = 0) -> None:
        super().__init__()
        self.settings = settings = settings or AggregatorSettings()
        if width % settings.heads:
            raise ModelError(f"Features {width} wide cannot be shared among {settings.heads} heads.")
        self.width = width
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.to_out = nn.Linear(width, width, bias=False) if settings.heads > 1 else None
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for layer in (self.to_q, self.to_k):
                layer.weight.copy_(0.3 * torch.randn(width, width, generator=generator) / width**0.5)
            # No biases: features of zeros, which say that there is no picture, stay zeros.
            first = torch.zeros(width, width) if settings.residual else torch.eye(width)
            self.to_v.weight.copy_(first)
            if self.to_out is not None:
                self.to_out.weight.copy_(torch.eye(width))

    def forward(self, features: Tensor) -> Tensor:
        """[rows, pictures, width] -> the same, or [rows, 1, width]; states [rows, pictures, length, width] likewise.

        States attend to those at their place in the other pictures.
        """
        rows = features.movedim(1, -2).flatten(0, -3)  # [rows * length, pictures, width]
        heads = self.settings.heads
        q, k, v = (
            layer(rows).unflatten(-1, (heads, -1)).transpose(1, 2) for layer in (self.to_q, self.to_k, self.to_v)
        )
        # Explicit: it is small, and on a CPU this trains faster.
        logits = q @ k.transpose(-1, -2) * (self.width // heads) ** -0.5
        found = (logits.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        if self.to_out is not None:
            found = self.to_out(found)
        if self.settings.residual:
            found = rows + found
        if self.settings.tokens == "mean":
            found = found.mean(1, keepdim=True)
        between = features.movedim(1, -2).shape[:-2]
        return found.unflatten(0, between).movedim(-2, 1)


def chosen_pictures(count: int, wanted: int, seed: int) -> list[int]:
    """Which of ``count`` pictures are read where ``wanted`` are: the first ones, or all and some of them again.

    A function of its arguments, so the same pictures always say the same.
    """
    if count >= wanted:
        return list(range(wanted))
    generator = torch.Generator().manual_seed(seed)
    return [*range(count), *torch.randint(count, (wanted - count,), generator=generator).tolist()]


def aggregated(features: Tensor, how: Aggregate, attention: PictureAttention | None) -> Tensor:
    """Features [rows, pictures, …] of pictures that are one prompt -> [rows, 1 or more, …].

    Raises:
        ModelError: attention is asked of an adapter that has none.
    """
    if how == "max":
        return features.amax(1, keepdim=True)
    if how == "average":
        return features.mean(1, keepdim=True)
    if how == "tokens":
        return features
    if attention is None:
        raise ModelError(
            "This IP-Adapter has no attention between pictures (aggregator.*). Give one that was trained with it, or "
            'aggregate="tokens", "max" or "average".'
        )
    settings = attention.settings
    return attention(features[:, chosen_pictures(features.shape[1], settings.pictures, settings.seed)])


def attention_from(tensors: Mapping[str, Tensor], settings: AggregatorSettings | None, name: str) -> Any:
    """The attention of a file whose ``aggregator.*`` tensors these are, without the prefix; None: it has none.

    The weights are not filled in.

    Raises:
        ModelError: tensors without settings, or settings without tensors.
    """
    asked = settings is not None and settings.aggregate == "attention"
    if not tensors:
        if asked:
            raise ModelError(
                f"{name} says that it has attention between pictures, but lacks aggregator.*. Copy it again."
            )
        return None
    if settings is None or not asked:
        raise ModelError(
            f"{name} has {len(tensors)} weights of an aggregator; its metadata does not say how they are used, and they"
            " cannot be left out. Give the file as training saved it, or an IPAdapterModel."
        )
    value = tensors.get("to_v.weight")
    if value is None or value.ndim != 2:
        raise ModelError(f"{name} lacks aggregator.to_v.weight. Copy it again.")
    return PictureAttention(int(value.shape[0]), settings)
