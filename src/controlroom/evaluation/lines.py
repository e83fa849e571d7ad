"""Records of a long measurement as JSON lines, so that a stopped one continues where it was."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ValidationError

from controlroom.core.errors import OutputError
from controlroom.core.files import write_text_atomically

Record = TypeVar("Record", bound=BaseModel)


class Lines(Generic[Record]):
    """A file with a record on each line. A line that was cut off by a crash is dropped on reading."""

    def __init__(self, path: Path, kind: type[Record]) -> None:
        self.path, self.kind = path, kind

    def read(self) -> list[Record]:
        """Every whole record, in order; none if there is no file.

        Raises:
            OutputError: the file cannot be read or mended.
        """
        try:
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise OutputError(f"{self.path} cannot be read ({error}). Move it away, or give another output.") from error
        found: list[Record] = []
        whole: list[str] = []
        for line in text.splitlines():
            try:
                found.append(self.kind.model_validate_json(line))
            except ValidationError:
                continue
            whole.append(line + "\n")
        if "".join(whole) != text:
            write_text_atomically(self.path, "".join(whole))
        return found

    def append(self, records: Sequence[Record]) -> None:
        """Add records, on the disk when this returns.

        Raises:
            OutputError: they could not be written; those before are whole.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(record.model_dump_json() + "\n" for record in records))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(
                f"{self.path} cannot be written ({error}). Make room and run again to continue."
            ) from error
