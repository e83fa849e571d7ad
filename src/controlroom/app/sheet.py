"""Contact sheets: pictures side by side, each with a line of text above it."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from controlroom.core.images import fit

_MARGIN, _TITLE = 8, 20
_PAPER, _INK = (255, 255, 255), (40, 40, 46)

Cell = tuple[str, Image.Image]


def contact_sheet(rows: Sequence[Sequence[Cell]], side: int = 256) -> Image.Image:
    """Rows of titled pictures on white; each picture is fitted into a square of ``side`` pixels.

    >>> contact_sheet([[("a", Image.new("RGB", (4, 4))), ("b", Image.new("RGB", (8, 4)))]], side=32).size
    (88, 68)
    """
    columns = max((len(row) for row in rows), default=0)
    step_x, step_y = side + _MARGIN, side + _TITLE + _MARGIN
    sheet = Image.new("RGB", (columns * step_x + _MARGIN, len(rows) * step_y + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for y, row in enumerate(rows):
        for x, (title, picture) in enumerate(row):
            left, top = _MARGIN + x * step_x, _MARGIN + y * step_y
            draw.text((left, top), _shortened(title, font, side), fill=_INK, font=font)
            sheet.paste(fit(picture, side, side), (left, top + _TITLE))
    return sheet


def _shortened(title: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    while title and font.getlength(title) > width:
        title = title[:-2].rstrip(" …") + "…" if len(title) > 2 else ""
    return title
