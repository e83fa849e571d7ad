"""BLIP-Diffusion (Li et al., "BLIP-Diffusion: Pre-trained Subject Representation for Controllable Text-to-Image
Generation and Editing", arXiv 2305.14720).

A multimodal encoder reads a picture beside the word for its subject; what it gives stands in the prompt behind "a", as
if it were words: "a [subject] dog swimming". The prompt is repeated, which makes it count more against the subject.

Deviations: ``scale``; several pictures of a subject are averaged, as in the authors' own code for fine-tuning; the
negative prompt may be longer than theirs; Stable Diffusion XL shapes take vectors as wide as both text encoders, as
there are no public weights to follow. Editing by attention, in the same paper, is Prompt-to-Prompt.
"""

from __future__ import annotations

import os
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt, field_validator

from controlroom.backbones.loading import find_model, keep
from controlroom.backbones.model_files import read_safetensors
from controlroom.backbones.subject_reader import (
    POSITION,
    SubjectReader,
    encoder_shape,
    load_subject_reader,
    told_with,
    with_subject_first,
)
from controlroom.backbones.swapped_weights import read_weights, swapped
from controlroom.backbones.words import PlacedPrompt, PromptTokens, content_ids, placed_tokens
from controlroom.controls.condition_map import tiled
from controlroom.controls.prompt_pictures import prompt_pixels, squared
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Condition, ConditionSource
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Texts
from controlroom.core.errors import InputError, ModelError
from controlroom.core.run import Run

CACHE = Path("ctx_embeddings_cache/ctx_embeddings_cache.safetensors")
"""What a fit to one subject leaves in its folder: the mean of its pictures' vectors, under `KEY`; and ``unet``."""
KEY = "ctx_embeddings_cache"


class SubjectPrompt(PlacedPrompt):
    """The words of a prompt with a subject between them.

    Attributes:
        own: the prompt that was given.
        control: that put the subject there.
    """

    own: str
    control: BLIPDiffusion

    def tokens(self, tokenizer: Any) -> PromptTokens:
        """Where its words are: behind the subject, but for the first."""
        length, count = int(tokenizer.model_max_length), self.control.queries()
        content = content_ids(tokenizer, str(self))
        kept = content[: length - count - 2]
        ids = [tokenizer.bos_token_id, *kept, tokenizer.eos_token_id]
        ids[POSITION:POSITION] = [tokenizer.bos_token_id] * count
        places = [1, *range(POSITION + count, len(ids) - 1)]
        return placed_tokens(tokenizer, str(self), ids, content, places, length)


