"""A folder of pictures that show several subjects: who is where, and what each looks like elsewhere.

The layout of 🤗 datasets' ``imagefolder``: ``metadata.jsonl`` with ``file_name`` and ``text``, and a list ``subjects``
of objects: ``word``, what it is called; ``box``, left, top, right and bottom of the upright picture; ``image``, another
picture of it; ``mask``, if there is one, where it is seen, white, in the shape of the line's picture. Boxes are shares
of the picture, from 0 to 1; of a line with ``"box_unit": "pixels"`` they are pixels.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.groups import Box, Group, PlacedSubject
from controlroom.data.json_lines import json_lines, shown, text_field
from controlroom.data.picture_files import (
    caption_beside,
    existing_folder,
    file_in,
    mask_reader,
    note_of_copies,
    picture_of,
)
from controlroom.data.pictures import Picture

METADATA = "metadata.jsonl"
FRACTION, PIXELS = "fraction", "pixels"
_FIELDS = ("file_name", "text", "subjects", "box_unit")
_OF_SUBJECTS = ("word", "box", "image", "mask")
_CAPTION_ENDINGS = (".txt", ".caption")
_EVERYWHERE: Box = (0.0, 0.0, 1.0, 1.0)


def group_folder(path: str | os.PathLike[str], boxes: bool = True) -> tuple[Group, ...]:
    """Pictures with their subjects, in the order of the lines.

    Pictures are not decoded here. One whose header is whole and whose pixels are not is found when it is read; that
    error names the line as well.

    Args:
        path: folder with ``metadata.jsonl``.
        boxes: whether each subject must have a box; otherwise one without is everywhere.

    Raises:
        InputError: no such folder, no table or nothing in it; a line that is not JSON, lacks a field, names a picture
            twice or one that is not there, lies outside or cannot be read; a box that is none; a mask of another shape;
            a subject that is known from the very picture it is in.
    """
    root = existing_folder(path, f"a folder with {METADATA}")
    table = root / METADATA
    if not table.is_file():
        raise InputError(
            f"There is no {METADATA} in {str(root)!r}; each of its lines says file_name, text and subjects (a word, a "
            "box and another picture of each)."
        )
    reader = _Reader(root, boxes)
    groups = tuple(reader.group(where, row) for where, row in json_lines(table, ", ".join(_FIELDS[:3])))
    if not groups:
        raise InputError(f"{str(table)!r} lists nothing.")
    notes = [note_of_copies([group.picture for group in groups])]
    if reader.ignored:
        notes.append(f"{str(table)!r} has further fields, which are not read: {', '.join(sorted(reader.ignored))}.")
    for note in filter(None, notes):
        warnings.warn(note, stacklevel=2)
    return groups


def has_groups(path: str | os.PathLike[str]) -> bool:
    """Whether a folder's table says who is on its pictures: its first line has ``subjects``.

    Raises:
        InputError: no such folder, or a first line that cannot be read.
    """
    table = existing_folder(path, "a folder of pictures") / METADATA
    first = next(json_lines(table), None) if table.is_file() else None
    return first is not None and "subjects" in first[1]


class _Reader:
    """Lines of one table. A picture that several lines name is hashed once."""

    def __init__(self, root: Path, boxes: bool) -> None:
        self.root, self.boxes = root, boxes
        self.ignored: set[str] = set()
        self._lines: dict[Path, str] = {}
        self._known: dict[Path, Picture] = {}

    def group(self, where: str, row: Mapping[str, Any]) -> Group:
        self.ignored.update(name for name in row if name not in _FIELDS)
        named = text_field(row, "file_name", where)
        path = file_in(self.root, named, where)
        if path in self._lines:
            raise InputError(f"{where} names {named!r}, which {self._lines[path]} names already. Remove one of them.")
        self._lines[path] = where
        picture = replace(self._picture(path, where), caption=self._caption(path, where, row))
        unit = row.get("box_unit", FRACTION)
        if unit not in (FRACTION, PIXELS):
            raise InputError(f"{where}: 'box_unit' is {shown(unit)}; expected {FRACTION!r} or {PIXELS!r}.")
        given = row.get("subjects")
        if not isinstance(given, list) or not given:
            said = "missing" if given is None else shown(given)
            raise InputError(
                f"{where}: 'subjects' is {said}; expected a list with those in the picture. Leave the line out, or say "
                "who is in it."
            )
        pixels = picture.size if unit == PIXELS else None
        subjects = [
            self._subject(f"{where}, subject {number}", one, picture, path, pixels)
            for number, one in enumerate(given, 1)
        ]
        return Group(picture, tuple(subjects))

    def _subject(
        self, where: str, given: Any, target: Picture, path: Path, pixels: tuple[int, int] | None
    ) -> PlacedSubject:
        if not isinstance(given, dict):
            raise InputError(f"{where} is {shown(given)}; expected an object with {', '.join(_OF_SUBJECTS)}.")
        unknown = [name for name in given if name not in _OF_SUBJECTS]
        if unknown:
            raise InputError(f"{where} has {shown(unknown[0])}; a subject has {', '.join(_OF_SUBJECTS)}.")
        word = " ".join(text_field(given, "word", where).split())
        box = _EVERYWHERE if given.get("box") is None and not self.boxes else _box(given.get("box"), pixels, where)
        named = text_field(given, "image", where)
        picture = self._picture(file_in(self.root, named, where, "picture"), where)
        if picture.content == target.content:
            raise InputError(
                f"{where} is known from {named!r}, which is the very picture it is in ({target.name}): it would be "
                "copied, not understood. Give another picture of it."
            )
        mask = given.get("mask")
        if mask is None:
            return PlacedSubject(word, box, picture)
        file = file_in(self.root, text_field(given, "mask", where), where, "mask")
        with _said(where):
            read_mask = mask_reader(file, path, target.size)
        return PlacedSubject(word, box, picture, partial(_read, read_mask, where))

    def _picture(self, path: Path, where: str) -> Picture:
        if path not in self._known:
            with _said(where):
                found = picture_of(path, self.root)
            self._known[path] = replace(found, read=partial(_read, found.read, where))
        return self._known[path]

    def _caption(self, path: Path, where: str, row: Mapping[str, Any]) -> str:
        if row.get("text") in (None, ""):
            with _said(where):
                beside = caption_beside(path, _CAPTION_ENDINGS)
            if beside:
                return beside
        return " ".join(text_field(row, "text", where).split())


def _box(given: Any, pixels: tuple[int, int] | None, where: str) -> Box:
    """The box as shares of the picture; ``pixels`` is the picture's width and height where the table has pixels."""
    width, height = pixels or (1, 1)
    if isinstance(given, list) and len(given) == 4 and all(type(value) in (int, float) for value in given):
        left, top, right, bottom = given
        if 0 <= left < right <= width and 0 <= top < bottom <= height:  # NaN is none of these
            return (left / width, top / height, right / width, bottom / height)
    said = "missing" if given is None else shown(given)
    unit = f"in pixels, of {width} x {height}" if pixels else "from 0 to 1 of the picture"
    hint = "" if pixels else f' (pixels: the line says "box_unit": "{PIXELS}")'
    raise InputError(f"{where}: 'box' is {said}; expected [left, top, right, bottom] {unit}{hint}.")


def _read(read: Callable[[], Image.Image], where: str) -> Image.Image:
    """A picture or a mask, decoded; the error names the line."""
    with _said(where):
        return read()


@contextmanager
def _said(where: str) -> Iterator[None]:
    """Errors within name the line."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
