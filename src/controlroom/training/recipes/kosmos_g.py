"""KOSMOS-G's three stages (Pan et al., arXiv 2310.02992, sections 2.1 to 2.3): read, align, instruct.

1. `KosmosLanguageRecipe`: a causal language model on captions, alone and behind their pictures (the loss is on words).
2. `KosmosAlignRecipe`: AlignerNet, on texts alone: its states should be the text encoder's of the same text, and give
   the language model's back. No picture and no noise.
3. `KosmosGRecipe`: the error of the predicted noise, through the frozen UNet, of pictures whose captions have pictures
   of their subjects, from another scene, behind the subjects' words or in their place. 10 % are told the start token
   alone.

In the first and the third the last block of CLIP's image encoder learns along, as published.

Deviations: stage 1 learns from captioned pictures alone, where KOSMOS-1 reads the web; a share of stage 2's texts is
empty, since the start token is what stage 3 tells a picture without a prompt; subjects are never cut out of the target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor

from controlroom.backbones.image_encoder import load_image_encoder
from controlroom.backbones.kosmos import KosmosReader, load_kosmos, new_kosmos
from controlroom.backbones.loading import find_model
from controlroom.backbones.multimodal import PICTURE, sequences
from controlroom.core.branch import Condition
from controlroom.core.errors import InputError
from controlroom.data.groups import Group
from controlroom.data.pictures import Picture, fingerprint
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.grouped import EncodedGroups, GroupBatch
from controlroom.training.interleaved import (
    InterleavedSettings,
    MultimodalStage,
    entities,
    groups_among,
    groups_of,
    interleaved,
)
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipe_settings import RecipeSettings

EMPTY = 0.1
"""Share of the texts of stage 2 that are empty."""
NULL = 0.1
"""Share of the pictures of stage 3 that are told the start token alone."""
_LOOP: dict[str, Any] = {"batch_size": 64, "betas": (0.9, 0.98), "weight_decay": 0.01, "warmup_steps": 375}


class KosmosLanguageSettings(RecipeSettings):
    """Stage 1: sizes of the network, which is new."""

    loop: ClassVar[dict[str, Any]] = {**_LOOP, "total_steps": 300_000, "learning_rate": 2e-4}

    image_encoder: str = "openai/clip-vit-large-patch14"
    """Folder or downloaded hub id of a CLIP with its image encoder."""
    width: PositiveInt = 512
    layers: PositiveInt = 8
    heads: PositiveInt = 8
    image_tokens: PositiveInt = 64
    length: PositiveInt = 512
    aligner_layers: PositiveInt = 4
    aligner_heads: PositiveInt = 8
    alone: float = Field(default=0.3, ge=0.0, le=1.0)
    """Share of captions that are read without their picture."""
    seed: int = Field(default=7, ge=0)
    """Of the first weights."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> KosmosLanguageRecipe:
        encoder = load_image_encoder(find_model(self.image_encoder, "image encoder"), pipe.backbone)
        return KosmosLanguageRecipe(pipe, encoder, pictures, self)


