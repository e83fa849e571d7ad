"""SSIM against scikit-image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.ssim import ssim


@pytest.mark.parametrize(("data_range", "channels"), [(1.0, 3), (255.0, 1), (2.0, 2)])
def test_equal_to_scikit_image(data_range: float, channels: int) -> None:
    rng = np.random.default_rng(0)
    first = rng.random((3, channels, 29, 40)) * data_range
    second = np.clip(first + rng.normal(0, 0.1 * data_range, first.shape), 0, data_range)
    second[1] = first[1, :, ::-1]
    found = ssim(torch.from_numpy(first), second, data_range)
    for row in range(3):
        expected = structural_similarity(
            first[row],
            second[row],
            channel_axis=0,
            data_range=data_range,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        assert float(found[row]) == pytest.approx(expected, abs=1e-9)


def test_float32_and_bytes_are_taken_as_they_are() -> None:
    rng = np.random.default_rng(1)
    first, second = (rng.integers(0, 256, (1, 3, 16, 16), dtype=np.uint8) for _ in range(2))
    as_bytes = ssim(first, second, 255.0)
    as_floats = ssim(torch.from_numpy(first).float() / 255, torch.from_numpy(second).float() / 255)
    torch.testing.assert_close(as_bytes, as_floats, atol=1e-5, rtol=0)


@pytest.mark.parametrize("shapes", [((1, 3, 16, 16), (1, 3, 16, 17)), ((3, 16, 16),) * 2, ((1, 3, 10, 16),) * 2])
def test_wrong_shapes(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        ssim(*(torch.zeros(shape) for shape in shapes))


def test_wrong_range() -> None:
    with pytest.raises(InputError, match="positive"):
        ssim(torch.zeros(1, 1, 16, 16), torch.zeros(1, 1, 16, 16), 0)
