"""A multimodal language model: a causal language model that reads words and pictures in one sequence.

A picture: the last block of CLIP's image encoder, then latent queries that attend to its states and to themselves. The
sequence: start, words, <image>, the picture's vectors, </image>, words. What KOSMOS-G (arXiv 2310.02992) and UNIMO-G
(arXiv 2401.13388) tell the UNet is made of its last states.

The language model is transformers' Llama with the base model's tokenizer and a table of words that serves for input and
output. Sizes are stored with the weights.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat, PositiveInt, ValidationError
from torch import Tensor, nn

from controlroom.backbones.image_encoder import check_image_encoder, image_features, load_image_encoder
from controlroom.backbones.model_files import load_strictly, read_metadata, read_safetensors
from controlroom.backbones.words import content_ids
from controlroom.core.backbone import Backbone
from controlroom.core.errors import InputError, ModelError

PICTURE = "<image>"
"""Where a picture stands in a text."""


class LanguageShape(BaseModel):
    """Sizes of the language model and its eye; the image encoder's and the base model's come with them."""

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


def sequences(tokenizer: Any, texts: Sequence[str], shape: LanguageShape, end: bool = False) -> Sequences:
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
                    f"{text!r:.80} has a learned word, which the language model does not know. Show a picture instead "
                    "of the word, or leave one of the two out."
                )
            row += found
            slots += [False] * len(found)
        if end:
            row.append(int(tokenizer.eos_token_id))
            slots.append(False)
        if len(row) > shape.length:
            raise InputError(
                f"{text!r:.80} has {len(row)} tokens with its pictures, the language model reads {shape.length}. "
                "Shorten it."
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


ShapeT = TypeVar("ShapeT", bound=LanguageShape)


class MultimodalModel(nn.Module, Generic[ShapeT]):
    """The language model with its eye.

    Attributes:
        shape: sizes.
        language: words and vectors of pictures -> states.
        eye: the last block of CLIP's image encoder, which learns.
        connector: states of a picture -> vectors.
    """

    def __init__(self, shape: ShapeT) -> None:
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

    def parts(self) -> dict[str, nn.Module]:
        """What stages of training move one by one."""
        return {"language": self.language, "eye": self.eye, "connector": self.connector}


class Eye(nn.Module):
    """The last block of CLIP's image encoder, and its norm, over all states."""

    def __init__(self, shape: LanguageShape) -> None:
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


# With the image encoder.

ModelT = TypeVar("ModelT", bound="MultimodalModel[Any]")


class MultimodalReader(nn.Module, Generic[ModelT]):
    """The network with CLIP's image encoder, whose blocks before the last stay as they are.

    Attributes:
        model, image_encoder: the parts.

    Raises:
        ModelError: an image encoder of another width.
    """

    title: ClassVar[str] = "multimodal language model"
    file: ClassVar[str] = "language.safetensors"
    metadata: ClassVar[str] = "language"

    def __init__(self, model: ModelT, image_encoder: Any) -> None:
        super().__init__()
        check_image_encoder(image_encoder)
        self.model, self.image_encoder = model, image_encoder
        if int(image_encoder.config.hidden_size) != model.shape.reads:
            raise ModelError(
                f"The image encoder's states are {image_encoder.config.hidden_size} wide, this {self.title} reads "
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

    def save(self, folder: Path) -> None:
        """Write both, as `read_model` reads them; in float32."""
        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        tensors = {k: v.detach().float().cpu().contiguous().clone() for k, v in self.model.state_dict().items()}
        about = {"format": "pt", self.metadata: self.model.shape.model_dump_json()}
        save_file(tensors, str(folder / self.file), about)
        self.image_encoder.save_pretrained(folder / "image_encoder")


def eye_sizes(image_encoder: Any) -> dict[str, Any]:
    """The fields of `LanguageShape` that come with an image encoder."""
    check_image_encoder(image_encoder)
    config = image_encoder.config
    return {
        "reads": int(config.hidden_size),
        "eye_heads": int(config.num_attention_heads),
        "eye_hidden": int(config.intermediate_size),
        "eye_act": str(config.hidden_act),
        "eye_eps": float(config.layer_norm_eps),
    }


def take_eye(model: MultimodalModel[Any], image_encoder: Any) -> None:
    """Start the eye as the image encoder's last block."""
    vision = image_encoder.vision_model
    model.eye.block.load_state_dict(copy.deepcopy(vision.encoder.layers[-1].state_dict()))
    model.eye.norm.load_state_dict(copy.deepcopy(vision.post_layernorm.state_dict()))


def read_shape(folder: Path, reader: type[MultimodalReader[Any]], shape: type[ShapeT]) -> ShapeT:
    """The sizes in a folder that `MultimodalReader.save` wrote.

    Raises:
        ModelError: there is no such file, or it does not say them.
    """
    file, title = folder / reader.file, reader.title
    if not file.is_file():
        raise ModelError(f"{folder} holds no {reader.file}. Give the folder that the training of a {title} wrote.")
    try:
        return shape(**json.loads(read_metadata(file).get(reader.metadata, "{}")))
    except (ValidationError, ValueError, TypeError) as error:
        raise ModelError(f"{file} does not say the sizes of a {title} ({reader.metadata} in its metadata).") from error


def read_weights(folder: Path, reader: type[MultimodalReader[Any]], model: ModelT, backbone: Backbone) -> ModelT:
    """The model with the weights of a folder, on the backbone's device, not learning.

    Raises:
        ModelError: something is missing, left over or of another shape.
    """
    file = folder / reader.file
    load_strictly(model, read_safetensors(file), str(file), "its sizes")
    return model.to(device=backbone.device, dtype=backbone.dtype).eval().requires_grad_(False)


def encoder_beside(folder: Path, backbone: Backbone) -> Any:
    """The image encoder in a folder that `MultimodalReader.save` wrote.

    Raises:
        ModelError: it is not there.
    """
    if not (folder / "image_encoder" / "config.json").is_file():
        raise ModelError(f"{folder} needs its image encoder in image_encoder/. Copy it there.")
    return load_image_encoder(folder / "image_encoder", backbone)
