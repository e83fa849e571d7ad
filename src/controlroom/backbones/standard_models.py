"""Networks without weights: the published Stable Diffusion 1, 2 and XL, or those of a folder's configurations.

Converting a file needs the names and shapes of a model's layers, and nothing of its weights.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.bases import SD1, SD2, XL
from controlroom.backbones.loading import THEATRE, find_model, theatre_folder
from controlroom.backbones.lora_names import PARTS, TEXT, TEXT_2, UNET, Names
from controlroom.backbones.model_files import explained, read_json
from controlroom.core.errors import ModelError

_UNETS: dict[str, dict[str, Any]] = {
    SD1: {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    SD2: {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "sample_size": 96,
    },
    XL: {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
        "sample_size": 128,
    },
}
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
_CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 23}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20, "num_hidden_layers": 32}
_TEXTS: dict[str, dict[str, dict[str, Any]]] = {
    SD1: {TEXT: _CLIP_L},
    SD2: {TEXT: _CLIP_H},
    XL: {TEXT: _CLIP_L, TEXT_2: {**_CLIP_G, "projection_dim": 1280}},
}


def empty_parts(base: str, model: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """UNet and text encoders on no device.

    Args:
        base: a published model, as files' shapes tell it.
        model: ``theatre``, or a folder in diffusers' layout, whose configurations count instead; None: the published
            ones.

    Raises:
        ModelError: neither a published model nor a folder.
    """
    from diffusers import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    if model is not None:
        folder = theatre_folder() if os.fspath(model) == THEATRE else find_model(model)
        if not (folder / "unet" / "config.json").is_file():
            raise ModelError(
                f"{os.fspath(model)} has no unet/config.json. Give a folder in diffusers' layout as --base."
            )
        unet, texts = read_json(folder / "unet" / "config.json"), _texts_of(folder)
    elif base in _UNETS:
        unet, texts = _UNETS[base], _TEXTS[base]
    else:
        known = ", ".join(_UNETS)
        raise ModelError(
            f"The shapes say {base or 'nothing of the base model'}, and known are {known}. Give the folder of its base "
            "model in diffusers' layout: --base FOLDER."
        )

    def build() -> dict[str, Any]:
        with torch.device("meta"):
            found: dict[str, Any] = {UNET: UNet2DConditionModel.from_config(unet)}
            for part, settings in texts.items():
                kind = CLIPTextModelWithProjection if part == TEXT_2 else CLIPTextModel
                found[part] = kind(CLIPTextConfig(**settings))
        return found

    return explained(base if model is None else os.fspath(model), build)


def empty_names(base: str, model: str | os.PathLike[str] | None = None) -> Names:
    """Names of a model's layers; see `empty_parts`."""
    parts = empty_parts(base, model)
    return Names(*(parts.get(part) for part in PARTS))


def _texts_of(folder: Path) -> dict[str, dict[str, Any]]:
    parts = [part for part in (TEXT, TEXT_2) if (folder / part / "config.json").is_file()]
    return {part: read_json(folder / part / "config.json") for part in parts}
