"""Aspect buckets: pictures keep their shape, and every batch has one size.

Sizes of about one area in steps of a few pixels, as trainers of Stable Diffusion make them; each picture goes to the
size of the nearest shape, is enlarged or reduced until it covers it, and loses what sticks out on both sides. Deviation
from sd-scripts: "nearest" is measured on the logarithm of the shape, so that wide and tall pictures are treated alike.

The order is a function of (seed, epoch, step) alone, so a resumed run needs no saved state. In an epoch every picture
is shown as often as it repeats, in batches of one bucket. What is left over in a bucket either fills its batch up with
further pictures of the bucket, which the epoch does not count, or makes a shorter batch.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from PIL import Image, ImageOps

from controlroom.core.errors import InputError
from controlroom.core.images import fit, placement
from controlroom.data.pictures import Picture
from controlroom.training.randomness import seed_of

Leftovers = Literal["fill", "short"]


@dataclass(frozen=True, order=True)
class Bucket:
    """A size in pixels that pictures are brought to."""

    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), as networks and SDXL's conditions have it."""
        return self.height, self.width


@dataclass(frozen=True)
class Crop:
    """How a picture gets to its bucket: scaled until it covers it, the middle kept.

    Attributes:
        original: (width, height) before.
        bucket: size after.
        left, top: pixels that are cut off there, after scaling.
        mirrored: whether left and right change places at the end.
    """

    original: tuple[int, int]
    bucket: Bucket
    left: int
    top: int
    mirrored: bool = False

    def apply(self, image: Image.Image) -> Image.Image:
        """The picture in its bucket's size, RGB."""
        found = fit(image, self.bucket.width, self.bucket.height, "crop")
        return ImageOps.mirror(found) if self.mirrored else found

    def apply_mask(self, mask: Image.Image) -> Image.Image:
        """Its mask, in mode L."""
        return self.apply(mask).convert("L")

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """What SDXL is told: original height and width, crop at top and left, bucket's height and width."""
        width, height = self.original
        return height, width, self.top, self.left, self.bucket.height, self.bucket.width

    @property
    def key(self) -> str:
        """Everything that decides which pixels come out, for a cache."""
        side = " mirrored" if self.mirrored else ""
        return f"cover {self.bucket.width}x{self.bucket.height} middle lanczos{side}"


