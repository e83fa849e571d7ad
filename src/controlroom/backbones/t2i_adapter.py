"""Files of T2I-Adapters (Mou et al., arXiv 2302.08453): diffusers' folders and single files, checked before use.

A single file has no configuration: widths, depths and the kind of adapter (full, light, XL) are read from the tensors
and from the UNet it is for. Keys may be diffusers' (``adapter.body.1.resnets.0.*``) or those of the published ``.pth``
files (``body.2.*`` counted through all levels; ``body.1.body.0.*`` in light ones), saved as safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.completeness import check_keys
from controlroom.backbones.model_files import explained, read_safetensors
from controlroom.backbones.sites import level_sizes
from controlroom.core.errors import ModelError

Shape = tuple[int, tuple[int, int]]
"""Channels, and height and width, of a feature."""

_CLASS = "T2IAdapter"
_FLAT = re.compile(r"body\.(\d+)\.(in_conv|block1|block2)\.(weight|bias)")
_FLAT_LIGHT = re.compile(r"body\.(\d+)\.body\.(\d+)\.(block1|block2)\.(weight|bias)")


def load_t2i_adapter(path: Path, unet: Any, pixels_per_latent: int) -> Any:
    """A `diffusers.T2IAdapter` for ``unet``, in its precision, on its device, not learning.

    Args:
        path: folder in diffusers' layout, or ``.safetensors`` file.
        unet: the network it will control.
        pixels_per_latent: of the autoencoder; a file does not say how far its adapter shrinks pictures.

    Raises:
        ModelError: another kind of model, keys missing or left over, or made for another base model.
    """
    import diffusers

    folder = path if path.is_dir() else path.parent
    # A file of diffusers' name next to its configuration is that folder.
    whole = path.name.startswith("diffusion_pytorch_model") and (folder / "config.json").is_file()
    if path.is_dir() or whole:
        net: Any = explained(
            str(folder),
            lambda: diffusers.T2IAdapter.from_pretrained(str(folder), use_safetensors=True, local_files_only=True),
        )
        check_keys(net, folder)
    else:
        net = adapter_from_tensors(read_safetensors(path), unet, pixels_per_latent, str(path))
    # Not diffusers' own `to`, which warns of modules in float32 that this network does not have.
    return torch.nn.Module.to(net, device=unet.device, dtype=unet.dtype).eval().requires_grad_(False)


def adapter_from_tensors(
    stored: Mapping[str, torch.Tensor], unet: Any, pixels_per_latent: int, name: str = "The file"
) -> Any:
    """A `diffusers.T2IAdapter` out of a file's tensors, with diffusers' or the published keys.

    Raises:
        ModelError: not an adapter, keys missing or left over, or made for another base model.
    """
    import diffusers

    tensors = {key.removeprefix("adapter."): value for key, value in stored.items()}
    light = "body.0.out_conv.weight" in tensors
    if not (light or "conv_in.weight" in tensors) or not any(key.startswith("body.") for key in tensors):
        raise ModelError(f"{name} is not a T2I-Adapter: it has no conv_in.* and body.*. Give another file.")
    slots = feature_slots(unet, (1 << 10, 1 << 10))
    # Where the first level is already half the latents' size, an adapter shrinks its pictures once more.
    factor = pixels_per_latent * ((1 << 10) // slots[0][1][0])
    if light:
        tensors = {_light_key(key): value for key, value in tensors.items()}
    elif not any(".resnets." in key for key in tensors):
        tensors = _nested(tensors, (len(slots), len(unet.down_blocks)), name)
    levels = 1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("body."))
    entry = tensors["body.0.in_conv.weight" if light else "conv_in.weight"]
    maps, rest = divmod(entry.shape[1], factor**2)
    if rest or maps not in (1, 3, 4):
        raise ModelError(
            f"{name} was made for another base model: it reads {entry.shape[1]} channels, which is not a map shrunk "
            f"{factor} times, as this model needs. Use the one for this model."
        )
    last = "out_conv" if light else "resnets.0.block2"
    widths = [_width(tensors, f"body.{level}.{last}.weight", name) for level in range(levels)]
    kind = "light_adapter" if light else "full_adapter" if factor == pixels_per_latent else "full_adapter_xl"
    depth = 1 + max(int(key.split(".")[3]) for key in tensors if key.startswith("body.0.resnets."))
    net: Any = diffusers.T2IAdapter(
        in_channels=maps,
        # The last block of a light adapter is as wide as the one before, and not counted.
        channels=widths[:-1] if light else widths,  # type: ignore[arg-type]
        num_res_blocks=depth,
        downscale_factor=factor,
        adapter_type=kind,
    )
    try:
        missing, unexpected = net.load_state_dict({f"adapter.{k}": v for k, v in tensors.items()}, strict=False)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{name} was made for another base model: {reason}. Use the one for this model.") from error
    if missing or unexpected:
        raise ModelError(
            f"{name} is not whole: {len(missing)} weights are missing (first: {next(iter(missing), 'none')}), "
            f"{len(unexpected)} are unknown (first: {next(iter(unexpected), 'none')}). Copy it again."
        )
    return net


def _width(tensors: Mapping[str, torch.Tensor], key: str, name: str) -> int:
    if key not in tensors:
        raise ModelError(f"{name} lacks {key!r}. Copy it again, or use the adapter for this base model.")
    return int(tensors[key].shape[0])


def _light_key(key: str) -> str:
    found = _FLAT_LIGHT.fullmatch(key)
    return key if found is None else "body.{}.resnets.{}.{}.{}".format(*found.groups())


def _nested(tensors: Mapping[str, torch.Tensor], levels: tuple[int, ...], name: str) -> dict[str, torch.Tensor]:
    """Published keys, whose blocks are counted through all levels, as diffusers' by level."""
    found = [match for key in tensors if (match := _FLAT.fullmatch(key))]
    count = 1 + max((int(match[1]) for match in found), default=-1)
    # A level has as many blocks as the others, and only its first may change the width.
    widening = {int(match[1]) for match in found if match[2] == "in_conv"}
    depths = [count // n for n in levels if count and count % n == 0]
    depth = next((d for d in depths if all(number % d == 0 for number in widening)), 0)
    if not depth:
        raise ModelError(
            f"{name} was made for another base model: its {count} blocks cannot be shared out among the {levels[0]} "
            "levels of this model. Use the one for this model."
        )
    nested: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        match = _FLAT.fullmatch(key)
        if match is None:
            nested[key] = value
            continue
        level, block = divmod(int(match[1]), depth)
        part = "in_conv" if match[2] == "in_conv" else f"resnets.{block}.{match[2]}"
        nested[f"body.{level}.{part}.{match[3]}"] = value
    return nested


def feature_slots(unet: Any, hw: tuple[int, int]) -> list[Shape]:
    """Where a UNet takes an adapter's features, in order: each down block, and the middle where one is left over.

    A block with cross-attention takes it before it is halved, one without after that.
    """
    sizes, level, slots = level_sizes(unet, hw), 0, []
    for block, width in zip(unet.down_blocks, unet.config.block_out_channels, strict=True):
        halves = bool(getattr(block, "downsamplers", None))
        crossed = bool(getattr(block, "has_cross_attention", False))
        slots.append((int(width), sizes[level + (halves and not crossed)]))
        level += halves
    middle = (int(unet.config.block_out_channels[-1]), sizes[level])
    first_halves = slots[0][1] != hw
    # Where the first block is passed by (Stable Diffusion XL), adapters have one feature more than there are blocks.
    return [*slots, middle] if first_halves else slots


def feature_shapes(net: Any, size: tuple[int, int]) -> list[Shape]:
    """Shapes of an adapter's features for a condition of that many pixels."""
    config = net.config
    height, width = (side // config.downscale_factor for side in size)
    widths = list(config.channels)
    if config.adapter_type == "light_adapter":
        widths.append(widths[-1])
    found: list[Shape] = []
    for level, channels in enumerate(widths):
        if level == 2 if config.adapter_type == "full_adapter_xl" else level > 0:
            height, width = -(-height // 2), -(-width // 2)
        found.append((int(channels), (height, width)))
    return found


def check_kind(net: Any) -> None:
    """A module that was given is one of diffusers' adapters.

    Raises:
        ModelError: it is not.
    """
    if not any(base.__name__ == _CLASS for base in type(net).__mro__):
        hint = " Give its adapters as several controls." if type(net).__name__ == "MultiAdapter" else ""
        raise ModelError(f"A T2I-Adapter cannot be made from a {type(net).__name__}; give a path or a module.{hint}")


def check_fit(net: Any, unet: Any, size: tuple[int, int], pixels_per_latent: int, name: str) -> None:
    """An adapter's features fit the UNet's blocks, for pictures of a size.

    Raises:
        ModelError: made for another base model.
    """
    slots = feature_slots(unet, (size[0] // pixels_per_latent, size[1] // pixels_per_latent))
    shapes = feature_shapes(net, size)
    # The feature of the middle may be missing; the UNet would silently pass by what does not fit.
    if shapes != slots[: len(shapes)] or len(shapes) < len(unet.down_blocks):
        raise ModelError(
            f"The T2I-Adapter {name} was made for another base model: its features are {_said(shapes)}, this model "
            f"takes {_said(slots)}. Use the one for this model."
        )


def _said(shapes: list[Shape]) -> str:
    return ", ".join(f"{channels} x {height} x {width}" for channels, (height, width) in shapes)
