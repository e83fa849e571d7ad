"""A folder of pictures with captions: the layout of 🤗 datasets' ``imagefolder``, and the plain one of trainers.

Captions come from ``metadata.jsonl`` (``file_name``, ``text``, optionally ``mask``) or ``metadata.csv``, else from a
``.txt`` or ``.caption`` beside each picture, else there is none. Masks are ``mask/NAME.png``. The metadata's
``conditioning_image`` is what a picture is to be drawn along, as diffusers' ControlNet trainers name it. A subfolder
names the subject of the pictures in it.
"""

from __future__ import annotations

import csv
import io
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from controlroom.core.errors import InputError
from controlroom.data.json_lines import json_lines
from controlroom.data.picture_files import (
    SUFFIXES,
    caption_beside,
    existing_folder,
    file_in,
    is_picture_file,
    mask_of,
    note_of_copies,
    picture_of,
    pictures_in,
    subfolders,
    text_of,
    with_condition,
)
from controlroom.data.pictures import Picture

METADATA = ("metadata.jsonl", "metadata.csv")
_CONDITION = "conditioning_image"
_KNOWN = ("file_name", "text", "mask", _CONDITION)
CAPTION_ENDINGS = (".txt", ".caption")
_TRAIN = "train"


def image_folder(path: str | os.PathLike[str]) -> tuple[Picture, ...]:
    """Pictures of a folder and its subfolders, in the order of their names.

    Where a folder has a ``metadata.jsonl``, the set is what it lists; pictures that it does not list are left out, with
    a warning, and so are further fields. A folder whose only pictures are in ``train/`` is read as that subfolder.

    Raises:
        InputError: no such folder or no picture in it; a picture that cannot be read; a line of the metadata that is
            not JSON, or names no picture, the same one twice, one that is not there or one outside of the folder.
    """
    root = existing_folder(path, "a folder of pictures")
    if not pictures_in(root) and metadata_file(root) is None and (root / _TRAIN).is_dir():
        root = root / _TRAIN
    notes: list[str] = []
    pictures = tuple(_pictures(root, root, notes))
    if not pictures:
        raise InputError(f"There is no picture in {str(root)!r}; expected files {', '.join(SUFFIXES)}.")
    copies = note_of_copies(pictures)
    for note in (*notes, *([copies] if copies else [])):
        warnings.warn(note, stacklevel=2)
    return pictures


def metadata_file(folder: Path) -> Path | None:
    """The table of a folder's pictures, if it has one. Raises InputError if it has two."""
    found = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(found) > 1:
        raise InputError(f"{str(folder)!r} has {' and '.join(METADATA)}; which one counts? Remove the other.")
    return found[0] if found else None


def _pictures(folder: Path, root: Path, notes: list[str]) -> Iterator[Picture]:
    table = metadata_file(folder)
    if table is not None:
        yield from _listed(table, root, notes)
        return
    inner = folder.relative_to(root).parts
    for path in pictures_in(folder):
        caption = caption_beside(path, CAPTION_ENDINGS) or ""
        yield picture_of(path, root, caption, mask_of(path, root), subject=inner[0] if inner else "")
    for below in subfolders(folder):
        yield from _pictures(below, root, notes)


@dataclass(frozen=True)
class _Row:
    """One line of the metadata; ``where`` says which."""

    where: str
    fields: Mapping[str, Any]

    def text(self, name: str) -> str | None:
        value = self.fields.get(name)
        if value is not None and not isinstance(value, str):
            raise InputError(f"{self.where}: {name!r} is {value!r}; expected text.")
        return value or None


def _listed(table: Path, root: Path, notes: list[str]) -> Iterator[Picture]:
    folder = table.parent
    seen: dict[Path, str] = {}
    ignored: set[str] = set()
    others: set[Path] = set()
    for row in _rows(table):
        named = row.text("file_name")
        if named is None:
            raise InputError(f"{row.where} has no 'file_name'; expected the name of a picture in {str(folder)!r}.")
        path = file_in(folder, named, row.where)
        if path in seen:
            raise InputError(f"{row.where} names {named!r}, which {seen[path]} names already. Remove one of them.")
        seen[path] = row.where
        mask = row.text("mask")
        masked = mask_of(path, root) if mask is None else file_in(folder, mask, row.where, "mask")
        shown = row.text(_CONDITION)
        condition = None if shown is None else file_in(folder, shown, row.where, _CONDITION)
        others.update(file for file in (masked, condition) if file is not None)
        caption = row.text("text")
        caption = (caption_beside(path, CAPTION_ENDINGS) or "") if caption is None else " ".join(caption.split())
        ignored.update(name for name in row.fields if name not in _KNOWN)
        inner = path.relative_to(root).parts[:-1]
        picture = picture_of(path, root, caption, masked, subject=inner[0] if inner else "")
        yield picture if condition is None else with_condition(picture, path, condition, root)
    if ignored:
        notes.append(f"{str(table)!r} has further fields, which are not read: {', '.join(sorted(ignored))}.")
    rest = [path for path in _all_in(folder) if path not in seen and path not in others]
    if rest:
        names = ", ".join(path.relative_to(folder).as_posix() for path in rest[:3])
        notes.append(
            f"{str(table)!r} does not list {len(rest)} of the pictures beside it ({names}); they are left out."
        )


def _all_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if is_picture_file(path) and "mask" not in path.parts]


def _rows(table: Path) -> Iterator[_Row]:
    if table.suffix == ".csv":
        try:
            rows = list(csv.DictReader(io.StringIO(text_of(table))))
        except csv.Error as error:
            raise InputError(f"{str(table)!r} is not a table: {error}.") from None
        for number, fields in enumerate(rows, 2):
            yield _Row(f"{str(table)!r}, row {number}", {key: value for key, value in fields.items() if key})
        return
    for where, fields in json_lines(table, "'file_name' and 'text'"):
        yield _Row(where, fields)
