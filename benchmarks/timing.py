"""Two ways of doing one thing, timed side by side: interleaved pairs, so that what else the machine does hits both."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ratio:
    """How many times longer ``ours`` takes than ``theirs``.

    Attributes:
        median: of the ratios of the pairs.
        low, high: quartiles of them.
        ours, theirs: median seconds.
        pairs: number of them.
    """

    median: float
    low: float
    high: float
    ours: float
    theirs: float
    pairs: int


def compare(ours: Callable[[], object], theirs: Callable[[], object], pairs: int = 15, warmups: int = 1) -> Ratio:
    """Time both in turns; which one begins changes from pair to pair."""
    for _ in range(warmups):
        ours()
        theirs()
    times: list[tuple[float, float]] = []
    for index in range(pairs):
        if index % 2:
            second, first = seconds(theirs), seconds(ours)
        else:
            first, second = seconds(ours), seconds(theirs)
        times.append((first, second))
    ratios = [a / b for a, b in times]
    low, _, high = statistics.quantiles(ratios, n=4) if pairs > 1 else (ratios[0],) * 3
    first, second = (statistics.median(column) for column in zip(*times, strict=True))
    return Ratio(statistics.median(ratios), low, high, first, second, pairs)


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


HEADER = (
    "| run | against | ratio | quartiles | ours, s | theirs, s | pairs | largest difference |\n"
    "|---|---|--:|---|--:|--:|--:|--:|"
)


def row(run: str, against: str, ratio: Ratio, difference: float | None = None) -> str:
    """A line of the Markdown table under `HEADER`; ``difference`` is between the latents of both."""
    gap = "–" if difference is None else f"{difference:.1e}"
    return (
        f"| {run} | {against} | **{ratio.median:.3f}** | {ratio.low:.3f} to {ratio.high:.3f} | {ratio.ours:.3f} "
        f"| {ratio.theirs:.3f} | {ratio.pairs} | {gap} |"
    )
