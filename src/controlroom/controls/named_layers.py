"""Layers chosen by name, as diffusers' perturbed-attention guidance names them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated

from pydantic import AfterValidator

from controlroom.core.errors import InputError
from controlroom.core.sites import Site

MAX_LENGTH = 200


def check_layers(layers: str | list[str]) -> list[str]:
    """The names as a list.

    Raises:
        ValueError: none, an empty or very long one, or no regular expression.
    """
    listed = [layers] if isinstance(layers, str) else layers
    if not listed:
        raise ValueError('no layer is named; "mid" is the middle block')
    for name in listed:
        if not name or len(name) > MAX_LENGTH:
            raise ValueError(f"a name of a layer has 1 to {MAX_LENGTH} characters")
        try:
            re.compile(name)
        except re.error as error:
            raise ValueError(f"{name!r} is no name of a layer and no regular expression ({error})") from error
    return listed


LayersInput = Annotated[str | list[str], AfterValidator(check_layers)]
"""What a control's setting of layers takes: a name, or several; a list afterwards."""


def named_sites(layers: str | list[str], sites: Sequence[Site]) -> tuple[Site, ...]:
    """Sites whose module path holds one of the names, or matches one as a regular expression, in their order.

    Args:
        layers: ``mid``, ``up``, ``down_blocks.1``, ``down.block_1`` and so on; regular expressions are allowed.
        sites: those to choose from.

    Raises:
        InputError: a name that fits none.
    """
    chosen: set[str] = set()
    for name in check_layers(layers):
        found = [site.name for site in sites if re.search(name, site.name)]
        if not found:
            known = sorted({site.name.partition(".attentions")[0] for site in sites})
            raise InputError(f"No layer of this network is named {name!r}. It has such layers in {', '.join(known)}.")
        chosen.update(found)
    return tuple(site for site in sites if site.name in chosen)
