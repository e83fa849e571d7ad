"""Cosine similarity of two pictures in a network's space: DINO score, CLIP-I score, identity score.

They are one formula with different extractors. With DINO's class token it is the subject fidelity of DreamBooth
(arXiv 2208.12242), with a network of faces the identity score; `extractors.theatre.TheatreIdentity` is the theatre's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.accumulators import checked_features


def similarity(first: Tensor, second: Tensor) -> Tensor:
    """Cosine of each pair of feature vectors; higher is more alike.

    Args:
        first, second: [B, D], of any length, from the same extractor.

    Returns:
        float64 [B] in [-1, 1]. Many pairs go into ``Averaged(label_of(extractor))``.

    Raises:
        InputError: other shapes, not finite, or a vector of length zero, which points nowhere.

    Example:
        >>> similarity(torch.tensor([[6.0, 8.0]]), torch.tensor([[0.0, 5.0]])).tolist()
        [0.8]
    """
    x, y = checked_features(first), checked_features(second)
    if x.shape != y.shape:
        raise InputError(f"Features have shapes {list(x.shape)} and {list(y.shape)}; expected [B, D] twice.")
    lengths = x.norm(dim=1), y.norm(dim=1)
    if not (lengths[0].all() and lengths[1].all()):
        raise InputError("A feature vector has length zero, so it has no direction to compare.")
    return torch.clamp((x / lengths[0][:, None] * (y / lengths[1][:, None])).sum(dim=1), -1.0, 1.0)
