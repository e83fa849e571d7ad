"""What a metric sees a picture with: the contract of feature extractors, and that numbers of two are never compared.

A Fréchet distance, a CLIP score or an LPIPS is a number about pictures *and* a network. Every result therefore carries
the network's label, its name and a hash over its weights and its preparation of pictures, and whatever brings two
results together asks `require_same` first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from controlroom.core.errors import InputError
from controlroom.training.checkpoint import modules_hash
from controlroom.training.recipe import Distance as Distance


@runtime_checkable
class Extractor(Protocol):
    """A network that turns pictures into vectors.

    Attributes:
        name: of the network and of how it is read, such as ``dino-cls``.
        hash: 16 hexadecimal digits over its weights and its preparation of pictures; see `content_hash`.
    """

    name: str
    hash: str

    def features(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] of any size -> [B, D]."""
        ...


@runtime_checkable
class Classifier(Extractor, Protocol):
    """An extractor that also tells classes apart, as the Inception score asks for."""

    def logits(self, images: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in [0, 1] -> [B, classes]."""
        ...


@runtime_checkable
class TextExtractor(Extractor, Protocol):
    """An extractor whose space is shared with words."""

    def text_features(self, texts: Sequence[str]) -> Tensor:
        """Texts -> [B, D] in the space of `features`; what is longer than the network reads is cut."""
        ...


def label_of(extractor: Extractor | Distance) -> str:
    """``name@hash``, as it stands in every result."""
    return f"{extractor.name}@{extractor.hash}"


def content_hash(module: nn.Module, preparation: Any = None) -> str:
    """16 hexadecimal digits over a network's weights and, if it is given, the preparation of pictures (plain data).

    Example:
        >>> net = nn.Linear(2, 2)
        >>> content_hash(net) == content_hash(net, {"size": 64})
        False
    """
    weights = modules_hash({"extractor": module})
    if preparation is None:
        return weights[:16]
    text = weights + json.dumps(preparation, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def require_same(first: str, second: str, what: str) -> None:
    """Refuse to bring together numbers of two extractors.

    Args:
        first, second: labels of what the numbers were measured with; "" for what needs no network.
        what: the numbers, as in "FID".

    Raises:
        InputError: the labels differ.

    Example:
        >>> require_same("inception@00", "theatre@11", "FID")
        Traceback (most recent call last):
        controlroom.core.errors.InputError: FID of two extractors cannot be compared: inception@00 and theatre@11. ...
    """
    if first != second:
        names = [label or "no extractor" for label in (first, second)]
        raise InputError(
            f"{what} of two extractors cannot be compared: {names[0]} and {names[1]}. Measure both with the same "
            "weights and the same preparation of pictures."
        )
