"""UNIMO-G's two stages (Li et al., arXiv 2401.13388), both with the error of the predicted noise.

1. `UnimoTextRecipe`: text to image. The UNet learns to read the language model's last states of captions.
2. `UnimoGRecipe`: multimodal instruction tuning. Captions have pictures of their entities, cut out by a detector and a
   segmenter, behind the entities' words or in their place. So that each place looks at the entity that belongs there,
   the attention that an entity's picture wins is held to the entity's segment in the target.

The multimodal language model is frozen in both; of the UNet the keys and values of cross-attention learn, and the
projections before them. A tenth is told the start token alone, for guidance.

As recalled, since only abstract and summaries could be read: what is frozen, the two stages, the data. This project's:
the form of the attention's loss, which is FastComposer's (arXiv 2305.10431); the shares; that a tenth of stage 2 has no
pictures, so that words alone go on working; that not the whole UNet learns; that an entity comes out of another picture
of it and not out of the target.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field
from torch import Tensor

from controlroom.backbones.kosmos import load_kosmos
from controlroom.backbones.loading import find_model
from controlroom.backbones.ms_diffusion import inside_boxes
from controlroom.backbones.multimodal import MultimodalReader, sequences
from controlroom.backbones.unimo import Told, UnimoReader, load_unimo, new_unimo, told_attention
from controlroom.controls.condition_map import tokens_hw
from controlroom.controls.interleaved import words_of
from controlroom.core.branch import Condition
from controlroom.core.errors import InputError
from controlroom.data.entities import cut_from_target, entity_groups, masked_groups
from controlroom.data.groups import Group
from controlroom.data.pictures import Picture, fingerprint
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.entities import BoxSegmenter, WordDetector
from controlroom.training.buckets import Bucket, crop_to
from controlroom.training.grouped import EncodedGroups, GroupBatch, kept_rows
from controlroom.training.interleaved import (
    InterleavedSettings,
    MultimodalStage,
    entities,
    groups_among,
    interleaved,
)
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipe_settings import RecipeSettings

NULL = 0.1
"""Share of the pictures that are told the start token alone."""
WORDS = 0.1
"""Share of the pictures of stage 2 whose captions have no pictures."""
_LOOP: dict[str, Any] = {"batch_size": 64, "learning_rate": 1e-4, "weight_decay": 0.01, "warmup_steps": 1_000}


class UnimoTextSettings(RecipeSettings):
    """Stage 1: on captioned pictures."""

    loop: ClassVar[dict[str, Any]] = {**_LOOP, "total_steps": 200_000}

    language: str = "runs/kosmos_language/weights"
    """Folder of the multimodal language model: what the recipe ``kosmos_language`` wrote."""
    seed: int = Field(default=7, ge=0)
    """Of the projections' first weights."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path) -> UnimoTextRecipe:
        language = load_kosmos(find_model(self.language, "multimodal language model"), pipe.backbone)
        return UnimoTextRecipe(pipe, language, pictures, self)


class UnimoGSettings(InterleavedSettings):
    """Stage 2: on captioned pictures whose entities are known: named with the data, or found in it."""

    loop: ClassVar[dict[str, Any]] = {**_LOOP, "total_steps": 100_000}

    model: str = "runs/unimo_text/weights"
    """Folder of stage 1."""
    attention: float = Field(default=0.01, ge=0.0)
    """Weight of the loss on attention."""
    words: tuple[str, ...] = ()
    """Words of the captions for entities: ``["dog", "ball"]``. Must be given where pictures are (not groups)."""
    detector: str = ""
    """Folder of a zero-shot detector for transformers (OWL-ViT, Grounding DINO); with it a segmenter. "": the pictures'
    masks say where the one entity is, or it is everywhere."""
    segmenter: str = ""
    """Folder of a Segment Anything model for transformers."""
    same_picture: bool = False
    """Whether entities are cut out of the very picture that is learned, as published."""

    def build(self, pipe: Pipeline, pictures: Sequence[Any], folder: Path) -> UnimoGRecipe:
        groups = groups_among(pictures, bool(self.words or self.detector))
        if groups and self.same_picture:
            groups = [cut_from_target(group) for group in groups]
        groups = groups or self._found(pipe, pictures)
        reader = load_unimo(find_model(self.model, "UNIMO-G"), pipe.backbone)
        return UnimoGRecipe(pipe, reader, groups, self)

    def _found(self, pipe: Pipeline, pictures: Sequence[Picture]) -> Sequence[Group]:
        """Pictures whose entities a detector finds, or whose masks say where the one is."""
        if bool(self.detector) != bool(self.segmenter):
            raise InputError("A detector needs a segmenter, and the other way round. Give both, or neither.")
        if self.detector:
            device = str(pipe.backbone.device)
            detect, segment = WordDetector(self.detector, device), BoxSegmenter(self.segmenter, device)
            return entity_groups(pictures, self.words, detect, segment, self.same_picture)
        return masked_groups(pictures, self.words, self.same_picture)


