"""The original layout of Stable Diffusion 1: one file with UNet, autoencoder and text encoder under other names."""

from __future__ import annotations

import re
from typing import Any

import torch

_UNET = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def ldm_checkpoint(pipeline: Any) -> dict[str, torch.Tensor]:
    """Every weight of a Stable Diffusion 1 pipeline under the names of the original files."""
    found = {f"model.diffusion_model.{_unet(k, pipeline.unet)}": v for k, v in pipeline.unet.state_dict().items()}
    for key, value in pipeline.vae.state_dict().items():
        name = _vae(key, len(pipeline.vae.config.up_block_types))
        # Attention was made of convolutions of one pixel.
        pixel = ".mid.attn_1." in name and value.ndim == 2
        found[f"first_stage_model.{name}"] = value[:, :, None, None] if pixel else value
    for key, value in pipeline.text_encoder.state_dict().items():
        found[f"cond_stage_model.transformer.text_model.{key.removeprefix('text_model.')}"] = value
    return {key: value.clone().contiguous() for key, value in found.items()}


def _renamed(key: str, names: dict[str, str]) -> str:
    head, _, tail = key.rpartition(".")
    return f"{names[head]}.{tail}" if head in names else key


def _unet(key: str, unet: Any) -> str:
    layers = unet.config.layers_per_block
    part = re.match(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key)
    if part is None:
        part = re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", key)
        if part is None:
            return _renamed(key, _UNET)
        kind, number, rest = part.groups()
        place = 1 if kind == "attentions" else 2 * int(number)
        return f"middle_block.{place}.{rest if kind == 'attentions' else _renamed(rest, RESNET)}"
    side, block, kind, number, rest = part.groups()
    first = (layers + 1) * int(block)
    if kind == "downsamplers":
        return f"input_blocks.{first + layers + 1}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        attends = len(getattr(unet.up_blocks[int(block)], "attentions", None) or ()) > 0
        return f"output_blocks.{first + layers}.{2 if attends else 1}.{rest}"
    blocks = f"input_blocks.{first + int(number) + 1}" if side == "down" else f"output_blocks.{first + int(number)}"
    return f"{blocks}.1.{rest}" if kind == "attentions" else f"{blocks}.0.{_renamed(rest, RESNET)}"


def _vae(key: str, levels: int) -> str:
    key = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", key)
    key = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", key)
    key = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", key)
    key = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
    key = re.sub(r"mid_block\.resnets\.(\d+)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
    key = key.replace("conv_norm_out", "norm_out").replace("conv_shortcut", "nin_shortcut")
    part = re.match(r"(.*)mid_block\.attentions\.0\.(.*)", key)
    return f"{part[1]}mid.attn_1.{_renamed(part[2], _VAE_ATTENTION)}" if part else key
