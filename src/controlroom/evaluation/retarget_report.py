"""The numbers of retargeting as tables: means by method, paired differences, what falls short, and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image, ImageDraw
from pydantic import BaseModel, ConfigDict

from controlroom.evaluation.estimates import Estimate, mean, share
from controlroom.evaluation.retarget_judge import IDENTITY, Verdict
from controlroom.evaluation.retarget_methods import METHODS, RECONSTRUCTION, REFERENCES, TRUTH

NUMBERS = ("pck", "ssim", "distance")
MEASURES = ("pck", *IDENTITY, "all of these", "place", "ssim", "distance")
TITLES = {"pck": "PCK@0.2 torso ↑", "ssim": "SSIM ↑", "distance": "perceptual distance ↓", "place": "place kept"}
_COLUMNS = {TRUTH: "true picture (readers)", RECONSTRUCTION: "autoencoder"}
#: What the project asks of its own method.
ASKED = {"pck": 0.9, **dict.fromkeys(IDENTITY, 0.9)}


class Summary(BaseModel):
    """Everything that is reported.

    Attributes:
        settings: of the run.
        extractor: hash of the network whose features the perceptual distance is measured in.
        n: number of pairs.
        methods: method -> measure -> mean or share with its interval.
        differences: other method -> measure -> first method minus that one, pair by pair.
    """

    model_config = ConfigDict(frozen=True)

    settings: dict[str, Any]
    extractor: str
    n: int
    methods: dict[str, dict[str, Estimate]]
    differences: dict[str, dict[str, Estimate]]


def summarise(verdicts: Mapping[str, Sequence[Verdict]], settings: dict[str, Any], extractor: str) -> Summary:
    """Means with intervals, and differences of the first method to each other one.

    Args:
        verdicts: method -> its verdicts, of the same pairs in the same order; the first is the one to compare.
        settings: recorded as they are.
        extractor: hash of the feature extractor.
    """
    names = [name for name in verdicts if name not in REFERENCES]
    methods = {name: {measure: _estimate(rows, measure) for measure in MEASURES} for name, rows in verdicts.items()}
    differences = {}
    for other in names[1:]:
        pairs = list(zip(verdicts[names[0]], verdicts[other], strict=True))
        differences[other] = {measure: _difference(pairs, measure) for measure in MEASURES}
    n = len(next(iter(verdicts.values()), ()))
    return Summary(settings=settings, extractor=extractor, n=n, methods=methods, differences=differences)


def _estimate(rows: Sequence[Verdict], measure: str) -> Estimate:
    values = [value for value in (row.value(measure) for row in rows) if value is not None]
    return mean(values) if measure in NUMBERS else share([value > 0 for value in values])


def _difference(pairs: Sequence[tuple[Verdict, Verdict]], measure: str) -> Estimate:
    values = [(one.value(measure), other.value(measure)) for one, other in pairs]
    return mean([one - other for one, other in values if one is not None and other is not None])


def falls_short(summary: Summary) -> list[str]:
    """What the first method is asked for and does not reach, in words."""
    ours = next((found for name, found in summary.methods.items() if name not in REFERENCES), {})
    short = [measure for measure, least in ASKED.items() if measure in ours and not ours[measure].mean >= least]
    return [f"{TITLES.get(m, m).removesuffix(' ↑')} {_cell(m, ours[m])}, asked for {ASKED[m]:.0%}" for m in short]


def markdown(summary: Summary) -> str:
    """The tables as Markdown."""
    names = list(summary.methods)
    titles = [_COLUMNS.get(name) or METHODS[name].title for name in names]
    settings = ", ".join(f"{name} {value}" for name, value in summary.settings.items())
    lines = [
        f"{summary.n} held-out pairs; 95 % intervals in brackets. {settings}; features of extractor "
        f"`{summary.extractor}`. Made by `python -m controlroom.evaluation.retarget_quality`.",
        "",
        *_table(titles, [(m, [_cell(m, summary.methods[name][m]) for name in names]) for m in MEASURES]),
        "",
    ]
    if summary.differences:
        first = next(name for name in names if name not in REFERENCES)
        others = list(summary.differences)
        rows = [(m, [_signed(m, summary.differences[other][m]) for other in others]) for m in MEASURES]
        heads = [f"minus {METHODS[other].title}" for other in others]
        lines += [f"{METHODS[first].title}, pair by pair, with the same noise:", "", *_table(heads, rows), ""]
    short = falls_short(summary)
    lines.append(f"Falls short: {'; '.join(short)}." if short else "Everything that is asked for is reached.")
    return "\n".join(lines) + "\n"


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> list[str]:
    lines = [f"| | {' | '.join(heads)} |", f"|---|{'---|' * len(heads)}"]
    return lines + [f"| {TITLES.get(measure, measure)} | {' | '.join(cells)} |" for measure, cells in rows]


def _cell(measure: str, estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "–"
    return str(estimate) if measure in ("ssim", "distance") else estimate.percent()


def _signed(measure: str, estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return "–"
    if measure in ("ssim", "distance"):
        return f"{estimate.mean:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    return f"{100 * estimate.mean:+.1f} [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}] points"


def worst_median_best(rows: Sequence[Verdict]) -> list[int]:
    """Numbers of three pairs, by the perceptual distance to the true picture."""
    ordered = [row.pair for row in sorted(rows, key=lambda row: (-row.distance, row.pair))]
    return [ordered[0], ordered[len(ordered) // 2], ordered[-1]] if ordered else []


def sheet(rows: Sequence[tuple[str, Sequence[tuple[str, Image.Image]]]], side: int = 128) -> Image.Image:
    """Titled pictures in titled rows, on white.

    >>> sheet([("best", [("truth", Image.new("RGB", (8, 8))), ("drawn", Image.new("RGB", (8, 8)))])], side=32).size
    (136, 56)
    """
    margin, left, line = 4, 60, 16
    columns = max((len(cells) for _, cells in rows), default=0)
    step_x, step_y = side + margin, side + line + margin
    picture = Image.new("RGB", (left + columns * step_x + margin, len(rows) * step_y + margin), "white")
    pen = ImageDraw.Draw(picture)
    for y, (title, cells) in enumerate(rows):
        top = margin + y * step_y
        pen.text((margin, top + line + side // 2), title, fill=(40, 40, 46))
        for x, (name, cell) in enumerate(cells):
            pen.text((left + x * step_x, top), name, fill=(40, 40, 46))
            picture.paste(cell.convert("RGB").resize((side, side)), (left + x * step_x, top + line))
    return picture
