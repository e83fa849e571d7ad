"""Curves of one measure against another: what is kept against what is followed, with 95 % intervals.

``python -m controlroom.evaluation.tradeoff REPORT --output FILE`` draws one from a report of ``instruct_pix2pix_sweep``
(a line for each text guidance, a point for each image guidance) or of ``subject`` over several steps of training
(a line for each method, a point for each number of steps; ringed points are on the front: no other has more of both).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.files import atomic_path
from controlroom.evaluation.suites.editing import MADE, PSNR
from controlroom.evaluation.suites.instruct_pix2pix import scales_of
from controlroom.evaluation.suites.inversion import AUTOENCODER
from controlroom.evaluation.suites.report import Cell, Report, read_report
from controlroom.evaluation.suites.subject import FOLLOWED, KEPT, OWN, WORDS

_SIZE = (760, 480)
_FRAME = (70, 24, 736, 420)
"""Left, top, right and bottom of the axes."""
_INK, _FAINT = (40, 40, 46), (205, 205, 210)
_COLOURS = ((40, 98, 224), (217, 38, 48), (44, 160, 68), (128, 52, 180), (245, 132, 31), (126, 78, 44))
_TRAINED = re.compile(r"(.+)-(\d+)( w[\d.]+)?")
"""An arm of the suite of subjects: method, steps of its training, scale of consistency guidance."""


@dataclass(frozen=True)
class Axis:
    """One side of a figure: what it shows, from where to where, and in which steps it is marked."""

    title: str
    low: float
    high: float
    step: float
    unit: str = "%"

    @property
    def marks(self) -> list[float]:
        """Where it is marked."""
        return [self.low + i * self.step for i in range(round((self.high - self.low) / self.step) + 1)]

    def share(self, value: float) -> float:
        """Where on it a value is, from 0 to 1."""
        return (value - self.low) / (self.high - self.low)

    def said(self, value: float) -> str:
        """A value in words."""
        return f"{round(100 * value if self.unit == '%' else value)} {self.unit}"


@dataclass(frozen=True)
class Point:
    """A point of a curve: what stands beside it, and where it is."""

    label: str
    across: Cell
    up: Cell
    ringed: bool = False


def draw_curve(report: Report) -> Image.Image:
    """The curve of a sweep of InstructPix2Pix.

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
    lines = {
        f"text guidance {text_scale:g}": [Point(f"{scale:g}", x, y) for scale, x, y in sorted(line, key=_first)]
        for text_scale, line in sorted(points.items())
    }
    across = Axis("instruction followed; numbers at points: image guidance", 0.0, 1.0, 0.2)
    up = Axis("PSNR outside the true change", *_round(heights, 2.0), 2.0, "dB")
    return _figure(across, up, lines, ("autoencoder alone", ceiling))


def draw_front(report: Report) -> Image.Image:
    """Subject fidelity against prompt fidelity, over steps of training.

    Raises:
        InputError: a report of another suite, or without methods at several steps.
    """
    kept, followed = report.row(KEPT), report.row(FOLLOWED)
    found: dict[str, list[tuple[float, Cell, Cell]]] = {}
    for arm in report.arms:
        trained = _TRAINED.fullmatch(arm)
        if trained and kept and followed and arm in kept.cells and arm in followed.cells:
            guided = trained[3].replace(" w", ", consistency guidance ") if trained[3] else ""
            line = found.setdefault(trained[1] + guided, [])
            line.append((int(trained[2]), followed.cells[arm], kept.cells[arm]))
    if not found or kept is None or followed is None:
        raise InputError(
            f"The report of {report.suite!r} has no methods over steps of training, such as dco-100 and dco-200. Give "
            "that of the suite subject."
        )
    best = front([(x.value or 0.0, y.value or 0.0) for line in found.values() for _, x, y in line])
    lines = {
        name: [Point(f"{step:g}", x, y, (x.value, y.value) in best) for step, x, y in sorted(line, key=_first)]
        for name, line in found.items()
    }
    if WORDS in kept.cells and WORDS in followed.cells:
        lines["the class, no adapter"] = [Point("", followed.cells[WORDS], kept.cells[WORDS])]
    cells = [(point.across, point.up) for line in lines.values() for point in line]
    widths = _all(x for x, _ in cells)
    across = Axis("prompt followed; numbers at points: steps of training", *_round(widths, 0.1, 1.0), 0.1)
    ceiling = kept.cells.get(OWN)
    heights = _all([*(y for _, y in cells), *([] if ceiling is None else [ceiling])])
    up = Axis("subject kept", *_round(heights, 0.1, 1.0), 0.1)
    return _figure(across, up, lines, ("another picture of the subject", ceiling))


