"""BLIP-Diffusion's subject encoder with what it reads by (tokenizer, image encoder): its files, and a prompt's subject.

Sizes, weights and names of files are those of the published model's folder ``qformer``. The subject's vectors take the
place of token embeddings behind the first word of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from controlroom.backbones.base import expand_learned_words
from controlroom.backbones.image_encoder import check_image_encoder, image_features, load_image_encoder
from controlroom.backbones.loading import find_model
from controlroom.backbones.model_files import explained, load_strictly, read_json, read_safetensors
from controlroom.backbones.subject_encoder import EncoderShape, SubjectEncoder
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Condition
from controlroom.core.errors import ModelError

BERT = "google-bert/bert-base-uncased"
"""Whose words the published model reads."""


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


def with_subject_first(prompt: str, name: str) -> str:
    """The prompt with "a" and the subject's name before it, unless it begins so."""
    words, start = prompt.strip(), f"a {name}"
    return words if words == start or words.startswith(f"{start} ") else f"{start} {words}".strip()


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
