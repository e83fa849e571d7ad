"""The two adapters of Uni-ControlNet (Zhao et al., arXiv 2305.16322) as recipes train them, each for itself.

What a new one is, what of its conditions it is shown, what CLIP says of a picture's content, and their files: the same
for the theatre's scenes and for pictures of one's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch import Tensor

from controlroom.backbones.image_encoder import check_image_encoder, clip_pixels, image_features
from controlroom.backbones.uni_controlnet import (
    ENCODER,
    GlobalAdapter,
    LocalAdapter,
    load_global_adapter,
    load_local_adapter,
    new_local_adapter,
    save_adapter,
)
from controlroom.core.branch import Condition
from controlroom.core.errors import ModelError
from controlroom.training.conditions import Row, every_row, pixels_shown
from controlroom.training.held_out import in_parts
from controlroom.training.randomness import StepRandom
from controlroom.training.shown import Shown
from controlroom.training.side_networks import kept

PUBLISHED_FIRST, PUBLISHED_FEATURES = (32, 64, 128), (192, 256, 384, 512)
"""Widths of the extractor of features: before the latents' size, and of each level of Stable Diffusion 1."""


def new_adapter(
    unet: Any, kinds: Sequence[str], encoder: Any, halvings: int, first: Sequence[int], widths: Sequence[int]
) -> LocalAdapter | GlobalAdapter:
    """The local adapter for ``kinds``, or the global one that reads what ``encoder`` says; untrained.

    Args:
        unet: the network it will control.
        kinds: of the local adapter, in the order of their channels.
        encoder: CLIP's image encoder, for the global adapter; None: the local one.
        halvings: how often the autoencoder halves a picture's sides.
        first, widths: of the extractor of features; the last of each counts for all that follow.
    """
    if encoder is not None:
        return GlobalAdapter(int(encoder.config.projection_dim), int(unet.config.cross_attention_dim))
    levels = len(unet.config.block_out_channels)
    return new_local_adapter(unet, kinds, _as_many(first, halvings), _as_many(widths, levels), halvings)


def _as_many(widths: Sequence[int], count: int) -> list[int]:
    return [widths[min(place, len(widths) - 1)] for place in range(count)]


def explicit_attention(net: Any) -> None:
    """Softmax attention written out, which trains faster than SDPA on a CPU."""
    for module in net.modules():
        if hasattr(module, "set_processor"):
            module.set_processor(AttnProcessor())


def dropped(maps: Tensor, rng: StepRandom, conditions: int) -> Tensor:
    """Conditions left out as published: their channels are zero.

    Args:
        maps: [B, channels, ...], as many channels for each condition.
        rng: of the step.
        conditions: how many there are; 1 for the feature of a content.
    """
    return _shares(maps, kept(rng, conditions).to(maps))


def only(maps: Tensor, number: int, conditions: int) -> Tensor:
    """One condition of the ``conditions`` that there are; the channels of the others are zero."""
    keep = torch.zeros(1, conditions).index_fill(1, torch.tensor(number), 1.0)
    return _shares(maps, keep.to(maps))


def _shares(maps: Tensor, keep: Tensor) -> Tensor:
    each = keep.repeat_interleave(maps.shape[1] // keep.shape[1], dim=1)
    return maps * each.reshape(*each.shape, *(1 for _ in maps.shape[2:]))


def with_content(condition: Condition, tokens: Tensor) -> Condition:
    """Words with the tokens of a content [B, tokens, width] behind them, one row for each."""
    mask = condition.mask
    if mask is not None:
        mask = torch.cat([mask, mask.new_ones(tokens.shape[:2])], dim=1)
    return replace(condition, tokens=torch.cat([condition.tokens.float(), tokens.float()], dim=1), mask=mask)


@torch.no_grad()
def content_features(encoder: Any, pictures: Sequence[Image.Image]) -> Tensor:
    """[n, width]: what CLIP says of pictures; float32, on the CPU."""
    pixels = clip_pixels(pictures, int(encoder.config.image_size))
    return image_features(encoder, pixels, states=False).float().cpu()


class ContentFeatures:
    """CLIP's feature of every picture as it is shown (cropped, mirrored), made once and kept in memory.

    Raises:
        ModelError: the encoder is none.
    """

    def __init__(self, encoder: Any) -> None:
        check_image_encoder(encoder)
        self.encoder = encoder
        self._kept: dict[tuple[str, str, bool], Tensor] = {}

    def fill(self, shown: Shown) -> ContentFeatures:
        """Make what is missing of these pictures."""
        missing = [row for row in every_row(shown) if _key(shown, row) not in self._kept]
        for part in in_parts(missing):
            found = content_features(self.encoder, [pixels_shown(shown, row) for row in part])
            self._kept |= {_key(shown, row): feature for row, feature in zip(part, found, strict=True)}
        return self

    def rows(self, shown: Shown, rows: Sequence[Row]) -> Tensor:
        """[B, width] of these pictures."""
        return torch.stack([self._kept[_key(shown, row)] for row in rows])


def _key(shown: Shown, row: Row) -> tuple[str, str, bool]:
    return shown.pictures[row[0]].content, shown.crops[row[0]].key, row[1]


def save_part(net: LocalAdapter | GlobalAdapter, encoder: Any, folder: Path) -> None:
    """Write an adapter into its folder of a Uni-ControlNet, and the image encoder (if given) beside it."""
    save_adapter(net, folder)
    if encoder is not None:
        encoder.save_pretrained(folder / ENCODER)


def load_into(net: LocalAdapter | GlobalAdapter, folder: Path, unet: Any) -> None:
    """Go on from the adapter in a folder of that part.

    Raises:
        ModelError: it has another shape or other kinds, or is for another base model.
    """
    load = load_local_adapter if isinstance(net, LocalAdapter) else load_global_adapter
    found = load(folder, unet)
    other = next((name for name, value in net.settings.items() if found.settings.get(name) != value), None)
    if other is not None:
        raise ModelError(
            f"{folder} has {other} = {found.settings.get(other)}, what is trained here has {net.settings[other]}. "
            "Give the folder as the recipe's setting start_from, which takes its shape over."
        )
    net.load_state_dict(found.state_dict())
