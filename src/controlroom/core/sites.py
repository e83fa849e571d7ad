"""Places inside a network where a control can read or write.

A site is named by its module path, so it means the same thing in a run, in a file of weights and in an error. Nothing
counts layer calls: the place, the order of execution and the resolution are facts of the site, known before the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
