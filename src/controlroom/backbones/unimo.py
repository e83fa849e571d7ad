"""UNIMO-G (Li et al., "UNIMO-G: Unified Image Generation through Multimodal Conditional Diffusion", arXiv 2401.13388).

A frozen multimodal language model reads words and pictures, and the UNet's cross-attention learns to read its states in
the place of a text encoder's.

What cross-attention is told: the language model's last states of the whole sequence, projected; and behind them, for
what a picture looks like in detail, the image encoder's states of each picture, projected too. Both have one softmax.
Every cross-attention layer has keys and values of its own for them, which start as copies of the words'.

Only the paper's abstract and summaries could be read here. That the language model is frozen, that the UNet reads its
last states, and that maps of the pictures' tokens are held to their segments in training is as recalled; that the image
encoder's states stand beside them, and that of the UNet keys and values alone learn, is this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from controlroom.backbones.ip_adapter import layer_numbers
from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.multimodal import (
    LanguageShape,
    MultimodalModel,
    MultimodalReader,
    Sequences,
    encoder_beside,
    read_shape,
    read_weights,
    sequences,
)
from controlroom.core.backbone import Backbone
from controlroom.core.errors import ModelError

FILE = "unimo.safetensors"
METADATA = "unimo_g"
HIDDEN = -10_000.0
"""Added to the logits of padding."""


class UnimoShape(LanguageShape):
    """Sizes of the network; keys and values are those of the UNet's layers."""

    states_width: PositiveInt
    """Width of what the UNet is told."""


@dataclass(frozen=True)
class Told:
    """What the UNet is told by texts with pictures.

    Attributes:
        tokens: [B, L, states_width].
        seen: [B, L], False at padding.
        pictures: [B, K, L], 1 at the tokens of the text's k-th picture, else 0; K is the most that a text has.
    """

    tokens: Tensor
    seen: Tensor
    pictures: Tensor

    def bias(self) -> Tensor:
        """[B, 1, 1, L]: added to the logits, so that padding is not attended to."""
        return (~self.seen).to(self.tokens.dtype)[:, None, None] * HIDDEN


class UnimoModel(MultimodalModel[UnimoShape]):
    """The multimodal language model, two projections, and keys and values for each cross-attention layer.

    Args:
        shape: sizes.
        layers: number of the attention processor -> how wide its keys are; see `layer_widths`.

    Attributes:
        prompt: states of the language model -> tokens.
        visual: states of the image encoder -> tokens.
        layers: number of the attention processor, as in IP-Adapter's files -> ``to_k`` and ``to_v``.
    """

    def __init__(self, shape: UnimoShape, layers: Mapping[str, int]) -> None:
        super().__init__(shape)
        width = shape.states_width
        self.prompt = nn.Sequential(nn.Linear(shape.width, width), nn.LayerNorm(width))
        self.visual = nn.Sequential(nn.Linear(shape.reads, width), nn.LayerNorm(width))
        parts = ("to_k", "to_v")
        self.layers = nn.ModuleDict(
            {
                number: nn.ModuleDict({part: nn.Linear(width, inner, bias=False) for part in parts})
                for number, inner in layers.items()
            }
        )

    def widths(self) -> dict[str, int]:
        """How wide the keys of each layer are, as `layer_widths`."""
        stored = self.layers.state_dict()
        return {key.split(".")[0]: int(value.shape[0]) for key, value in stored.items() if ".to_k." in key}

    def keys_and_values(self, number: int, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, length, states_width] -> keys and values [rows, length, heads * head width] of a layer."""
        layer: Any = self.layers[str(number)]
        return layer["to_k"](tokens), layer["to_v"](tokens)

    def forward(self, told: Sequences, shown: Tensor | None = None) -> Told:
        """What the UNet is told by texts. No gradient reaches the language model or its eye.

        Args:
            told: texts.
            shown: [n, length, reads], states of all pictures before CLIP's last block, in the order of the texts;
                None: there are none.
        """
        with torch.no_grad():
            eyes = None if shown is None else self.eye(shown)
            states = self.states(told, None if eyes is None else self.connector(eyes))
        tokens, seen, slots = self.prompt(states), told.seen.to(states.device), told.slots.to(states.device)
        counts = slots.sum(1) // self.shape.image_tokens
        order = torch.arange(int(counts.max()), device=states.device)
        which = (slots.cumsum(1) - 1) // self.shape.image_tokens
        pictures = ((which[:, None] == order[:, None]) & slots[:, None]).to(tokens)
        if eyes is None:
            return Told(tokens, seen, pictures)
        there = order < counts[:, None]
        looks = tokens.new_zeros(*there.shape, *eyes.shape[1:2], tokens.shape[-1])
        looks = looks.masked_scatter(there[..., None, None], self.visual(eyes).to(looks))
        own = torch.eye(len(order), device=states.device).to(tokens).repeat_interleave(eyes.shape[1], dim=1)
        return Told(
            torch.cat([tokens, looks.flatten(1, 2)], dim=1),
            torch.cat([seen, there.repeat_interleave(eyes.shape[1], dim=1)], dim=1),
            torch.cat([pictures, there[..., None] * own], dim=2),
        )

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "prompt": self.prompt, "visual": self.visual, "layers": self.layers}


class UnimoReader(MultimodalReader[UnimoModel]):
    """UNIMO-G with CLIP's image encoder."""

    title = "UNIMO-G"
    file = FILE
    metadata = METADATA

    def forward(self, tokenizer: Any, texts: Sequence[str], pixels: Tensor | None = None) -> Told:
        """What the UNet is told by texts.

        Args:
            tokenizer: the base model's.
            texts: with `PICTURE` where a picture stands.
            pixels: [pictures, 3, side, side] of all of them, in order; None: there are none.

        Raises:
            InputError: as `sequences`.
        """
        shown = None if pixels is None else self.seen(pixels).to(self.model.connector.queries)
        return self.model(sequences(tokenizer, texts, self.model.shape), shown)


