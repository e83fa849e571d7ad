"""Small pictures on disk, as tests of readers need them."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def paint(
    path: Path, colour: str | tuple[int, int, int] = "red", size: tuple[int, int] = (8, 6), **save: object
) -> Path:
    """A picture of one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **save)  # type: ignore[arg-type]
    return path


def paint_mask(path: Path, size: tuple[int, int] = (8, 6)) -> Path:
    """A mask whose left half is white."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.new("L", size, 0)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    mask.save(path)
    return path


def write_lines(path: Path, rows: Iterable[object]) -> None:
    """Rows as JSON, one a line; text is written as it is."""
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