class Buckets:
    """Sizes of about ``side`` x ``side`` pixels.

    Args:
        side: of the square bucket, or its (width, height); no bucket has more pixels.
        step: sides are multiples of it; 64 for Stable Diffusion, at least the pixels of a latent.
        shortest, longest: limits of a side; None: half and twice the side. ``longest`` equal to ``shortest`` gives
            one bucket.

    Raises:
        InputError: a side smaller than a step, or limits that leave no bucket.
    """

    def __init__(
        self,
        side: int | tuple[int, int] = 512,
        step: int = 64,
        shortest: int | None = None,
        longest: int | None = None,
    ) -> None:
        width, height = (side, side) if isinstance(side, int) else side
        if step < 1 or min(width, height) < step:
            raise InputError(f"Buckets of {width} x {height} in steps of {step} are not possible; give a smaller step.")
        base = Bucket(width // step * step, height // step * step)
        mean = math.isqrt(width * height)
        low = max(step, -(-(mean // 2 if shortest is None else shortest) // step) * step)
        high = (2 * mean if longest is None else longest) // step * step
        found = {base} if low <= min(base.width, base.height) and max(base.width, base.height) <= high else set()
        for one in range(low, high + 1, step):
            other = min(high, width * height // one // step * step)
            if other >= low:
                found |= {Bucket(one, other), Bucket(other, one)}
        if not found:
            raise InputError(
                f"No bucket of {width} x {height} pixels has sides from {shortest} to {longest} in steps of {step}."
            )
        self.all: tuple[Bucket, ...] = tuple(sorted(found))

    def of(self, size: tuple[int, int]) -> Bucket:
        """The bucket of the shape nearest to that of a (width, height); of equal ones, the largest."""
        shape = math.log(size[0] / size[1])
        return min(self.all, key=lambda b: (abs(math.log(b.width / b.height) - shape), -b.width * b.height, b))

    def crop(self, picture: Picture) -> Crop:
        """How a picture gets to its bucket."""
        return crop_to(picture.size, self.of(picture.size))


def crop_to(size: tuple[int, int], bucket: Bucket) -> Crop:
    """How a picture of (width, height) gets to a bucket."""
    _, _, left, top = placement(size, bucket.width, bucket.height, "crop")
    return Crop(size, bucket, max(0, round(-left)), max(0, round(-top)))


@dataclass(frozen=True)
class BucketBatch:
    """What a step shows.

    Attributes:
        indices: of pictures, all of one bucket.
        counted: how many of them, from the first, the epoch counts; the others fill the batch up.
    """

    indices: tuple[int, ...]
    counted: int


class BucketOrder:
    """Which pictures each step shows: batches of one bucket, every picture as often an epoch as it repeats.

    A loop that numbers samples asks `indices`, as of `randomness.DataOrder`; one that counts steps asks `batch`.

    Args:
        buckets: the bucket (or anything else that must not mix) of each picture.
        repeats: how often an epoch shows each; None: once.
        batch_size: pictures of a step.
        seed: of the order.
        leftovers: ``fill``: an incomplete batch is filled up with other pictures of its bucket (its own again, where
            the bucket is smaller than a batch); ``short``: it stays short.
        first_slot: number of the sample at which the run begins (samples that its weights had seen before).

    Attributes:
        steps_per_epoch: batches of an epoch; the same for every epoch.

    Raises:
        InputError: nothing to show, or a batch size or repeats that are not positive.
    """

    def __init__(
        self,
        buckets: Sequence[Hashable],
        repeats: Sequence[int] | None,
        batch_size: int,
        seed: int,
        leftovers: Leftovers = "fill",
        first_slot: int = 0,
    ) -> None:
        repeats = [1] * len(buckets) if repeats is None else list(repeats)
        if not buckets:
            raise InputError("There is no picture to show; expected at least one.")
        if batch_size < 1 or len(repeats) != len(buckets) or min(repeats) < 1:
            raise InputError(
                f"A batch size of {batch_size} with repeats {min(repeats, default=0)} to {max(repeats, default=0)} for "
                f"{len(repeats)} of {len(buckets)} pictures is not possible; expected 1 or more for each."
            )
        self.batch_size, self.seed, self.leftovers, self.first_slot = batch_size, seed, leftovers, first_slot
        self._repeats = repeats
        groups: dict[Hashable, list[int]] = {}
        for index, bucket in enumerate(buckets):
            groups.setdefault(bucket, []).append(index)
        self._groups = list(groups.values())
        self.steps_per_epoch = sum(-(-sum(repeats[i] for i in group) // batch_size) for group in self._groups)
        self._kept: tuple[int, list[BucketBatch]] = (-1, [])

    @classmethod
    def of(
        cls,
        pictures: Sequence[Picture],
        buckets: Buckets,
        batch_size: int,
        seed: int,
        leftovers: Leftovers = "fill",
        first_slot: int = 0,
    ) -> BucketOrder:
        """The order of pictures."""
        placed = [buckets.of(picture.size) for picture in pictures]
        return cls(placed, [picture.repeats for picture in pictures], batch_size, seed, leftovers, first_slot)

    def batch(self, step: int) -> BucketBatch:
        """What a step of the run shows, counted from 0 over all epochs."""
        epoch, place = divmod(step, self.steps_per_epoch)
        kept, batches = self._kept  # read and written as one: batches may be made ahead in a thread
        if kept != epoch:
            batches = self._shuffled(epoch)
            self._kept = epoch, batches
        return batches[place]

    def indices(self, slots: Sequence[int]) -> list[int]:
        """What these samples of one step show; a process of several asks for its share of the step's.

        With ``leftovers="short"`` the slots after the last of a short batch show nothing: the result is shorter.

        Raises:
            InputError: slots of several steps, whose buckets may differ.
        """
        places = [divmod(slot - self.first_slot, self.batch_size) for slot in slots]
        steps = {step for step, _ in places}
        if len(steps) > 1:
            raise InputError(
                f"Slots {slots[0]} to {slots[-1]} belong to steps {min(steps)} to {max(steps)} of {self.batch_size} "
                f"samples from slot {self.first_slot}; expected those of one step. Does first_slot fit the run?"
            )
        shown = [(self.batch(step).indices, row) for step, row in places]
        return [indices[row] for indices, row in shown if row < len(indices)]

    def _shuffled(self, epoch: int) -> list[BucketBatch]:
        batches: list[BucketBatch] = []
        for number, group in enumerate(self._groups):
            shows = self._shows(group, epoch, number)
            for start in range(0, len(shows), self.batch_size):
                own = shows[start : start + self.batch_size]
                missing = self.batch_size - len(own)
                if missing and self.leftovers == "fill":
                    # Those not in the batch yet come first; only a bucket smaller than a batch shows its own again.
                    others = list(dict.fromkeys(i for i in shows if i not in own)) + list(dict.fromkeys(own))
                    own = own + [others[k % len(others)] for k in range(missing)]
                batches.append(BucketBatch(tuple(own), self.batch_size - missing))
        return [batches[place] for place in self._permutation(len(batches), epoch, "batches")]

    def _shows(self, group: Sequence[int], epoch: int, number: int) -> list[int]:
        """Every picture of a bucket as often as it repeats; round after round, so that copies lie far apart."""
        shows: list[int] = []
        for turn in range(max(self._repeats[index] for index in group)):
            there = [index for index in group if self._repeats[index] > turn]
            shows += [there[place] for place in self._permutation(len(there), epoch, f"bucket {number} round {turn}")]
        return shows

    def _permutation(self, count: int, epoch: int, name: str) -> list[int]:
        generator = torch.Generator("cpu").manual_seed(seed_of(self.seed, epoch, f"bucket order {name}"))
        return torch.randperm(count, generator=generator).tolist()
