"""BLIP-Diffusion's multimodal encoder (Li et al., arXiv 2305.14720; its Q-Former: BLIP-2, arXiv 2301.12597).

A few learned queries read a picture, beside the word for what is wanted of it, and become a subject's vectors in the
space of a text encoder's token embeddings. Parameters are named as in the folder ``qformer`` of the published model in
diffusers' layout. That one reads pixels through a network of its own; without it (``vision_config`` is null) the states
of a CLIP image encoder in the folder ``image_encoder`` beside are read, and words by the base model's tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from controlroom.backbones.base import expand_learned_words
from controlroom.backbones.image_encoder import check_image_encoder, image_features, load_image_encoder
from controlroom.backbones.loading import find_model
from controlroom.backbones.model_files import explained, load_strictly, read_json, read_safetensors
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Condition
from controlroom.core.errors import ModelError

Activation = Literal["gelu", "quick_gelu"]
BERT = "google-bert/bert-base-uncased"
"""Whose words the published model reads."""


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


# With what it reads.


class SubjectReader(nn.Module):
    """An encoder with the tokenizer of its words and, where it has no network for pixels, an image encoder.

    Attributes:
        encoder, tokenizer, image_encoder: the parts.

    Raises:
        ModelError: an image encoder that is missing, or of another width.
    """

    def __init__(self, encoder: SubjectEncoder, tokenizer: Any, image_encoder: Any = None) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.image_encoder = encoder, tokenizer, image_encoder
        reads = encoder.shape.qformer_config.encoder_hidden_size
        if encoder.visual_encoder is None:
            check_image_encoder(image_encoder)
            if int(image_encoder.config.hidden_size) != reads:
                raise ModelError(
                    f"The image encoder's states are {image_encoder.config.hidden_size} wide, the subject encoder "
                    f"reads {reads}. Give the one that belongs to it."
                )

    @property
    def side(self) -> int:
        """Of the pictures that it reads, in pixels."""
        vision = self.encoder.shape.vision_config
        return int(self.image_encoder.config.image_size) if vision is None else vision.image_size

    def seen(self, pixels: Tensor) -> Tensor:
        """What the encoder reads of pictures [n, 3, side, side] that are normalised as for CLIP."""
        if self.encoder.visual_encoder is None:
            pixels = image_features(self.image_encoder, pixels, states=True)
        parameter = self.encoder.query_tokens
        return pixels.to(parameter.device, parameter.dtype)

    def words(self, words: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids [n, length] of words, with start and end; and 0 at padding."""
        found = self.tokenizer(list(words), padding=True, return_tensors="pt")
        device = self.encoder.query_tokens.device
        return found.input_ids.to(device), found.attention_mask.to(device)

    def forward(self, pixels: Tensor, words: Sequence[str]) -> Tensor:
        """[n, queries, width] of pictures and what they show."""
        return self.encoder(self.seen(pixels), *self.words(words))


def load_subject_reader(folder: Path, backbone: Backbone) -> SubjectReader:
    """The encoder in a folder: that of a published model, its ``qformer``, or what `save_subject_reader` wrote.

    Raises:
        ModelError: something is missing, left over, or of another shape.
    """
    place = folder / "qformer" if (folder / "qformer").is_dir() else folder
    shape = encoder_shape(place)
    stored: dict[str, Tensor] = {}
    files = sorted(place.glob("*.safetensors"))
    if not files:
        raise ModelError(f"{place} holds no .safetensors file of a subject encoder (pickles are never opened).")
    for file in files:
        stored |= read_safetensors(file)
    stored = {key: value for key, value in stored.items() if not key.endswith("position_ids")}
    encoder = SubjectEncoder(shape)
    load_strictly(encoder, stored, str(place), "the sizes in its config.json")
    encoder = encoder.to(device=backbone.device, dtype=backbone.dtype).eval().requires_grad_(False)
    if shape.vision_config is not None:
        return SubjectReader(encoder, _bert(place))
    near = [each / "image_encoder" for each in (place, place.parent)]
    found_encoder = next((each for each in near if (each / "config.json").is_file()), None)
    if found_encoder is None:
        raise ModelError(f"{place} needs an image encoder beside it, in {near[0]}. Copy it there.")
    return SubjectReader(encoder, backbone.tokenizers()[0], load_image_encoder(found_encoder, backbone))


