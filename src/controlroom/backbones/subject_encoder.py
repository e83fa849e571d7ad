"""BLIP-Diffusion's multimodal encoder (Li et al., arXiv 2305.14720; its Q-Former: BLIP-2, arXiv 2301.12597).

A few learned queries read a picture, beside the word for what is wanted of it, and become a subject's vectors in the
space of a text encoder's token embeddings. Parameters are named as in the folder ``qformer`` of the published model in
diffusers' layout. That one reads pixels through a network of its own; without it (``vision_config`` is null) the states
of a CLIP image encoder in the folder ``image_encoder`` beside are read, and words by the base model's tokenizer.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

Activation = Literal["gelu", "quick_gelu"]


class QFormerShape(BaseModel):
    """Sizes of a Q-Former; names and defaults are transformers'."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: Activation = "gelu"
    layer_norm_eps: float = 1e-12
    cross_attention_frequency: int = 2
    encoder_hidden_size: int = 1408
    vocab_size: int = 30522
    max_position_embeddings: int = 512


class VisionShape(BaseModel):
    """Sizes of the network that reads pixels; names and defaults are transformers'."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    hidden_size: int = 1408
    intermediate_size: int = 6144
    num_hidden_layers: int = 39
    num_attention_heads: int = 16
    image_size: int = 224
    patch_size: int = 14
    hidden_act: Activation = "gelu"
    layer_norm_eps: float = 1e-6
    qkv_bias: bool = True


class EncoderShape(BaseModel):
    """Sizes of the whole encoder: the content of its ``config.json``."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    qformer_config: QFormerShape = QFormerShape()
    vision_config: VisionShape | None = None
    num_query_tokens: int = 16


