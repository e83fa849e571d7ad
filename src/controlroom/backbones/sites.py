"""Where the layers of a `UNet2DConditionModel` are: found by walking the modules in the order of execution.

`UNet2DConditionModel.attn_processors` lists down, up, mid; a network executes down, mid, up. Sites are numbered by
execution, which is what papers mean by the number of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from controlroom.core.sites import Place, Site

_Stage = tuple[str, nn.Module, Place, int, tuple[int, int]]


def level_sizes(unet: Any, hw: tuple[int, int]) -> list[tuple[int, int]]:
    """Height and width at each level, from the latents down. A strided convolution rounds up."""
    sizes = [hw]
    for block in unet.down_blocks:
        if getattr(block, "downsamplers", None):
            height, width = sizes[-1]
            sizes.append(((height + 1) // 2, (width + 1) // 2))
    return sizes


def stages(unet: Any, hw: tuple[int, int]) -> Iterator[_Stage]:
    """Resnets, attentions and samplers with their size, in the order in which they run."""
    sizes = level_sizes(unet, hw)
    level = 0
    for number, block in enumerate(unet.down_blocks):
        prefix = f"down_blocks.{number}"
        yield from _pairs(block, prefix, "down", number, sizes[level])
        if getattr(block, "downsamplers", None):
            level += 1
            for index, module in enumerate(block.downsamplers):
                yield f"{prefix}.downsamplers.{index}", module, "down", number, sizes[level]
    if unet.mid_block is not None:
        resnets = list(unet.mid_block.resnets)
        yield "mid_block.resnets.0", resnets[0], "mid", 0, sizes[level]
        for index, resnet in enumerate(resnets[1:]):
            attentions = getattr(unet.mid_block, "attentions", None)
            if attentions is not None and attentions[index] is not None:
                yield f"mid_block.attentions.{index}", attentions[index], "mid", 0, sizes[level]
            yield f"mid_block.resnets.{index + 1}", resnet, "mid", 0, sizes[level]
    for number, block in enumerate(unet.up_blocks):
        prefix = f"up_blocks.{number}"
        yield from _pairs(block, prefix, "up", number, sizes[level])
        if getattr(block, "upsamplers", None):
            level -= 1
            for index, module in enumerate(block.upsamplers):
                yield f"{prefix}.upsamplers.{index}", module, "up", number, sizes[level]


def _pairs(block: Any, prefix: str, place: Place, number: int, hw: tuple[int, int]) -> Iterator[_Stage]:
    attentions = getattr(block, "attentions", None)
    for index, resnet in enumerate(block.resnets):
        yield f"{prefix}.resnets.{index}", resnet, place, number, hw
        if attentions is not None:
            yield f"{prefix}.attentions.{index}", attentions[index], place, number, hw


def attention_sites(unet: Any, hw: tuple[int, int]) -> tuple[Site, ...]:
    """Attention layers in the order of execution; ``index`` counts self- and cross-attention apart."""
    counts = {"self": 0, "cross": 0}
    found = []
    for prefix, module, place, number, size in stages(unet, hw):
        for name, found_module in module.named_modules():
            layer: Any = found_module
            # GLIGEN's gated layers run only where its control asks for them.
            if not (hasattr(layer, "set_processor") and hasattr(layer, "to_q")) or ".fuser." in name:
                continue
            kind = "cross" if layer.is_cross_attention else "self"
            full = f"{prefix}.{name}" if name else prefix
            found.append(Site(full, kind, place, number, counts[kind], size, layer.query_dim))
            counts[kind] += 1
    return tuple(found)


def feature_sites(unet: Any, hw: tuple[int, int]) -> tuple[Site, ...]:
    """Outputs of resnets, transformers and samplers, and GroupNorms, in the order of execution."""
    counts = {"resnet": 0, "transformer": 0, "downsample": 0, "upsample": 0, "norm": 0}
    found = []

    def add(name: str, kind: Any, place: Place, number: int, size: tuple[int, int], channels: int) -> None:
        found.append(Site(name, kind, place, number, counts[kind], size, channels))
        counts[kind] += 1

    for name, module, place, number, size in stages(unet, hw):
        part = name.split(".")[-2]
        for inner, norm in module.named_modules():
            if isinstance(norm, nn.GroupNorm) and inner:
                add(f"{name}.{inner}", "norm", place, number, size, norm.num_channels)
        channels = getattr(module, "out_channels", None) or getattr(module, "in_channels", None) or 0
        kind = {
            "resnets": "resnet",
            "attentions": "transformer",
            "downsamplers": "downsample",
            "upsamplers": "upsample",
        }[part]
        add(name, kind, place, number, size, int(channels))
    last = getattr(unet, "conv_norm_out", None)
    if isinstance(last, nn.GroupNorm):
        add("conv_norm_out", "norm", "up", len(unet.up_blocks) - 1, hw, last.num_channels)
    return tuple(found)
