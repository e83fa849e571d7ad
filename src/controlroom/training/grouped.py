"""Pictures of several subjects as recipes show them: latents of the pictures, features of the subjects, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from PIL import Image
from torch import Tensor, nn

from controlroom.backbones.ms_diffusion import inside_boxes
from controlroom.core.errors import InputError
from controlroom.data.group_folder import group_folder
from controlroom.data.groups import Group, groups_fingerprint
from controlroom.training.base_model import BaseModel
from controlroom.training.clip_vision import image_encoder_for
from controlroom.training.held_out import in_parts, spread_over
from controlroom.training.latent_cache import LatentCache, cache_key
from controlroom.training.recipe_settings import EncodedSettings

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline
    from controlroom.training.recipe import Recipe

Describe = Callable[[Sequence[Image.Image]], Tensor]
"""Pictures of subjects -> features [n, length, reads]."""


class GroupSettings(EncodedSettings):
    """Settings of a recipe that learns from groups: `read` gives them, and `build` takes them, where others have
    pictures.
    """

    needs_boxes: ClassVar[bool] = True
    """Whether the recipe must know where a subject is."""

    image_encoder: str | None = None
    """Folder of CLIP's image encoder, which reads the pictures of subjects; None: the theatre's."""

    def read(self, data: str) -> Sequence[Any]:
        """Groups of a folder whose ``metadata.jsonl`` names the subjects; see `data.group_folder`."""
        return group_folder(data, self.needs_boxes)

    def groups(self, given: Sequence[Any]) -> tuple[list[Group], list[Group]]:
        """Groups that are learned from, and held-out ones.

        Raises:
            InputError: something else was given, or ``validation`` cannot be read.
        """
        held_out = () if self.validation is None else self.read(self.validation)
        return checked_groups(given), spread_over(checked_groups(held_out), self.validation_pictures)

    def encoder_for(self, pipe: Pipeline) -> Any:
        """The image encoder that was named, or the theatre's. Raises ModelError if there is none."""
        return image_encoder_for(pipe, self.image_encoder, type(self).__name__.removesuffix("Settings"))

    @property
    def cache_folder(self) -> Path | None:
        """Where what is encoded is kept."""
        return Path(self.cache) if self.cache else None

    def own(self) -> str:
        """What only this recipe can be told, as JSON."""
        return self.model_dump_json(exclude=set(GroupSettings.model_fields))

    def rehearsal(self, pipe: Pipeline, pictures: Sequence[Any], folder: Path) -> Recipe[Any]:
        """With the two pictures of most subjects, so that nothing else is encoded for a look."""
        learned, _ = self.groups(pictures)
        largest: list[Any] = sorted(learned, key=lambda group: len(group.subjects), reverse=True)[:2]
        return self.model_copy(update={"validation": None}).build(pipe, largest, folder)


def checked_groups(given: Sequence[Any]) -> list[Group]:
    """What was given, if it is groups. Raises InputError otherwise."""
    for one in given:
        if not isinstance(one, Group):
            raise InputError(
                f"{getattr(one, 'name', one)!s:.80} does not say who is in it. Read the set with "
                "data.group_folder.group_folder."
            )
    return list(given)


