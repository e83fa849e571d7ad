"""Metrics of pixels against scikit-image and torchmetrics, and what is easily got wrong about them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from torchmetrics.functional.image import peak_signal_noise_ratio as torchmetrics_psnr

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.background import BackgroundKept, background, only_background
from controlroom.evaluation.metrics.l1 import l1
from controlroom.evaluation.metrics.pixels import as_bytes, as_pictures, in_batches, unit_pixels
from controlroom.evaluation.metrics.psnr import PSNR, psnr


def pairs(n: int = 4, data_range: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    first = rng.random((n, 3, 9, 12)) * data_range
    second = first + rng.normal(0, 0.1 * data_range, first.shape) * np.arange(1, n + 1).reshape(-1, 1, 1, 1)
    return torch.from_numpy(first), torch.from_numpy(second)


@pytest.mark.parametrize("data_range", [1.0, 2.0, 255.0])
def test_psnr(data_range: float) -> None:
    x, y = pairs(data_range=data_range)
    for row, value in enumerate(psnr(x, y, data_range).tolist()):
        expected = peak_signal_noise_ratio(x[row].numpy(), y[row].numpy(), data_range=data_range)
        assert value == pytest.approx(expected, abs=1e-9)


def test_mean_and_pooled_psnr_are_two_numbers() -> None:
    x, y = pairs()
    whole, left, right = PSNR(), PSNR(), PSNR()
    whole.add(x, y)
    left.add(x[:1], y[:1])
    right.add(x[1:], y[1:])
    left.merge(right)
    each = torchmetrics_psnr(x, y, data_range=1.0, dim=(1, 2, 3))
    together = torchmetrics_psnr(x, y, data_range=1.0)
    for found in (whole, left):
        # torchmetrics computes the logarithm in float32.
        assert found.mean().mean == pytest.approx(float(each), abs=1e-5)
        assert found.pooled() == pytest.approx(float(together), abs=1e-5)
    assert float(each) > float(together) + 1
    # The same pictures in another range are worth the same.
    bytes_ = PSNR(255.0)
    bytes_.add(x * 255, y * 255)
    bytes_.merge(right)
    left.merge(right)
    whole.merge(right)
    assert bytes_.pooled() == pytest.approx(whole.pooled(), abs=1e-9)


def test_equal_pictures() -> None:
    x, _ = pairs()
    assert math.isinf(float(psnr(x, x)[0]))
    found = PSNR(ceiling=50.0)
    assert math.isnan(found.pooled()) and found.mean().n == 0
    found.add(x, x)
    assert found.mean().mean == 50.0 and math.isinf(found.pooled())
    assert l1(x, x).tolist() == [0.0] * 4
    # Bytes are not subtracted as bytes, where 0 - 1 is 255.
    dark = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    assert float(psnr(dark, dark + 1, 255)) == pytest.approx(20 * math.log10(255))
    assert float(l1(dark, dark + 1, 255)) == pytest.approx(1 / 255)


def test_l1() -> None:
    x, y = pairs(data_range=255.0)
    assert l1(x, y, 255).tolist() == pytest.approx(
        [float((a - b).abs().mean()) / 255 for a, b in zip(x, y, strict=True)]
    )


@pytest.mark.parametrize("metric", [psnr, l1])
def test_wrong_input(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(InputError, match=r"\[B, C, H, W\]"):
        metric(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 5))
    with pytest.raises(InputError, match="not empty"):
        metric(torch.zeros(0, 3, 4, 4), torch.zeros(0, 3, 4, 4))
    with pytest.raises(InputError, match="positive"):
        metric(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4), 0)
    with pytest.raises(InputError, match="finite"):
        metric(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), math.nan))


def test_background_looks_only_outside() -> None:
    x, y = pairs()
    mask = torch.zeros(4, 9, 12, dtype=torch.bool)
    mask[:, 2:6, 3:9] = True
    mask[1] = False
    found = background(x, y, mask)
    for row in range(4):
        kept = ~mask[row]
        difference = (x[row] - y[row])[:, kept]
        assert float(found.psnr[row]) == pytest.approx(-10 * math.log10(float(difference.square().mean())))
        assert float(found.l1[row]) == pytest.approx(float(difference.abs().mean()))
        assert float(found.share[row]) == pytest.approx(float(kept.float().mean()))
    assert float(found.psnr[1]) == pytest.approx(float(psnr(x, y)[1]))
    # Whatever happens inside, even what is no number, changes nothing.
    wild = torch.where(mask[:, None], torch.tensor(1e6, dtype=y.dtype), y)
    again = background(x, wild, mask)
    assert torch.equal(again.psnr, found.psnr) and torch.equal(again.l1, found.l1)
    shown = only_background(x, wild, mask)
    assert torch.equal(shown[:, :, 3, 4][2:], x[:, :, 3, 4][2:]) and torch.equal(shown[1], y[1])
    with pytest.raises(InputError, match="covers a whole"):
        background(x, y, torch.ones(4, 9, 12))
    with pytest.raises(InputError, match="mask has the shape"):
        background(x, y, mask[:, :5])


def test_background_kept_merges() -> None:
    x, y = pairs()
    mask = torch.zeros(4, 9, 12, dtype=torch.bool)
    mask[:, :4] = True
    whole, left, right = (BackgroundKept() for _ in range(3))
    whole.add(x, y, mask)
    left.add(x[:3], y[:3], mask[:3])
    right.add(x[3:], y[3:], mask[3:])
    left.merge(right)
    assert left.psnr.mean == pytest.approx(whole.psnr.mean) and left.l1.mean == pytest.approx(whole.l1.mean)
    assert whole.psnr.mean == pytest.approx(float(background(x, y, mask).psnr.mean()))


def test_bytes_are_rounded_not_cut() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(as_bytes(every.float() / 255), every)
    fine = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    best = float(psnr(fine, as_bytes(fine).float() / 255))
    cut = float(psnr(fine, fine.mul(255).to(torch.uint8).float() / 255))
    assert best == pytest.approx(58.9, abs=0.1) and cut == pytest.approx(52.8, abs=0.1)


def test_pictures_and_back() -> None:
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)) for _ in range(3)]
    pixels = unit_pixels(pictures)
    assert pixels.shape == (3, 3, 5, 7)
    assert [picture.tobytes() for picture in as_pictures(pixels)] == [picture.tobytes() for picture in pictures]
    grey = Image.new("L", (7, 5), 51)
    assert float(unit_pixels([grey]).mean()) == pytest.approx(0.2)
    with pytest.raises(InputError, match="5 x 7, 7 x 5"):
        unit_pixels([pictures[0], pictures[0].transpose(Image.Transpose.ROTATE_90)])
    with pytest.raises(InputError, match="none"):
        unit_pixels([])
    calls = []

    def means(images: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(images.shape))
        return images.mean(dim=(1, 2, 3))

    mixed = [*pictures, grey.resize((2, 2)), *pictures]
    expected = [float(unit_pixels([picture]).mean()) for picture in mixed]
    assert in_batches(means, mixed, 2).tolist() == pytest.approx(expected)
    assert calls == [(2, 3, 5, 7), (1, 3, 5, 7), (1, 3, 2, 2), (2, 3, 5, 7), (1, 3, 5, 7)]