def front(points: Sequence[tuple[float, float]]) -> set[tuple[float, float]]:
    """Pareto's: the points that no other one beats in one number without losing in the other.

    >>> sorted(front([(0.9, 0.2), (0.5, 0.5), (0.4, 0.5), (0.2, 0.9)]))
    [(0.2, 0.9), (0.5, 0.5), (0.9, 0.2)]
    """
    return {(x, y) for x, y in points if not any(a >= x and b >= y and (a, b) != (x, y) for a, b in points)}


# Drawing.


def _figure(
    across: Axis, up: Axis, lines: Mapping[str, Sequence[Point]], ceiling: tuple[str, Cell | None]
) -> Image.Image:
    picture = Image.new("RGB", _SIZE, "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    left, top, right, bottom = _FRAME

    def place(x: float, y: float) -> tuple[float, float]:
        return left + across.share(x) * (right - left), bottom - up.share(y) * (bottom - top)

    _axes(pen, font, across, up)
    name, cell = ceiling
    if cell is not None and cell.value is not None:
        height = place(across.low, cell.value)[1]
        for x in range(left, right, 10):
            pen.line((x, height, x + 5, height), fill=_INK)
        pen.text((left + 6, height + 3), name, fill=_INK, font=font)
    for index, (title, line) in enumerate(lines.items()):
        colour = _COLOURS[index % len(_COLOURS)]
        spots = [place(point.across.value or 0.0, point.up.value or 0.0) for point in line]
        pen.line(spots, fill=colour, width=2)
        for (x, y), point in zip(spots, line, strict=True):
            (first, last), (lowest, highest) = _bounds(point.across), _bounds(point.up)
            x_value, y_value = point.across.value or 0.0, point.up.value or 0.0
            pen.line((*place(first, y_value), *place(last, y_value)), fill=colour)
            pen.line((*place(x_value, lowest), *place(x_value, highest)), fill=colour)
            pen.ellipse((x - 3, y - 3, x + 3, y + 3), fill=colour)
            if point.ringed:
                pen.ellipse((x - 6, y - 6, x + 6, y + 6), outline=_INK)
            pen.text((x + 5, y - 17), point.label, fill=colour, font=font)
        pen.text((left + 12, bottom - 24 - 18 * index), title, fill=colour, font=font)
    return picture


def _axes(pen: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, across: Axis, up: Axis) -> None:
    left, top, right, bottom = _FRAME
    for mark in across.marks:
        x = left + across.share(mark) * (right - left)
        pen.line((x, top, x, bottom), fill=_FAINT)
        pen.text((x - 10, bottom + 6), across.said(mark), fill=_INK, font=font)
    for mark in up.marks:
        y = bottom - up.share(mark) * (bottom - top)
        pen.line((left, y, right, y), fill=_FAINT)
        pen.text((left - 48, y - 8), up.said(mark), fill=_INK, font=font)
    pen.rectangle(_FRAME, outline=_INK)
    pen.text((left, bottom + 28), across.title, fill=_INK, font=font)
    pen.text((4, 4), up.title, fill=_INK, font=font)


def _first(point: tuple[float, Cell, Cell]) -> float:
    return point[0]


def _bounds(cell: Cell) -> tuple[float, float]:
    """The interval of a cell, or its value twice."""
    value = cell.value or 0.0
    return (value if cell.low is None else cell.low, value if cell.high is None else cell.high)


def _all(cells: Iterable[Cell]) -> list[float]:
    return [value for cell in cells for value in _bounds(cell)]


def _round(values: Sequence[float], step: float, most: float = math.inf) -> tuple[float, float]:
    """Multiples of a step around all values.

    >>> _round([18.3, 25.9], 2.0)
    (18.0, 26.0)
    """
    low = step * math.floor(min(values) / step)
    return low, min(most, max(low + step, step * (math.floor(max(values) / step) + 1)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw the figure; 0 when all is well, 2 for an error."""
    parser = argparse.ArgumentParser(prog="python -m controlroom.evaluation.tradeoff", description=__doc__)
    parser.add_argument("report", type=Path, help="JSON file of instruct_pix2pix_sweep or subject")
    parser.add_argument("--output", type=Path, help="default: instruct_pix2pix.png or subject.png in docs/measured")
    options = parser.parse_args(arguments)
    try:
        report = read_report(options.report)
        of_subjects = report.suite == "subject"
        target = options.output or Path("docs/measured") / ("subject.png" if of_subjects else "instruct_pix2pix.png")
        picture = draw_front(report) if of_subjects else draw_curve(report)
        with atomic_path(target) as beside:
            picture.save(beside, "PNG")
    except ControlRoomError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {target}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