@dataclass(frozen=True)
class GroupBatch:
    """What a step shows; a picture of fewer subjects has boxes of zeros for the others, which are then never seen.

    Attributes:
        latents: [B, C, h, w], scaled.
        prompts: B texts.
        words: what the subjects of each picture are called.
        features: [B, subjects, length, reads].
        boxes: [B, subjects, 4].
        inside: [B, subjects, h, w], 1 in the boxes.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]
    features: Tensor
    boxes: Tensor
    inside: Tensor


class EncodedGroups:
    """Groups as a network reads them.

    Args:
        base: the model; its autoencoder encodes.
        groups: pictures with captions, and their subjects.
        describe: makes features of subjects' pictures.
        described_by: the network that ``describe`` uses.
        size: height and width of the pictures; None: the model's own.
        cache_folder: where latents and features are kept; None: in memory.
        exact: whether they are kept as they are encoded, in float32; otherwise in half precision.

    Raises:
        InputError: no groups, or a picture without a caption.
    """

    def __init__(
        self,
        base: BaseModel,
        groups: Sequence[Group],
        describe: Describe,
        described_by: nn.Module,
        size: tuple[int, int] | None = None,
        cache_folder: Path | None = None,
        exact: bool = False,
    ) -> None:
        silent = [group.picture.name for group in groups if not group.picture.caption]
        if not groups or silent:
            raise InputError(f"{silent[0]} has no caption." if silent else "There is no picture to train on.")
        self.base, self.groups, self.size = base, tuple(groups), size or base.backbone.default_size
        self._describe = describe
        self._subjects = [subject for group in groups for subject in group.subjects]
        self._first = [0]
        for group in groups:
            self._first.append(self._first[-1] + len(group.subjects))
        version = self.fingerprint()
        self._latents = kept_rows(self._encode, len(groups), cache_folder, {"vae": base.vae}, version, exact)
        by = {"image_encoder": described_by}
        self._features = kept_rows(self._seen, len(self._subjects), cache_folder, by, version, exact)

    def __len__(self) -> int:
        """How many pictures an epoch shows."""
        return len(self.groups)

    def fingerprint(self) -> str:
        """Pictures, words, boxes, size."""
        return f"{groups_fingerprint(self.groups)} {self.size}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return tuple(self.groups[index].picture.name for index in indices)

    def parts(self) -> list[GroupBatch]:
        """All groups, a few at a time."""
        return [self.batch(part) for part in in_parts(range(len(self)))]

    def _encode(self, slots: Sequence[int]) -> Tensor:
        return self.base.latents([self.groups[slot].picture.read() for slot in slots], self.size).cpu()

    def _seen(self, slots: Sequence[int]) -> Tensor:
        return self._describe([self._subjects[slot].picture.read() for slot in slots])[..., None].float().cpu()

    def batch(self, indices: Sequence[int]) -> GroupBatch:
        """Groups of these numbers, filled up to as many subjects as the largest has."""
        groups = [self.groups[index] for index in indices]
        latents = self._latents(indices)
        height, width = latents.shape[-2:]
        most = max(len(group.subjects) for group in groups)
        shown = [self._features(range(self._first[i], self._first[i + 1]))[..., 0] for i in indices]
        features = torch.zeros(len(groups), most, *shown[0].shape[1:])
        boxes, inside = torch.zeros(len(groups), most, 4), torch.zeros(len(groups), most, height, width)
        for row, group in enumerate(groups):
            count = len(group.subjects)
            places = [subject.box for subject in group.subjects]
            features[row, :count], boxes[row, :count] = shown[row], torch.tensor(places)
            inside[row, :count] = inside_boxes(places, (height, width))
        device = self.base.device
        return GroupBatch(
            latents.to(device),
            tuple(group.picture.caption for group in groups),
            tuple(tuple(subject.word for subject in group.subjects) for group in groups),
            features.to(device),
            boxes.to(device),
            inside.to(device),
        )


def kept_rows(
    make: Callable[[Sequence[int]], Tensor],
    count: int,
    folder: Path | None,
    by: dict[str, nn.Module],
    version: str,
    exact: bool = False,
) -> Callable[[Sequence[int]], Tensor]:
    """A function that reads rows which ``make`` made once.

    Args:
        make: rows of these numbers, [n, C, H, W].
        count: number of rows.
        folder: where they are kept; None: in memory.
        by: networks that ``make`` uses.
        version: of what they are made of.
        exact: whether files hold float32; otherwise half precision.
    """
    if folder is None:
        # As a file has them: sums of other strides are rounded elsewhere.
        whole = torch.cat([make(range(i, min(i + 64, count))) for i in range(0, count, 64)]).contiguous()
        return lambda rows: whole[list(rows)]
    channels, height, width = make([0]).shape[1:]
    cache = LatentCache(folder, cache_key(by, version), count, (channels, height, width), exact).build(make)
    return lambda rows: cache.read(list(rows)).float()
