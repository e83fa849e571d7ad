"""The notation of RPG for splitting a picture: ``"1,1"`` are two columns; rows are divided by semicolons, and there the
first number of a row is its height: ``"1,1,1;2"`` is a row of two cells above a row of one, which is twice as high.
"""

from __future__ import annotations

from controlroom.core.errors import InputError

Box = tuple[float, float, float, float]
MAX_CELLS = 64


def split_boxes(ratios: str) -> tuple[Box, ...]:
    """Boxes (left, top, right, bottom, as shares of the picture) of all cells, row by row.

    Raises:
        InputError: not the notation; the message shows the part that is wrong.

    >>> split_boxes("1,3")
    ((0.0, 0.0, 0.25, 1.0), (0.25, 0.0, 1.0, 1.0))
    >>> split_boxes("1,1;2") == split_boxes("1;2") == ((0.0, 0.0, 1.0, 1 / 3), (0.0, 1 / 3, 1.0, 1.0))
    True
    """
    rows = [[_number(part, ratios) for part in row.split(",")] for row in ratios.split(";")]
    if len(rows) == 1:
        heights, cells = [1.0], rows
    else:
        heights, cells = [row[0] for row in rows], [row[1:] or [1.0] for row in rows]
    if sum(len(row) for row in cells) > MAX_CELLS:
        raise InputError(f"The ratios {ratios[:60]!r}… have more than {MAX_CELLS} cells.")
    found: list[Box] = []
    for (top, bottom), widths in zip(_edges(heights), cells, strict=True):
        found += [(left, top, right, bottom) for left, right in _edges(widths)]
    return tuple(found)


def _number(part: str, whole: str) -> float:
    try:
        value = float(part)
    except ValueError:
        value = float("nan")
    if not 0 < value < 1e6:
        raise InputError(
            f"The ratios {whole[:60]!r} cannot be read at {part.strip()[:20]!r}: expected numbers above 0, with ',' "
            "between cells and ';' between rows, as '1,1' (two columns), '1;2' (two rows), or '1,1,1;2' (with ';' the "
            "first number of a row is its height)."
        )
    return value


def _edges(parts: list[float]) -> list[tuple[float, float]]:
    total, at, found = sum(parts), 0.0, []
    for part in parts:
        found.append((at / total, (at + part) / total))
        at += part
    return found
