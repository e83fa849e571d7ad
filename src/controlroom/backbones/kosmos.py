"""KOSMOS-G (Pan et al., "Kosmos-G: Generating Images in Context with Multimodal Large Language Models", arXiv
2310.02992): a causal language model reads words and pictures in one sequence, and AlignerNet turns its states into what
a text encoder would give, so that the UNet stays as it is.

A picture: the last block of CLIP's image encoder, then latent queries that attend to its states and to themselves. The
sequence: start, words, <image>, the picture's vectors, </image>, words. AlignerNet: a transformer over the M states,
and as many latent queries as the text encoder has tokens, which attend to it; its decoder goes the way back, for
training.

Deviations: the language model is transformers' Llama with the base model's tokenizer and a table of words that serves
for input and output, where the published one is KOSMOS-1 (Magneto, xPos); layers of AlignerNet are torch's. Sizes are
stored with the weights. There are no public weights in a format that can be opened without running code.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor, nn

from controlroom.backbones.image_encoder import check_image_encoder, image_features, load_image_encoder
from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.model_files import read_metadata, read_safetensors
from controlroom.backbones.words import content_ids
from controlroom.core.backbone import Backbone
from controlroom.core.errors import InputError, ModelError

PICTURE = "<image>"
"""Where a picture stands in a text."""
FILE = "kosmos.safetensors"
METADATA = "kosmos_g"


class KosmosShape(BaseModel):
    """Sizes of the network; the image encoder's and the base model's come with them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: PositiveInt
    """Tokens of the tokenizer; the marks around a picture come behind them."""
    width: PositiveInt = 512
    """Of the language model."""
    layers: PositiveInt = 8
    heads: PositiveInt = 8
    image_tokens: PositiveInt = 64
    """Vectors of a picture."""
    length: PositiveInt = 512
    """Most tokens of a text with its pictures."""
    reads: PositiveInt
    """Width of the image encoder's states."""
    eye_heads: PositiveInt
    eye_hidden: PositiveInt
    eye_act: str = "quick_gelu"
    eye_eps: PositiveFloat = 1e-5
    states: PositiveInt = 77
    """Tokens of the text encoder."""
    states_width: PositiveInt
    """Width of what the UNet is told."""
    aligner_layers: PositiveInt = 4
    """Of each of AlignerNet's four transformers; 12 as published."""
    aligner_heads: PositiveInt = 8


@dataclass(frozen=True)
class Sequences:
    """Texts with pictures as the language model reads them.

    Attributes:
        ids: [B, M] tokens; the mark of a picture where its vectors stand.
        slots: [B, M], whether a picture's vector stands there.
        seen: [B, M], False at padding.
    """

    ids: Tensor
    slots: Tensor
    seen: Tensor


def sequences(tokenizer: Any, texts: Sequence[str], shape: KosmosShape, end: bool = False) -> Sequences:
    """Texts in which `PICTURE` stands for a picture.

    Args:
        tokenizer: the base model's.
        texts: words and `PICTURE`.
        shape: of the network.
        end: whether the end token is there too (for the language model's own training).

    Raises:
        InputError: longer than the network reads, or with a word that was learned after the network.
    """
    opens, closes = shape.words, shape.words + 1
    rows: list[list[int]] = []
    places: list[list[bool]] = []
    for text in texts:
        row, slots = [int(tokenizer.bos_token_id)], [False]
        for number, piece in enumerate(str(text).split(PICTURE)):
            if number:
                row += [opens] * (1 + shape.image_tokens) + [closes]
                slots += [False, *[True] * shape.image_tokens, False]
            found = content_ids(tokenizer, piece)
            if any(token >= shape.words for token in found):
                raise InputError(
                    f"{text!r:.80} has a learned word, which KOSMOS-G's language model does not know. Show a picture "
                    "instead of the word, or leave one of the two out."
                )
            row += found
            slots += [False] * len(found)
        if end:
            row.append(int(tokenizer.eos_token_id))
            slots.append(False)
        if len(row) > shape.length:
            raise InputError(
                f"{text!r:.80} has {len(row)} tokens with its pictures, KOSMOS-G reads {shape.length}. Shorten it."
            )
        rows.append(row)
        places.append(slots)
    most = max(len(row) for row in rows)
    pad = int(tokenizer.eos_token_id)
    return Sequences(
        torch.tensor([row + [pad] * (most - len(row)) for row in rows]),
        torch.tensor([slots + [False] * (most - len(slots)) for slots in places]),
        torch.tensor([[True] * len(row) + [False] * (most - len(row)) for row in rows]),
    )


