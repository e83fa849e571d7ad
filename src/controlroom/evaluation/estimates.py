"""A number with its uncertainty: means with bootstrap intervals, shares with Wilson's."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict


class Estimate(BaseModel):
    """A mean over ``n`` cases with the bounds of its 95 % confidence interval."""

    model_config = ConfigDict(frozen=True)

    mean: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def percent(self) -> str:
        """As a percentage with its interval, for tables of shares."""
        return f"{100 * self.mean:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"


def share(right: Sequence[bool]) -> Estimate:
    """Share of true values, with Wilson's score interval (exact enough for small n and for shares near 0 and 1).

    Example:
        >>> share([True] * 9 + [False]).percent()
        '90.0 % [59.6, 98.2]'
    """
    return share_of(sum(right), len(right))


def share_of(right: int, n: int) -> Estimate:
    """Share of ``right`` among ``n``, as `share`; NaN of none."""
    if n == 0:
        return Estimate(mean=math.nan, low=math.nan, high=math.nan, n=0)
    z, p = 1.959964, right / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return Estimate(mean=p, low=max(0.0, centre - half), high=min(1.0, centre + half), n=n)


def mean(values: Sequence[float], draws: int = 2000) -> Estimate:
    """Mean of ``values`` with a percentile bootstrap interval (seeded, so the same values give the same interval).

    Example:
        >>> mean([1.0, 1.0, 1.0]).low
        1.0
    """
    data = np.asarray(values, dtype=np.float64)
    if len(data) == 0:
        return Estimate(mean=math.nan, low=math.nan, high=math.nan, n=0)
    picks = np.random.default_rng(0).integers(0, len(data), (draws, len(data)))
    low, high = np.percentile(data[picks].mean(axis=1), [2.5, 97.5])
    return Estimate(mean=float(data.mean()), low=float(low), high=float(high), n=len(data))