class SubjectEncoder(nn.Module):
    """A picture and the word for a subject -> vectors like those of words.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.shape = shape
        former = shape.qformer_config
        width = former.hidden_size
        self.embeddings = _WordEmbeddings(former)
        self.visual_encoder = None if shape.vision_config is None else _Vision(shape.vision_config)
        self.query_tokens = nn.Parameter(torch.randn(1, shape.num_query_tokens, width) * 0.02)
        self.proj_layer = _Projection(width)
        self.encoder = _Layers(former)

    @classmethod
    def beside_words(cls, shape: EncoderShape, table: Tensor) -> SubjectEncoder:
        """One to be trained, whose first vectors are as large as those of words in a text encoder's table."""
        found = cls(shape)
        last: Any = found.encoder.layer[-1]
        with torch.no_grad():
            last.output_query.LayerNorm.weight.fill_(float(table.detach().float().std()))
            found.proj_layer.dense2.weight.zero_()
            found.proj_layer.dense2.bias.zero_()
        return found

    @property
    def queries(self) -> int:
        """Vectors of a subject."""
        return self.shape.num_query_tokens

    @property
    def width(self) -> int:
        """Of each vector."""
        return self.shape.qformer_config.hidden_size

    def forward(self, seen: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """[n, queries, width].

        Args:
            seen: [n, 3, side, side], normalised as for CLIP; without a network for pixels, states [n, length, reads].
            ids: [n, length] of the words, with start and end.
            mask: [n, length], 0 at padding.
        """
        states = seen if self.visual_encoder is None else self.visual_encoder(seen)
        rows, queries = len(ids), self.queries
        hidden = torch.cat([self.query_tokens.expand(rows, -1, -1), self.embeddings(ids)], dim=1)
        hidden = self.embeddings.LayerNorm(hidden)
        kept = torch.cat([mask.new_ones(rows, queries), mask], dim=1).to(hidden.dtype)
        hidden = self.encoder(hidden, (1 - kept)[:, None, None, :] * -10_000.0, states, queries)
        return self.proj_layer(hidden[:, :queries])


class _WordEmbeddings(nn.Module):
    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.position_embeddings = nn.Embedding(shape.max_position_embeddings, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, ids: Tensor) -> Tensor:
        places = torch.arange(ids.shape[1], device=ids.device)
        return self.word_embeddings(ids) + self.position_embeddings(places)


class _Projection(nn.Module):
    """Into the space of token embeddings."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dense1 = nn.Linear(width, 4 * width)
        self.dense2 = nn.Linear(4 * width, width)
        self.LayerNorm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dense2(_activated(self.dense1(self.LayerNorm(x)), "quick_gelu"))


class _Layers(nn.Module):
    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            _Layer(shape, crossing=i % shape.cross_attention_frequency == 0) for i in range(shape.num_hidden_layers)
        )

    def forward(self, hidden: Tensor, bias: Tensor, states: Tensor, queries: int) -> Tensor:
        for layer in self.layer:
            hidden = layer(hidden, bias, states, queries)
        return hidden


class _Layer(nn.Module):
    """Queries and words attend to each other; then the queries to the picture; each has a network of its own."""

    def __init__(self, shape: QFormerShape, crossing: bool) -> None:
        super().__init__()
        self.attention = _Attention(shape, shape.hidden_size)
        self.crossattention = _Attention(shape, shape.encoder_hidden_size) if crossing else None
        self.intermediate, self.output = _Widened(shape), _Residual(shape, shape.intermediate_size)
        self.intermediate_query, self.output_query = _Widened(shape), _Residual(shape, shape.intermediate_size)

    def forward(self, hidden: Tensor, bias: Tensor, states: Tensor, queries: int) -> Tensor:
        hidden = self.attention(hidden, hidden, bias)
        read, words = hidden[:, :queries], hidden[:, queries:]
        if self.crossattention is not None:
            read = self.crossattention(read, states, None)
        read = self.output_query(self.intermediate_query(read), read)
        return torch.cat([read, self.output(self.intermediate(words), words)], dim=1)


class _Attention(nn.Module):
    def __init__(self, shape: QFormerShape, reads: int) -> None:
        super().__init__()
        self.attention = _Projections(shape, reads)
        self.output = _Residual(shape, shape.hidden_size)

    def forward(self, hidden: Tensor, states: Tensor, bias: Tensor | None) -> Tensor:
        return self.output(self.attention(hidden, states, bias), hidden)


class _Projections(nn.Module):
    def __init__(self, shape: QFormerShape, reads: int) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        self.query = nn.Linear(shape.hidden_size, shape.hidden_size)
        self.key = nn.Linear(reads, shape.hidden_size)
        self.value = nn.Linear(reads, shape.hidden_size)

    def forward(self, hidden: Tensor, states: Tensor, bias: Tensor | None) -> Tensor:
        q, k, v = (
            x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for x in (self.query(hidden), self.key(states), self.value(states))
        )
        bias = None if bias is None else bias.to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


class _Widened(nn.Module):
    def __init__(self, shape: QFormerShape) -> None:
        super().__init__()
        self.dense = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.kind: Activation = shape.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        return _activated(self.dense(hidden), self.kind)


class _Residual(nn.Module):
    def __init__(self, shape: QFormerShape, reads: int) -> None:
        super().__init__()
        self.dense = nn.Linear(reads, shape.hidden_size)
        self.LayerNorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, hidden: Tensor, before: Tensor) -> Tensor:
        return self.LayerNorm(self.dense(hidden) + before)


class _Vision(nn.Module):
    """[n, 3, side, side] -> [n, 1 + patches, width]."""

    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.embeddings = _Patches(shape)
        self.pre_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)
        self.encoder = _VisionLayers(shape)
        self.post_layernorm = nn.LayerNorm(shape.hidden_size, eps=shape.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.post_layernorm(self.encoder(self.pre_layernorm(self.embeddings(pixels))))


class _Patches(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        width, side = shape.hidden_size, shape.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, width))
        self.patch_embedding = nn.Conv2d(3, width, kernel_size=side, stride=side, bias=False)
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + (shape.image_size // side) ** 2, width))

    def forward(self, pixels: Tensor) -> Tensor:
        found = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        return torch.cat([self.class_embedding.expand(len(found), -1, -1), found], dim=1) + self.position_embedding


class _VisionLayers(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_VisionLayer(shape) for _ in range(shape.num_hidden_layers))

    def forward(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden


class _VisionLayer(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        width, eps = shape.hidden_size, shape.layer_norm_eps
        self.self_attn = _VisionAttention(shape)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.mlp = _Mlp(shape)

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.self_attn(self.layer_norm1(hidden))
        return hidden + self.mlp(self.layer_norm2(hidden))


class _VisionAttention(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.heads = shape.num_attention_heads
        self.qkv = nn.Linear(shape.hidden_size, 3 * shape.hidden_size, bias=shape.qkv_bias)
        self.projection = nn.Linear(shape.hidden_size, shape.hidden_size)

    def forward(self, hidden: Tensor) -> Tensor:
        q, k, v = self.qkv(hidden).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.projection(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Mlp(nn.Module):
    def __init__(self, shape: VisionShape) -> None:
        super().__init__()
        self.fc1 = nn.Linear(shape.hidden_size, shape.intermediate_size)
        self.fc2 = nn.Linear(shape.intermediate_size, shape.hidden_size)
        self.kind: Activation = shape.hidden_act

    def forward(self, hidden: Tensor) -> Tensor:
        return self.fc2(_activated(self.fc1(hidden), self.kind))


def _activated(x: Tensor, kind: Activation) -> Tensor:
    return F.gelu(x) if kind == "gelu" else x * torch.sigmoid(1.702 * x)
