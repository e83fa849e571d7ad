"""One scale for each layer, written as diffusers writes it: by place, block and transformer.

A number holds everywhere. ``{"up": {"block_0": [0.0, 1.0, 0.0]}}`` names the transformers of a block (one number, or
one for each); what a mapping leaves out is 0. This is how InstantStyle (arXiv 2404.02733) confines an image prompt to
the layers of style or layout.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from controlroom.core.errors import InputError
from controlroom.core.sites import Site

Scale = float | list[float]
"""A number, or one for each picture."""

_TRANSFORMER = re.compile(r"(?:^|\.)attentions\.(\d+)\.")


def leaves(scale: Any) -> list[float]:
    """Every number of a scale, whatever its form.

    Raises:
        InputError: something in it is no finite number.
    """
    if isinstance(scale, Mapping):
        return [number for part in scale.values() for number in leaves(part)]
    if isinstance(scale, Sequence) and not isinstance(scale, str | bytes):
        return [number for part in scale for number in leaves(part)]
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
        raise InputError(f"A scale must be a number, got {scale!r:.60}.")
    return [float(scale)]


def layer_scales(scale: Any, sites: Sequence[Site]) -> dict[str, Scale]:
    """Name of each attention site -> its scale.

    Args:
        scale: a number; a list of numbers, one for each picture; a mapping of ``down``, ``mid`` and ``up``; or, as
            diffusers' ``set_ip_adapter_scale`` takes it, a list that holds one mapping.
        sites: attention sites of one kind.

    Raises:
        InputError: an unknown place or block, or a list of another length than there are transformers.
    """
    if isinstance(scale, list | tuple) and len(scale) == 1 and isinstance(scale[0], Mapping | list | tuple):
        scale = scale[0]
    if not isinstance(scale, Mapping):
        return {site.name: _leaf(scale) for site in sites}
    tree = _tree(sites)
    unknown = [key for key in scale if key not in tree]
    if unknown:
        raise InputError(f"scale names {unknown[0]!r}; this network has cross-attention in {', '.join(tree)}.")
    found: dict[str, Scale] = {site.name: 0.0 for site in sites}
    for place, part in scale.items():
        blocks = tree[place]
        if place == "mid" or not isinstance(part, Mapping):
            part = dict.fromkeys(blocks, part)
        for block, value in part.items():
            if block not in blocks:
                raise InputError(f"scale names {place}.{block}; this network has {', '.join(blocks)} there.")
            transformers = blocks[block]
            values = value if isinstance(value, list | tuple) else [value]
            if len(values) not in (1, len(transformers)):
                raise InputError(
                    f"scale gives {len(values)} numbers for {place}.{block}, which has {len(transformers)}."
                )
            values = list(values) * (len(transformers) if len(values) == 1 else 1)
            for names, each in zip(transformers.values(), values, strict=True):
                found.update(dict.fromkeys(names, _leaf(each)))
    return found


def _tree(sites: Sequence[Site]) -> dict[str, dict[str, dict[int, list[str]]]]:
    """Place -> block -> number of the transformer -> names of its sites."""
    tree: dict[str, dict[str, dict[int, list[str]]]] = {}
    for site in sites:
        match = _TRANSFORMER.search(site.name)
        number = int(match[1]) if match else 0
        block = tree.setdefault(site.place, {}).setdefault(f"block_{site.block}", {})
        block.setdefault(number, []).append(site.name)
    return tree


def _leaf(value: Any) -> Scale:
    if isinstance(value, list | tuple):
        if not value or any(isinstance(item, list | tuple | Mapping) for item in value):
            raise InputError(f"A scale must be a number, or a list of one for each picture, got {value!r:.60}.")
        return leaves(value)
    if isinstance(value, Mapping):
        raise InputError(f"A scale must be a number here, got {value!r:.60}.")
    return leaves(value)[0]
