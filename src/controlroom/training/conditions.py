"""Condition maps of pictures that are shown: read from their files, or found by the project's signals.

Each is made once, from the pixels that are shown (cropped, and mirrored where the picture is), and kept beside the run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.core.images import fit
from controlroom.data.pictures import ConditionedPicture, Picture
from controlroom.signals.choose import choose_signal
from controlroom.signals.signal import Kind, Signal
from controlroom.training.entry_store import EntryStore, key_of
from controlroom.training.shown import Shown

_VERSION = "condition maps 1"
_FOLDER = "maps"
# Mirrored, these say something else: left and right change places in their colours.
_ONE_SIDED = ("normal", "pose")


Row = tuple[int, bool]
"""Number of a picture, and whether it is shown mirrored."""


class Places:
    """Which picture a number of `Shown` is, and whether it is mirrored."""

    def __init__(self, shown: Shown) -> None:
        self._of = [number for number, picture in enumerate(shown.pictures) for _ in range(picture.repeats)]

    def __getitem__(self, index: int) -> Row:
        return self._of[index % len(self._of)], index >= len(self._of)


def every_row(shown: Shown) -> list[Row]:
    """Each picture once, and once mirrored where it is shown so."""
    sides = (False, True) if shown.flip else (False,)
    return [(number, mirrored) for number in range(len(shown.pictures)) for mirrored in sides]


def pixels_shown(shown: Shown, row: Row) -> Image.Image:
    """A picture as it is shown."""
    found = shown.crops[row[0]].apply(shown.pictures[row[0]].read())
    return ImageOps.mirror(found) if row[1] else found


def row_pixels(pictures: Iterable[Image.Image]) -> Tensor:
    """[B, 3, H, W], uint8."""
    return torch.stack([torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1) for one in pictures])


class Conditions(Protocol):
    """What stands beside pictures."""

    def fill(self, shown: Shown) -> Conditions:
        """Make what is missing of these pictures."""
        ...

    def rows(self, shown: Shown, rows: Sequence[Row]) -> Tensor:
        """[B, ...]: that of these pictures."""
        ...


class ConditionMaps:
    """One condition of every picture, in the size in which it is shown.

    Args:
        folder: of the run; maps are kept in ``maps/`` in it. None: in memory.
        kind: which signal finds the conditions of pictures that have none.
        model, detector: of the signal, as `choose_signal` takes them.
        given: whether conditions of pictures' own (`ConditionedPicture`) are read.
        absent: whether a map is black where the signal finds nothing (nobody, for a pose); otherwise that is an error.
    """

    def __init__(
        self,
        folder: Path | None,
        kind: str | None = None,
        model: str | None = None,
        detector: str | None = None,
        given: bool = True,
        absent: bool = False,
    ) -> None:
        self.kind, self.model, self.detector, self.given, self.absent = kind, model, detector, given, absent
        self._signal: Signal | None = None
        self._store = None if folder is None else EntryStore(folder / _FOLDER)
        self._kept: dict[str, Tensor] = {}

    def fill(self, shown: Shown) -> ConditionMaps:
        """Make what is missing of these pictures.

        Raises:
            InputError: some pictures with a condition and some without, none and no kind, a signal that finds nothing,
                a condition that cannot be read, or mirrored ones that would say something else.
        """
        if self.given and _all_given(shown.pictures):
            if shown.flip and (self.kind is None or self.kind in _ONE_SIDED):
                raise InputError(
                    "flip mirrors the conditions as well, and a mirrored pose or normal map says something else. Leave "
                    "flip out, or say with kind that they are something else."
                )
        elif self.kind is None:
            raise InputError(
                f"{shown.pictures[0].name} has no condition. Give a kind, such as kind='canny', to have it found in "
                "each picture, or name its file as conditioning_image in metadata.jsonl."
            )
        for row in every_row(shown):
            self._map(shown, row)
        return self

    def rows(self, shown: Shown, rows: Sequence[Row]) -> Tensor:
        """[B, 3, H, W] in [0, 1]: the conditions of these pictures, all of one size."""
        return torch.stack([self._map(shown, row) for row in rows]).float() / 255

    def _map(self, shown: Shown, row: Row) -> Tensor:
        """[3, H, W], uint8; made where it is not there yet."""
        picture = shown.pictures[row[0]]
        what = "given" if self._is_given(picture) else f"{self.kind} {self.model} {self.detector} {self.absent}"
        key = key_of(_VERSION, picture.content, shown.crops[row[0]].key, f"{what} {row[1]}")
        if self._store is None:
            if key not in self._kept:
                self._kept[key] = self._made(shown, row)
            return self._kept[key]
        found = self._store.read(key)
        if found is None:
            found = {"map": self._made(shown, row)}
            self._store.write(key, found)
        return found["map"]

    def _is_given(self, picture: Picture) -> bool:
        return self.given and isinstance(picture, ConditionedPicture)

    def _made(self, shown: Shown, row: Row) -> Tensor:
        number, mirrored = row
        picture = shown.pictures[number]
        if self.given and isinstance(picture, ConditionedPicture):
            drawn = shown.crops[number].apply(fit(picture.condition.read(), *picture.size, "stretch"))
            drawn = ImageOps.mirror(drawn) if mirrored else drawn
        else:
            # Of the mirrored picture, and not the mirrored map: a left arm is a left arm.
            drawn = self._found(pixels_shown(shown, row), picture.name)
        return row_pixels([drawn])[0].contiguous()

    def _found(self, seen: Image.Image, name: str) -> Image.Image:
        if self._signal is None:
            self._signal = choose_signal(str(self.kind), self.model, self.detector)
        try:
            return self._signal(seen).picture
        except InputError as error:
            if not self.absent:
                raise InputError(f"{name}: {error} Take it out of the set, or name its conditioning_image.") from error
            return Image.new("RGB", seen.size)


class JoinedMaps:
    """Several conditions of every picture, one behind the other on channels.

    Each is found and kept as `ConditionMaps` does, so runs of one kind and of several share what is in a folder. Nobody
    in a picture is no pose: a black map.

    Args:
        folder: of the run; None: in memory.
        kinds: in the order of their channels, three each.
        models: of the signals, by kind; normals are found from the depth's if they have none.
        detector: what finds the people of a pose, for networks of photographs.
        given: which of them conditions of pictures' own are; None: the only one.

    Raises:
        InputError: a model, a detector or a given kind that is none of ``kinds``.
    """

    def __init__(
        self,
        folder: Path | None,
        kinds: Sequence[str],
        models: Mapping[Kind, str] | None = None,
        detector: str | None = None,
        given: str | None = None,
    ) -> None:
        known = dict[str, str]((models or {}).items())
        several = len(kinds) > 1
        asked = [*known, *([given] if given else []), *(["pose"] if detector else [])]
        unknown = next((kind for kind in asked if kind not in kinds), None)
        if unknown is not None:
            raise InputError(
                f"Something is said of {unknown}, which is not learned. Learned are {', '.join(kinds)}: add it to "
                "kinds, or leave it out of given, signal_models and detector."
            )
        self.kinds, self._given = tuple(kinds), given if several else kinds[0]
        if "depth" in known:
            known.setdefault("normal", known["depth"])
        self._each = [
            ConditionMaps(
                folder,
                kind,
                known.get(kind),
                detector if kind == "pose" else None,
                given=kind == self._given,
                absent=several and kind == "pose",
            )
            for kind in kinds
        ]

    def fill(self, shown: Shown) -> JoinedMaps:
        """Make what is missing of these pictures.

        Raises:
            InputError: as `ConditionMaps.fill`; conditions of pictures' own that may be any of several kinds.
        """
        if self._given is None and any(isinstance(picture, ConditionedPicture) for picture in shown.pictures):
            raise InputError(
                "The pictures have a conditioning_image, which is one map, and several kinds are learned. Say which "
                f"of them it is, such as given={self.kinds[0]!r}; the others are found in the pictures."
            )
        for maps in self._each:
            maps.fill(shown)
        return self

    def rows(self, shown: Shown, rows: Sequence[Row]) -> Tensor:
        """[B, 3 * kinds, H, W] in [0, 1]: the conditions of these pictures, all of one size."""
        return torch.cat([maps.rows(shown, rows) for maps in self._each], dim=1)

    def check_found(self, shown: Shown) -> None:
        """Raise InputError for a kind that is found in no picture, which nothing would be learned of."""
        for kind, maps in zip(self.kinds, self._each, strict=True):
            if not any(maps.rows(shown, [row]).any() for row in every_row(shown)):
                raise InputError(f"There is no {kind} in any picture: every map is black. Leave it out of kinds.")


def _all_given(pictures: tuple[Picture, ...]) -> bool:
    """Whether the pictures have conditions; not some of them."""
    with_one = [isinstance(picture, ConditionedPicture) for picture in pictures]
    if any(with_one) and not all(with_one):
        raise InputError(
            f"{pictures[with_one.index(False)].name} has no conditioning_image, {pictures[with_one.index(True)].name} "
            "has one. Name one for every picture, or for none."
        )
    return all(with_one)
