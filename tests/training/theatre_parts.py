"""Tiny networks of the theatre's shapes, for recipes: UNet, autoencoder, CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from transformers import CLIPConfig, CLIPModel, CLIPTextModel, CLIPTokenizer

from controlroom.data.theatre.tokenizer import LENGTH, write_tokenizer
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.recipes.theatre_unet import noise_schedule
from tests.tiny import tiny_unet


def write_parts(folder: Path, seed: int = 0) -> Path:
    """Folders ``unet``, ``vae`` (halves three times) and ``clip`` (text and pictures) with random weights."""
    torch.manual_seed(seed)
    size = write_tokenizer(folder / "clip/tokenizer")
    common = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        **common,
        "vocab_size": size,
        "max_position_embeddings": LENGTH,
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
        "projection_dim": 24,
    }
    vision = {**common, "image_size": 32, "patch_size": 8, "projection_dim": 24}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder / "clip")
    AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    ).save_pretrained(folder / "vae")
    tiny_unet(seed).save_pretrained(folder / "unet")
    return folder


def pipeline(parts: Path, unet: Any) -> Pipeline:
    """A pipeline of the parts, with this UNet."""
    return Pipeline.from_diffusers(
        StableDiffusionPipeline(
            vae=AutoencoderKL.from_pretrained(parts / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(parts / "clip"),
            tokenizer=CLIPTokenizer.from_pretrained(parts / "clip/tokenizer"),
            unet=unet,
            scheduler=noise_schedule(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    )
