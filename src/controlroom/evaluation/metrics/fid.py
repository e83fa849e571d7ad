"""FID, the Fréchet distance of two sets of pictures (Heusel et al., "GANs Trained by a Two Time-Scale Update Rule
Converge to a Local Nash Equilibrium", arXiv 1706.08500).

Features of each set are taken for a Gaussian; the squared distance of the two is
``|m1 - m2|² + tr(C1 + C2 - 2 (C1 C2)^½)``. The published name FID means Inception's features; with others it is a
Fréchet distance in those, and the extractor's label says which.

It is biased upwards, the more the fewer pictures there are (0.21 for 64 and 0.04 for 256 pictures of one distribution
with one small extractor); below a few thousand use `kid`. Deviation from the published code: the trace of the root is
the sum of the roots of the eigenvalues of ``C1^½ C2 C1^½``, symmetric and in float64, with those below zero cut off;
SciPy's ``sqrtm`` of the product gives complex numbers and needs a patch where a covariance has no full rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.extractor import require_same
from controlroom.evaluation.metrics.accumulators import Moments


def frechet_distance(mean1: Tensor, covariance1: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """Squared Fréchet distance of two Gaussians; 0 for equal ones, lower is better.

    Args:
        mean1, mean2: [D].
        covariance1, covariance2: [D, D].

    Raises:
        InputError: shapes that do not fit, or values that are not finite.

    Example:
        >>> zero, one = torch.zeros(2), torch.eye(2)
        >>> round(frechet_distance(zero, one, zero + 1, 4 * one), 6)  # 1 + 1 from the means, (2 - 1)² twice
        4.0
    """
    parts = [part.detach().to("cpu", torch.float64) for part in (mean1, covariance1, mean2, covariance2)]
    width = parts[0].shape
    if [list(part.shape) for part in parts] != [[*width], [*width, *width]] * 2 or len(width) != 1:
        shapes = ", ".join(str(list(part.shape)) for part in parts)
        raise InputError(f"A Fréchet distance takes means [D] and covariances [D, D]; got {shapes}.")
    if not all(part.isfinite().all() for part in parts):
        raise InputError("A Fréchet distance got values that are not finite (NaN or infinity).")
    m1, c1, m2, c2 = parts
    root = _root(c1)
    product = root @ c2 @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp_min(0)
    distance = (m1 - m2).square().sum() + c1.trace() + c2.trace() - 2 * eigenvalues.sqrt().sum()
    return max(float(distance), 0.0)


def _root(matrix: Tensor) -> Tensor:
    """Symmetric square root of a covariance; rounding below zero is cut off."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def fid(first: Moments, second: Moments) -> float:
    """Fréchet distance of two sets of features of one extractor.

    Raises:
        InputError: of two extractors, or fewer than two pictures in a set.

    Example:
        >>> ours, theirs = Moments("inception@00"), Moments("inception@00")
        >>> ours.add(torch.tensor([[0.0], [2.0]])); theirs.add(torch.tensor([[3.0], [5.0]]))
        >>> round(fid(ours, theirs), 6)
        9.0
    """
    require_same(first.extractor, second.extractor, "FID")
    return frechet_distance(first.mean, first.covariance(), second.mean, second.covariance())
