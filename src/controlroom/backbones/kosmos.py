"""KOSMOS-G (Pan et al., "Kosmos-G: Generating Images in Context with Multimodal Large Language Models", arXiv
2310.02992): a causal language model reads words and pictures in one sequence, and AlignerNet turns its states into what
a text encoder would give, so that the UNet stays as it is.

The language model is that of `controlroom.backbones.multimodal`. AlignerNet: a transformer over the M states, and as
many latent queries as the text encoder has tokens, which attend to it; its decoder goes the way back, for training.

Deviations: the language model is transformers' Llama with the base model's tokenizer and a table of words that serves
for input and output, where the published one is KOSMOS-1 (Magneto, xPos); layers of AlignerNet are torch's. Sizes are
stored with the weights. There are no public weights in a format that can be opened without running code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.multimodal import (
    LanguageShape,
    MultimodalModel,
    MultimodalReader,
    Sequences,
    encoder_beside,
    eye_sizes,
    read_shape,
    read_weights,
    sequences,
    take_eye,
)
from controlroom.core.backbone import Backbone
from controlroom.core.errors import ModelError

FILE = "kosmos.safetensors"
METADATA = "kosmos_g"


class KosmosShape(LanguageShape):
    """Sizes of the network; the image encoder's and the base model's come with them."""

    states: PositiveInt = 77
    """Tokens of the text encoder."""
    states_width: PositiveInt
    """Width of what the UNet is told."""
    aligner_layers: PositiveInt = 4
    """Of each of AlignerNet's four transformers; 12 as published."""
    aligner_heads: PositiveInt = 8


class KosmosModel(MultimodalModel[KosmosShape]):
    """The language model with its eye and AlignerNet.

    Attributes:
        aligner: states -> what the UNet is told, and back.
    """

    def __init__(self, shape: KosmosShape) -> None:
        super().__init__(shape)
        self.aligner = AlignerNet(shape)

    def forward(self, told: Sequences, pictures: Tensor | None = None) -> Tensor:
        """[B, tokens, states_width]: what the UNet is told by texts with pictures."""
        return self.aligner.encoder(self.states(told, pictures), told.seen)

    def parts(self) -> dict[str, nn.Module]:
        return {**super().parts(), "encoder": self.aligner.encoder, "decoder": self.aligner.decoder}


