"""Files of ControlNets (Zhang et al., arXiv 2302.05543): diffusers' folders and single files, checked before use.

A single file has no configuration: it is the UNet's own, since a ControlNet is a copy of the UNet's encoder; only the
channels it reads and the widths of the condition's embedding are read from the file. Keys may be diffusers' or the
original ones (``control_model.*``).

A ControlNet for several kinds of condition reads eleven channels: the picture, and one plane for each of
`CONDITION_KINDS`, which is 1 for the kind that the picture is and 0 for the others (`with_kind`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.bases import BASES
from controlroom.backbones.differences import load_network
from controlroom.backbones.model_files import explained, read_safetensors
from controlroom.core.errors import ModelError

CONDITION_KINDS = ("canny", "soft_edge", "lines", "scribble", "depth", "normal", "segmentation", "pose")
"""Kinds of condition, in the order of their planes in a network for all of them."""
MULTI_CHANNELS = 3 + len(CONDITION_KINDS)
"""Channels that such a network reads."""

_CLASS = "ControlNetModel"
# Weights of the SDXL conditions in the original layout, which diffusers does not convert for ControlNets.
_LABELS = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
# Original key -> diffusers' key of the layers that embed the condition; they alternate with activations.
_ORIGINAL_HINT = re.compile(r"^(?:control_model\.)?input_hint_block\.(\d+)\.weight$")
_HINT = re.compile(r"^controlnet_cond_embedding\.(?:conv_in|blocks\.(\d+))\.weight$")


def load_controlnet(path: Path, unet: Any) -> Any:
    """A `diffusers.ControlNetModel` for ``unet``, in its precision, on its device, not learning.

    Args:
        path: folder in diffusers' layout, or ``.safetensors`` file.
        unet: the network it will control.

    Raises:
        ModelError: another kind of model, keys missing or left over, or made for another base model.
    """
    import diffusers

    folder = path if path.is_dir() else path.parent
    # A file of diffusers' name next to its configuration is that folder.
    whole = path.name.startswith("diffusion_pytorch_model") and (folder / "config.json").is_file()
    if path.is_dir() or whole:
        net = load_network(diffusers.ControlNetModel, folder)
    else:
        net = controlnet_from_tensors(read_safetensors(path), unet, str(path))
    check_controlnet(net, unet, str(path))
    return net.to(device=unet.device, dtype=unet.dtype).eval().requires_grad_(False)


def controlnet_from_tensors(stored: Mapping[str, torch.Tensor], unet: Any, path: str) -> Any:
    """A `diffusers.ControlNetModel` out of a file's tensors, with diffusers' or the original keys, on the CPU.

    Args:
        stored: the file's tensors.
        unet: whose encoder it is a copy of; only its configuration counts.
        path: the file, for messages.

    Raises:
        ModelError: not a ControlNet, keys missing or left over, or made for another base model.
    """
    import diffusers
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    widths = _hint_widths(stored)
    if not widths:
        raise ModelError(f"{path} is not a ControlNet: it has no layers that embed a condition. Give another file.")
    words = next((v.shape[1] for key, v in stored.items() if key.endswith("attn2.to_k.weight")), None)
    _check_words(words, unet, path)
    net: Any = diffusers.ControlNetModel.from_unet(
        unet,
        conditioning_embedding_out_channels=widths,
        conditioning_channels=_channels(stored, ("controlnet_cond_embedding.conv_in", "input_hint_block.0"), 3),
        load_weights_from_unet=False,
    )
    # A UNet for inpainting reads further channels, which a ControlNet does not.
    latents = _channels(stored, ("conv_in", "input_blocks.0.0"), int(unet.config.out_channels))
    if latents != net.config.in_channels:
        net = diffusers.ControlNetModel.from_config({**net.config, "in_channels": latents})
    converted = explained(path, lambda: convert_controlnet_checkpoint(dict(stored), net.config))
    for key, value in stored.items():
        head, _, tail = key.removeprefix("control_model.").rpartition(".")
        if head in _LABELS:
            converted[f"{_LABELS[head]}.{tail}"] = value
    try:
        missing, unexpected = net.load_state_dict(converted, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{path} was made for another base model: {reason}. Use the one for this model.") from error
    if missing or unexpected:
        raise ModelError(
            f"{path} does not fit this model: {len(missing)} weights are missing (first: "
            f"{next(iter(missing), 'none')}), {len(unexpected)} are unknown (first: {next(iter(unexpected), 'none')}). "
            "Use the ControlNet for this base model."
        )
    return net


def with_kind(pixels: torch.Tensor, kind: str) -> torch.Tensor:
    """[..., 3, H, W] -> [..., 11, H, W]: a condition, and the planes that say of which kind it is."""
    shape = (*pixels.shape[:-3], len(CONDITION_KINDS), *pixels.shape[-2:])
    planes = pixels.new_zeros(shape)
    planes[..., CONDITION_KINDS.index(kind), :, :] = 1.0
    return torch.cat([pixels, planes], dim=-3)


def _channels(stored: Mapping[str, torch.Tensor], layers: tuple[str, ...], default: int) -> int:
    """Input channels of a layer that is stored under one of these names."""
    for layer in layers:
        for prefix in ("", "control_model."):
            if (weight := stored.get(f"{prefix}{layer}.weight")) is not None:
                return int(weight.shape[1])
    return default


def _hint_widths(stored: Mapping[str, torch.Tensor]) -> tuple[int, ...]:
    """Widths of the condition's embedding: its first layer, then the layers that halve the picture."""
    layers: dict[int, int] = {}
    for key, value in stored.items():
        if found := _ORIGINAL_HINT.match(key):
            layers[int(found[1]) // 2] = value.shape[0]
        elif found := _HINT.match(key):
            layers[0 if found[1] is None else int(found[1]) + 1] = value.shape[0]
    # In the original numbering the last layer leads to the UNet's width.
    if any(_ORIGINAL_HINT.match(key) for key in stored):
        layers.pop(max(layers))
    return tuple(layers[i] for i in sorted(layers) if i % 2 == 0)


def check_controlnet(net: Any, unet: Any, name: str) -> None:
    """A ControlNet's shapes are those of the UNet.

    Raises:
        ModelError: not a ControlNet, or made for another base model.
    """
    if type(net).__name__ != _CLASS and not any(base.__name__ == _CLASS for base in type(net).__mro__):
        raise ModelError(f"{name} is a {type(net).__name__}; expected a diffusers ControlNetModel.")
    _check_words(net.config.get("cross_attention_dim"), unet, name)
    for field in ("block_out_channels", "layers_per_block", "cross_attention_dim"):
        ours, theirs = net.config.get(field), unet.config.get(field)
        # Numbers that hold for every block may be written once.
        if isinstance(ours, list | tuple) != isinstance(theirs, list | tuple):
            ours, theirs = _all(ours, unet), _all(theirs, unet)
        if (list(ours) if isinstance(ours, tuple) else ours) != (list(theirs) if isinstance(theirs, tuple) else theirs):
            raise ModelError(
                f"The ControlNet {name} was made for another base model: its {field} is {ours}, this model's "
                f"{theirs}. Use the one for this model."
            )
    if net.config.get("addition_embed_type") is not None and unet.config.get("addition_embed_type") is None:
        raise ModelError(f"The ControlNet {name} was made for Stable Diffusion XL. Use the one for this model.")
    if net.config.in_channels != unet.config.out_channels:
        raise ModelError(
            f"The ControlNet {name} reads {net.config.in_channels} channels of latents; these have "
            f"{unet.config.out_channels}. Use one that reads the latents alone."
        )


def _check_words(width: Any, unet: Any, name: str) -> None:
    """The states of words that it reads are those of the UNet.

    Raises:
        ModelError: they have another width; where it is a known one, the message says whose.
    """
    theirs = unet.config.get("cross_attention_dim")
    if isinstance(width, int) and isinstance(theirs, int) and width != theirs:
        raise ModelError(
            f"The ControlNet {name} was made for another base model, {_base(width)}; this model is {_base(theirs)}. "
            "Use the ControlNet for this model."
        )


def _base(width: int) -> str:
    """What a model with words of that width is.

    >>> _base(1024), _base(32)
    ('Stable Diffusion 2 (words 1024 wide)', 'one with words 32 wide')
    """
    return f"{BASES[width]} (words {width} wide)" if width in BASES else f"one with words {width} wide"


def _all(value: Any, unet: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(unet.config.block_out_channels)
