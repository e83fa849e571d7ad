"""Tiny diffusers pipelines with random weights, made on the spot: Stable Diffusion 1, 2 and XL in miniature.

Topologies are the real ones (cross-attention in all but the lowest level, two levels and a middle block), sizes are
not: a forward pass takes milliseconds. Nothing is downloaded. The tokenizer knows single characters and a few words, so
that prompts of different words differ and words have known positions.
"""

from __future__ import annotations

import json
import tempfile
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WORDS = ("a", "cat", "dog", "frog", "red", "green", "blue", "with", "hat", "and", "on", "the", "beach", "night")
LENGTH = 16
"""Tokens of a prompt; 77 in the real models."""
PIXELS = 32
"""Default height and width; the latents are half of that."""


@lru_cache(maxsize=1)
def _tokenizer_folder() -> str:
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + list("0123456789,.!?-'\"")
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters)]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], f"{word[-1]}</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            if "".join(pair) not in vocabulary:
                vocabulary.append("".join(pair))
            pieces = ["".join(pair), *pieces[2:]]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    folder = Path(tempfile.mkdtemp(prefix="tiny-tokenizer-"))
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(pair) for pair in merges) + "\n")
    return str(folder)


def tiny_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer with `WORDS` as single tokens and everything else letter by letter."""
    folder = Path(_tokenizer_folder())
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=LENGTH)


def tiny_text_encoder(projected: bool = False, width: int = 32, seed: int = 0) -> Any:
    """A CLIP text encoder of two layers."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer) + 8,
        hidden_size=width,
        intermediate_size=37,
        projection_dim=width,
        num_attention_heads=4,
        num_hidden_layers=2,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu" if projected else "quick_gelu",
    )
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    """An autoencoder that halves each side, with four latent channels."""
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=PIXELS,
    ).eval()


def tiny_unet(seed: int = 0, cross: int = 32, **settings: Any) -> UNet2DConditionModel:
    """A UNet of two levels: 5 self- and 5 cross-attention layers on 16x16 and 8x8 tokens."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        **{
            "block_out_channels": (16, 32),
            "layers_per_block": 1,
            "sample_size": PIXELS // 2,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": cross,
            "attention_head_dim": 2,
            "norm_num_groups": 4,
            **settings,
        }
    ).eval()
    # Random queries and keys of PyTorch's default size give nearly uniform attention: nothing would be seen of an edit.
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".to_q." in name or ".to_k." in name:
                parameter.mul_(4.0)
    return unet


def tiny_scheduler(**settings: Any) -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        **{
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "clip_sample": False,
            "set_alpha_to_one": False,
            "steps_offset": 1,
            **settings,
        }
    )


def tiny_sd1(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 1 in miniature: predicts the noise."""
    return StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed=seed),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(seed, **unet),
        scheduler=tiny_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sd2(seed: int = 0, **unet: Any) -> StableDiffusionPipeline:
    """Stable Diffusion 2 in miniature: predicts v, upcasts attention, projects linearly, heads of one width."""
    settings = {"upcast_attention": True, "use_linear_projection": True, "attention_head_dim": (2, 4), **unet}
    return StableDiffusionPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed=seed),
        tokenizer=tiny_tokenizer(),
        unet=tiny_unet(seed, **settings),
        scheduler=tiny_scheduler(prediction_type="v_prediction"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(seed: int = 0, **unet: Any) -> StableDiffusionXLPipeline:
    """Stable Diffusion XL in miniature: two text encoders, pooled text, time ids, several transformer layers."""
    settings = {
        "cross": 64,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 32 + 6 * 8,
        "transformer_layers_per_block": (1, 2),
        "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (2, 4),
        **unet,
    }
    return StableDiffusionXLPipeline(
        vae=tiny_vae(seed),
        text_encoder=tiny_text_encoder(seed=seed),
        text_encoder_2=tiny_text_encoder(projected=True, seed=seed + 1),
        tokenizer=tiny_tokenizer(),
        tokenizer_2=tiny_tokenizer(),
        unet=tiny_unet(seed, **settings),
        scheduler=tiny_scheduler(),
        add_watermarker=False,
    )


BACKBONES = {"sd1": tiny_sd1, "sd2": tiny_sd2, "sdxl": tiny_sdxl}
"""Name of a backbone -> its miniature."""
