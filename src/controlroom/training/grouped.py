"""Pictures of several subjects as recipes show them: latents of the pictures, features of the subjects, made once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from controlroom.backbones.ms_diffusion import inside_boxes
from controlroom.core.errors import InputError
from controlroom.data.groups import Group, groups_fingerprint
from controlroom.training.base_model import BaseModel
from controlroom.training.latent_cache import LatentCache, cache_key

Describe = Callable[[Sequence[Image.Image]], Tensor]
"""Pictures of subjects -> features [n, length, reads]."""


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
        cache_folder: where latents and features are kept, in half precision; None: in memory.

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
        self._latents = kept_rows(self._encode, len(groups), cache_folder, {"vae": base.vae}, version)
        by = {"image_encoder": described_by}
        self._features = kept_rows(self._seen, len(self._subjects), cache_folder, by, version)

    def __len__(self) -> int:
        """How many pictures an epoch shows."""
        return len(self.groups)

    def fingerprint(self) -> str:
        """Pictures, words, boxes, size."""
        return f"{groups_fingerprint(self.groups)} {self.size}"

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
    make: Callable[[Sequence[int]], Tensor], count: int, folder: Path | None, by: dict[str, nn.Module], version: str
) -> Callable[[Sequence[int]], Tensor]:
    """A function that reads rows which ``make`` made once.

    Args:
        make: rows of these numbers, [n, C, H, W].
        count: number of rows.
        folder: where they are kept, in half precision; None: in memory.
        by: networks that ``make`` uses.
        version: of what they are made of.
    """
    if folder is None:
        whole = torch.cat([make(range(i, min(i + 64, count))) for i in range(0, count, 64)])
        return lambda rows: whole[list(rows)]
    channels, height, width = make([0]).shape[1:]
    cache = LatentCache(folder, cache_key(by, version), count, (channels, height, width)).build(make)
    return lambda rows: cache.read(list(rows)).float()