class BLIPDiffusion(Control):
    """Put the subject of a picture into the prompt.

    The run's prompt says what the subject does, "swimming under water"; it is told "a dog swimming under water".

    Args:
        model: folder of a published model or of its ``qformer``, of a trained subject encoder, or of a fit to one
            subject; downloaded hub id; name of the theatre; or a `SubjectReader`.
        image: a picture of the subject, or a list of several, whose vectors are averaged. A list of lists: one list for
            each prompt. None: the subject that the model was fitted to.
        subject: the word for what is wanted of the picture, like ``dog``.
        target: what it shall be in the picture; None: ``subject``.
        scale: 0 is the run's own prompt, without the subject; 1 as published; between, what the network is told
            moves from one to the other.
        repeat: how often the prompt is said, as long as it fits.

    Raises:
        InputError: no subject; at planning, a prompt given as embeddings or apart for the second text encoder; at the
            start, no picture for a model that was not fitted, or one that cannot be read.
        ModelError: at the start: no such model, or one for another base model.
    """

    type: Literal["blip_diffusion"] = Field(default="blip_diffusion", kw_only=True)
    model: Any
    image: Any = None
    subject: str = ""
    target: str | None = None
    scale: float = 1.0
    repeat: PositiveInt = 20

    @field_validator("subject", "target")
    @classmethod
    def _something(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("expected a word for the subject, like dog")
        return value

    # Planning.

    def read(self, texts: Texts) -> Texts:
        """The prompts with what the subject is before them, as often as they are said."""
        if self.scale == 0:
            return texts
        if "prompt" in texts.embeds or "prompt" in texts.seconds:
            raise InputError(f"{self.label} puts a subject into the prompt. Give it as text, and no prompt_2.")
        return replace(texts, prompts=tuple(self._said(prompt) for prompt in texts.prompts))

    def _said(self, prompt: str) -> str:
        # What another control of this kind has read stays as it is: the two are a conflict that is found later.
        if isinstance(prompt, PlacedPrompt):
            return prompt
        once = with_subject_first(prompt, self.target or self.subject)
        said = SubjectPrompt(", ".join([once] * self.repeat))
        said.own, said.control = prompt, self
        return said

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(claims=(Claim("condition", "edit", branches=frozenset({"cond"})),))

    def queries(self) -> int:
        """How many tokens the subject has."""
        if isinstance(self.model, SubjectReader):
            return self.model.encoder.queries
        folder = self._folder()
        if self._fitted(folder):
            return int(_cached(folder).shape[1])
        return encoder_shape(folder).num_query_tokens

    # A run.

    def attach(self, backbone: Backbone) -> AbstractContextManager[None] | None:
        """The weights of a fit in the place of the network's own, for the run."""
        if isinstance(self.model, SubjectReader):
            return None
        folder = self._folder()
        if not self._fitted(folder) or not (folder / "unet").is_dir():
            return None
        read = keep(
            backbone, ("blip_diffusion",), folder, lambda: read_weights(folder / "unet", backbone.unet, "the network")
        )
        return swapped(backbone.unet, read)

    @torch.no_grad()
    def prepare(self, run: Run) -> None:
        """Tell ``cond``, and branches that were told the same, the prompt with the subject in it."""
        vectors = self._vectors(run)
        vectors = tiled(vectors, run.images, "cond")
        told = told_with(run.backbone, run.prompts, vectors, run.size, run.clip_skip)
        if self.scale != 1:
            own = [prompt.own if isinstance(prompt, SubjectPrompt) else prompt for prompt in run.prompts]
            told = _between(run.encode_text(own), told, self.scale)
        before = run.conditions["cond"]
        source = _in_place_of(run.encode_text(run.prompts), told, before)
        for name in [name for name, held in run.conditions.items() if held is before]:
            run.set_condition(name, source)

    def _vectors(self, run: Run) -> torch.Tensor:
        """[1 or images, queries, width]"""
        if isinstance(self.model, SubjectReader):
            reader = self.model
        else:
            folder = self._folder()
            if self.image is None and self._fitted(folder):
                return _cached(folder).to(run.device)
            loaded = keep(run.backbone, ("subject",), folder, lambda: load_subject_reader(folder, run.backbone))
            # Its words may be learned ones, which the tokenizer of this run knows.
            vision = loaded.encoder.visual_encoder
            own = run.backbone.tokenizers()[0] if vision is None else loaded.tokenizer
            reader = SubjectReader(loaded.encoder, own, loaded.image_encoder)
        if self.image is None or not self.subject:
            missing = "picture: give image" if self.image is None else "word for its subject: give subject"
            raise InputError(f"{self.label} needs a {missing}, or a model that was fitted to one subject.")
        pixels = prompt_pixels(squared(self.image, reader.side), reader.side, run.images)
        rows, pictures = pixels.shape[:2]
        found = reader(pixels.flatten(0, 1).to(run.device), [self.subject] * (rows * pictures))
        return found.unflatten(0, (rows, pictures)).mean(1)

    def _folder(self) -> Path:
        if not isinstance(self.model, str | os.PathLike):
            raise ModelError(f"{self.label} cannot read a {type(self.model).__name__}; give a folder.")
        return find_model(self.model, "subject encoder")

    def _fitted(self, folder: Path) -> bool:
        return (folder / CACHE).is_file()


def _cached(folder: Path) -> torch.Tensor:
    """[1, queries, width]"""
    found = read_safetensors(folder / CACHE).get(KEY)
    if found is None or found.ndim != 3 or found.shape[0] != 1:
        shape = None if found is None else list(found.shape)
        raise ModelError(f"{folder / CACHE} holds {shape} where the vectors of a subject [1, queries, width] belong.")
    return found


def _in_place_of(plain: Condition, told: Condition, before: ConditionSource) -> ConditionSource:
    """What another control made of the plain words (a direction added, say) is made of these too."""

    def moved(held: Condition) -> Condition:
        if torch.equal(held.expand(len(plain.tokens)).tokens, plain.tokens):
            return told
        held = held.expand(len(told.tokens))
        pooled = told.pooled
        if held.pooled is not None and pooled is not None and plain.pooled is not None:
            pooled = held.pooled + pooled - plain.pooled
        return replace(held, tokens=held.tokens + told.tokens - plain.tokens, pooled=pooled)

    return moved(before) if isinstance(before, Condition) else lambda step: moved(before(step))


def _between(own: Condition, told: Condition, scale: float) -> Condition:
    pooled = told.pooled
    if pooled is not None and own.pooled is not None:
        pooled = torch.lerp(own.pooled, pooled, scale)
    return replace(told, tokens=torch.lerp(own.tokens, told.tokens, scale), pooled=pooled)
