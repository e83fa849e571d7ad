"""Cosine similarity, CLIP score and LPIPS' formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.clip_score import clip_score
from controlroom.evaluation.metrics.lpips import lpips
from controlroom.evaluation.metrics.similarity import similarity


def test_similarity_is_the_cosine() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 5, 7))
    expected = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, y, strict=True)]
    found = similarity(torch.from_numpy(x), torch.from_numpy(y) * 1e-6)
    assert found.tolist() == pytest.approx(expected)
    assert similarity(torch.from_numpy(x), torch.from_numpy(x)).tolist() == pytest.approx([1.0] * 5)
    assert clip_score(torch.from_numpy(x), torch.from_numpy(y)).tolist() == pytest.approx(
        [100 * max(value, 0) for value in expected]
    )
    assert min(expected) < 0  # cut off in the score


@pytest.mark.parametrize("metric", [similarity, clip_score])
def test_wrong_features(metric: object) -> None:
    assert callable(metric)
    with pytest.raises(InputError, match="expected"):
        metric(torch.ones(2, 3), torch.ones(2, 4))
    with pytest.raises(InputError, match="length zero"):
        metric(torch.ones(1, 3), torch.zeros(1, 3))
    with pytest.raises(InputError, match="finite"):
        metric(torch.ones(1, 3), torch.full((1, 3), math.nan))


def test_lpips_formula() -> None:
    rng = np.random.default_rng(0)
    stages = [(4, 3, 2), (2, 5, 5)]
    first, second = ([rng.normal(size=(2, *shape)) for shape in stages] for _ in range(2))
    weights = [rng.random(shape[0]) for shape in stages]
    for row in range(2):
        total = 0.0
        for x, y, weight in zip(first, second, weights, strict=True):
            _, height, width = x[row].shape
            for i in range(height):
                for j in range(width):
                    a, b = x[row, :, i, j], y[row, :, i, j]
                    difference = a / np.linalg.norm(a) - b / np.linalg.norm(b)
                    total += float((weight * difference**2).sum()) / (height * width)
        maps = [[torch.from_numpy(m).float() for m in listed] for listed in (first, second)]
        found = lpips(*maps, [torch.from_numpy(w).float() for w in weights])
        assert float(found[row]) == pytest.approx(total, rel=1e-5)
    with pytest.raises(InputError, match="LPIPS got maps"):
        lpips(maps[0], maps[1][:1], [torch.ones(4)])
    with pytest.raises(InputError, match="LPIPS got maps"):
        lpips(maps[0], maps[1], [torch.ones(3), torch.ones(2)])
    with pytest.raises(InputError, match="LPIPS got maps"):
        lpips([], [], [])
