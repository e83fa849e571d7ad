"""A caption, an instruction, and the caption of the edited picture: what pairs of pictures are drawn from.

Brooks et al. (arXiv 2211.09800) wrote seven hundred of them and had a language model write the rest. Here they come
from a file, or from the theatre, whose edits are known.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from controlroom.core.errors import InputError
from controlroom.data.json_lines import json_lines, text_field

NAMES = (("caption", "instruction", "edited"), ("input", "edit", "output"))
"""Fields of a line; the second are the authors'."""


@dataclass(frozen=True)
class CaptionEdit:
    """``caption`` becomes ``edited`` by ``instruction``; ``where`` it was read, for messages."""

    caption: str
    instruction: str
    edited: str
    where: str = ""


def caption_edits(path: str | os.PathLike[str]) -> tuple[CaptionEdit, ...]:
    """Lines of a JSONL file.

    Each has ``caption``, ``instruction`` and ``edited``, or the authors' ``input``, ``edit`` and ``output``.

    Raises:
        InputError: it cannot be read or is empty; a line is not JSON, lacks a field, or changes nothing.
    """
    file = Path(path)
    found: list[CaptionEdit] = []
    for where, row in json_lines(file, ", ".join(map(repr, NAMES[0]))):
        names = NAMES[1] if NAMES[1][0] in row and NAMES[0][0] not in row else NAMES[0]
        before, words, after = (" ".join(text_field(row, name, where).split()) for name in names)
        if before == after:
            raise InputError(f"{where}: both captions say {before[:80]!r}; nothing would change.")
        found.append(CaptionEdit(before, words, after, where))
    if not found:
        raise InputError(f"{str(file)!r} is empty; expected a caption, an instruction and an edited caption a line.")
    return tuple(found)


def theatre_caption_edits(count: int, kinds: Sequence[str] | None = None) -> tuple[CaptionEdit, ...]:
    """The theatre's first edits whose captions differ.

    Args:
        count: how many.
        kinds: some of `controlroom.data.theatre.edits.KINDS`, in turn; None: as they come.

    Raises:
        InputError: a count below one, or an unknown kind.
    """
    from controlroom.data.theatre.captions import full_caption
    from controlroom.data.theatre.edits import KINDS, sample_edit

    if count < 1:
        raise InputError(f"count is {count}; ask for at least one edit.")
    if kinds is not None and (not kinds or not set(kinds) <= set(KINDS)):
        raise InputError(f"kinds are some of {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}.")
    found: list[CaptionEdit] = []
    for seed in range(20 * count):
        edit = sample_edit(seed, kind=None if kinds is None else kinds[seed % len(kinds)])
        before, after = full_caption(edit.before), full_caption(edit.after)
        if before != after:
            found.append(CaptionEdit(before, edit.instruction, after, f"edit {seed} of the theatre"))
        if len(found) == count:
            break
    return tuple(found)
