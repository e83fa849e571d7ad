"""Models to time on: the theatre, a UNet of Stable Diffusion 1.5's size with random weights, and a miniature."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel

from controlroom.backbones.loading import theatre_folder
from tests.tiny import tiny_scheduler, tiny_sd1, tiny_text_encoder, tiny_tokenizer

NAMES = ("theatre", "sd15", "tiny")


def available(name: str) -> bool:
    """Whether a model can be made on this machine."""
    return name != "theatre" or (theatre_folder() / "model_index.json").is_file()


def pipeline(name: str) -> StableDiffusionPipeline:
    """A diffusers pipeline without its progress bar."""
    if name == "theatre":
        made: Any = StableDiffusionPipeline.from_pretrained(
            str(theatre_folder()), dtype=torch.float32, safety_checker=None, requires_safety_checker=False
        )
    else:
        made = tiny_sd1() if name == "tiny" else _sd15()
    made.set_progress_bar_config(disable=True)
    return made


def pixels(name: str) -> int:
    """Side of the picture that is drawn."""
    return {"theatre": 128, "sd15": 256, "tiny": 32}[name]


def _sd15() -> StableDiffusionPipeline:
    """Only the UNet has its real size: the rest of a run is the same work on both sides."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(320, 640, 1280, 1280),
        cross_attention_dim=768,
        attention_head_dim=8,
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
        up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    ).eval()
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        norm_num_groups=4,
    ).eval()
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=tiny_text_encoder(width=768),
        tokenizer=tiny_tokenizer(),
        unet=unet,
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
