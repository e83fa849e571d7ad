"""Tables with one JSON object a line."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from controlroom.core.errors import InputError
from controlroom.data.picture_files import text_of

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80


def shown(value: Any) -> str:
    """A value for a message: short, however long or deep it is."""
    return _SHORT.repr(value)


def json_lines(path: Path, fields: str = "fields") -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line that is not empty: where it stands, for messages, and the object.

    Args:
        path: the file.
        fields: what an object should have, for the message.

    Raises:
        InputError: the file cannot be read, or a line is not an object.
    """
    for number, line in enumerate(text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{str(path)!r}, line {number}"
        try:
            found = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where} is not JSON ({error}); expected one object a line.") from None
        if not isinstance(found, dict):
            raise InputError(f"{where} is {type(found).__name__}, expected an object with {fields}.")
        yield where, found


def text_field(row: Mapping[str, Any], name: str, where: str) -> str:
    """What a field says.

    Raises:
        InputError: it is missing, empty or not text.
    """
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{where}: {name!r} is {'missing' if value is None else shown(value)}; expected text.")
    return value
