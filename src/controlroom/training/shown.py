"""Pictures as recipes show them to a network: latents made once, words, masks; and pictures of the class beside them.

Prior preservation (DreamBooth, arXiv 2208.12242): beside each picture of the subject stands one that the untrained
model drew of its class, so that the class keeps its looks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture, fingerprint
from controlroom.training.base_model import BaseModel
from controlroom.training.buckets import Bucket, BucketOrder, Buckets, crop_to
from controlroom.training.held_out import in_parts
from controlroom.training.picture_cache import PictureCache
from controlroom.training.randomness import seed_of


@dataclass(frozen=True)
class ShownBatch:
    """What a step shows.

    Attributes:
        latents: [B, C, h, w], scaled.
        prompts: B texts.
        mask: [B, 1, h, w] in [0, 1], what counts; None: everything.
        names: of the pictures.
        size: height and width of the pictures in pixels.
    """

    latents: Tensor
    prompts: tuple[str, ...]
    mask: Tensor | None
    names: tuple[str, ...]
    size: tuple[int, int]


class Shown:
    """Pictures with their words, encoded once: of one size, or each of the nearest of several shapes.

    Their latents are kept in memory, or where the model's cache is on disk, and are read from there for each batch.

    Args:
        base: the model; its autoencoder encodes.
        pictures: what is shown; each as often an epoch as its ``repeats``.
        prompt: words for pictures without a caption; None: every picture must have one.
        captions: whether captions of the pictures are used where there are any.
        size: height and width; pictures are cropped around their centre. None: the model's own.
        flip: also show each picture mirrored (not for faces that are not symmetric).
        buckets: whether pictures keep their shape: each goes to the nearest of some sizes with as many pixels as
            ``size``; batches must then be of one of them, as those of `order` are.

    Raises:
        InputError: no picture, one that cannot be read, or one without words.
    """

    def __init__(
        self,
        base: BaseModel,
        pictures: Sequence[Picture],
        prompt: str | None = None,
        captions: bool = True,
        size: tuple[int, int] | None = None,
        flip: bool = False,
        buckets: bool = False,
    ) -> None:
        if not pictures:
            raise InputError("There is no picture to train on.")
        self.pictures = tuple(pictures)
        self.size = size or base.backbone.default_size
        self.prompts = tuple(_words(p, prompt, captions) for p in pictures)
        self.flip = flip
        height, width = self.size
        self.crops = tuple(crop_to(p.size, Bucket(width, height)) for p in pictures)
        if buckets:
            scale = base.backbone.pixels_per_latent
            shapes = Buckets((width, height), max(scale, min(64, min(self.size) // 8) // scale * scale))
            self.crops = tuple(shapes.crop(p) for p in pictures)
        if flip:
            # What is mirrored is the picture and not its latents: the autoencoder is not quite symmetric.
            self.crops += tuple(replace(crop, mirrored=True) for crop in self.crops)
        self.masked = any(p.read_mask is not None for p in pictures)
        self._shown = [(self.pictures[row % len(pictures)], crop) for row, crop in enumerate(self.crops)]
        self._encoder, self._kept = base.pictures, list[tuple[Tensor, Tensor]]()
        if isinstance(self._encoder, PictureCache):
            self._encoder.fill(self._shown)
        else:
            self._kept = [self._encoded([row]) for row in range(len(self._shown))]
        self._places = [i for i, p in enumerate(pictures) for _ in range(p.repeats)]
        if flip:
            self._places += [len(self.pictures) + i for i in self._places]

    def __len__(self) -> int:
        """How many pictures an epoch shows."""
        return len(self._places)

    def fingerprint(self) -> str:
        """Whatever a resumed run must share: pictures, words, size."""
        sizes = sorted({crop.key for crop in self.crops[: len(self.pictures)]})
        text = f"{fingerprint(self.pictures)} {self.prompts} {sizes} flip={self.flip}"
        return hashlib.sha256(text.encode()).hexdigest()

    def batch(self, indices: Sequence[int]) -> ShownBatch:
        """Pictures of these numbers, below ``len(self)``."""
        return self._rows([self._places[index] for index in indices])

    def parts(self) -> list[ShownBatch]:
        """Every picture once and as it is, in small batches of one size: what is measured on."""
        of_size: dict[Bucket, list[int]] = {}
        for number in range(len(self.pictures)):
            of_size.setdefault(self.crops[number].bucket, []).append(number)
        return [self._rows(part) for numbers in of_size.values() for part in in_parts(numbers)]

    def _rows(self, rows: Sequence[int]) -> ShownBatch:
        plain = [row % len(self.pictures) for row in rows]
        if self._kept:
            latents, mask = (torch.cat(each) for each in zip(*(self._kept[row] for row in rows), strict=True))
        else:
            latents, mask = self._encoded(rows)
        return ShownBatch(
            latents,
            tuple(self.prompts[row] for row in plain),
            mask if self.masked else None,
            tuple(self.pictures[row].name for row in plain),
            self.crops[rows[0]].bucket.size,
        )

    def _encoded(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Latents and masks, of one size."""
        found = self._encoder.read([self._shown[row] for row in rows])
        return found.latents(), found.mask

    def order(self, batch_size: int, seed: int, first_slot: int) -> BucketOrder:
        """Batches of one size, every picture as often an epoch as it repeats."""
        places = [self.crops[row].bucket for row in self._places]
        return BucketOrder(places, None, batch_size, seed, first_slot=first_slot)

    def beside(self, step: int, rows: int, seed: int = 0) -> ShownBatch:
        """Pictures drawn anew for this step, each as likely as any other: a class beside its subject."""
        return self.batch([seed_of(seed, step * rows + k, "beside") % len(self) for k in range(rows)])


def _words(picture: Picture, prompt: str | None, captions: bool) -> str:
    found = picture.caption if captions and picture.caption else prompt
    if found is None:
        raise InputError(
            f"{picture.name} has no caption. Write one beside it (a .txt file of the same name, or metadata.jsonl), or "
            "give a prompt for all pictures."
        )
    return found