class AlignerNet(nn.Module):
    """From the language model's states to those of a text encoder, and back."""

    def __init__(self, shape: KosmosShape) -> None:
        super().__init__()
        self.encoder = AlignerEncoder(shape)
        self.decoder = AlignerDecoder(shape)

    def losses(self, states: Tensor, seen: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Errors [B] of the way there and of the way back, and what the way there gave.

        The way back counts where there are words, and as many tokens over M as much as published: times states / M.

        Args:
            states: [B, M, width] of the language model.
            seen: [B, M], False at padding.
            target: [B, tokens, states_width] of the text encoder for the same text.
        """
        found = self.encoder(states, seen)
        there = (found.float() - target.float()).square().mean(dim=(1, 2))
        again = self.decoder(found, states.shape[1])
        keep = seen.to(states)
        count = keep.sum(1)
        back = ((again.float() - states.float()).square().mean(-1) * keep).sum(1) / count
        return there, back * (target.shape[1] / count), found


class AlignerEncoder(nn.Module):
    """M states -> as many as a text encoder gives."""

    def __init__(self, shape: KosmosShape) -> None:
        super().__init__()
        width = shape.states_width
        self.proj_in = nn.Linear(shape.width, width)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.length, width))
        self.reader = _encoder(shape)
        self.queries = nn.Parameter(torch.randn(shape.states, width))
        self.writer = _decoder(shape)

    def forward(self, states: Tensor, seen: Tensor) -> Tensor:
        """[B, M, width], [B, M] -> [B, tokens, states_width]"""
        hidden = ~seen.to(states.device)
        read = self.proj_in(states) + self.positions[: states.shape[1]]
        read = self.reader(read, src_key_padding_mask=hidden)
        queries = self.queries.expand(len(states), -1, -1)
        return self.writer(queries, read, memory_key_padding_mask=hidden)


class AlignerDecoder(nn.Module):
    """The way back, for training."""

    def __init__(self, shape: KosmosShape) -> None:
        super().__init__()
        width = shape.states_width
        self.queries = nn.Parameter(torch.randn(shape.length, width))
        self.writer = _decoder(shape)
        self.positions = nn.Parameter(0.02 * torch.randn(shape.length, width))
        self.reader = _encoder(shape)
        self.proj_out = nn.Linear(width, shape.width)

    def forward(self, found: Tensor, count: int) -> Tensor:
        """[B, tokens, states_width] -> [B, count, width]"""
        written = self.writer(self.queries[:count].expand(len(found), -1, -1), found)
        return self.proj_out(self.reader(written + self.positions[:count]))


def _encoder(shape: KosmosShape) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(**_layer(shape))
    norm = nn.LayerNorm(shape.states_width)
    return nn.TransformerEncoder(layer, shape.aligner_layers, norm, enable_nested_tensor=False)


def _decoder(shape: KosmosShape) -> nn.TransformerDecoder:
    layer = nn.TransformerDecoderLayer(**_layer(shape))
    return nn.TransformerDecoder(layer, shape.aligner_layers, nn.LayerNorm(shape.states_width))


def _layer(shape: KosmosShape) -> dict[str, Any]:
    return {
        "d_model": shape.states_width,
        "nhead": shape.aligner_heads,
        "dim_feedforward": 4 * shape.states_width,
        "dropout": 0.0,
        "activation": "gelu",
        "batch_first": True,
        "norm_first": True,
    }


# With the image encoder.


class KosmosReader(MultimodalReader[KosmosModel]):
    """KOSMOS-G with CLIP's image encoder."""

    title = "KOSMOS-G"
    file = FILE
    metadata = METADATA

    def forward(self, tokenizer: Any, texts: Sequence[str], pixels: Tensor | None = None) -> Tensor:
        """What the UNet is told by texts: [n, tokens, states_width].

        Args:
            tokenizer: the base model's.
            texts: with `PICTURE` where a picture stands.
            pixels: [pictures, 3, side, side] of all of them, in order; None: there are none.

        Raises:
            InputError: as `sequences`.
        """
        shown = None if pixels is None else self.model.pictures(self.seen(pixels).to(self.model.connector.queries))
        return self.model(sequences(tokenizer, texts, self.model.shape), shown)


def new_kosmos(image_encoder: Any, backbone: Backbone, seed: int = 0, **sizes: Any) -> KosmosReader:
    """An untrained network for a base model; its eye is the image encoder's last block.

    Args:
        image_encoder: a `CLIPVisionModelWithProjection`.
        backbone: the base model's.
        seed: of the first weights.
        sizes: of `KosmosShape`, that differ from its defaults.
    """
    tokenizer = backbone.tokenizers()[0]
    shape = KosmosShape(
        words=len(tokenizer),
        states=int(tokenizer.model_max_length),
        states_width=int(backbone.unet.config.cross_attention_dim),
        **eye_sizes(image_encoder),
        **sizes,
    )
    torch.manual_seed(seed)
    model = KosmosModel(shape)
    take_eye(model, image_encoder)
    return KosmosReader(model.to(backbone.device), image_encoder.eval().requires_grad_(False))


def find_kosmos(model: Any, backbone: Backbone) -> KosmosReader:
    """The KOSMOS-G of a folder, or as it is given; for this base model.

    Raises:
        ModelError: no such folder, keys that are missing or left over, or made for another base model.
    """
    if isinstance(model, KosmosReader):
        found = model
    else:
        folder = find_model(model, "KOSMOS-G")
        found = keep(backbone, ("kosmos_g",), folder, lambda: load_kosmos(folder, backbone))
    shape, width = found.model.shape, int(backbone.unet.config.cross_attention_dim)
    length = int(backbone.tokenizers()[0].model_max_length)
    if (shape.states, shape.states_width) != (length, width):
        raise ModelError(
            f"This KOSMOS-G was made for another base model: it gives {shape.states} tokens of width "
            f"{shape.states_width}, this model reads {length} of {width}. Use the one for this model."
        )
    return found


def load_kosmos(folder: Path, backbone: Backbone) -> KosmosReader:
    """The network in a folder that `KosmosReader.save` wrote.

    Raises:
        ModelError: something is missing, left over or of another shape.
    """
    model = read_weights(folder, KosmosReader, KosmosModel(read_shape(folder, KosmosReader, KosmosShape)), backbone)
    return KosmosReader(model, encoder_beside(folder, backbone))