class KosmosAlignSettings(RecipeSettings):
    """Stage 2: on the captions of the pictures."""

    loop: ClassVar[dict[str, Any]] = {**_LOOP, "total_steps": 300_000, "learning_rate": 1e-3}

    model: str = "runs/kosmos_language/weights"
    """Folder of stage 1."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> KosmosAlignRecipe:
        reader = load_kosmos(find_model(self.model, "KOSMOS-G"), pipe.backbone)
        return KosmosAlignRecipe(pipe, reader, [picture.caption for picture in pictures if picture.caption], self)


class KosmosGSettings(InterleavedSettings):
    """Stage 3: on pictures with their subjects, or pictures of subjects, each of which is there at least twice."""

    loop: ClassVar[dict[str, Any]] = {**_LOOP, "total_steps": 200_000, "learning_rate": 1e-3}

    model: str = "runs/kosmos_align/weights"
    """Folder of stage 2."""
    word: str = ""
    """The word of the captions for the subject: "dog". Must be given where pictures are (not groups)."""

    def build(self, pipe: Pipeline, pictures: Sequence[Any], folder: Path) -> KosmosGRecipe:
        reader = load_kosmos(find_model(self.model, "KOSMOS-G"), pipe.backbone)
        groups = groups_among(pictures, bool(self.word)) or groups_of(pictures, self.word)
        return KosmosGRecipe(pipe, reader, groups, self)


class _Stage(MultimodalStage[KosmosReader]):
    """A stage of KOSMOS-G."""

    def read(self, folder: Path) -> KosmosReader:
        return load_kosmos(folder, self.base.backbone)


@dataclass(frozen=True)
class CaptionBatch:
    """Captions, and states [B, length, reads] of their pictures."""

    captions: tuple[str, ...]
    states: Tensor


class KosmosLanguageRecipe(_Stage):
    """Recipe: the language model, its connector and the last block of CLIP.

    Args:
        pipe: the base model, whose tokenizer is used; it is only read.
        image_encoder: a `CLIPVisionModelWithProjection`.
        pictures: with captions.
        settings: see `KosmosLanguageSettings`.

    Raises:
        InputError: no picture, one without a caption, or a caption that is too long.
    """

    name = "kosmos_language"
    moves = ("language", "eye", "connector")

    def __init__(
        self, pipe: Pipeline, image_encoder: Any, pictures: Sequence[Picture], settings: KosmosLanguageSettings
    ) -> None:
        sizes = settings.model_dump(include={"width", "layers", "heads", "image_tokens", "length"})
        sizes |= settings.model_dump(include={"aligner_layers", "aligner_heads"})
        super().__init__(pipe, new_kosmos(image_encoder, pipe.backbone, settings.seed, **sizes))
        silent = [picture.name for picture in pictures if not picture.caption]
        if not pictures or silent:
            raise InputError(f"{silent[0]} has no caption." if silent else "There is no picture to train on.")
        self.settings, self.pictures = settings, tuple(pictures)
        for picture in pictures:
            self._sequences([f"{PICTURE} {picture.caption}"])
        starts = range(0, len(pictures), 32)
        self.states = torch.cat([self.seen([p.read() for p in pictures[i : i + 32]]).cpu() for i in starts])
        self.dataset_size: int | None = len(pictures)

    def fingerprint(self) -> str:
        return f"{fingerprint(self.pictures)} {self.settings.model_dump_json()}"

    def batch(self, indices: Sequence[int], step: int) -> CaptionBatch:
        captions = tuple(self.pictures[index].caption for index in indices)
        return CaptionBatch(captions, self.states[list(indices)].to(self.base.device))

    def _sequences(self, texts: Sequence[str]) -> Any:
        return sequences(self.tokenizer, texts, self.reader.model.shape, end=True)

    def loss(self, batch: CaptionBatch, step: int, rng: StepRandom) -> Losses:
        shown = rng.choice("alone", (1 - self.settings.alone, self.settings.alone)) == 0
        texts = [f"{PICTURE} {c}" if s else c for c, s in zip(batch.captions, shown.tolist(), strict=True)]
        read, model = self._sequences(texts), self.reader.model
        states = model.states(read, model.pictures(batch.states)[shown])
        ids, seen = read.ids.to(states.device), read.seen.to(states.device)
        # What comes behind a word or the end of a picture is learned, what comes within a picture is not.
        counted = seen[:, 1:] & (ids[:, :-1] != model.shape.words)
        error = F.cross_entropy(model.logits(states[:, :-1][counted]).float(), ids[:, 1:][counted])
        return Losses(error, {"words": error.detach()})


class KosmosAlignRecipe(_Stage):
    """Recipe: AlignerNet, there and back.

    Args:
        pipe: the base model, whose text encoder is aligned to; it is only read.
        reader: of stage 1.
        texts: what is learned from.
        settings: see `KosmosAlignSettings`.

    Raises:
        InputError: no text.
    """

    name = "kosmos_align"
    moves = ("encoder", "decoder")

    def __init__(
        self, pipe: Pipeline, reader: KosmosReader, texts: Sequence[str], settings: KosmosAlignSettings | None = None
    ) -> None:
        super().__init__(pipe, reader)
        if not texts:
            raise InputError("There is no text to align by: give pictures with captions.")
        self.settings, self.texts = settings or KosmosAlignSettings(), tuple(texts)
        self.dataset_size: int | None = len(texts)

    def fingerprint(self) -> str:
        return f"{hashlib.sha256(repr(self.texts).encode()).hexdigest()} {EMPTY} {self.settings.model_dump_json()}"

    def batch(self, indices: Sequence[int], step: int) -> tuple[str, ...]:
        return tuple(self.texts[index] for index in indices)

    def loss(self, batch: tuple[str, ...], step: int, rng: StepRandom) -> Losses:
        empty = (rng.choice("empty", (1 - EMPTY, EMPTY)) == 1).tolist()
        texts = ["" if nothing else text for text, nothing in zip(batch, empty, strict=True)]
        there, back = self.errors(texts)
        return Losses(there.mean() + back.mean(), {"there": there.mean().detach(), "back": back.mean().detach()})

    def errors(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """[B] errors of the way to the text encoder's states, and of the way back."""
        model = self.reader.model
        read = sequences(self.tokenizer, texts, model.shape)
        most = model.shape.states - 1  # the text encoder reads so many, and its end
        read = replace(read, ids=read.ids[:, :most], slots=read.slots[:, :most], seen=read.seen[:, :most])
        with torch.no_grad():
            states, target = model.states(read), self.base.condition(texts).tokens
        there, back, _ = model.aligner.losses(states, read.seen, target)
        return there, back


