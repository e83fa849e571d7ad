"""The curve of InstructPix2Pix: how much of the picture is kept against how often the instruction is followed.

``python -m controlroom.evaluation.tradeoff REPORT --output FILE`` draws it from the report of the suite
``instruct_pix2pix_sweep``: a line for each text guidance, a point for each image guidance, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.files import atomic_path
from controlroom.evaluation.suites.editing import MADE, PSNR
from controlroom.evaluation.suites.instruct_pix2pix import scales_of
from controlroom.evaluation.suites.inversion import AUTOENCODER
from controlroom.evaluation.suites.report import Cell, Report, read_report

_SIZE = (760, 480)
_FRAME = (70, 24, 736, 420)
"""Left, top, right and bottom of the axes."""
_INK, _FAINT = (40, 40, 46), (205, 205, 210)
_COLOURS = ((40, 98, 224), (217, 38, 48), (44, 160, 68), (128, 52, 180), (245, 132, 31), (126, 78, 44))


def draw_curve(report: Report) -> Image.Image:
    """The curve of a sweep.

    Raises:
        InputError: a report without a sweep.
    """
    made, kept = report.row(MADE), report.row(PSNR)
    points: dict[float, list[tuple[float, Cell, Cell]]] = {}
    for arm in report.arms:
        scales = scales_of(arm)
        if scales and made and kept and arm in made.cells and arm in kept.cells:
            points.setdefault(scales[1], []).append((scales[0], made.cells[arm], kept.cells[arm]))
    if not points or kept is None:
        raise InputError(f"The report of {report.suite!r} has no sweep. Give that of instruct_pix2pix_sweep.")
    ceiling = kept.cells.get(AUTOENCODER)
    heights = [value for line in points.values() for _, _, cell in line for value in _bounds(cell)]
    heights += [] if ceiling is None else list(_bounds(ceiling))
    low, high = 2 * int(min(heights) // 2), 2 * int(max(heights) // 2) + 2
    picture = Image.new("RGB", _SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    left, top, right, bottom = _FRAME

    def place(share: float, decibels: float) -> tuple[float, float]:
        return left + share * (right - left), bottom - (decibels - low) / (high - low) * (bottom - top)

    _axes(pen, font, low, high, place)
    if ceiling is not None and ceiling.value is not None:
        for x in range(left, right, 10):
            pen.line((x, place(0, ceiling.value)[1], x + 5, place(0, ceiling.value)[1]), fill=_INK)
        pen.text((left + 6, place(0, ceiling.value)[1] + 3), "autoencoder alone", fill=_INK, font=font)
    for index, (text_scale, line) in enumerate(sorted(points.items())):
        colour = _COLOURS[index % len(_COLOURS)]
        spots = [(place(x.value or 0.0, y.value or 0.0), scale, x, y) for scale, x, y in sorted(line, key=_scale)]
        pen.line([spot for spot, *_ in spots], fill=colour, width=2)
        for (x, y), scale, across, up in spots:
            (first, last), (lowest, highest) = _bounds(across), _bounds(up)
            pen.line((*place(first, up.value or 0.0), *place(last, up.value or 0.0)), fill=colour)
            pen.line((*place(across.value or 0.0, lowest), *place(across.value or 0.0, highest)), fill=colour)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            pen.text((x + 5, y - 17), f"{scale:g}", fill=colour, font=font)
        pen.text((left + 12, bottom - 24 - 18 * index), f"text guidance {text_scale:g}", fill=colour, font=font)
    return picture


def _scale(point: tuple[float, Cell, Cell]) -> float:
    return point[0]


def _bounds(cell: Cell) -> tuple[float, float]:
    """The interval of a cell, or its value twice."""
    value = cell.value or 0.0
    return (value if cell.low is None else cell.low, value if cell.high is None else cell.high)


def _axes(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    low: int,
    high: int,
    place: Callable[[float, float], tuple[float, float]],
) -> None:
    left, top, right, bottom = _FRAME
    for percent in range(0, 101, 20):
        x, _ = place(percent / 100, low)
        pen.line((x, top, x, bottom), fill=_FAINT)
        pen.text((x - 10, bottom + 6), f"{percent} %", fill=_INK, font=font)
    for decibels in range(low, high + 1, 2):
        _, y = place(0, decibels)
        pen.line((left, y, right, y), fill=_FAINT)
        pen.text((left - 48, y - 8), f"{decibels} dB", fill=_INK, font=font)
    pen.rectangle(_FRAME, outline=_INK)
    pen.text((left, bottom + 28), "instruction followed; numbers at points: image guidance", fill=_INK, font=font)
    pen.text((4, 4), "PSNR outside the true change", fill=_INK, font=font)


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figure; 0 when all is well, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m controlroom.evaluation.tradeoff", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON file of instruct_pix2pix_sweep")
    parser.add_argument("--output", type=Path, default=Path("docs/measured/instruct_pix2pix.png"))
    options = parser.parse_args(arguments)
    try:
        picture = draw_curve(read_report(options.report))
        with atomic_path(options.output) as beside:
            picture.save(beside, "PNG")
    except ControlRoomError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
