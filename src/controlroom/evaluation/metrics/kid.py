"""KID, the kernel inception distance (Bińkowski et al., "Demystifying MMD GANs", arXiv 1801.01401).

The squared maximum mean discrepancy of two sets of features under the kernel ``(x·y/D + 1)³``, estimated without bias:
its expectation is the same for any number of pictures, so it may be compared where FID may not, and it may come out a
little below zero.

`kid` uses every pair and gives an interval by the jackknife, in closed form from the sums of the kernel's rows (a
bootstrap would draw pictures twice, and a picture is too much like itself). `kid_of_subsets` is the published protocol:
mean and standard deviation over random subsets.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.estimates import Estimate
from controlroom.evaluation.extractor import require_same
from controlroom.evaluation.metrics.accumulators import FeatureBank, checked_features


def kid(first: Tensor, second: Tensor) -> Estimate:
    """Unbiased squared MMD over all pairs, with the jackknife's 95 % interval; lower is better.

    Args:
        first, second: features [N, D] and [M, D], with at least three pictures each.

    Returns:
        ``n`` is the size of the smaller set.

    Raises:
        InputError: too few pictures, other shapes, or not finite.

    Example:
        >>> line = torch.arange(6.0).view(6, 1)
        >>> kid(line, line).mean < 0 < kid(line, line + 3).mean
        True
    """
    x, y = _sets(first, second, 3)
    n, m = len(x), len(y)
    within_x, within_y, across = _kernel(x, x), _kernel(y, y), _kernel(x, y)
    rows_x = within_x.sum(dim=1) - within_x.diagonal()
    rows_y = within_y.sum(dim=1) - within_y.diagonal()
    sum_x, sum_y, sum_across = rows_x.sum(), rows_y.sum(), across.sum()
    mean_x, mean_y = sum_x / (n * (n - 1)), sum_y / (m * (m - 1))
    value = mean_x + mean_y - 2 * sum_across / (n * m)
    # Without picture i: its row and its column leave the sums.
    less_x = (sum_x - 2 * rows_x) / ((n - 1) * (n - 2)) + mean_y - 2 * (sum_across - across.sum(1)) / ((n - 1) * m)
    less_y = mean_x + (sum_y - 2 * rows_y) / ((m - 1) * (m - 2)) - 2 * (sum_across - across.sum(0)) / (n * (m - 1))
    half = 1.959964 * math.sqrt(float(_spread(less_x) + _spread(less_y)))
    return Estimate(mean=float(value), low=float(value) - half, high=float(value) + half, n=min(n, m))


def _spread(without: Tensor) -> Tensor:
    """The jackknife's variance, from the values without each picture."""
    n = len(without)
    return (n - 1) / n * (without - without.mean()).square().sum()


def kid_of_subsets(
    first: Tensor, second: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Mean and standard deviation of the unbiased estimate over random subsets of ``size`` pictures of each set.

    Raises:
        InputError: fewer than ``size`` pictures in a set, other shapes, or not finite.

    Example:
        >>> line = torch.arange(6.0).view(6, 1)
        >>> mean, deviation = kid_of_subsets(line, line + 3, subsets=4, size=6)  # each subset is the whole set
        >>> abs(mean - kid(line, line + 3).mean) < 1e-9, deviation < 1e-9
        (True, True)
    """
    if size < 2 or subsets < 1:
        raise InputError(f"KID takes at least one subset of at least two pictures; got {subsets} of {size}.")
    x, y = _sets(first, second, size)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        a, b = (data[torch.randperm(len(data), generator=generator)[:size]] for data in (x, y))
        within = [_kernel(part, part) for part in (a, b)]
        means = [(k.sum() - k.diagonal().sum()) / (size * (size - 1)) for k in within]
        found.append(means[0] + means[1] - 2 * _kernel(a, b).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std(correction=0))


def kid_of(first: FeatureBank, second: FeatureBank) -> Estimate:
    """`kid` of two sets of features of one extractor.

    Raises:
        InputError: of two extractors, or too few pictures.
    """
    require_same(first.extractor, second.extractor, "KID")
    return kid(first.features(), second.features())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _sets(first: Tensor, second: Tensor, least: int) -> tuple[Tensor, Tensor]:
    x, y = checked_features(first), checked_features(second)
    if x.shape[1] != y.shape[1] or min(len(x), len(y)) < least:
        raise InputError(
            f"KID got features {list(x.shape)} and {list(y.shape)}; expected two sets of one width, of at least "
            f"{least} pictures each."
        )
    return x, y
