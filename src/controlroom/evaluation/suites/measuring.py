"""A suite measured in one call: drawn from where it was stopped, judged, summed up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from controlroom.evaluation.suites.drawing import PipelineDrawer
from controlroom.evaluation.suites.journal import Journal
from controlroom.evaluation.suites.report import Report, summarise
from controlroom.evaluation.suites.runner import Progress, run
from controlroom.evaluation.suites.suite import Suite


def measured(
    suite: Suite[Any],
    journal: Path,
    batch_size: int = 8,
    minutes: float | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Report:
    """The report of a suite that its own model draws.

    Args:
        suite: what is measured.
        journal: file of finished cases; those in it are not drawn again.
        batch_size: cases that are drawn together.
        minutes: begin no batch after so many; the rest is for the next call.
        progress: is told how far it is; None: it is printed.

    Raises:
        ModelError: weights that are not there.
        InputError: the journal is of another measurement.
    """

    def told(now: Progress) -> None:
        print(f"{suite.name}: {now.done} of {now.n}", flush=True)

    draw = PipelineDrawer(suite.settings.model, suite.weights)
    about = suite.about(draw.fingerprint)
    seconds = None if minutes is None else minutes * 60
    records = run(suite, draw, Journal(journal, about), batch_size, seconds, progress or told)
    return summarise(suite, records, about)
