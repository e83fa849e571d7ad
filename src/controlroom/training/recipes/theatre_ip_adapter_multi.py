"""The theatre's IP-Adapters for several pictures: people of its LFW, each drawn from nine other pictures of them.

Captions say what a person does and where, and nothing of their looks, which only the pictures can tell. All start from
the same adapter, and every one (self-attention, maximum, average, a single picture) sees the same people in the same
order with the same noise, so that they differ in nothing but what they do with the pictures. Loss weighted by
min(SNR, 5) / SNR (arXiv 2303.09556), as all of the theatre's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTokenizer

from controlroom.backbones.image_aggregator import PICTURES, Aggregate, AggregatorSettings
from controlroom.backbones.image_encoder import load_image_encoder
from controlroom.backbones.ip_adapter import adapter_file, load_ip_adapter
from controlroom.data.theatre.people import theatre_people
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.image_prompts import ENCODER
from controlroom.training.objective import ObjectiveSettings
from controlroom.training.recipes.ip_adapter_multi import IPAdapterMultiRecipe, IPAdapterMultiSettings
from controlroom.training.recipes.theatre_unet import noise_schedule
from controlroom.training.shown import Shown

HELD_OUT_PEOPLE = 2


def theatre_ip_adapter_multi(
    unet_folder: Path,
    vae_folder: Path,
    clip_folder: Path,
    start: Path,
    aggregate: Aggregate = "attention",
    people: int = 240,
    pictures: int = PICTURES + 1,
    rank: int | None = None,
) -> IPAdapterMultiRecipe:
    """The recipe on the theatre's people.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        start: exported adapter that it starts from, with its image encoder beside it.
        aggregate: what becomes of the pictures; ``tokens`` reads a single one.
        people: that are learned from.
        pictures: of each.
        rank: of low-rank changes of the network's attention that learn too; None: none.
    """
    count = 1 if aggregate == "tokens" else pictures - 1
    settings = IPAdapterMultiSettings(
        start=str(start),
        aggregator=AggregatorSettings(aggregate=aggregate, pictures=count),
        rank=rank,
        objective=ObjectiveSettings(min_snr_gamma=5.0),
    )
    base = BaseModel(theatre_pipeline(unet_folder, vae_folder, clip_folder))
    file = adapter_file(start)
    shown = Shown(base, theatre_people("train", people, pictures, "class"))
    held_out = theatre_people("held_out", HELD_OUT_PEOPLE, pictures, "class")
    encoder = load_image_encoder(file.parent / ENCODER, base.backbone)
    return IPAdapterMultiRecipe(base, shown, settings, encoder, load_ip_adapter(file, base.unet), held_out)


def theatre_pipeline(unet_folder: Path, vae_folder: Path, clip_folder: Path) -> Pipeline:
    """The theatre's model out of its trained parts, before they are assembled."""
    vae: Any = AutoencoderKL.from_pretrained(vae_folder)
    unet: Any = UNet2DConditionModel.from_pretrained(unet_folder)
    text_encoder: Any = CLIPTextModel.from_pretrained(clip_folder)
    scheduler: Any = noise_schedule()
    absent: Any = None  # diffusers' types ask for what its code does without
    return Pipeline.from_diffusers(
        StableDiffusionPipeline(
            vae=vae.eval().float(),
            text_encoder=text_encoder.eval().float(),
            tokenizer=CLIPTokenizer.from_pretrained(clip_folder / "tokenizer"),
            unet=unet.eval().float(),
            scheduler=scheduler,
            safety_checker=absent,
            feature_extractor=absent,
            requires_safety_checker=False,
        )
    )
