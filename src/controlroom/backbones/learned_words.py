"""Words that were learned (Textual Inversion): files of them, and text encoders that know them for a while.

A word is one or several vectors in the place of a token's embedding, one set for each text encoder. Read: diffusers'
``{token: [n, d]}``, kohya's ``emb_params``, Stable Diffusion XL's ``clip_l`` and ``clip_g``, and A1111's
``string_to_param`` where it is no pickle. A word of several vectors is ``<cat>``, ``<cat>_1``, ... as in diffusers.
Written: diffusers' form, and for two text encoders Stable Diffusion XL's.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlroom.backbones.model_files import read_metadata, read_safetensors
from controlroom.core.backbone import Backbone
from controlroom.core.errors import InputError, ModelError
from controlroom.core.files import atomic_path

_NAME = "learned_word"
"""Metadata of our files whose keys do not say the word."""


@dataclass(frozen=True)
class LearnedWord:
    """A word and its vectors.

    Attributes:
        word: as it is written in a prompt.
        vectors: [n, d] for each text encoder that has any.
    """

    word: str
    vectors: tuple[Tensor, ...]


def load_words(path: Path, word: str | None = None) -> list[LearnedWord]:
    """The words in a ``.safetensors`` file.

    Args:
        path: the file.
        word: what the only word of the file is called in prompts; None: its name in the file, or the file's own.

    Raises:
        ModelError: broken, or nothing that is a word.
    """
    return words_from_tensors(read_safetensors(path), word, read_metadata(path).get(_NAME, path.stem), str(path))


def save_learned_words(
    path: str | os.PathLike[str], words: Sequence[LearnedWord], metadata: Mapping[str, str] | None = None
) -> Path:
    """Write words in the form that diffusers' ``load_textual_inversion``, kohya's tools and A1111 read.

    Vectors of one text encoder are ``{word: [n, d]}``; those of two are ``clip_l`` and ``clip_g``, as files for Stable
    Diffusion XL have them, and the word stands in the metadata.

    Args:
        path: the ``.safetensors`` file.
        words: one word, or several for a model with one text encoder.
        metadata: more of it, text.

    Raises:
        InputError: no word, one that cannot stand in a prompt, or several for two text encoders.
    """
    from safetensors.torch import save_file

    for word in words:
        check_word(word.word)
    if not words or (len(words) > 1 and any(len(word.vectors) != 1 for word in words)):
        raise InputError(f"A file holds one word for two text encoders, or several for one; got {len(words)}.")
    about = {"format": "pt", **(metadata or {})}
    if len(words[0].vectors) == 1:
        tensors = {word.word: word.vectors[0] for word in words}
    else:
        tensors = dict(zip(("clip_l", "clip_g"), words[0].vectors, strict=True))
        about[_NAME] = words[0].word
    stored = {key: vectors.detach().cpu().contiguous().clone() for key, vectors in tensors.items()}
    with atomic_path(path) as beside:
        save_file(stored, str(beside), about)
    return Path(path)


def words_from_tensors(
    tensors: Mapping[str, Any], word: str | None = None, stem: str = "learned", what: str = "the file"
) -> list[LearnedWord]:
    """The words in a mapping with the keys of a file.

    Raises:
        ModelError: as `load_words`.
    """
    if set(tensors) == {"string_to_param.*"}:
        tensors = {"string_to_param": {"*": tensors["string_to_param.*"]}}
    found: list[LearnedWord]
    if "string_to_param" in tensors:
        inner = tensors["string_to_param"]
        name = tensors.get("name")
        found = [LearnedWord(word or (name if isinstance(name, str) else stem), (_rows(inner["*"], what),))]
    elif set(tensors) & {"clip_l", "clip_g"}:
        strange = sorted(set(tensors) - {"clip_l", "clip_g"})
        if strange:
            raise ModelError(f"{what} has {strange[0]!r} beside clip_l and clip_g, which nothing reads.")
        parts = tuple(_rows(tensors[key], what) for key in ("clip_l", "clip_g") if key in tensors)
        found = [LearnedWord(word or stem, parts)]
    elif set(tensors) == {"emb_params"}:
        found = [LearnedWord(word or stem, (_rows(tensors["emb_params"], what),))]
    else:
        found = [LearnedWord(key, (_rows(value, what),)) for key, value in tensors.items()]
        if word is not None and len(found) == 1:
            found = [LearnedWord(word, found[0].vectors)]
    if not found:
        raise ModelError(f"{what} holds no learned word.")
    if word is not None and len(found) > 1:
        known = ", ".join(each.word for each in found)
        raise ModelError(f"{what} holds {len(found)} words ({known}); they keep their names. Leave token out.")
    for each in found:
        check_word(each.word)
    return found


def check_word(word: str) -> None:
    """Something that can stand in a prompt.

    Raises:
        InputError: it is empty or has spaces.
    """
    if not word.strip() or any(c.isspace() for c in word):
        raise InputError(f"{word!r} cannot stand for something in a prompt. Give token= one word, like <cat>.")


def bundled_words(words: Mapping[str, tuple[Tensor, ...]], what: str) -> list[LearnedWord]:
    """Words that came along with a LoRA: name -> vectors for each text encoder, in their order.

    Raises:
        InputError: a name that cannot stand in a prompt.
        ModelError: something that is no vectors.
    """
    for word in words:
        check_word(word)
    return [LearnedWord(word, tuple(_rows(each, what) for each in vectors)) for word, vectors in words.items()]


@contextmanager
def known_words(backbone: Backbone, words: list[LearnedWord], what: str) -> Iterator[None]:
    """Let the text encoders know words; tokenizers and embeddings are the old ones afterwards, untouched.

    Raises:
        ModelError: vectors of another width, or for another number of text encoders.
        InputError: a word that a tokenizer already knows.
    """
    texts = [
        (index, getattr(backbone, f"tokenizer{end}"), getattr(backbone, f"text_encoder{end}"))
        for index, end in enumerate(("", "_2"))
        if getattr(backbone, f"text_encoder{end}", None) is not None
    ]
    placed = [_fitted(word, texts, what) for word in words]
    kept: list[tuple[Any, Any, int]] = []
    tokenizers = [(f"tokenizer{'_2' if index else ''}", tokenizer) for index, tokenizer, _ in texts]
    try:
        for number, (index, tokenizer, encoder) in enumerate(texts):
            changed = copy.deepcopy(tokenizer)
            table = encoder.get_input_embeddings()
            rows: dict[int, Tensor] = {}
            for word, vectors in zip(words, placed, strict=True):
                for k, vector in enumerate(vectors[number]):
                    token = word.word if k == 0 else f"{word.word}_{k}"
                    known = changed.get_added_vocab().get(token)
                    if known is not None and torch.equal(table.weight[known], vector.to(table.weight)):
                        continue  # the same word, told twice
                    alone = changed(token, add_special_tokens=False).input_ids
                    if known is not None or len(alone) == 1 or not changed.add_tokens([token]):
                        raise InputError(
                            f"{token!r} of {what} is a word that this model knows already. Name it otherwise: token=."
                        )
                    rows[int(changed.convert_tokens_to_ids(token))] = vector
            kept.append((table, table.weight, table.num_embeddings))
            table.weight = torch.nn.Parameter(_with_rows(table.weight, rows), requires_grad=table.weight.requires_grad)
            table.num_embeddings = table.weight.shape[0]
            setattr(backbone, f"tokenizer{'_2' if index else ''}", changed)
        yield
    finally:
        for table, weight, count in kept:
            table.weight, table.num_embeddings = weight, count
        for name, tokenizer in tokenizers:
            setattr(backbone, name, tokenizer)


def _fitted(word: LearnedWord, texts: list[Any], what: str) -> list[Tensor]:
    """Vectors for each text encoder, in their order."""
    widths = [int(encoder.get_input_embeddings().weight.shape[1]) for _, _, encoder in texts]
    given = [int(vectors.shape[1]) for vectors in word.vectors]
    if given != widths:
        raise ModelError(
            f"{what} has vectors of the widths {given} for {word.word!r}; this model's text encoders have {widths}. "
            "Use the model that they were learned with."
        )
    return list(word.vectors)


def _with_rows(table: Tensor, rows: Mapping[int, Tensor]) -> Tensor:
    """An embedding table with some rows set; longer where their numbers ask for it."""
    count = max(table.shape[0], 1 + max(rows, default=0))
    # Without gradients and outside of inference mode, since the parameter may be trained later.
    found = torch.zeros(count, table.shape[1], dtype=table.dtype, device=table.device)
    found[: table.shape[0]] = table.detach()
    for index, vector in rows.items():
        found[index] = vector.to(found)
    return found


def _rows(value: Any, what: str) -> Tensor:
    """[n, d]."""
    if not isinstance(value, Tensor) or value.ndim not in (1, 2) or not value.numel() or not value.is_floating_point():
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ModelError(f"{what} is not a file of learned words: it has {shape} where vectors [n, width] belong.")
    if not bool(torch.isfinite(value).all()):
        raise ModelError(f"{what} has vectors with values that are not finite. Learn them again.")
    return value[None] if value.ndim == 1 else value
