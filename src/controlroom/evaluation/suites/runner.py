"""Runs a suite: draws what the journal does not have, judges it, and writes a line for each case."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.evaluation.suites.drawing import Drawer, pipeline_of, together
from controlroom.evaluation.suites.journal import Journal, Record
from controlroom.evaluation.suites.suite import Case, Shown, Suite

Truth = TypeVar("Truth")
THUMBNAIL = 192
"""Longest side of the pictures that a report shows."""


@dataclass(frozen=True)
class Progress:
    """How far a run is: cases done of all, and the seconds that the rest will take (None: not known yet)."""

    done: int
    n: int
    seconds_left: float | None


def run(
    suite: Suite[Truth],
    draw: Drawer,
    journal: Journal,
    batch_size: int = 8,
    seconds: float | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> list[Record]:
    """Draw and judge every case that the journal does not have yet.

    Args:
        suite: what to measure.
        draw: draws its runs.
        journal: where finished cases are kept.
        batch_size: cases that are drawn together.
        seconds: begin no batch after so long; None: go on to the end.
        progress: told before the first batch and after each.

    Returns:
        Records of the first ``n`` cases that are there, in order.

    Raises:
        InputError: the journal is of another measurement, or a case that cannot be drawn.
        OutputError: the journal cannot be written.
    """
    done = {record.number: record for record in journal.open() if record.number < suite.n}
    missing = [number for number in range(suite.n) if number not in done]
    begun, drawn = time.monotonic(), 0
    progress(Progress(len(done), suite.n, None if missing else 0.0))
    for part in _runs(missing, batch_size):
        if seconds is not None and time.monotonic() - begun >= seconds:
            break
        records = _measured(suite, draw, part)
        journal.append(records)
        done.update({record.number: record for record in records})
        drawn += len(part)
        left = (time.monotonic() - begun) / drawn * (len(missing) - drawn)
        progress(Progress(len(done), suite.n, left))
    return [done[number] for number in sorted(done)]


def _runs(numbers: Sequence[int], size: int) -> list[list[int]]:
    """Consecutive numbers, at most ``size`` together.

    >>> _runs([0, 1, 2, 5, 6], 2)
    [[0, 1], [2], [5, 6]]
    """
    found: list[list[int]] = []
    for number in numbers:
        if found and len(found[-1]) < size and found[-1][-1] + 1 == number:
            found[-1].append(number)
        else:
            found.append([number])
    return found


def _measured(suite: Suite[Truth], draw: Drawer, numbers: Sequence[int]) -> list[Record]:
    begun = time.monotonic()
    cases = [suite.case(number) for number in numbers]
    pictures: list[dict[str, Image.Image]] = [{} for _ in cases]
    for arm in suite.arms:
        column = _known(cases, arm.name) if arm.known else _drawn(suite, draw, cases, arm.name)
        for row, picture in zip(pictures, column, strict=True):
            row[arm.name] = picture
    shown = [Shown(case, row) for case, row in zip(cases, pictures, strict=True)]
    values: list[dict[str, dict[str, float | None]]] = [{arm.name: {} for arm in suite.arms} for _ in cases]
    for judge in suite.judges:
        for row, verdict in zip(values, judge(shown), strict=True):
            for arm, found in verdict.items():
                row[arm].update(found)
    vectors: list[dict[str, dict[str, str]]] = [{} for _ in cases]
    for judge in suite.set_judges:
        for arm in (*suite.compared, judge.reference):
            for row, vector in zip(vectors, judge.vectors([one[arm] for one in pictures]), strict=True):
                row.setdefault(judge.name, {})[arm] = packed(vector.cpu().numpy())
    each = (time.monotonic() - begun) / len(cases)
    return [
        Record(
            number=case.number,
            title=case.title,
            values=values[i],
            vectors=vectors[i],
            thumbnails={arm: thumbnail(picture) for arm, picture in pictures[i].items()},
            seconds=round(each, 3),
        )
        for i, case in enumerate(cases)
    ]


def _known(cases: Sequence[Case[Any]], arm: str) -> list[Image.Image]:
    return [case.known[arm]() for case in cases]


def _drawn(suite: Suite[Any], draw: Drawer, cases: Sequence[Case[Any]], arm: str) -> list[Image.Image]:
    if all(arm in case.made for case in cases):
        pipe = pipeline_of(draw)
        return [case.made[arm](pipe) for case in cases]
    specs = [case.specs[arm] for case in cases]
    joined = together(specs, suite.per_prompt)
    found = [picture for spec in ([joined] if joined is not None else specs) for picture in draw(spec)]
    if len(found) != len(cases) or not all(isinstance(picture, Image.Image) for picture in found):
        raise InputError(
            f"The arm {arm!r} of {suite.name!r} gave {len(found)} pictures for {len(cases)} cases; a case's run draws "
            "one picture, as PIL."
        )
    return found


def packed(vector: np.ndarray) -> str:
    """A vector as base64 of its float32, little-endian."""
    return base64.b64encode(np.ascontiguousarray(vector, dtype="<f4").tobytes()).decode("ascii")


def unpacked(text: str) -> np.ndarray:
    """The vector that `packed` wrote.

    >>> unpacked(packed(np.array([1.0, -2.5]))).tolist()
    [1.0, -2.5]
    """
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def thumbnail(picture: Image.Image) -> str:
    """A small WebP as base64; never enlarged."""
    small = picture.convert("RGB")
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=88, method=4)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
