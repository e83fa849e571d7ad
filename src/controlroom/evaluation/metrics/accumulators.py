"""What is kept of many pictures, in constant memory where a metric allows it.

Every accumulator takes batches (`add`), takes in another one of the same kind (`merge`; two halves merged give what
the whole gives), and knows the extractor of its numbers, so that those of two are never mixed. Means and covariances
are updated by the formulas of Chan, Golub and LeVeque (1983), which lose no digits where the sum of squares does.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.estimates import Estimate, share_of
from controlroom.evaluation.extractor import require_same


class Averaged:
    """Mean of numbers, one for each picture: SSIM, L1, LPIPS, CLIP score, similarity, PCK.

    Example:
        >>> left, right = Averaged(), Averaged()
        >>> left.add([1.0, 2.0]); right.add([3.0]); left.merge(right)
        >>> left.n, left.mean, left.variance
        (3, 2.0, 1.0)
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor = extractor
        self.n, self.mean, self._scatter = 0, 0.0, 0.0

    def add(self, values: Tensor | Iterable[float]) -> None:
        """Numbers of a batch.

        Raises:
            InputError: one that is not finite, which would make the mean meaningless without a trace.
        """
        data = torch.as_tensor(values if isinstance(values, Tensor) else list(values), dtype=torch.float64).flatten()
        if not data.isfinite().all():
            raise InputError("A value to be averaged is not finite (NaN or infinity).")
        if len(data):
            mean = float(data.mean())
            self._take(len(data), mean, float((data - mean).square().sum()))

    def merge(self, other: Averaged) -> None:
        """Take in the numbers of another one."""
        require_same(self.extractor, other.extractor, "Means")
        if other.n:
            self._take(other.n, other.mean, other._scatter)

    def _take(self, n: int, mean: float, scatter: float) -> None:
        total, delta = self.n + n, mean - self.mean
        self._scatter += scatter + delta * delta * self.n * n / total
        self.mean += delta * n / total
        self.n = total

    @property
    def variance(self) -> float:
        """Of the numbers (divided by n - 1); NaN of fewer than two."""
        return self._scatter / (self.n - 1) if self.n > 1 else math.nan

    def estimate(self) -> Estimate:
        """Mean with the normal 95 % interval; NaN without numbers."""
        half = 1.959964 * math.sqrt(self.variance / self.n) if self.n > 1 else math.nan
        mean = self.mean if self.n else math.nan
        return Estimate(mean=mean, low=mean - half, high=mean + half, n=self.n)


class Counted:
    """Share of right answers.

    Example:
        >>> found = Counted()
        >>> found.add([True, True, False]); found.estimate().mean
        0.6666666666666666
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor, self.right, self.n = extractor, 0, 0

    def add(self, right: Iterable[bool]) -> None:
        """Answers of a batch."""
        listed = list(right)
        self.right += sum(map(bool, listed))
        self.n += len(listed)

    def merge(self, other: Counted) -> None:
        """Take in the answers of another one."""
        require_same(self.extractor, other.extractor, "Shares")
        self.right, self.n = self.right + other.right, self.n + other.n

    def estimate(self) -> Estimate:
        """Share with Wilson's 95 % interval."""
        return share_of(self.right, self.n)


class Moments:
    """Mean and covariance of features, one pass, float64: what a Fréchet distance is made of.

    Example:
        >>> found = Moments()
        >>> found.add(torch.tensor([[0.0, 0.0], [2.0, 4.0]])); found.add(torch.tensor([[1.0, 2.0]]))
        >>> found.mean.tolist(), found.covariance().tolist()
        ([1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]])
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor, self.n = extractor, 0
        self.mean: Tensor = torch.zeros(0, dtype=torch.float64)
        self._scatter: Tensor = torch.zeros(0, 0, dtype=torch.float64)

    def add(self, features: Tensor) -> None:
        """Features [B, D] of a batch.

        Raises:
            InputError: another shape or width, or not finite.
        """
        data = checked_features(features)
        if len(data):
            mean = data.mean(dim=0)
            self._take(len(data), mean, (data - mean).T @ (data - mean))

    def merge(self, other: Moments) -> None:
        """Take in the features of another one."""
        require_same(self.extractor, other.extractor, "Means and covariances")
        if other.n:
            self._take(other.n, other.mean, other._scatter)

    def _take(self, n: int, mean: Tensor, scatter: Tensor) -> None:
        if self.n == 0:
            self.mean, self._scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        if len(mean) != len(self.mean):
            raise InputError(f"Features have {len(mean)} numbers, those before had {len(self.mean)}.")
        total, delta = self.n + n, mean - self.mean
        self._scatter = self._scatter + scatter + torch.outer(delta, delta) * (self.n * n / total)
        self.mean = self.mean + delta * (n / total)
        self.n = total

    def covariance(self) -> Tensor:
        """[D, D], divided by n - 1.

        Raises:
            InputError: fewer than two pictures.
        """
        if self.n < 2:
            raise InputError(f"A covariance needs at least two pictures; there are {self.n}.")
        return self._scatter / (self.n - 1)


class FeatureBank:
    """The features themselves, for metrics that compare every picture with every other (KID).

    Example:
        >>> bank = FeatureBank()
        >>> bank.add(torch.zeros(2, 3)); bank.add(torch.ones(1, 3)); bank.features().shape
        torch.Size([3, 3])
    """

    def __init__(self, extractor: str = "") -> None:
        self.extractor = extractor
        self._parts: list[Tensor] = []

    def add(self, features: Tensor) -> None:
        """Features [B, D] of a batch.

        Raises:
            InputError: another shape or width, or not finite.
        """
        data = checked_features(features)
        if self._parts and data.shape[1] != self._parts[0].shape[1]:
            raise InputError(f"Features have {data.shape[1]} numbers, those before had {self._parts[0].shape[1]}.")
        self._parts.append(data)

    def merge(self, other: FeatureBank) -> None:
        """Take in the features of another one."""
        require_same(self.extractor, other.extractor, "Features")
        for part in other._parts:
            self.add(part)

    def features(self) -> Tensor:
        """All of them, float64 [N, D].

        Raises:
            InputError: there are none.
        """
        if not self._parts:
            raise InputError("No features were added.")
        return torch.cat(self._parts)


def checked_features(features: Tensor | Sequence[Sequence[float]]) -> Tensor:
    """[B, D] in float64 on the CPU.

    Raises:
        InputError: another shape, or not finite.
    """
    data = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if data.ndim != 2 or not data.isfinite().all():
        raise InputError(f"Features have the shape {list(data.shape)}; expected finite numbers [B, D].")
    return data
