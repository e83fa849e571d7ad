"""Rules of the table of effects: what of a report is read, and whether it is enough."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

from controlroom.evaluation.suites.pages import number
from controlroom.evaluation.suites.report import Cell, Report


@dataclass(frozen=True)
class Verdict:
    """The cells of a row: the arm, what it is compared with, the number of cases, and whether it is enough."""

    arm: str
    base: str
    n: int
    reached: str


class Rule(Protocol):
    """Reads a verdict out of a report; None where the report does not have its numbers."""

    def __call__(self, report: Report) -> Verdict | None: ...


@dataclass(frozen=True)
class Target:
    """A row of the table: a control, what is asked of it in words, the suite, and the rule."""

    control: str
    asked: str
    suite: str
    rule: Rule


def against(cell: Cell, least: float | None = None, most: float | None = None) -> str:
    """Whether a number is enough, and whether its interval leaves that open.

    >>> against(Cell(value=0.8, low=0.75, high=0.85, n=9), least=0.7)
    'yes'
    >>> against(Cell(value=0.8, low=0.65, high=0.9, n=9), least=0.7)
    'yes, within the error'
    >>> against(Cell(value=1.4, low=1.2, high=1.6, n=9), most=1.0)
    'no'
    """
    bound, sign = (least, 1.0) if least is not None else (most, -1.0)
    if bound is None or cell.value is None:
        return "–"
    value, low, high = (None if x is None else sign * (x - bound) for x in (cell.value, cell.low, cell.high))
    if sign < 0:
        low, high = high, low
    assert value is not None
    said = "yes" if value >= 0 else "no"
    if low is None or high is None:
        return said
    return said if low >= 0 or high < 0 else f"{said}, within the error"


def above(cell: Cell) -> str:
    """Whether a difference is more than none, and whether its interval leaves that open.

    >>> above(Cell(value=0.0, low=0.0, high=0.0, n=9)), above(Cell(value=0.2, low=0.0, high=0.5, n=9))
    ('no', 'yes, within the error')
    """
    if cell.value is None:
        return "–"
    said = "yes" if cell.value > 0 else "no"
    if cell.low is None or cell.high is None:
        return said
    return said if cell.low > 0 or cell.high <= 0 else f"{said}, within the error"


@dataclass(frozen=True)
class Level:
    """A measure of an arm is at least, or at most, a number."""

    measure: str
    arm: str
    base: str | None = None
    least: float | None = None
    most: float | None = None

    def __call__(self, report: Report) -> Verdict | None:
        row = report.row(self.measure)
        if row is None or self.arm not in row.cells:
            return None
        cell = row.cells[self.arm]
        base = number(row, row.cells.get(self.base or "")) if self.base else "–"
        return Verdict(number(row, cell), _named(report, self.base, base), cell.n, against(cell, self.least, self.most))


@dataclass(frozen=True)
class Gain:
    """A measure of an arm is better than the suite's baseline, case by case, by a number or more; 0: by any."""

    measure: str
    arm: str
    least: float = 0.0

    def __call__(self, report: Report) -> Verdict | None:
        row = next((row for row in report.differences if row.measure == self.measure), None)
        levels = report.row(self.measure)
        if row is None or levels is None or self.arm not in row.cells or report.baseline is None:
            return None
        cell = row.cells[self.arm]
        base = number(levels, levels.cells.get(report.baseline))
        text = f"{number(levels, levels.cells.get(self.arm))}; by case {number(row, cell, signed=True)}"
        reached = against(cell, least=self.least) if self.least else above(cell)
        return Verdict(text, _named(report, report.baseline, base), cell.n, reached)


@dataclass(frozen=True)
class Joint:
    """A number of all cases together; with a bound, it is at least that."""

    measure: str
    least: float | None = None

    def __call__(self, report: Report) -> Verdict | None:
        row = next((row for row in report.derived if row.measure == self.measure), None)
        if row is None or "" not in row.cells:
            return None
        return Verdict(number(row, row.cells[""]), "–", row.cells[""].n, against(row.cells[""], self.least))


@dataclass(frozen=True)
class Rising:
    """A measure never falls from one drawn arm to the next; arms are numbers."""

    measure: str

    def __call__(self, report: Report) -> Verdict | None:
        row = report.row(self.measure)
        arms = [arm for arm in report.arms if _is_number(arm) and row is not None and arm in row.cells]
        if row is None or len(arms) < 2:
            return None
        cells = [row.cells[arm] for arm in arms]
        text = ", ".join(f"{arm}: {number(row, cell)}" for arm, cell in zip(arms, cells, strict=True))
        values = [cell.value or 0.0 for cell in cells]
        rises = all(first <= second for first, second in pairwise(values))
        reached = "yes" if rises and values[-1] > values[0] else "no"
        low, high = cells[0], cells[-1]
        if reached == "yes" and low.high is not None and high.low is not None and high.low <= low.high:
            reached += ", within the error"
        return Verdict(text, _named(report, report.baseline, number(row, row.cells.get("1"))), cells[0].n, reached)


@dataclass(frozen=True)
class NotWorse:
    """A measure that is better where it is lower, of whole sets and without an interval, is not above the base's."""

    measure: str
    arm: str
    base: str

    def __call__(self, report: Report) -> Verdict | None:
        row = report.row(self.measure)
        if row is None or not {self.arm, self.base} <= set(row.cells):
            return None
        cell, base = row.cells[self.arm], row.cells[self.base]
        reached = "–" if cell.value is None or base.value is None else "yes" if cell.value <= base.value else "no"
        return Verdict(number(row, cell), _named(report, self.base, number(row, base)), cell.n, reached)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _named(report: Report, arm: str | None, text: str) -> str:
    return text if arm is None or arm not in report.arms or text == "–" else f"{report.arms[arm]}: {text}"
