"""CLIP score (Hessel et al., "CLIPScore: A Reference-free Evaluation Metric for Image Captioning", arXiv 2104.08718).

``100 max(cos(picture, text), 0)`` in CLIP's space. The paper multiplies by 2.5; the number in use, torchmetrics' too,
by 100.
"""

from __future__ import annotations

from torch import Tensor

from controlroom.evaluation.metrics.similarity import similarity


def clip_score(images: Tensor, texts: Tensor) -> Tensor:
    """Score of each picture with its text; higher is better.

    Args:
        images: features of the pictures [B, D], of any length.
        texts: features of their texts [B, D], from the same network.

    Returns:
        float64 [B] in [0, 100]. Many pictures go into ``Averaged(label_of(clip))``.

    Raises:
        InputError: other shapes, not finite, or a vector of length zero.

    Example:
        >>> import torch
        >>> clip_score(torch.tensor([[3.0, 4.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, -1.0]])).tolist()
        [60.0, 0.0]
    """
    return 100 * similarity(images, texts).clamp_min(0)
