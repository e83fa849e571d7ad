"""Files of ControlNets (Zhang et al., arXiv 2302.05543): diffusers' folders and single files, checked before use.

A single file has no configuration: it is the UNet's own, since a ControlNet is a copy of the UNet's encoder; only the
widths of the condition's embedding are read from the file. Keys may be diffusers' or the original ones
(``control_model.*``).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.completeness import check_keys
from controlroom.backbones.model_files import explained, read_safetensors
from controlroom.core.errors import ModelError

_CLASS = "ControlNetModel"
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
        net = explained(
            str(folder),
            lambda: diffusers.ControlNetModel.from_pretrained(str(folder), use_safetensors=True, local_files_only=True),
        )
        check_keys(net, folder)
    else:
        net = _from_file(path, unet)
    check_controlnet(net, unet, str(path))
    return net.to(device=unet.device, dtype=unet.dtype).eval().requires_grad_(False)


def _from_file(path: Path, unet: Any) -> Any:
    import diffusers
    from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint

    stored = read_safetensors(path)
    widths = _hint_widths(stored)
    if not widths:
        raise ModelError(f"{path} is not a ControlNet: it has no layers that embed a condition. Give another file.")
    net = diffusers.ControlNetModel.from_unet(
        unet, conditioning_embedding_out_channels=widths, load_weights_from_unet=False
    )
    converted = explained(str(path), lambda: convert_controlnet_checkpoint(dict(stored), net.config))
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


def _hint_widths(stored: dict[str, torch.Tensor]) -> tuple[int, ...]:
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


def _all(value: Any, unet: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value] * len(unet.config.block_out_channels)
