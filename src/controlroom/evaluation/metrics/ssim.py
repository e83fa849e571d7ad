"""SSIM, the structural similarity of two pictures (Wang et al., "Image Quality Assessment: From Error Visibility to
Structural Similarity", IEEE TIP 2004).

Means, variances and covariance are taken under a Gaussian window of 11 pixels and sigma 1.5; only windows that lie
inside the picture count. Equal to scikit-image's `structural_similarity` with ``gaussian_weights=True, sigma=1.5,
use_sample_covariance=False`` (its defaults, a square window of 7, give another number).
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from controlroom.core.errors import InputError

WINDOW, SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03


def ssim(first: Tensor | np.ndarray, second: Tensor | np.ndarray, data_range: float = 1.0) -> Tensor:
    """Mean structural similarity of each pair of pictures; 1 for equal ones, higher is better.

    Args:
        first, second: ``[B, C, H, W]``; both of one shape, at least 11 x 11 pixels. Channels are compared one by one
            and averaged.
        data_range: largest possible difference of two values: 1 for [0, 1], 2 for [-1, 1], 255 for bytes.

    Returns:
        float64 [B], each at most 1.

    Raises:
        InputError: other shapes, or a range that is not positive.

    Example:
        >>> grey = torch.full((1, 1, 16, 16), 0.5)
        >>> float(ssim(grey, grey))
        1.0
        >>> round(float(ssim(grey, grey / 2)), 4)  # no structure: only the brightness differs
        0.8001
    """
    x, y = (torch.as_tensor(picture).detach().to(torch.float64) for picture in (first, second))
    if x.shape != y.shape or x.ndim != 4 or min(x.shape[2:]) < WINDOW:
        raise InputError(
            f"SSIM got pictures of shapes {list(x.shape)} and {list(y.shape)}; expected two of one shape [B, C, H, W] "
            f"with at least {WINDOW} x {WINDOW} pixels."
        )
    if not data_range > 0:
        raise InputError(f"The data range of SSIM is {data_range!r}; expected a positive number.")
    mean_x, mean_y = _windowed(x), _windowed(y)
    variance_x, variance_y = _windowed(x * x) - mean_x**2, _windowed(y * y) - mean_y**2
    covariance = _windowed(x * y) - mean_x * mean_y
    c1, c2 = (_K1 * data_range) ** 2, (_K2 * data_range) ** 2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (variance_x + variance_y + c2)
    return (brightness * structure).mean(dim=(1, 2, 3))


def _windowed(x: Tensor) -> Tensor:
    """Weighted mean under the window at every place where it fits: [B, C, H, W] -> [B, C, H - 10, W - 10]."""
    offsets = torch.arange(WINDOW, dtype=x.dtype, device=x.device) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * SIGMA**2))
    weights = weights / weights.sum()
    channels = x.shape[1]
    rows = weights.view(1, 1, -1, 1).expand(channels, -1, -1, -1)
    columns = weights.view(1, 1, 1, -1).expand(channels, -1, -1, -1)
    return F.conv2d(F.conv2d(x, rows, groups=channels), columns, groups=channels)
