"""Condition maps for networks that read them once: a tensor of another size, or colours where one channel is read, is
an error that says so, since it would be taken for something else.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from controlroom.controls.condition_map import condition_map
from controlroom.core.errors import InputError
from controlroom.core.run import Run

_GREY = 0.02
"""Channels may differ that much in a picture that is grey: compression leaves a tint."""


def side_map(source: Any, run: Run, channels: int, name: str = "condition") -> torch.Tensor:
    """Read what an auxiliary network is conditioned on: [images, channels, height, width] in pixels of the run.

    Pictures are stretched to the size of the run, poses are drawn, float tensors are used as they are.

    Args:
        source: as `condition_map` reads it.
        run: gives size, number of images, device and precision.
        channels: that the network reads. A picture for a network of one channel must be grey.
        name: of the map, for messages.

    Raises:
        InputError: unreadable, a tensor of another size, or colours where one channel is read.
    """
    items = list(source) if isinstance(source, list | tuple) else [source]
    for item in items:
        _check_size(item, run, name)
    if channels != 1:
        return condition_map(source, run, channels)
    if len(items) < 2:
        return _grey(condition_map(source, run, _channels(items[0]) if items else 3), name)
    # Each is read for its own channels; the list is then joined by the rule of all lists.
    maps = [_grey(condition_map(item, run, _channels(item))[:1], name) for item in items]
    return condition_map(torch.cat(maps), run, 1)


def _channels(source: Any) -> int:
    """Of a tensor or array, 1 or 3; pictures are read as three."""
    if isinstance(source, torch.Tensor):
        return 1 if source.ndim == 2 or source.shape[-3] == 1 else 3
    if isinstance(source, np.ndarray):
        return 1 if source.ndim == 2 or source.shape[-1] == 1 else 3
    return 3


def _grey(maps: torch.Tensor, name: str) -> torch.Tensor:
    if maps.shape[1] == 1:
        return maps
    if float((maps - maps[:, :1]).abs().max()) > _GREY:
        raise InputError(
            f"The {name} has colours; this network reads one channel (edges, lines, a sketch). Give a grey map, "
            "or the network for this kind of map."
        )
    return maps[:, :1]


def _check_size(source: Any, run: Run, name: str) -> None:
    if isinstance(source, torch.Tensor) and source.is_floating_point() and source.ndim >= 2:
        size = tuple(source.shape[-2:])
    elif isinstance(source, np.ndarray) and source.dtype.kind == "f" and source.ndim >= 2:
        size = tuple(source.shape[:2] if source.ndim < 4 else source.shape[1:3])
    else:
        return
    if size != run.size:
        raise InputError(
            f"The {name} is a tensor of {size[0]} x {size[1]}, the run draws {run.size[0]} x {run.size[1]} pixels. "
            "Tensors are used as they are: resize it as it should be, or give a picture, which is stretched."
        )
