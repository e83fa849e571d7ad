"""Pictures before and after an instruction: what editing by instructions is learned from (arXiv 2211.09800).

A folder with ``metadata.jsonl``, whose lines have ``before``, ``after`` (files, relative to the folder) and
``instruction``; further fields are notes. ``controlroom instruct-data`` writes such folders.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field

from controlroom.core.errors import InputError
from controlroom.data.json_lines import json_lines, text_field
from controlroom.data.picture_files import existing_folder, file_in, picture_of
from controlroom.data.pictures import Picture

METADATA = "metadata.jsonl"


@dataclass(frozen=True)
class EditedPicture(Picture):
    """The picture after an instruction, which is its caption.

    Attributes:
        before: the picture that was edited, of the same size; its bytes count in ``content`` as well.
    """

    before: Picture = field(kw_only=True)


def edited_pictures(path: str | os.PathLike[str]) -> tuple[EditedPicture, ...]:
    """Triples of a folder, in the order of its lines.

    Raises:
        InputError: no such folder, no table or nothing in it; a line that is not JSON or lacks a field, a picture that
            is not there, cannot be read or lies outside, or two pictures of different sizes.
    """
    root = existing_folder(path, f"a folder with {METADATA}")
    table = root / METADATA
    if not table.is_file():
        raise InputError(
            f"There is no {METADATA} in {str(root)!r}; its lines say before, after and instruction. Make one with "
            "controlroom instruct-data."
        )
    found: list[EditedPicture] = []
    for where, row in json_lines(table):
        files = [file_in(root, text_field(row, side, where), where) for side in ("before", "after")]
        before, after = (picture_of(file, root) for file in files)
        if before.size != after.size:
            raise InputError(
                f"{where}: {before.name} is {before.size[0]} x {before.size[1]}, {after.name} {after.size[0]} x "
                f"{after.size[1]}; expected the same size."
            )
        content = hashlib.sha256(f"{before.content} {after.content}".encode()).hexdigest()
        words = " ".join(text_field(row, "instruction", where).split())
        found.append(EditedPicture(after.name, content, after.size, after.read, words, before=before))
    if not found:
        raise InputError(f"{str(table)!r} lists nothing.")
    return tuple(found)