class KosmosModel(nn.Module):
    """The language model with its eye and AlignerNet.

    Attributes:
        shape: sizes.
        language: words and vectors of pictures -> states.
        eye: the last block of CLIP's image encoder, which learns.
        connector: states of a picture -> vectors.
        aligner: states -> what the UNet is told, and back.
    """

    def __init__(self, shape: KosmosShape) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaModel

        self.shape = shape
        config = LlamaConfig(
            vocab_size=shape.words + 2,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            max_position_embeddings=shape.length,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
        self.language = LlamaModel(config)
        self.eye = Eye(shape)
        self.connector = Connector(shape.reads, shape.width, shape.image_tokens, shape.heads)
        self.aligner = AlignerNet(shape)

    def pictures(self, states: Tensor) -> Tensor:
        """States of pictures [n, length, reads] before CLIP's last block -> [n, image_tokens, width]."""
        return self.connector(self.eye(states))

    def states(self, told: Sequences, pictures: Tensor | None = None) -> Tensor:
        """[B, M, width]: last states of the language model.

        Args:
            told: texts.
            pictures: [n, image_tokens, width] of all of them, in the order of the texts; None: there are none.
        """
        device = self.language.embed_tokens.weight.device
        ids, slots, seen = told.ids.to(device), told.slots.to(device), told.seen.to(device)
        vectors = self.language.embed_tokens(ids)
        if pictures is not None:
            vectors = vectors.masked_scatter(slots[..., None], pictures.to(vectors))
        return self.language(inputs_embeds=vectors, attention_mask=seen.long()).last_hidden_state

    def logits(self, states: Tensor) -> Tensor:
        """[B, M, words + 2] of states: what comes next."""
        return F.linear(states, self.language.embed_tokens.weight)

    def forward(self, told: Sequences, pictures: Tensor | None = None) -> Tensor:
        """[B, tokens, states_width]: what the UNet is told by texts with pictures."""
        return self.aligner.encoder(self.states(told, pictures), told.seen)

    def parts(self) -> dict[str, nn.Module]:
        """What stages of training move one by one."""
        return {
            "language": self.language,
            "eye": self.eye,
            "connector": self.connector,
            "encoder": self.aligner.encoder,
            "decoder": self.aligner.decoder,
        }


class Eye(nn.Module):
    """The last block of CLIP's image encoder, and its norm, over all states."""

    def __init__(self, shape: KosmosShape) -> None:
        super().__init__()
        from transformers import CLIPVisionConfig
        from transformers.models.clip.modeling_clip import CLIPEncoderLayer

        config = CLIPVisionConfig(
            hidden_size=shape.reads,
            intermediate_size=shape.eye_hidden,
            num_attention_heads=shape.eye_heads,
            hidden_act=shape.eye_act,
            layer_norm_eps=shape.eye_eps,
        )
        config._attn_implementation = "sdpa"
        self.block = CLIPEncoderLayer(config)
        self.norm = nn.LayerNorm(shape.reads, eps=shape.eye_eps)

    def forward(self, states: Tensor) -> Tensor:
        return self.norm(self.block(states, attention_mask=None))


class Connector(nn.Module):
    """Latent queries attend to the states of a picture and to themselves, once."""

    def __init__(self, reads: int, width: int, tokens: int, heads: int) -> None:
        super().__init__()
        self.dense = nn.Linear(reads, width)
        self.queries = nn.Parameter(torch.randn(tokens, width))
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, states: Tensor) -> Tensor:
        """[n, length, reads] -> [n, tokens, width]"""
        queries = self.queries.expand(len(states), -1, -1)
        read = torch.cat([self.dense(states), queries], dim=1)
        return self.attention(queries, read, read, need_weights=False)[0]


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


