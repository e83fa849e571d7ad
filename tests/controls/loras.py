"""LoRAs with random weights, made by PEFT and diffusers: what files of other tools are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "v_proj", "out_proj"]


def add_peft(module: Any, targets: list[str], rank: int = 3, alpha: int = 6, seed: int = 0, **more: Any) -> None:
    """A PEFT adapter with random factors inside a network (or a text encoder), by its own ``add_adapter``."""
    module.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, **more))
    randomise(module, seed)


def randomise(module: Any, seed: int, size: float = 0.2) -> None:
    """Factors that are zero at the start become random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if any(part in name for part in ("lora_", "hada_", "lokr_")):
                noise = torch.randn(parameter.shape, generator=generator)
                lengths = "magnitude" in name
                parameter.copy_(parameter * (1 + 0.2 * noise) if lengths else size * noise)


def saved_by_diffusers(pipe: Any, folder: Path, unet: bool = True, texts: bool = True) -> Path:
    """The file that ``save_lora_weights`` writes of the adapters in a pipeline."""
    layers: dict[str, Any] = {}
    about: dict[str, Any] = {}
    for part in ("unet", "text_encoder", "text_encoder_2"):
        module = getattr(pipe, part, None)
        if module is None or not getattr(module, "peft_config", None) or not (unet if part == "unet" else texts):
            continue
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(module)
        about[f"{part}_lora_adapter_metadata"] = module.peft_config["default"].to_dict()
    type(pipe).save_lora_weights(str(folder), **layers, **about)
    return folder / "pytorch_lora_weights.safetensors"


def tiny_lora(path: Path, backbone: Any, seed: int = 0) -> Path:
    """A LoRA of a tiny pipeline's UNet and text encoder, saved by diffusers, at ``path``."""
    pipe = backbone()
    add_peft(pipe.unet, ATTENTION, seed=seed)
    add_peft(pipe.text_encoder, TEXT, seed=seed + 1)
    saved_by_diffusers(pipe, path.parent / f"{path.stem}-folder").replace(path)
    return path


def tiny_word(pipe: Any) -> dict[str, torch.Tensor]:
    """A learned word of two vectors for each text encoder of a pipeline, with the keys of a file."""
    encoders = {"clip_l": pipe.text_encoder, "clip_g": getattr(pipe, "text_encoder_2", None)}
    widths = {key: int(encoder.config.hidden_size) for key, encoder in encoders.items() if encoder is not None}
    generator = torch.Generator().manual_seed(6)
    return {key: torch.randn(2, width, generator=generator) for key, width in widths.items()}