class _Stage(MultimodalStage[UnimoReader]):
    """A stage of UNIMO-G."""

    def __init__(self, pipe: Pipeline, reader: UnimoReader, settings: RecipeSettings) -> None:
        super().__init__(pipe, reader)
        self.objective = Objective(self.base.backbone.scheduler, settings.objective)
        self.size = settings.hw or self.base.backbone.default_size

    def read(self, folder: Path) -> UnimoReader:
        return load_unimo(folder, self.base.backbone)

    def predict(
        self, noisy: Tensor, t: Tensor, told: Told, condition: Condition, maps: list[Tensor] | None = None
    ) -> Tensor:
        """What the UNet predicts with its cross-attention reading ``told``; ``maps`` as in `told_attention`."""
        with told_attention(self.base.unet, self.reader.model, told, maps):
            return self.base.predict(noisy, t, condition)

    def told_words(self, texts: Sequence[str]) -> tuple[Told, Condition]:
        """What the UNet is told by words alone."""
        told = self.reader.model(sequences(self.tokenizer, texts, self.reader.model.shape))
        return told, self.base.condition(texts, self.size)


@dataclass(frozen=True)
class TextBatch:
    """Latents [B, C, h, w] and their captions."""

    latents: Tensor
    captions: tuple[str, ...]


class UnimoTextRecipe(_Stage):
    """Recipe: the projection of the language model's states, and keys and values that read them.

    Args:
        pipe: the base model; it is only read.
        language: a reader with a trained multimodal language model.
        pictures: with captions.
        settings: see `UnimoTextSettings`.
        held_out: pictures that are never trained on, for `validate`.
        cache_folder: where latents are kept; None: in memory.

    Raises:
        InputError: no picture, one without a caption, or a caption that is too long.
    """

    name = "unimo_text"
    moves = ("prompt", "layers")

    def __init__(
        self,
        pipe: Pipeline,
        language: MultimodalReader[Any],
        pictures: Sequence[Picture],
        settings: UnimoTextSettings | None = None,
        held_out: Sequence[Picture] = (),
        cache_folder: Path | None = None,
    ) -> None:
        self.settings = settings or UnimoTextSettings()
        super().__init__(pipe, new_unimo(language, pipe.backbone, self.settings.seed), self.settings)
        silent = [picture.name for picture in (*pictures, *held_out) if not picture.caption]
        if not pictures or silent:
            raise InputError(f"{silent[0]} has no caption." if silent else "There is no picture to train on.")
        self.pictures, self.held_out = tuple(pictures), tuple(held_out)
        for picture in pictures:
            sequences(self.tokenizer, [picture.caption], self.reader.model.shape)
        self._latents = kept_rows(
            lambda slots: self._encoded([self.pictures[slot] for slot in slots]),
            len(pictures),
            cache_folder,
            {"vae": self.base.vae},
            f"{fingerprint(pictures)} {self.size}",
        )
        self.dataset_size: int | None = len(pictures)

    def _encoded(self, pictures: Sequence[Picture]) -> Tensor:
        """Latents of pictures, cropped around their centre."""
        height, width = self.size
        shown = [crop_to(picture.size, Bucket(width, height)).apply(picture.read()) for picture in pictures]
        return self.base.latents(shown, self.size).cpu()

    def fingerprint(self) -> str:
        return f"{fingerprint(self.pictures)} {self.size} {NULL} {self.settings.model_dump_json()}"

    def batch(self, indices: Sequence[int], step: int) -> TextBatch:
        latents = self._latents(indices).to(self.base.device)
        return TextBatch(latents, tuple(self.pictures[index].caption for index in indices))

    def loss(self, batch: TextBatch, step: int, rng: StepRandom) -> Losses:
        null = (rng.choice("null", (1 - NULL, NULL)) == 1).tolist()
        told = self.told_words(["" if nothing else c for c, nothing in zip(batch.captions, null, strict=True)])
        each = self.objective.loss(lambda noisy, t: self.predict(noisy, t, *told), batch.latents, rng)
        return Losses(each.mean(), {"mse": each.mean().detach()})

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to measure on."""
        return bool(self.held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pictures by the language model's reading, and by the untouched network's of the same."""
        if not self.held_out:
            return {}
        captions, latents = [picture.caption for picture in self.held_out], self._encoded(self.held_out)
        latents, told = latents.to(self.base.device), self.told_words(captions)
        return {
            "held_out": self.objective.held_out(lambda noisy, t: self.predict(noisy, t, *told), latents),
            "by_clip": self.objective.held_out(lambda noisy, t: self.base.predict(noisy, t, told[1]), latents),
        }


