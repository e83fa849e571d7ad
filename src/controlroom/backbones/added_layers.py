"""Changes of weights beside the weights: the layers' outputs are changed while a run lasts, the weights never are.

So the base stays bit for bit what it was, several changes of one layer add up, each has a strength that may differ from
step to step, and what is quantised or offloaded stays so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from controlroom.backbones.lora_layers import Applied, LayerChange
from controlroom.backbones.lora_names import PARTS, UNET, Layer, Names
from controlroom.core.backbone import Backbone


@dataclass
class Strength:
    """How strongly changes act now; read at every call of a layer."""

    value: float = 1.0


def names_of(backbone: Backbone) -> Names:
    """Names of the layers of a backbone's network and text encoders."""
    texts = [getattr(backbone, part, None) for part in PARTS if part != UNET]
    return Names(backbone.unet, *texts)


def prepared(layers: Mapping[Layer, LayerChange], names: Names) -> list[tuple[str, Applied]]:
    """Changes in the precision and on the device of their layers, with the part that each belongs to.

    Raises:
        ModelError: one does not fit its layer.
    """
    return [(layer[0], Applied.to(names.layers[layer], change)) for layer, change in layers.items()]


@contextmanager
def added(changes: list[tuple[str, Applied]], strengths: Mapping[str, Strength]) -> Iterator[None]:
    """Add changes to the outputs of their layers; everything is as before afterwards.

    Args:
        changes: from `prepared`.
        strengths: of each part; a part that is absent is left alone.
    """
    kept: list[tuple[Any, Any, bool]] = []
    try:
        for part, change in changes:
            if part in strengths:
                layer = change.layer
                kept.append((layer, layer.forward, "forward" in vars(layer)))
                layer.forward = _Changed(layer.forward, change, strengths[part])
        yield
    finally:
        for layer, forward, own in reversed(kept):
            if own:
                layer.forward = forward
            else:
                del layer.forward


@contextmanager
def unchanged(networks: Iterable[Any]) -> Iterator[int]:
    """Within the block, layers of these networks give what they give without anything `added`; how many those are."""
    kept: list[tuple[Any, Any]] = []
    try:
        for layer in (layer for network in networks for layer in network.modules()):
            changed = forward = vars(layer).get("forward")
            while isinstance(forward, _Changed):
                forward = forward.plain
            if forward is not changed:
                kept.append((layer, changed))
                layer.forward = forward
        yield len(kept)
    finally:
        for layer, changed in kept:
            layer.forward = changed


@dataclass(frozen=True)
class _Changed:
    """A layer's forward with a change beside it."""

    plain: Any
    change: Applied
    strength: Strength

    def __call__(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = self.plain(hidden, *args, **kwargs)
        value = self.strength.value
        return found if value == 0 else found + value * self.change(hidden).to(found.dtype)
