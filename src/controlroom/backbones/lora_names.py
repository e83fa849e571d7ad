"""What trainers call the layers of Stable Diffusion's networks: diffusers' paths, the original ones, kohya's.

diffusers' path of a layer (``down_blocks.0.attentions.0...to_q``) is the name inside this project. Original Stable
Diffusion, ComfyUI and kohya's XL files count blocks instead (``input_blocks.1.1...to_q``); kohya writes dots as lines.
"""

from __future__ import annotations

from typing import Any

from torch import nn

UNET, TEXT, TEXT_2 = "unet", "text_encoder", "text_encoder_2"
PARTS = (UNET, TEXT, TEXT_2)
Layer = tuple[str, str]
"""Part and diffusers' path of a layer; of text encoders without ``text_model.``, which not every transformers has."""

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_TOP = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}


def adaptable(module: Any) -> dict[str, Any]:
    """Linear and convolutional layers of a network by their path, without ``text_model.``."""
    return {
        name.removeprefix("text_model."): layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def original_blocks(unet: Any) -> dict[str, str]:
    """diffusers' path of each resnet, transformer and sampler -> the original path."""
    paths = dict(_TOP)
    index = 1
    for b, block in enumerate(unet.down_blocks):
        attentions = getattr(block, "attentions", None)
        for k in range(len(block.resnets)):
            paths[f"down_blocks.{b}.resnets.{k}"] = f"input_blocks.{index}.0"
            if attentions:
                paths[f"down_blocks.{b}.attentions.{k}"] = f"input_blocks.{index}.1"
            index += 1
        if getattr(block, "downsamplers", None):
            paths[f"down_blocks.{b}.downsamplers.0.conv"] = f"input_blocks.{index}.0.op"
            index += 1
    paths |= {
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    index = 0
    for b, block in enumerate(unet.up_blocks):
        attentions = getattr(block, "attentions", None)
        for k in range(len(block.resnets)):
            paths[f"up_blocks.{b}.resnets.{k}"] = f"output_blocks.{index}.0"
            if attentions:
                paths[f"up_blocks.{b}.attentions.{k}"] = f"output_blocks.{index}.1"
            index += 1
        if getattr(block, "upsamplers", None):
            paths[f"up_blocks.{b}.upsamplers.0.conv"] = f"output_blocks.{index - 1}.{2 if attentions else 1}.conv"
    return paths


def original_paths(unet: Any) -> dict[str, str]:
    """diffusers' path of each linear and convolutional layer -> the original path."""
    blocks = original_blocks(unet)
    found: dict[str, str] = {}
    for path in adaptable(unet):
        if path in blocks:
            found[path] = blocks[path]
            continue
        for length in (4, 3):  # down_blocks.0.resnets.1, mid_block.resnets.0
            head, tail = ".".join(path.split(".")[:length]), ".".join(path.split(".")[length:])
            if head in blocks and tail:
                found[path] = f"{blocks[head]}.{_RESNET.get(tail, tail) if '.resnets.' in path else tail}"
                break
    return found


class Names:
    """Every name of every layer of a model.

    Attributes:
        layers: part and path -> the layer itself.
    """

    def __init__(self, unet: Any, text_encoder: Any = None, text_encoder_2: Any = None) -> None:
        self.layers: dict[Layer, Any] = {}
        self._known: dict[str, Layer] = {}
        self._original = original_paths(unet)
        for part, module in ((UNET, unet), (TEXT, text_encoder), (TEXT_2, text_encoder_2)):
            if module is None:
                continue
            for path, layer in adaptable(module).items():
                self.layers[part, path] = layer
                for name in self._names(part, path):
                    self._known.setdefault(name, (part, path))
        # kohya's SD1 files name the only text encoder without a number.
        self.two = text_encoder_2 is not None

    def find(self, name: str) -> Layer | None:
        """The layer that a file's name stands for; None: there is none."""
        return self._known.get(name)

    def kohya(self, layer: Layer) -> str:
        """kohya's name: original blocks for Stable Diffusion XL, diffusers' for 1 and 2."""
        part, path = layer
        if part == UNET:
            return f"lora_unet_{(self._original.get(path, path) if self.two else path).replace('.', '_')}"
        number = ("1" if part == TEXT else "2") if self.two else ""
        return f"lora_te{number}_text_model_{path.replace('.', '_')}"

    def _names(self, part: str, path: str) -> list[str]:
        if part == UNET:
            original = self._original.get(path)
            paths = [path] if original is None else [path, original]
            found = [path, f"unet.{path}"]
            found += [f"lora_unet_{p.replace('.', '_')}" for p in paths]
            return found + ([] if original is None else [f"diffusion_model.{original}"])
        number = "1" if part == TEXT else "2"
        clip = "clip_l" if part == TEXT else "clip_g"
        found = []
        for inner in (path, f"text_model.{path}"):
            found += [f"{part}.{inner}", f"te{number}.{inner}", f"text_encoders.{clip}.transformer.{inner}"]
            found.append(f"lora_te{number}_{inner.replace('.', '_')}")
            if part == TEXT:
                # A bare text path is a file saved from a text encoder alone.
                found += [f"lora_te_{inner.replace('.', '_')}", inner]
        return found
