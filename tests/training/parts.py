"""Tiny networks of the theatre's shapes, for recipes of controls: folders ``unet``, ``vae`` and ``clip``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from controlroom.data.theatre.tokenizer import LENGTH, write_tokenizer
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.recipes.theatre_unet import noise_schedule
from tests.tiny import tiny_unet


def write_parts(folder: Path) -> Path:
    """Write them."""
    torch.manual_seed(0)
    autoencoder: Any = AutoencoderKL
    size = write_tokenizer(folder / "clip/tokenizer")
    text = CLIPTextConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=size - 2,
        eos_token_id=size - 1,
        pad_token_id=size - 1,
    )
    CLIPTextModel(text).save_pretrained(folder / "clip")
    autoencoder(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    ).save_pretrained(folder / "vae")
    tiny_unet(0).save_pretrained(folder / "unet")
    return folder


def pipeline_of(parts: Path) -> Pipeline:
    """They as a model that draws."""
    pipeline: Any = StableDiffusionPipeline
    return Pipeline.from_diffusers(
        pipeline(
            vae=AutoencoderKL.from_pretrained(parts / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(parts / "clip"),
            tokenizer=CLIPTokenizer.from_pretrained(parts / "clip/tokenizer"),
            unet=UNet2DConditionModel.from_pretrained(parts / "unet"),
            scheduler=noise_schedule(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
