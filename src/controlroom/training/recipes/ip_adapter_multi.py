"""An IP-Adapter that reads several pictures of a person, trained by leaving one out.

Of ten pictures of a person one is drawn from its caption and from the other nine, whose features look at each other
first (self-attention, `backbones.image_aggregator`). The attention, the projection with its norm, and the adapter's
keys and values learn, starting from an adapter that exists; the network is frozen. A person with more pictures shows
nine of the others, other ones at each step; one with fewer shows some again. Variants: low-rank changes of the
network's attention learn too, the features are a face encoder's (by the adapter that it starts from), and, to compare
like with like, the same further training for maximum, average, joined tokens, or a single picture (``pictures=1``).

Deviation from the publication: where it adds noise to the features, latents of the picture are noised.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import PositiveInt

from controlroom.backbones.image_aggregator import AggregatorSettings, PictureAttention
from controlroom.backbones.image_encoder import load_image_encoder
from controlroom.backbones.ip_adapter import IPAdapterModel, adapter_file, load_ip_adapter
from controlroom.backbones.loading import THEATRE, find_model
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.image_prompts import ENCODER, ImagePromptRecipe, ImagePromptSettings
from controlroom.training.shown import Shown


class IPAdapterMultiSettings(ImagePromptSettings):
    """How an adapter learns to read several pictures."""

    loop: ClassVar[dict[str, Any]] = {**ImagePromptSettings.loop, "total_steps": 5_000}

    start: str = f"{THEATRE}/ip_adapter"
    """Adapter that it starts from: a file, a folder with one, or a name of the theatre."""
    aggregator: AggregatorSettings = AggregatorSettings()
    """What becomes of the pictures, and how many there are."""
    rank: PositiveInt | None = None
    """Of changes to the network's attention that learn too; None: only what the adapter has."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> IPAdapterMultiRecipe:
        base = self.networks(pipe)
        learned, held_out = self.sides(pictures)
        file = adapter_file(find_model(self.start, "IP-Adapter"))
        start = load_ip_adapter(file, base.unet)
        beside = file.parent / ENCODER
        if self.image_encoder is None and self.faces is None and beside.is_dir():
            encoder = load_image_encoder(beside, pipe.backbone)
        else:
            encoder = self.encoder_for(pipe)
        shown = Shown(base, learned, self.prompt, size=self.hw)
        return IPAdapterMultiRecipe(base, shown, self, encoder, start, held_out)


class IPAdapterMultiRecipe(ImagePromptRecipe):
    """Recipe: an IP-Adapter learns to read several pictures of a subject.

    Args:
        base: the model, all of it frozen.
        shown: the pictures, with their subjects.
        settings: see `IPAdapterMultiSettings`.
        encoder: what the adapter that it starts from reads with.
        start: that adapter; it is changed.
        held_out: pictures of other subjects, for the error on the way.

    Exported is ``ip_adapter.safetensors``: the published keys, ``aggregator.*``, and in the metadata how it is used.
    """

    name = "ip_adapter_multi"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: IPAdapterMultiSettings,
        encoder: Any,
        start: IPAdapterModel,
        held_out: Sequence[Picture] = (),
    ) -> None:
        chosen = settings.aggregator
        start.aggregate = chosen.aggregate
        if chosen.aggregate == "attention":
            # One that has learned goes on, if it is the same kind.
            if start.aggregator is None or start.aggregator.settings != chosen:
                start.aggregator = PictureAttention(start.image_proj.reads, chosen, settings.seed)
        else:
            start.aggregator = None
        if settings.rank is not None and not start.adapts_attention:
            start.add_low_rank(base.unet, settings.rank, settings.seed)
        super().__init__(base, shown, settings, encoder, start, chosen.pictures, held_out=held_out)
