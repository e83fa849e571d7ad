"""The journal of a measurement: one line of JSON for each finished case, so that a stopped one goes on where it was.

The first line says what was measured and with what. A journal of another measurement is refused, never mixed in. A line
is on the disk when `append` returns; one that a crash cut off is dropped on reading, and its case is drawn again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from controlroom.core.errors import InputError, OutputError
from controlroom.core.files import write_text_atomically
from controlroom.evaluation.suites.suite import fingerprint

FORMAT = 1


class Header(BaseModel):
    """The first line."""

    model_config = ConfigDict(extra="forbid")

    format: int = FORMAT
    fingerprint: str
    about: dict[str, Any]


class Record(BaseModel):
    """A finished case.

    Attributes:
        number: of the case.
        title: what the report says of it.
        values: arm -> measure -> value.
        vectors: judge of whole sets -> arm -> base64 of its float32 vector.
        thumbnails: arm -> base64 of a small WebP picture.
        seconds: its share of the time that drawing and judging took.
    """

    model_config = ConfigDict(extra="forbid")

    number: int
    title: str
    values: dict[str, dict[str, float | None]]
    vectors: dict[str, dict[str, str]]
    thumbnails: dict[str, str]
    seconds: float


class Journal:
    """A file with a header and a record on each line.

    Args:
        path: of the file; it need not be there.
        about: everything that a result depends on; see `Suite.about`.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, dict(about)

    def open(self) -> list[Record]:
        """Start the journal, or read what it has: the records by number, the last of each.

        Raises:
            InputError: it is of another measurement; the message says in what they differ.
            OutputError: it cannot be read or written.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read ({error}). Move it away, or give another --out.") from error
        first, _, rest = text.partition("\n")
        header = Header(fingerprint=fingerprint(self.about), about=self.about)
        if not text:
            self._start(header.model_dump_json() + "\n")
            return []
        self._check(first, header)
        found: dict[int, Record] = {}
        whole = [first + "\n"]
        for line in rest.splitlines():
            try:
                record = Record.model_validate_json(line)
            except ValidationError:
                continue
            found[record.number] = record
            whole.append(line + "\n")
        if "".join(whole) != text:
            write_text_atomically(self.path, "".join(whole))
        return [found[number] for number in sorted(found)]

    def _start(self, text: str) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"The folder of {self.path} cannot be made ({error}). Give another --out.") from error
        write_text_atomically(self.path, text)

    def _check(self, line: str, wanted: Header) -> None:
        try:
            header = Header.model_validate_json(line)
        except ValidationError as error:
            raise InputError(
                f"{self.path} is not the journal of a measurement. Give another --out, or move that file away."
            ) from error
        if header.fingerprint == wanted.fingerprint and header.format == FORMAT:
            return
        differences = _differences(header.about, wanted.about) or ["the format of the file"]
        raise InputError(
            f"{self.path} holds the cases of another measurement, which differs in {'; '.join(differences)}. Give "
            "another --out, or move that file away to begin anew."
        )

    def append(self, records: Sequence[Record]) -> None:
        """Add records, on the disk when this returns.

        Raises:
            OutputError: they could not be written; those before are whole.
        """
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(record.model_dump_json() + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error}). Make room and run again to continue."
            ) from error


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str = "") -> list[str]:
    """What two accounts of a measurement differ in, in words."""
    found = []
    for key in dict.fromkeys((*before, *now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{where}{key} ")
        elif old != new:
            found.append(f"{where}{key} ({old} there, {new} now)")
    return found
