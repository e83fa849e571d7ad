"""Condition maps of pictures that are shown: read from their files, or found by the project's signals.

Each is made once, from the pixels that are shown (cropped, and mirrored where the picture is), and kept beside the run.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.core.images import fit
from controlroom.data.pictures import ConditionedPicture, Picture
from controlroom.signals.choose import choose_signal
from controlroom.signals.signal import Signal
from controlroom.training.entry_store import EntryStore, key_of
from controlroom.training.shown import Shown

_VERSION = "condition maps 1"
_FOLDER = "maps"
# Mirrored, these say something else: left and right change places in their colours.
_ONE_SIDED = ("normal", "pose")


class Places:
    """Which picture a number of `Shown` is, and whether it is mirrored."""

    def __init__(self, shown: Shown) -> None:
        self._of = [number for number, picture in enumerate(shown.pictures) for _ in range(picture.repeats)]
        self.every = [
            (n, side) for n in range(len(shown.pictures)) for side in ((False, True) if shown.flip else (False,))
        ]

    def __getitem__(self, index: int) -> tuple[int, bool]:
        return self._of[index % len(self._of)], index >= len(self._of)


def pixels_shown(shown: Shown, number: int, mirrored: bool) -> Image.Image:
    """A picture as it is shown."""
    found = shown.crops[number].apply(shown.pictures[number].read())
    return ImageOps.mirror(found) if mirrored else found


class ConditionMaps:
    """One condition of every picture, in the size in which it is shown.

    Args:
        shown: the pictures. Where they have conditions of their own (`ConditionedPicture`), those are read.
        folder: of the run; maps are kept in ``maps/`` in it. None: in memory.
        kind: which signal finds the conditions of pictures that have none.
        model, detector: of the signal, as `choose_signal` takes them.
        given: whether conditions of pictures' own are read.
        absent: whether a map is black where the signal finds nothing (nobody, for a pose); otherwise that is an error.

    Raises:
        InputError: some pictures with a condition and some without, none and no kind, a signal that finds nothing, a
            condition that cannot be read, or mirrored ones that would say something else.
    """

    def __init__(
        self,
        shown: Shown,
        folder: Path | None,
        kind: str | None = None,
        model: str | None = None,
        detector: str | None = None,
        given: bool = True,
        absent: bool = False,
    ) -> None:
        self.shown, self.places, self.absent = shown, Places(shown), absent
        self.signal: Signal | None = None
        self._what = "given"
        if not (given and _all_given(shown.pictures)):
            if kind is None:
                raise InputError(
                    f"{shown.pictures[0].name} has no condition. Give a kind, such as kind='canny', to have it found "
                    "in each picture, or name its file as conditioning_image in metadata.jsonl."
                )
            self.signal = choose_signal(kind, model, detector)
            self._what = f"{kind} {model} {detector} {absent}"
        elif shown.flip and (kind is None or kind in _ONE_SIDED):
            raise InputError(
                "flip mirrors the conditions as well, and a mirrored pose or normal map says something else. Leave "
                "flip out, or say with kind that they are something else."
            )
        self._store = None if folder is None else EntryStore(folder / _FOLDER)
        self._kept: dict[str, Tensor] = {}
        for number, mirrored in self.places.every:
            self._map(number, mirrored)

    def rows(self, indices: list[int]) -> Tensor:
        """[B, 3, H, W] in [0, 1]: the conditions of the pictures of these numbers, all of one size."""
        return torch.stack([self._map(*self.places[index]) for index in indices]).float() / 255

    def _map(self, number: int, mirrored: bool) -> Tensor:
        """[3, H, W], uint8; made where it is not there yet."""
        key = key_of(
            _VERSION, self.shown.pictures[number].content, self.shown.crops[number].key, f"{self._what} {mirrored}"
        )
        if self._store is None:
            if key not in self._kept:
                self._kept[key] = self._made(number, mirrored)
            return self._kept[key]
        found = self._store.read(key)
        if found is None:
            found = {"map": self._made(number, mirrored)}
            self._store.write(key, found)
        return found["map"]

    def _made(self, number: int, mirrored: bool) -> Tensor:
        picture = self.shown.pictures[number]
        if self.signal is None:
            assert isinstance(picture, ConditionedPicture)
            drawn = self.shown.crops[number].apply(fit(picture.condition.read(), *picture.size, "stretch"))
            drawn = ImageOps.mirror(drawn) if mirrored else drawn
        else:
            # Of the mirrored picture, and not the mirrored map: a left arm is a left arm.
            seen = pixels_shown(self.shown, number, mirrored)
            try:
                drawn = self.signal(seen).picture
            except InputError as error:
                if not self.absent:
                    raise InputError(
                        f"{picture.name}: {error} Take it out of the set, or name its conditioning_image."
                    ) from error
                drawn = Image.new("RGB", seen.size)
        return torch.from_numpy(np.array(drawn.convert("RGB"))).permute(2, 0, 1).contiguous()


def _all_given(pictures: tuple[Picture, ...]) -> bool:
    """Whether the pictures have conditions; not some of them."""
    with_one = [isinstance(picture, ConditionedPicture) for picture in pictures]
    if any(with_one) and not all(with_one):
        raise InputError(
            f"{pictures[with_one.index(False)].name} has no conditioning_image, {pictures[with_one.index(True)].name} "
            "has one. Name one for every picture, or for none."
        )
    return all(with_one)