def layer_widths(unet: Any) -> dict[str, int]:
    """How wide the keys of each cross-attention layer are, by the number of its processor."""
    return {str(n): int(unet.get_submodule(name).to_k.weight.shape[0]) for name, n in layer_numbers(unet).items()}


def new_unimo(language: MultimodalReader[Any], backbone: Backbone, seed: int = 0) -> UnimoReader:
    """A network whose language model is one that was trained; keys and values start as copies of the UNet's.

    Args:
        language: any reader with a multimodal language model, such as KOSMOS-G's; it is only read.
        backbone: the base model's.
        seed: of the projections' first weights.
    """
    unet, known = backbone.unet, language.model
    sizes = {name: getattr(known.shape, name) for name in LanguageShape.model_fields}
    shape = UnimoShape(**sizes, states_width=int(unet.config.cross_attention_dim))
    torch.manual_seed(seed)
    model = UnimoModel(shape, layer_widths(unet))
    for name in ("language", "eye", "connector"):
        model.parts()[name].load_state_dict(known.parts()[name].state_dict())
    for name, number in layer_numbers(unet).items():
        attention, layer = unet.get_submodule(name), model.get_submodule(f"layers.{number}")
        for part in ("to_k", "to_v"):
            layer.get_submodule(part).load_state_dict({"weight": getattr(attention, part).weight.detach()})
    return UnimoReader(model.to(backbone.device), language.image_encoder.eval().requires_grad_(False))


# Files.


def find_unimo(model: Any, backbone: Backbone) -> UnimoReader:
    """The UNIMO-G of a folder, or as it is given; for this base model.

    Raises:
        ModelError: no such folder, keys that are missing or left over, or made for another base model.
    """
    if not isinstance(model, UnimoReader):
        folder = find_model(model, "UNIMO-G")
        return keep(backbone, ("unimo_g",), folder, lambda: load_unimo(folder, backbone))
    _check_width(model.model.shape, backbone)
    if model.model.widths() != layer_widths(backbone.unet):
        raise ModelError("This UNIMO-G was made for another base model: the layers differ. Use the one for this model.")
    return model


def load_unimo(folder: Path, backbone: Backbone) -> UnimoReader:
    """The network in a folder that `UnimoReader.save` wrote.

    Raises:
        ModelError: something is missing, left over or of another shape, or made for another base model.
    """
    shape = read_shape(folder, UnimoReader, UnimoShape)
    _check_width(shape, backbone)
    model = read_weights(folder, UnimoReader, UnimoModel(shape, layer_widths(backbone.unet)), backbone)
    return UnimoReader(model, encoder_beside(folder, backbone))


def _check_width(shape: UnimoShape, backbone: Backbone) -> None:
    width = int(backbone.unet.config.cross_attention_dim)
    if shape.states_width != width:
        raise ModelError(
            f"This UNIMO-G was made for another base model: its tokens are {shape.states_width} wide, this model reads "
            f"{width}. Use the one for this model."
        )


# Training.


@contextmanager
def told_attention(unet: Any, model: UnimoModel, told: Told, maps: list[Tensor] | None = None) -> Iterator[None]:
    """Let the cross-attentions of ``unet`` read what UNIMO-G tells in the place of the words, with gradients.

    Equal to ``stream(mode="replace", scale=1)`` of the engine. Afterwards the processors are as before.

    Args:
        unet: the reader.
        model: gives keys and values.
        told: one row for each of the UNet's.
        maps: gets of every layer [rows, K, queries], the attention that the k-th picture's tokens win, averaged over
            the heads; None: nobody asks.
    """
    layers = [(unet.get_submodule(name), number) for name, number in layer_numbers(unet).items()]
    before = [layer.processor for layer, _ in layers]
    try:
        for layer, number in layers:
            layer.processor = _Told(model, number, told, maps)
        yield
    finally:
        for (layer, _), processor in zip(layers, before, strict=True):
            layer.processor = processor


class _Told:
    """Cross-attention to UNIMO-G's tokens. Explicit: maps are asked for, and on a CPU it trains faster than SDPA."""

    def __init__(self, model: UnimoModel, number: int, told: Told, maps: list[Tensor] | None) -> None:
        self.model, self.number, self.told, self.maps = model, number, told, maps

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **named: Any) -> Tensor:
        q = _heads(attn.to_q(hidden_states), attn.heads)
        found = self.model.keys_and_values(self.number, self.told.tokens)
        k, v = (_heads(each.to(q.dtype), attn.heads) for each in found)
        weights = ((q @ k.transpose(-1, -2) * attn.scale).float() + self.told.bias().float()).softmax(-1)
        if self.maps is not None:
            self.maps.append(torch.einsum("bql,bkl->bkq", weights.mean(1), self.told.pictures.float()))
        out = (weights.to(v.dtype) @ v).transpose(1, 2).flatten(2)
        return attn.to_out[1](attn.to_out[0](out))


def _heads(x: Tensor, heads: int) -> Tensor:
    """[rows, length, heads * width] -> [rows, heads, length, width]"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)
