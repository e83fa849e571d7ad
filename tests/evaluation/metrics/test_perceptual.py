"""The perceptual distance: its formula written out, and what any distance promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from controlroom.core.errors import InputError
from controlroom.evaluation.metrics.perceptual import extractor_hash, perceptual_distance
from controlroom.signals.readers import AttributeReader


def reader(seed: int = 0) -> AttributeReader:
    torch.manual_seed(seed)
    return AttributeReader({"colour": ("red", "green")}, size=32, width=8).eval()


def pictures(seed: int) -> torch.Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_formula() -> None:
    net, x, y = reader(), pictures(0), pictures(1)
    with torch.no_grad():
        stages = [[f.double().numpy() for f in net.features(p)] for p in (x, y)]
    for row in range(3):
        each = []
        for a, b in zip(*stages, strict=True):
            total, (_, _, height, width) = 0.0, a.shape
            for i in range(height):
                for j in range(width):
                    u, v = a[row, :, i, j], b[row, :, i, j]
                    total += float(((u / np.linalg.norm(u) - v / np.linalg.norm(v)) ** 2).sum())
            each.append(total / (height * width))
        assert len(each) == 4
        assert float(perceptual_distance(x, y, net.features)[row]) == pytest.approx(np.mean(each), abs=1e-6)


def test_distance() -> None:
    net, x, y = reader(), pictures(0), pictures(1)
    found = perceptual_distance(x, y, net.features)
    assert torch.equal(perceptual_distance(x, x, net.features), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(found, perceptual_distance(y, x, net.features))
    near = perceptual_distance(x, x + 0.1 * (y - x), net.features)
    assert (near > 0).all() and (near < found).all() and (found < 4).all()


def test_wrong_input() -> None:
    with pytest.raises(InputError, match="shapes"):
        perceptual_distance(pictures(0), pictures(0)[:1], reader().features)
    with pytest.raises(InputError, match="no feature maps"):
        perceptual_distance(pictures(0), pictures(0), lambda x: [x.flatten(1)])


def test_hash_depends_on_the_weights_alone() -> None:
    assert extractor_hash(reader(0)) == extractor_hash(reader(0))
    assert extractor_hash(reader(0)) != extractor_hash(reader(1))