class KosmosGRecipe(_Stage):
    """Recipe: everything but CLIP's earlier blocks, through the frozen UNet.

    Args:
        pipe: the base model; it is only read.
        reader: of stage 2.
        groups: pictures with captions that name their subjects, and pictures of the subjects elsewhere.
        settings: see `KosmosGSettings`.
        held_out: groups that are never trained on, for `validate`.
        cache_folder: where latents and states are kept; None: in memory.

    Raises:
        InputError: no groups, or a caption that does not name its subjects.
    """

    name = "kosmos_g"
    moves = ("language", "eye", "connector", "encoder")

    def __init__(
        self,
        pipe: Pipeline,
        reader: KosmosReader,
        groups: Sequence[Group],
        settings: KosmosGSettings | None = None,
        held_out: Sequence[Group] = (),
        cache_folder: Path | None = None,
    ) -> None:
        super().__init__(pipe, reader)
        self.settings = settings or KosmosGSettings()
        self.objective = Objective(self.base.backbone.scheduler, self.settings.objective)
        for group in (*groups, *held_out):
            entities(group.picture.caption, [subject.word for subject in group.subjects])
        image_encoder, size = reader.image_encoder, self.settings.hw
        self.shown = EncodedGroups(self.base, groups, self.seen, image_encoder, size, cache_folder)
        self.unseen = EncodedGroups(self.base, held_out, self.seen, image_encoder, size) if held_out else None
        self.dataset_size: int | None = len(self.shown)

    def fingerprint(self) -> str:
        return f"{self.shown.fingerprint()} {NULL} {self.settings.model_dump_json()}"

    def batch(self, indices: Sequence[int], step: int) -> GroupBatch:
        return self.shown.batch(indices)

    def told(self, batch: GroupBatch, kept: Sequence[bool]) -> Condition:
        """What the UNet is told by captions with pictures behind the subjects' words, or in their place."""
        model, texts, states = self.reader.model, [], []
        for row, (caption, words) in enumerate(zip(batch.prompts, batch.words, strict=True)):
            spans = entities(caption, words)
            texts.append(interleaved(caption, spans, kept[row]))
            states += [batch.features[row, subject] for _, _, subject in spans]
        found = model(sequences(self.tokenizer, texts, model.shape), model.pictures(torch.stack(states)))
        plain = [" ".join(text.replace(PICTURE, " ").split()) for text in texts]
        return replace(self.base.condition(plain, self.shown.size), tokens=found)

    def loss(self, batch: GroupBatch, step: int, rng: StepRandom) -> Losses:
        told = self.told(batch, (rng.choice("word", (0.5, 0.5)) == 1).tolist())
        null = rng.choice("null", (1 - NULL, NULL)) == 1
        nothing, model = self.base.condition([""], self.shown.size), self.reader.model
        start = model(sequences(self.tokenizer, [""], model.shape))
        pooled = told.pooled
        if pooled is not None and nothing.pooled is not None:
            pooled = torch.where(null[:, None], nothing.pooled, pooled)
        told = replace(told, tokens=torch.where(null[:, None, None], start, told.tokens), pooled=pooled)
        each = self.objective.loss(lambda noisy, t: self.base.predict(noisy, t, told), batch.latents, rng)
        return Losses(each.mean(), {"mse": each.mean().detach()})

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to measure on."""
        return self.unseen is not None

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pictures with their subjects, and by the text encoder's reading of the words alone."""
        if self.unseen is None:
            return {}
        batch = self.unseen.batch(range(len(self.unseen)))
        told, words = self.told(batch, [True] * len(batch.prompts)), self.base.condition(batch.prompts, self.shown.size)
        both = [
            self.objective.held_out(lambda noisy, t, c=c: self.base.predict(noisy, t, c), batch.latents)
            for c in (told, words)
        ]
        return {"held_out": both[0], "by_words": both[1]}
