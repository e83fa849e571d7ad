"""Textual Inversion (Gal et al., "An Image is Worth One Word: Personalizing Text-to-Image Generation using Textual
Inversion", arXiv 2208.01618).

A thing or a style is one new word: a few vectors in the place of a token's embedding, learned from pictures.

Reads the files of diffusers, kohya, Stable Diffusion XL and A1111; see `backbones.learned_words`. Deviation from
diffusers: tokenizers and text encoders know the word while the run lasts, and no longer.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

from pydantic import Field, field_validator

from controlroom.backbones.learned_words import known_words, load_words, words_from_tensors
from controlroom.backbones.loading import find_model
from controlroom.core.backbone import Backbone
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ModelError


class TextualInversion(Control):
    """Know a learned word in prompts.

    Args:
        model: ``.safetensors`` file, downloaded hub id with the path inside, or a mapping with the keys of a file.
        token: what the word is called in prompts, like ``<anna>``; None: its name in the file, or the file's own name.

    Raises:
        InputError: at the start of a run: a name that the model knows already.
        ModelError: at the start of a run: no such file, no words in it, or words of another model.
    """

    type: Literal["textual_inversion"] = Field(default="textual_inversion", kw_only=True)
    model: Any
    token: str | None = None

    @field_validator("model")
    @classmethod
    def _given(cls, value: Any) -> Any:
        if value is None or value == "" or (isinstance(value, Mapping) and not value):
            raise ValueError("expected a file, a hub id, or a mapping of tensors")
        return value

    @field_validator("token")
    @classmethod
    def _one_word(cls, value: str | None) -> str | None:
        if value is not None and (not value or any(c.isspace() for c in value)):
            raise ValueError("expected one word without spaces, like <anna>")
        return value

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(claims=(Claim("condition", "add"),))

    def attach(self, backbone: Backbone) -> AbstractContextManager[None]:
        """The words, for the run."""
        if isinstance(self.model, Mapping):
            return known_words(backbone, words_from_tensors(self.model, self.token), "the mapping given")
        path = find_model(self.model, "learned word")
        if path.is_dir():
            files = sorted(path.glob("*.safetensors"))
            if len(files) != 1:
                raise ModelError(f"{path} holds {len(files)} .safetensors files; name the one of the learned word.")
            path = files[0]
        return known_words(backbone, load_words(path, self.token), str(path))
