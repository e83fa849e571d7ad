"""IS, the inception score (Salimans et al., "Improved Techniques for Training GANs", arXiv 1606.03498).

``exp(mean over pictures of KL(p(class | picture) || p(class)))``: high where each picture is surely of one class, and
all classes occur. It compares with nothing: a set that repeats one perfect picture of each class has the best score.
The published protocol cuts the set into ten parts and gives mean and standard deviation over them. Here picture i is in
part ``i mod splits``, whatever the batches, so that the score can be streamed and merged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.extractor import require_same
from controlroom.evaluation.metrics.accumulators import checked_features


class InceptionScore:
    """Many pictures, in constant memory: for each part the mean of p and of its negative entropy.

    Example:
        >>> found = InceptionScore(splits=1)
        >>> found.add(torch.eye(4) * 100)  # four pictures, surely of four classes
        >>> [round(value, 6) for value in found.score()]
        [4.0, 0.0]
    """

    def __init__(self, splits: int = 10, extractor: str = "") -> None:
        if splits < 1:
            raise InputError(f"An inception score has at least one part; got {splits}.")
        self.splits, self.extractor, self.n = splits, extractor, 0
        self._sum: Tensor | None = None
        self._information = torch.zeros(splits, dtype=torch.float64)
        self._count = torch.zeros(splits, dtype=torch.float64)

    def add(self, logits: Tensor) -> None:
        """Logits [B, classes] of a batch (softmaxed here).

        Raises:
            InputError: another shape, another number of classes, or not finite.
        """
        surprise = checked_features(logits).log_softmax(dim=1)
        p = surprise.exp()
        total = torch.zeros(self.splits, p.shape[1], dtype=torch.float64) if self._sum is None else self._sum
        if total.shape[1] != p.shape[1]:
            raise InputError(f"There are {p.shape[1]} classes, before there were {total.shape[1]}.")
        part = (torch.arange(len(p)) + self.n) % self.splits
        self._sum = total.index_add(0, part, p)
        self._information.index_add_(0, part, (p * surprise).sum(dim=1))
        self._count.index_add_(0, part, torch.ones(len(p), dtype=torch.float64))
        self.n += len(p)

    def merge(self, other: InceptionScore) -> None:
        """Take in the pictures of another one, part by part.

        Raises:
            InputError: of another extractor, or another number of parts or classes.
        """
        require_same(self.extractor, other.extractor, "Inception scores")
        if other._sum is None:
            return
        if self.splits != other.splits or (self._sum is not None and self._sum.shape != other._sum.shape):
            raise InputError("Inception scores with other numbers of parts or classes cannot be merged.")
        self._sum = other._sum.clone() if self._sum is None else self._sum + other._sum
        self._information += other._information
        self._count += other._count
        self.n += other.n

    def score(self) -> tuple[float, float]:
        """Mean and standard deviation over the parts; higher is better, from 1 to the number of classes.

        Raises:
            InputError: fewer pictures than parts.
        """
        if self._sum is None or not self._count.all():
            raise InputError(f"{self.n} pictures are too few for {self.splits} parts. Give more, or fewer parts.")
        marginal = self._sum / self._count[:, None]
        # KL = mean of sum p log p - sum q log q, with q the marginal; 0 log 0 is 0.
        divergence = self._information / self._count - torch.special.xlogy(marginal, marginal).sum(dim=1)
        scores = divergence.exp()
        return float(scores.mean()), float(scores.std(correction=0))


def inception_score(logits: Tensor, splits: int = 10) -> tuple[float, float]:
    """Mean and standard deviation of the score of pictures with ``logits`` [N, classes] over ``splits`` parts.

    Raises:
        InputError: another shape, not finite, or fewer pictures than parts.

    Example:
        >>> inception_score(torch.zeros(20, 5))  # no picture is of any class
        (1.0, 0.0)
    """
    found = InceptionScore(splits)
    found.add(logits)
    return found.score()
