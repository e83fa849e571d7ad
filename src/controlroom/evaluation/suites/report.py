"""What a measurement found, as data: every number with its interval and the network it was measured with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from controlroom.core.errors import InputError
from controlroom.evaluation.estimates import Estimate, mean, share
from controlroom.evaluation.extractor import require_same
from controlroom.evaluation.suites.journal import Record
from controlroom.evaluation.suites.runner import unpacked
from controlroom.evaluation.suites.suite import Kind, Measure, Suite, Values, fingerprint

VERSION = 1


class Cell(BaseModel):
    """A number over ``n`` cases, with the bounds of its 95 % interval where it has one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, estimate: Estimate) -> Cell:
        """From an estimate; what is not a number becomes None, which JSON can say."""
        value, low, high = (None if math.isnan(x) else x for x in (estimate.mean, estimate.low, estimate.high))
        return cls(value=value, low=low, high=high, n=estimate.n)


class Row(BaseModel):
    """One measure of every arm; ``extractor`` is "" where it needs no network."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    measure: str
    kind: Kind
    higher: bool | None
    extractor: str
    digits: int
    cells: dict[str, Cell]


class Picked(BaseModel):
    """A case that is shown: what it is, its pictures (base64 of WebP) and their values."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    place: str
    number: int
    title: str
    thumbnails: dict[str, str]
    values: dict[str, dict[str, float | None]]


class Report(BaseModel):
    """Everything that is reported.

    Attributes:
        version: of this schema.
        suite, title: what was measured.
        fingerprint: hash of ``about``, which says what the numbers depend on.
        n: cases that are done, of ``asked``.
        arms: arm -> title of its column.
        rows: measures of single cases, and of whole sets.
        differences: measure -> `ours` (and the suite's further arms) minus `baseline`, case by case, in their cells.
        derived: numbers of all cases together.
        picked: the worst, the median and the best case.
        seconds: that all cases took.
        weights: further models that the runs name, beside the base model.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int = VERSION
    suite: str
    title: str
    note: str
    fingerprint: str
    about: dict[str, Any]
    n: int
    asked: int
    arms: dict[str, str]
    baseline: str | None
    ours: str | None
    rows: list[Row]
    differences: list[Row]
    derived: list[Row]
    picked: list[Picked]
    seconds: float
    weights: list[str] = []

    def row(self, measure: str) -> Row | None:
        """The row of a measure."""
        return next((row for row in self.rows if row.measure == measure), None)


def summarise(suite: Suite[Any], records: Sequence[Record], about: Mapping[str, Any]) -> Report:
    """The report of finished cases; of none, its cells are empty."""
    values = [record.values for record in records]
    arms = [arm.name for arm in suite.arms]
    table = suite.table
    rows = [_row(measure, {arm: _column(values, arm, measure) for arm in arms}) for measure in suite.measures]
    differences = []
    if table.baseline is not None and table.ours is not None:
        for measure in suite.measures:
            cells = {arm: _difference(values, arm, table.baseline, measure.name) for arm in (table.ours, *table.others)}
            if any(cell.n for cell in cells.values()):
                differences.append(_row(measure, cells))
    return Report(
        suite=suite.name,
        title=suite.title,
        note=table.note,
        fingerprint=fingerprint(about),
        about=dict(about),
        n=len(records),
        asked=suite.n,
        arms={arm.name: arm.title for arm in suite.arms},
        baseline=table.baseline,
        ours=table.ours,
        rows=rows + _set_rows(suite, records),
        differences=differences,
        derived=[_row(Measure(one.name, one.kind, None), {"": Cell.of(one.compute(values))}) for one in table.derived],
        picked=picked(suite, records),
        seconds=round(sum(record.seconds for record in records), 1),
        weights=list(suite.weights),
    )


def _row(measure: Measure, cells: dict[str, Cell]) -> Row:
    return Row(
        measure=measure.name,
        kind=measure.kind,
        higher=measure.higher,
        extractor=measure.extractor,
        digits=measure.digits,
        cells={arm: cell for arm, cell in cells.items() if cell.n},
    )


def _column(values: Sequence[Values], arm: str, measure: Measure) -> Cell:
    found = [v for v in (one[arm].get(measure.name) for one in values) if v is not None]
    return Cell.of(share([v > 0 for v in found]) if measure.kind == "share" else mean(found))


def _difference(values: Sequence[Values], ours: str, baseline: str, measure: str) -> Cell:
    pairs = [(one[ours].get(measure), one[baseline].get(measure)) for one in values]
    return Cell.of(mean([mine - other for mine, other in pairs if mine is not None and other is not None]))


def _set_rows(suite: Suite[Any], records: Sequence[Record]) -> list[Row]:
    found = []
    for judge in suite.set_judges:
        sets = {
            arm: torch.from_numpy(np.stack([unpacked(one.vectors[judge.name][arm]) for one in records]))
            for arm in (*suite.compared, judge.reference)
            if records
        }
        compared = {arm: judge.compare(sets[arm], sets[judge.reference]) for arm in suite.compared if records}
        for measure in judge.measures:
            cells = {arm: Cell.of(one[measure.name]) for arm, one in compared.items() if measure.name in one}
            found.append(_row(measure, cells))
    return found


def picked(suite: Suite[Any], records: Sequence[Record]) -> list[Picked]:
    """The worst, the median and the best case by the suite's rank; fewer where there are fewer cases."""
    ordered = sorted(records, key=lambda record: (suite.table.rank(record.values), -record.number))
    if not ordered:
        return []
    places = {"worst": 0, "median": (len(ordered) - 1) // 2, "best": len(ordered) - 1}
    chosen: dict[int, str] = {}
    for name, index in places.items():
        chosen.setdefault(index, name)
    return [
        Picked(
            place=name,
            number=ordered[index].number,
            title=ordered[index].title,
            thumbnails=ordered[index].thumbnails,
            values=ordered[index].values,
        )
        for index, name in chosen.items()
    ]


def read_report(path: Path) -> Report:
    """A report that was written as JSON.

    Raises:
        InputError: no such file, or something else.
    """
    try:
        return Report.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{str(path)!r} cannot be read ({error}). Give the JSON file of a report.") from error
    except ValidationError as error:
        raise InputError(f"{str(path)!r} is not a report of `controlroom evaluate`. Give its JSON file.") from error


class Compared(BaseModel):
    """One number in two reports; ``clear`` if their intervals do not meet."""

    model_config = ConfigDict(frozen=True)

    measure: str
    arm: str
    row: Row
    before: Cell
    now: Cell
    clear: bool


def compare(now: Report, before: Report) -> list[Compared]:
    """Every number that two reports of one suite share.

    Raises:
        InputError: other suites, or a measure that was measured with another extractor.
    """
    if now.suite != before.suite:
        raise InputError(f"Reports of two suites cannot be compared: {now.suite!r} and {before.suite!r}.")
    found = []
    for row in now.rows:
        other = before.row(row.measure)
        if other is None:
            continue
        require_same(row.extractor, other.extractor, row.measure)
        for arm, cell in row.cells.items():
            if arm in other.cells:
                old = other.cells[arm]
                bounds = (cell.low, cell.high, old.low, old.high)
                clear = None not in bounds and (cell.low > old.high or old.low > cell.high)  # type: ignore[operator]
                found.append(Compared(measure=row.measure, arm=arm, row=row, before=old, now=cell, clear=clear))
    return found
