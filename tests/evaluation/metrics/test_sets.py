"""FID, KID and IS: closed forms, brute force, and torchmetrics with an extractor of our own in it."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore as TorchmetricsIS
from torchmetrics.image.kid import KernelInceptionDistance

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.accumulators import FeatureBank, Moments
from controlroom.evaluation.metrics.fid import fid, frechet_distance
from controlroom.evaluation.metrics.inception_score import InceptionScore, inception_score
from controlroom.evaluation.metrics.kid import kid, kid_of, kid_of_subsets

WIDTH = 6


class Pixels(nn.Module):
    """An extractor for torchmetrics: a fixed random projection of the bytes."""

    num_features = WIDTH

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.register_buffer("matrix", torch.randn(3 * 8 * 8, width, generator=generator) / 1000)

    def forward(self, images: Tensor) -> Tensor:
        return images.float().flatten(1) @ self.get_buffer("matrix")


def images(n: int, low: int, high: int, seed: int) -> Tensor:
    return torch.randint(low, high, (n, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def moments(features: Tensor, label: str = "") -> Moments:
    found = Moments(label)
    for part in features.split(7):
        found.add(part)
    return found


def bank(features: Tensor, label: str = "") -> FeatureBank:
    found = FeatureBank(label)
    found.add(features)
    return found


# FID.


def test_distance_of_gaussians_in_closed_form() -> None:
    """Covariances that commute: the sum over axes of (difference of means)² + (difference of deviations)²."""
    rng = np.random.default_rng(0)
    axes = torch.from_numpy(np.linalg.qr(rng.normal(size=(5, 5)))[0])
    first, second = (torch.from_numpy(rng.random(5) + 0.1) for _ in range(2))
    means = [torch.from_numpy(rng.normal(size=5)) for _ in range(2)]
    covariances = [axes @ torch.diag(deviation**2) @ axes.T for deviation in (first, second)]
    expected = float((means[0] - means[1]).square().sum() + (first - second).square().sum())
    found = frechet_distance(means[0], covariances[0], means[1], covariances[1])
    assert found == pytest.approx(expected, abs=1e-10)


def test_distance_of_any_covariances() -> None:
    rng = np.random.default_rng(1)
    a, b = (x @ x.T for x in rng.normal(size=(2, 6, 6)))
    m = rng.normal(size=(2, 6))
    expected = ((m[0] - m[1]) ** 2).sum() + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real
    found = frechet_distance(*(torch.from_numpy(x) for x in (m[0], a, m[1], b)))
    assert found == pytest.approx(expected, rel=1e-9)
    back = frechet_distance(*(torch.from_numpy(x) for x in (m[1], b, m[0], a)))
    assert back == pytest.approx(found, rel=1e-9)


def test_fid_equals_torchmetrics() -> None:
    net = Pixels()
    real, fake = images(40, 0, 200, 0), images(30, 50, 256, 1)
    reference: Any = FrechetInceptionDistance(feature=net)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    found = fid(moments(net(real)), moments(net(fake)))
    assert found == pytest.approx(float(reference.compute()), rel=1e-4)
    assert found > 0.1


def test_distance_without_full_rank() -> None:
    """Fewer pictures than features: no root of a product, no complex number, and never below zero."""
    features = torch.randn(8, 40, generator=torch.Generator().manual_seed(0))
    own = moments(features)
    assert fid(own, moments(features)) == pytest.approx(0.0, abs=1e-9)
    # With the same covariance only the means differ.
    assert fid(own, moments(features + 0.5)) == pytest.approx(0.25 * 40, rel=1e-6)
    flat = torch.zeros(3, 3, dtype=torch.float64)
    assert frechet_distance(torch.zeros(3), flat, torch.ones(3), flat) == pytest.approx(3.0)


def test_fid_is_too_high_for_few_pictures_and_kid_is_not() -> None:
    """Sets of one distribution: FID falls with their size, KID is about zero at any."""
    generator = torch.Generator().manual_seed(0)
    values: dict[int, tuple[float, float]] = {}
    for n in (20, 200):
        drawn = [[torch.randn(n, 8, generator=generator) for _ in range(2)] for _ in range(20)]
        fids = [fid(moments(x), moments(y)) for x, y in drawn]
        kids = [kid(x, y).mean for x, y in drawn]
        values[n] = float(np.mean(fids)), float(np.mean(kids))
        assert abs(values[n][1]) < 3 * np.std(kids) / math.sqrt(20)
    assert values[20][0] > 5 * values[200][0] > 0


def test_fid_refuses() -> None:
    features = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(InputError, match="FID of two extractors.*inception@1 and inception@2"):
        fid(moments(features, "inception@1"), moments(features, "inception@2"))
    with pytest.raises(InputError, match="at least two"):
        fid(moments(features), moments(features[:1]))
    with pytest.raises(InputError, match=r"means \[D\]"):
        frechet_distance(torch.zeros(2), torch.eye(3), torch.zeros(2), torch.eye(2))
    with pytest.raises(InputError, match="finite"):
        frechet_distance(torch.zeros(1), torch.tensor([[math.nan]]), torch.zeros(1), torch.eye(1))


# KID.


def brute_force(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within_x = [kernel(a, b) for a, b in itertools.permutations(x, 2)]
    within_y = [kernel(a, b) for a, b in itertools.permutations(y, 2)]
    across = [kernel(a, b) for a in x for b in y]
    return float(np.mean(within_x) + np.mean(within_y) - 2 * np.mean(across))


def test_kid_by_brute_force_and_its_jackknife() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(7, 4)), rng.normal(0.3, 1.2, size=(9, 4))
    found = kid(torch.from_numpy(x), torch.from_numpy(y))
    assert found.mean == pytest.approx(brute_force(x, y), abs=1e-12)
    assert found.n == 7
    without_x = [brute_force(np.delete(x, i, 0), y) for i in range(7)]
    without_y = [brute_force(x, np.delete(y, i, 0)) for i in range(9)]
    variance = sum((len(w) - 1) / len(w) * np.square(w - np.mean(w)).sum() for w in (without_x, without_y))
    assert found.high - found.mean == pytest.approx(1.959964 * math.sqrt(variance), rel=1e-9)


def test_kid_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12_000, 3, generator=generator) + shift for shift in (0.0, 0.4))
    truth = np.mean([kid(a, b).mean for a, b in zip(x.split(600), y.split(600), strict=True)])
    found = [kid(a, b) for a, b in zip(x.split(60), y.split(60), strict=True)]
    assert np.mean([one.low <= truth <= one.high for one in found]) > 0.88


def test_kid_equals_torchmetrics() -> None:
    net = Pixels()
    real, fake = images(20, 0, 200, 0), images(20, 50, 256, 1)
    reference: Any = KernelInceptionDistance(feature=net, subsets=3, subset_size=20)
    reference.update(real, real=True)
    reference.update(fake, real=False)
    mean, deviation = reference.compute()
    found = kid_of_subsets(net(real), net(fake), subsets=3, size=20)
    assert found[0] == pytest.approx(float(mean), rel=1e-4)
    assert found[1] < 1e-9 and float(deviation) < 1e-3  # each subset is the whole set
    assert kid(net(real), net(fake)).mean == pytest.approx(float(mean), rel=1e-4)


def test_subsets() -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(60, 3, generator=generator) for _ in range(2))
    first = kid_of_subsets(x, y, subsets=50, size=20, seed=1)
    assert first == kid_of_subsets(x, y, subsets=50, size=20, seed=1) != kid_of_subsets(x, y, subsets=50, size=20)
    assert first[1] > 0 and first[0] == pytest.approx(kid(x, y).mean, abs=3 * first[1])


def test_kid_refuses() -> None:
    few, many = torch.zeros(2, 3), torch.zeros(9, 3)
    with pytest.raises(InputError, match="at least 3"):
        kid(few, many)
    with pytest.raises(InputError, match="at least 5"):
        kid_of_subsets(few, many, size=5)
    with pytest.raises(InputError, match="one width"):
        kid(many, torch.zeros(9, 4))
    with pytest.raises(InputError, match="at least one subset"):
        kid_of_subsets(many, many, subsets=0)
    with pytest.raises(InputError, match="KID of two extractors"):
        kid_of(bank(many, "a"), bank(many, "b"))


# IS.


def test_inception_score_by_its_formula() -> None:
    logits = torch.from_numpy(np.random.default_rng(0).normal(0, 2, size=(23, 5)))
    p = logits.softmax(dim=1).numpy()
    scores = []
    for part in range(4):
        own = p[part::4]
        scores.append(math.exp(np.mean((own * (np.log(own) - np.log(own.mean(axis=0)))).sum(axis=1))))
    mean, deviation = inception_score(logits, 4)
    assert mean == pytest.approx(np.mean(scores)) and deviation == pytest.approx(np.std(scores))
    streamed = InceptionScore(4)
    for part in logits.split(5):
        streamed.add(part)
    assert streamed.score() == pytest.approx((mean, deviation))
    # Merged halves that begin at a whole round of parts have the same parts.
    left, right = InceptionScore(4), InceptionScore(4)
    left.add(logits[:12])
    right.add(logits[12:])
    left.merge(right)
    assert left.score() == pytest.approx((mean, deviation)) and left.n == 23


def test_inception_score_equals_torchmetrics() -> None:
    net = Pixels(4)
    pictures = images(24, 0, 256, 0)
    reference: Any = TorchmetricsIS(feature=net, splits=1)
    reference.update(pictures)
    assert inception_score(net(pictures), 1)[0] == pytest.approx(float(reference.compute()[0]), rel=1e-4)


def test_inception_score_of_sure_answers_and_bad_input() -> None:
    sure = torch.eye(3).repeat(4, 1) * 1e4  # probabilities of exactly 0 and 1
    assert inception_score(sure, 1) == pytest.approx((3.0, 0.0))
    assert inception_score(sure[:1].repeat(9, 1), 3) == pytest.approx((1.0, 0.0))
    with pytest.raises(InputError, match="too few for 10 parts"):
        inception_score(sure[:9])
    with pytest.raises(InputError, match="at least one part"):
        InceptionScore(0)
    found = InceptionScore(1)
    found.add(sure)
    with pytest.raises(InputError, match="4 classes, before there were 3"):
        found.add(torch.zeros(1, 4))
    other = InceptionScore(2)
    other.add(sure)
    with pytest.raises(InputError, match="numbers of parts"):
        found.merge(other)
