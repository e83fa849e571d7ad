"""Accumulators: any cut into batches and halves gives what the whole gives, in full precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from controlroom.core.errors import InputError
from controlroom.evaluation.estimates import share
from controlroom.evaluation.extractor import content_hash, label_of, require_same
from controlroom.evaluation.metrics.accumulators import Averaged, Counted, FeatureBank, Moments
from controlroom.evaluation.metrics.agreement import ALL, Agreement, agreement
from controlroom.evaluation.metrics.inception_score import InceptionScore

CUTS = [(50,), (1, 49), (7, 3, 40), (0, 25, 25)]


def halves(kind: type, parts: list[torch.Tensor]) -> object:
    """The first part in one accumulator, the others in a second that is merged into it."""
    left, right = kind(), kind()
    left.add(parts[0])
    for part in parts[1:]:
        right.add(part)
    left.merge(right)
    left.merge(kind())
    return left


@pytest.mark.parametrize("cut", CUTS)
def test_mean_and_variance_far_from_zero(cut: tuple[int, ...]) -> None:
    """A mean of 1e8 with a deviation of 1: sums of squares would have no digit left."""
    values = torch.from_numpy(np.random.default_rng(0).normal(1e8, 1.0, 50))
    found = halves(Averaged, list(values.split(list(cut))))
    assert isinstance(found, Averaged)
    assert found.n == 50
    assert found.mean == pytest.approx(float(values.mean()), abs=1e-6)
    assert found.variance == pytest.approx(float(values.numpy().var(ddof=1)), rel=1e-6)
    estimate = found.estimate()
    assert estimate.high - estimate.mean == pytest.approx(1.959964 * math.sqrt(found.variance / 50))


@pytest.mark.parametrize("cut", CUTS)
def test_covariance(cut: tuple[int, ...]) -> None:
    mix = np.random.default_rng(1).normal(size=(4, 4))
    data = np.random.default_rng(0).normal(size=(50, 4)) @ mix + 1e6
    found = halves(Moments, list(torch.from_numpy(data).split(list(cut))))
    assert isinstance(found, Moments)
    np.testing.assert_allclose(found.mean, data.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(data.T), rtol=1e-6, atol=1e-6)
    bank = halves(FeatureBank, list(torch.from_numpy(data).split(list(cut))))
    assert isinstance(bank, FeatureBank)
    np.testing.assert_array_equal(bank.features(), data)


def test_merging_does_not_tie_two_together() -> None:
    left, right = Moments(), Moments()
    right.add(torch.eye(3))
    left.merge(right)
    before = left.mean.clone(), left.covariance()
    right.add(torch.ones(5, 3))
    assert torch.equal(left.mean, before[0]) and torch.equal(left.covariance(), before[1])
    first, second = InceptionScore(1), InceptionScore(1)
    second.add(torch.eye(3) * 50)
    first.merge(second)
    second.add(torch.zeros(30, 3))
    assert first.score()[0] == pytest.approx(3.0)


def test_few_values() -> None:
    assert math.isnan(Averaged().estimate().mean) and math.isnan(Counted().estimate().mean)
    one = Averaged()
    one.add([2.0])
    assert one.estimate().mean == 2.0 and math.isnan(one.estimate().low)
    alone = Moments()
    alone.add(torch.zeros(1, 2))
    with pytest.raises(InputError, match="at least two"):
        alone.covariance()
    with pytest.raises(InputError, match="No features"):
        FeatureBank().features()
    right = [True] * 9 + [False]
    counted = Counted()
    counted.add(right)
    assert counted.estimate() == share(right)


@pytest.mark.parametrize("kind", [Moments, FeatureBank])
def test_wrong_features(kind: type) -> None:
    found = kind()
    for wrong in (torch.zeros(3), torch.full((1, 2), math.inf)):
        with pytest.raises(InputError, match=r"\[B, D\]"):
            found.add(wrong)
    found.add(torch.zeros(2, 3))
    with pytest.raises(InputError, match="4 numbers, those before had 3"):
        found.add(torch.zeros(2, 4))
    with pytest.raises(InputError, match="not finite"):
        Averaged().add([math.nan])


@pytest.mark.parametrize("kind", [Averaged, Counted, Moments, FeatureBank, Agreement])
def test_two_extractors_are_never_mixed(kind: type) -> None:
    left, right = kind("inception@0000"), kind("theatre-attributes@1111")
    with pytest.raises(InputError, match="inception@0000 and theatre-attributes@1111"):
        left.merge(right)
    left.merge(kind("inception@0000"))
    with pytest.raises(InputError, match="no extractor and inception@0000"):
        kind().merge(left)
    with pytest.raises(InputError, match="inception"):
        InceptionScore(1, "a").merge(InceptionScore(1, "inception"))


def test_agreement() -> None:
    read = {"top": "shirt", "hat": "cap", "skin": "tan"}
    assert agreement(read, {"top": "shirt", "hat": None, "skin": "pale"}) == {"top": True, "skin": False}
    assert agreement(read, {"top": "shirt", "skin": "pale"}, ["top", "pose"]) == {"top": True}
    assert agreement({}, {"top": "shirt"}) == {"top": False}
    answers = [{"top": True, "hat": True}, {"top": False}, {}, {"hat": True}]
    whole, left, right = Agreement(), Agreement(), Agreement()
    whole.add(answers)
    left.add(answers[:1])
    right.add(answers[1:])
    left.merge(right)
    assert left.estimates() == whole.estimates()
    shares = {question: (estimate.mean, estimate.n) for question, estimate in whole.estimates().items()}
    assert shares == {"top": (0.5, 2), "hat": (1.0, 2), ALL: (2 / 3, 3)}


def test_hash_is_of_weights_and_preparation() -> None:
    torch.manual_seed(0)
    net, same, other = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    same.load_state_dict(net.state_dict())
    assert content_hash(net) == content_hash(same) != content_hash(other)
    assert content_hash(net, {"size": 1}) == content_hash(same, {"size": 1}) != content_hash(net, {"size": 2})

    class Named:
        name, hash = "mine", "ab"

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1)

    assert label_of(Named()) == "mine@ab"
    require_same("", "", "SSIM")