class KosmosReader(nn.Module):
    """The network with CLIP's image encoder, whose blocks before the last stay as they are.

    Attributes:
        model, image_encoder: the parts.

    Raises:
        ModelError: an image encoder of another width.
    """

    def __init__(self, model: KosmosModel, image_encoder: Any) -> None:
        super().__init__()
        check_image_encoder(image_encoder)
        self.model, self.image_encoder = model, image_encoder
        if int(image_encoder.config.hidden_size) != model.shape.reads:
            raise ModelError(
                f"The image encoder's states are {image_encoder.config.hidden_size} wide, this KOSMOS-G reads "
                f"{model.shape.reads}. Give the one that belongs to it."
            )

    @property
    def side(self) -> int:
        """Of the pictures that it reads, in pixels."""
        return int(self.image_encoder.config.image_size)

    @torch.no_grad()
    def seen(self, pixels: Tensor) -> Tensor:
        """[n, length, reads]: states before CLIP's last block, of pixels from `clip_pixels`."""
        return image_features(self.image_encoder, pixels, states=True)

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

    def save(self, folder: Path) -> None:
        """Write both, as `find_kosmos` reads them; in float32."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().float().cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
        about = {"format": "pt", METADATA: self.model.shape.model_dump_json()}
        save_file(tensors, str(folder / FILE), about)
        self.image_encoder.save_pretrained(folder / "image_encoder")


def new_kosmos(image_encoder: Any, backbone: Backbone, seed: int = 0, **sizes: int) -> KosmosReader:
    """An untrained network for a base model; its eye is the image encoder's last block.

    Args:
        image_encoder: a `CLIPVisionModelWithProjection`.
        backbone: the base model's.
        seed: of the first weights.
        sizes: of `KosmosShape`, that differ from its defaults.
    """
    check_image_encoder(image_encoder)
    config, tokenizer = image_encoder.config, backbone.tokenizers()[0]
    shape = KosmosShape(
        words=len(tokenizer),
        reads=int(config.hidden_size),
        eye_heads=int(config.num_attention_heads),
        eye_hidden=int(config.intermediate_size),
        eye_act=str(config.hidden_act),
        eye_eps=float(config.layer_norm_eps),
        states=int(tokenizer.model_max_length),
        states_width=int(backbone.unet.config.cross_attention_dim),
        **sizes,
    )
    torch.manual_seed(seed)
    model = KosmosModel(shape)
    vision = image_encoder.vision_model
    model.eye.block.load_state_dict(copy.deepcopy(vision.encoder.layers[-1].state_dict()))
    model.eye.norm.load_state_dict(copy.deepcopy(vision.post_layernorm.state_dict()))
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
    file = folder / FILE
    if not file.is_file():
        raise ModelError(f"{folder} holds no {FILE}. Give the folder that the training of a KOSMOS-G wrote.")
    try:
        shape = KosmosShape(**json.loads(read_metadata(file).get(METADATA, "{}")))
    except (ValidationError, ValueError, TypeError) as error:
        raise ModelError(f"{file} does not say the sizes of a KOSMOS-G ({METADATA} in its metadata).") from error
    stored, model = read_safetensors(file), KosmosModel(shape)
    expected = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    for key, wanted in expected.items():
        if key not in stored or tuple(stored[key].shape) != wanted:
            found = f"has {list(stored[key].shape)} for" if key in stored else "lacks"
            raise ModelError(f"{file} {found} {key!r}; its sizes ask for {list(wanted)}.")
    if left := sorted(stored.keys() - expected.keys()):
        raise ModelError(f"{file} has {len(left)} weights that nothing reads, such as {left[0]!r}.")
    model.load_state_dict(stored)
    model = model.to(device=backbone.device, dtype=backbone.dtype).eval().requires_grad_(False)
    if not (folder / "image_encoder" / "config.json").is_file():
        raise ModelError(f"{folder} needs its image encoder in image_encoder/. Copy it there.")
    return KosmosReader(model, load_image_encoder(folder / "image_encoder", backbone))
