"""Directional similarity: do two pictures differ as their texts do? (Gal et al., arXiv 2108.00946)

The cosine of the difference of two pictures and the difference of their texts in CLIP's space, all of length one. The
measure of InstructPix2Pix (arXiv 2211.09800) for how far an edit does what was asked.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.accumulators import checked_features


def directional_similarity(before: Tensor, after: Tensor, text_before: Tensor, text_after: Tensor) -> Tensor:
    """Cosine of what changed in the pictures and what changed in the texts; higher is better.

    Args:
        before, after: features of the pictures [B, D], of any length.
        text_before, text_after: features of their texts [B, D], from the same network.

    Returns:
        float64 [B] in [-1, 1]; 0 where pictures or texts do not differ.

    Raises:
        InputError: other shapes, or not finite.

    Example:
        >>> import torch
        >>> x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
        >>> [round(float(directional_similarity(x, y, x, other)), 6) for other in (y, x)]
        [1.0, 0.0]
    """
    found = [F.normalize(checked_features(one), dim=1) for one in (before, after, text_before, text_after)]
    if len({one.shape for one in found}) > 1:
        raise InputError(f"Features have shapes {[list(one.shape) for one in found]}; expected [B, D] four times.")
    pictures, texts = found[1] - found[0], found[3] - found[2]
    return (F.normalize(pictures, dim=1) * F.normalize(texts, dim=1)).sum(dim=1).clamp(-1.0, 1.0)