def encoder_shape(place: Path) -> EncoderShape:
    """Sizes out of a ``config.json``; of a published model, that of its ``qformer``.

    Raises:
        ModelError: it is missing, or not one of a subject encoder.
    """
    folder = place / "qformer" if (place / "qformer").is_dir() else place
    data = read_json(folder / "config.json")
    if "qformer_config" not in data:
        raise ModelError(f"{folder / 'config.json'} is not that of a subject encoder: it has no qformer_config.")
    try:
        return EncoderShape(**data)
    except ValidationError as error:
        raise ModelError(f"{folder / 'config.json'} cannot be used: {error.errors()[0]['msg']}.") from error


def save_subject_reader(reader: SubjectReader, folder: Path) -> None:
    """Write an encoder without a network for pixels, with its image encoder, as `load_subject_reader` reads it."""
    from safetensors.torch import save_file

    tensors = {k: v.detach().float().cpu().contiguous() for k, v in reader.encoder.state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(folder / "model.safetensors"), {"format": "pt"})
    config = {"model_type": "blip-2", **reader.encoder.shape.model_dump()}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    reader.image_encoder.save_pretrained(folder / "image_encoder")


def _bert(place: Path) -> Any:
    folder = place / "tokenizer" if (place / "tokenizer").is_dir() else find_model(BERT, "tokenizer of BERT")
    from transformers import BertTokenizer

    return explained(str(folder), lambda: BertTokenizer.from_pretrained(str(folder), local_files_only=True))


# Into the text encoders.

POSITION = 2
"""Where the subject stands in the prompt: behind the start and the article."""


def ids_with_room(tokenizer: Any, prompts: Sequence[str], count: int) -> Tensor:
    """[rows, 77] token ids with ``count`` start tokens at `POSITION`, whose embeddings are to be replaced."""
    texts = [expand_learned_words(str(prompt), tokenizer) for prompt in prompts]
    length = int(tokenizer.model_max_length) - count
    ids = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
    room = torch.full((len(texts), count), int(tokenizer.bos_token_id))
    return torch.cat([ids[:, :POSITION], room, ids[:, POSITION:]], dim=1)


@contextmanager
def spliced(encoders: Sequence[Any], vectors: Tensor) -> Iterator[None]:
    """Let text encoders read vectors in the place of the embeddings of some tokens.

    Args:
        encoders: the base model's, in the order in which their states are joined.
        vectors: [rows or 1, count, width], as wide as all encoders' embeddings together.

    Raises:
        ModelError: another width.
    """
    tables = [encoder.get_input_embeddings() for encoder in encoders]
    widths = [int(table.weight.shape[1]) for table in tables]
    if vectors.shape[-1] != sum(widths):
        raise ModelError(
            f"The subject's vectors are {vectors.shape[-1]} wide, this model's words {sum(widths)}. Use the model that "
            "they were made for."
        )

    def hook(part: Tensor) -> Any:
        def replace(module: Any, inputs: Any, output: Tensor) -> Tensor:
            own = part.to(output).expand(len(output), -1, -1)
            return torch.cat([output[:, :POSITION], own, output[:, POSITION + own.shape[1] :]], dim=1)

        return replace

    with ExitStack() as stack:
        for table, part in zip(tables, vectors.split(widths, dim=-1), strict=True):
            handle = table.register_forward_hook(hook(part))
            stack.callback(handle.remove)
        yield


def told_with(
    backbone: Any,
    prompts: Sequence[str],
    vectors: Tensor,
    size: tuple[int, int] | None = None,
    clip_skip: int | None = None,
) -> Condition:
    """What the network is told by prompts with a subject's vectors in them, one row for each prompt.

    Args:
        backbone: its text encoders read them.
        prompts: words; the subject stands behind the first.
        vectors: [rows or 1, count, width].
        size: height and width of the picture in pixels (SDXL is told it).
        clip_skip: layers of CLIP to leave out at the end.

    Raises:
        ModelError: vectors of another width.
    """
    ids = [ids_with_room(each, prompts, vectors.shape[1]) for each in backbone.tokenizers()]
    encoders = [each for each in (backbone.text_encoder, backbone.text_encoder_2) if each is not None]
    with spliced(encoders, vectors):
        return backbone.encode_ids(ids, size=size, clip_skip=clip_skip)
