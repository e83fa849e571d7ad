"""What recipes of multimodal language models share: which parts move, and captions with pictures in them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from PIL import Image
from torch import Tensor, nn

from controlroom.backbones.image_encoder import clip_pixels
from controlroom.backbones.multimodal import PICTURE, MultimodalReader
from controlroom.core.errors import InputError
from controlroom.data.group_folder import group_folder, has_groups
from controlroom.data.groups import Group, PlacedSubject
from controlroom.data.pictures import Picture, by_subject
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.grouped import checked_groups
from controlroom.training.recipe_settings import RecipeSettings

ReaderT = TypeVar("ReaderT", bound=MultimodalReader[Any])


class InterleavedSettings(RecipeSettings):
    """Settings of a stage that learns from subjects: `read` gives groups where the folder's ``metadata.jsonl`` names
    them, and pictures otherwise; `build` takes both.
    """

    def read(self, data: str) -> Sequence[Any]:
        return group_folder(data, boxes=False) if has_groups(data) else super().read(data)


def groups_among(given: Sequence[Any], told: bool) -> list[Group]:
    """What was given, if it is groups; nothing of pictures.

    Args:
        given: groups, or pictures.
        told: whether settings say which words are subjects, as pictures need it.

    Raises:
        InputError: some of both, or groups where settings say it too.
    """
    if not any(isinstance(one, Group) for one in given):
        return []
    if told:
        raise InputError("The data names its subjects; leave the words (and a detector) for them out.")
    return checked_groups(given)


class MultimodalStage(Generic[ReaderT]):
    """Which parts of a multimodal language model move, and its file.

    Args:
        pipe: the base model; it is only read.
        reader: the network.

    Attributes:
        base: the base model, frozen.
        reader: the network, of which `moves` learn.
    """

    moves: ClassVar[tuple[str, ...]]

    def __init__(self, pipe: Pipeline, reader: ReaderT) -> None:
        self.base, self.reader = BaseModel(pipe), reader
        self.tokenizer = self.base.backbone.tokenizers()[0]
        reader.model.float().requires_grad_(False)
        for module in self.modules().values():
            module.requires_grad_(True)

    def modules(self) -> dict[str, nn.Module]:
        parts = self.reader.model.parts()
        return {name: parts[name] for name in self.moves}

    def frozen(self) -> dict[str, nn.Module]:
        parts = {name: part for name, part in self.reader.model.parts().items() if name not in self.moves}
        return {**self.base.frozen(), **parts, "image_encoder": self.reader.image_encoder}

    def seen(self, pictures: Sequence[Image.Image]) -> Tensor:
        """[n, length, reads]: what CLIP's image encoder says before its last block, as in a run."""
        return self.reader.seen(clip_pixels(pictures, self.reader.side)).float()

    def export(self, folder: Path) -> None:
        self.reader.save(folder)

    def load(self, folder: Path) -> None:
        self.reader.model.load_state_dict(self.read(folder).model.state_dict())

    def read(self, folder: Path) -> ReaderT:
        """What `export` wrote."""
        raise NotImplementedError


def entities(caption: str, words: Sequence[str]) -> list[tuple[int, int, int]]:
    """Where a caption names its subjects: start, end and number of the subject, in the caption's order.

    Of subjects with one name the first is named first.

    Raises:
        InputError: it does not.
    """
    spans = []
    for number, word in enumerate(words):
        found = [match.span() for match in re.finditer(rf"\b{re.escape(word)}\b", caption, re.IGNORECASE)]
        before = words[:number].count(word)
        if len(found) <= before:
            raise InputError(f"The caption {caption!r:.80} does not name its subject {word!r}. Write it there.")
        spans.append((*found[before], number))
    return sorted(spans)


def interleaved(caption: str, spans: Sequence[tuple[int, int, int]], kept: bool) -> str:
    """The caption with `PICTURE` behind each subject's word (``kept``), or in its place."""
    parts, at = [], 0
    for start, end, _ in spans:
        parts += [caption[at : end if kept else start], f" {PICTURE}" if kept else PICTURE]
        at = end
    return "".join([*parts, caption[at:]])


def groups_of(pictures: Sequence[Picture], word: str) -> tuple[Group, ...]:
    """Each picture with the next of its subject as what the subject looks like.

    Raises:
        InputError: no word, or a subject of one picture.
    """
    if not word.strip():
        raise InputError('The word of the captions for the subject is missing: word = "dog".')
    groups = []
    for subject, its in by_subject(pictures).items():
        if len(its) < 2:
            raise InputError(f"There is one picture of {subject or 'the subject'!r}; it takes two to know it from.")
        for number, picture in enumerate(its):
            other = PlacedSubject(word, (0.0, 0.0, 1.0, 1.0), its[(number + 1) % len(its)])
            groups.append(Group(picture, (other,)))
    return tuple(groups)
