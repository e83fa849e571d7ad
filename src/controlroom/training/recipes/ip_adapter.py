"""IP-Adapter (Ye et al., arXiv 2308.06721): new keys and values for a picture, beside those of the words.

The network is frozen. A projection makes tokens of what an image encoder says of a picture, and keys and values in
every cross-attention, which start as copies of the words', learn to denoise the subject from them. Three shapes: base
(a linear layer, 4 tokens), plus (a resampler of the encoder's states, 16 tokens), face (FaceID: a small network of a
face's vector, 4 tokens, and low-rank changes of the attention itself). Deviation: the prompt is another picture of the
same subject, unless ``reference="same"``, which is as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import PositiveInt

from controlroom.backbones.image_projection import (
    HEAD_WIDTH,
    IdentityProjection,
    ImageProjection,
    LinearProjection,
    Resampler,
)
from controlroom.backbones.ip_adapter import IPAdapterModel
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.faces import StoredFaces
from controlroom.training.image_prompts import ImagePromptRecipe, ImagePromptSettings
from controlroom.training.shown import Shown


class IPAdapterSettings(ImagePromptSettings):
    """How a new IP-Adapter is trained."""

    variant: Literal["base", "plus", "face"] = "base"
    tokens: PositiveInt | None = None
    """That a picture becomes; None: 4, plus 16."""
    depth: PositiveInt = 4
    """Layers of the resampler (plus)."""
    heads: PositiveInt = 12
    """Of the resampler (plus), 64 wide each."""
    rank: PositiveInt | None = None
    """Of changes to the layers' own projections; None: 128 for face, none else."""
    reference: Literal["other", "same"] = "other"
    """Whether a picture is learned from another one of its subject, or from itself."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> IPAdapterRecipe:
        base = self.networks(pipe)
        learned, held_out = self.sides(pictures)
        shown = Shown(base, learned, self.prompt, size=self.hw)
        return IPAdapterRecipe(base, shown, self, self.encoder_for(pipe), held_out)


class IPAdapterRecipe(ImagePromptRecipe):
    """Recipe: a new IP-Adapter.

    Args:
        base: the model, all of it frozen.
        shown: the pictures, with their subjects.
        settings: see `IPAdapterSettings`.
        encoder: `CLIPVisionModelWithProjection`; for ``face`` also `StoredFaces`, or anything with ``embed(picture)``.
        held_out: pictures of other subjects, for the error on the way.

    Exported are ``ip_adapter.safetensors`` with the published keys, and the image encoder beside it.
    """

    name = "ip_adapter"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: IPAdapterSettings,
        encoder: Any,
        held_out: Sequence[Picture] = (),
    ) -> None:
        width = int(base.unet.config.cross_attention_dim)
        reads = _reads(encoder, settings.variant == "plus", shown.pictures[0])
        rank = settings.rank or (128 if settings.variant == "face" else None)
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            projection = new_projection(settings, reads, width)
            adapter = IPAdapterModel.for_unet(base.unet, projection, rank, settings.seed)
        itself = settings.reference == "same"
        super().__init__(base, shown, settings, encoder, adapter, 1, itself, held_out)


def new_projection(settings: IPAdapterSettings, reads: int, width: int) -> ImageProjection:
    """An untrained projection of features ``reads`` wide to tokens as wide as the text's."""
    if settings.variant == "plus":
        tokens, inner = settings.tokens or 16, settings.heads * HEAD_WIDTH
        return Resampler(reads, width, width, tokens, settings.depth, inner, 4 * width)
    if settings.variant == "face":
        return IdentityProjection(reads, 2 * reads, width, settings.tokens or 4)
    return LinearProjection(reads, width, settings.tokens or 4)


def _reads(encoder: Any, states: bool, first: Picture) -> int:
    """Width of what the encoder says of a picture."""
    config = getattr(encoder, "config", None)
    if config is not None:
        return int(config.hidden_size if states else config.projection_dim)
    if isinstance(encoder, StoredFaces):
        return encoder.vectors([first]).shape[1]
    return len(torch.as_tensor(encoder.embed(first.read())).reshape(-1))
