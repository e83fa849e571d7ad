"""Places inside a network where a control can read or write.

A site is named by its module path, so it means the same thing in a run, in a file of weights and in an error. Nothing
counts layer calls: the place, the order of execution and the resolution are facts of the site, known before the run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from controlroom.core.errors import InputError

AttentionKind = Literal["self", "cross"]
FeatureKind = Literal["resnet", "transformer", "downsample", "upsample", "norm"]
Place = Literal["down", "mid", "up"]


@dataclass(frozen=True)
class Site:
    """One module of the UNet that a control may act at.

    Attributes:
        name: module path, e.g. ``down_blocks.0.attentions.0.transformer_blocks.0.attn1``.
        kind: ``self`` and ``cross`` are attention; ``resnet``, ``transformer``, ``downsample``, ``upsample`` are the
            outputs of those modules; ``norm`` is a GroupNorm (its input and its output).
        place: the part of the UNet.
        block: number of the block within its place (``up_blocks.1`` has 1).
        index: order of execution among sites of the same kind, from 0. This is what papers call "layer 10 of 16".
        hw: height and width of the feature map there, in tokens or pixels, for the latent size of the run.
        channels: width of the feature map.
    """

    name: str
    kind: AttentionKind | FeatureKind
    place: Place
    block: int
    index: int
    hw: tuple[int, int]
    channels: int


def nearest_size(sites: Iterable[Site], latent: tuple[int, int], resolution: int | None = None) -> tuple[int, int]:
    """Size of the layers at which attention shows objects: a quarter of the latents' sides, or the nearest there is.

    For Stable Diffusion at 64x64 latents that is 16x16, where the papers look.

    Args:
        sites: layers to choose from.
        latent: height and width of the latents.
        resolution: shorter side in tokens; None: derived as above.

    Raises:
        InputError: no layer has that resolution.
    """
    sizes = sorted({site.hw for site in sites}, reverse=True)
    if resolution is not None:
        found = [hw for hw in sizes if min(hw) == resolution]
        if not found:
            known = ", ".join(str(min(hw)) for hw in sizes)
            raise InputError(f"No such layer of this network has resolution {resolution}; there are {known}.")
        return found[0]
    if not sizes:
        raise InputError("This network has no such layers.")
    wanted = [max(1.0, -(-side // 4)) for side in latent]
    return min(sizes, key=lambda hw: sum(abs(math.log(side / want)) for side, want in zip(hw, wanted, strict=True)))