@dataclass(frozen=True)
class UnimoBatch:
    """What a step shows.

    Attributes:
        groups: pictures and their entities.
        masks: [B, entities, h, w] at the size of the latents, the share of each place that is the entity's.
    """

    groups: GroupBatch
    masks: Tensor


class UnimoGRecipe(_Stage):
    """Recipe: both projections, and keys and values.

    Args:
        pipe: the base model; it is only read.
        reader: of stage 1.
        groups: pictures with captions that name their entities, and pictures of the entities.
        settings: see `UnimoGSettings`.
        held_out: groups that are never trained on, for `validate`.
        cache_folder: where latents and states are kept; None: in memory.

    Raises:
        InputError: no groups, or a caption that does not name its entities.
    """

    name = "unimo_g"
    moves = ("prompt", "visual", "layers")

    def __init__(
        self,
        pipe: Pipeline,
        reader: UnimoReader,
        groups: Sequence[Group],
        settings: UnimoGSettings | None = None,
        held_out: Sequence[Group] = (),
        cache_folder: Path | None = None,
    ) -> None:
        self.settings = settings or UnimoGSettings()
        super().__init__(pipe, reader, self.settings)
        for group in (*groups, *held_out):
            spans = entities(group.picture.caption, [subject.word for subject in group.subjects])
            sequences(self.tokenizer, [interleaved(group.picture.caption, spans, True)], reader.model.shape)
        encoder = reader.image_encoder
        self.shown = EncodedGroups(self.base, groups, self.seen, encoder, self.size, cache_folder)
        self.unseen = EncodedGroups(self.base, held_out, self.seen, encoder, self.size) if held_out else None
        hw = tuple(self.shown.batch([0]).latents.shape[-2:])
        self._masks = [segments(group, (hw[0], hw[1])) for group in groups]
        self._held_out_masks = [segments(group, (hw[0], hw[1])) for group in held_out]
        self.dataset_size: int | None = len(self.shown)

    def fingerprint(self) -> str:
        masks = hashlib.sha256(b"".join(mask.numpy().tobytes() for mask in self._masks)).hexdigest()
        return f"{self.shown.fingerprint()} {masks} {NULL} {WORDS} {self.settings.model_dump_json()}"

    def batch(self, indices: Sequence[int], step: int) -> UnimoBatch:
        return self._batch(self.shown, self._masks, indices)

    def _batch(self, shown: EncodedGroups, masks: Sequence[Tensor], indices: Sequence[int]) -> UnimoBatch:
        groups = shown.batch(indices)
        found = torch.zeros_like(groups.inside)
        for row, index in enumerate(indices):
            found[row, : len(masks[index])] = masks[index].to(found) / 255
        return UnimoBatch(groups, found)

    def told(
        self, batch: UnimoBatch, kept: Sequence[bool], shown: Sequence[bool], null: Sequence[bool] | None = None
    ) -> tuple[Told, Condition, Tensor]:
        """What the UNet is told by captions with pictures, and where each text's k-th picture belongs.

        Args:
            batch: of `batch`.
            kept: whether the entities' words stay before their pictures.
            shown: whether there are pictures.
            null: whether there is nothing but the start token; None: nowhere.

        Returns:
            With K as in `Told`, [B, K, h, w].
        """
        model, groups, texts, states = self.reader.model, batch.groups, [], []
        orders: list[list[int]] = []
        for row, (caption, words) in enumerate(zip(groups.prompts, groups.words, strict=True)):
            nothing = null is not None and null[row]
            spans = entities(caption, words) if shown[row] and not nothing else []
            texts.append("" if nothing else interleaved(caption, spans, kept[row]))
            orders.append([subject for _, _, subject in spans])
            states += [groups.features[row, subject] for subject in orders[-1]]
        told = model(sequences(self.tokenizer, texts, model.shape), torch.stack(states) if states else None)
        masks = batch.masks.new_zeros(len(texts), told.pictures.shape[1], *batch.masks.shape[-2:])
        for row, order in enumerate(orders):
            masks[row, : len(order)] = batch.masks[row, order]
        return told, self.base.condition([words_of(text) for text in texts], self.size), masks

    def loss(self, batch: UnimoBatch, step: int, rng: StepRandom) -> Losses:
        kept = (rng.choice("word", (0.5, 0.5)) == 1).tolist()
        told = rng.choice("told", (1 - WORDS - NULL, WORDS, NULL))
        read, condition, masks = self.told(batch, kept, (told == 0).tolist(), (told == 2).tolist())
        maps: list[Tensor] = []
        each = self.objective.loss(
            lambda noisy, t: self.predict(noisy, t, read, condition, maps), batch.groups.latents, rng
        )
        error, looked = each.mean(), attention_loss(maps, masks).mean()
        return Losses(error + self.settings.attention * looked, {"mse": error.detach(), "attention": looked.detach()})

    @property
    def has_held_out(self) -> bool:
        """Whether there is something to measure on."""
        return self.unseen is not None

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out pictures with their entities, and by the words alone; and where attention goes."""
        if self.unseen is None:
            return {}
        batch = self._batch(self.unseen, self._held_out_masks, range(len(self.unseen)))
        every, maps = [True] * len(batch.masks), list[Tensor]()
        told, condition, masks = self.told(batch, every, every)
        words = self.told(batch, every, [False] * len(every))
        latents = batch.groups.latents
        return {
            "held_out": self.objective.held_out(
                lambda noisy, t: self.predict(noisy, t, told, condition, maps), latents
            ),
            "by_words": self.objective.held_out(lambda noisy, t: self.predict(noisy, t, *words[:2]), latents),
            "attention": float(attention_loss(maps, masks).mean()),
        }


def attention_loss(maps: Sequence[Tensor], masks: Tensor) -> Tensor:
    """[B]: how much more attention the pictures of entities win outside of their segments than inside, -1 to 1.

    Of each layer and entity the difference of two means (FastComposer, arXiv 2305.10431, section 4.2), averaged over
    both. Entities without a segment, or with one that is everything, do not count.

    Args:
        maps: of each layer [B, K, queries], as from `told_attention`.
        masks: [B, K, h, w] in [0, 1] at the size of the latents.
    """
    if not maps or not masks.shape[1]:
        return masks.new_zeros(len(masks))
    height, width = masks.shape[-2:]
    total = masks.new_zeros(len(masks))
    for found in maps:
        own = F.interpolate(masks, size=tokens_hw((height, width), found.shape[-1]), mode="area").flatten(2)
        inside, outside = own.sum(-1), (1 - own).sum(-1)
        counts = ((inside > 1e-3) & (outside > 1e-3)).to(masks)
        there = (found * own).sum(-1) / inside.clamp_min(1e-3)
        elsewhere = (found * (1 - own)).sum(-1) / outside.clamp_min(1e-3)
        total = total + ((elsewhere - there) * counts).sum(1) / counts.sum(1).clamp_min(1)
    return total / len(maps)


def segments(group: Group, hw: tuple[int, int]) -> Tensor:
    """[subjects, h, w], uint8: how much of each place is the subject's; its box where there is no mask."""
    found = (inside_boxes([subject.box for subject in group.subjects], hw) * 255).to(torch.uint8)
    for number, subject in enumerate(group.subjects):
        if subject.read_mask is not None:
            mask = subject.read_mask().convert("L").resize((hw[1], hw[0]), Image.Resampling.BOX)
            found[number] = torch.from_numpy(np.asarray(mask).copy())
    return found
