"""The latent cache builds once, continues where it was cut, and never serves latents of another encoder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from controlroom.core.errors import InputError
from controlroom.training.latent_cache import LatentCache, cache_key

SHAPE = (2, 3, 3)


def encode(slots: Sequence[int]) -> Tensor:
    return torch.stack([torch.full(SHAPE, slot / 8) for slot in slots])


def test_build_and_read(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "a" * 64, 10, SHAPE)
    with pytest.raises(InputError, match="0 of 10"):
        cache.read([0])
    calls: list[tuple[int, int]] = []
    cache.build(encode, chunk=4, report=lambda done, count: calls.append((done, count)))
    assert calls == [(4, 10), (8, 10), (10, 10)] and cache.complete
    latents = LatentCache(tmp_path, "a" * 64, 10, SHAPE).read([9, 0, 9])
    assert latents.dtype == torch.float32 and torch.equal(latents, encode([9, 0, 9]))


def test_an_interrupted_build_continues(tmp_path: Path) -> None:
    asked: list[int] = []

    def failing(slots: Sequence[int]) -> Tensor:
        if 8 in slots:
            raise KeyboardInterrupt
        return encode(slots)

    def counting(slots: Sequence[int]) -> Tensor:
        asked.extend(slots)
        return encode(slots)

    cache = LatentCache(tmp_path, "a", 12, SHAPE)
    with pytest.raises(KeyboardInterrupt):
        cache.build(failing, chunk=4)
    with (cache.folder / "latents.f16").open("ab") as file:
        file.write(b"half a row")  # what a kill in the middle of a write leaves
    assert cache.done == 8
    cache.build(counting, chunk=4)
    assert asked == [8, 9, 10, 11] and torch.equal(cache.read(range(12)), encode(range(12)))
    longer = LatentCache(tmp_path, "a", 14, SHAPE).build(counting)
    assert asked[4:] == [12, 13] and torch.equal(longer.read([13]), encode([13]))


def test_lost_rows_are_made_again(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "a", 6, SHAPE).build(encode)
    data = cache.folder / "latents.f16"
    data.write_bytes(data.read_bytes()[:-50])
    assert LatentCache(tmp_path, "a", 6, SHAPE).done == 4
    assert torch.equal(LatentCache(tmp_path, "a", 6, SHAPE).build(encode).read([5]), encode([5]))


def test_the_key_follows_weights_and_versions(tmp_path: Path) -> None:
    net = nn.Linear(2, 2)
    key = cache_key({"vae": net}, "world 1")
    assert key == cache_key({"vae": net}, "world 1") and key != cache_key({"vae": net}, "world 2")
    with torch.no_grad():
        net.bias[0] += 1e-6
    assert key != cache_key({"vae": net}, "world 1")


def test_bad_latents_are_refused(tmp_path: Path) -> None:
    cache = LatentCache(tmp_path, "a", 4, SHAPE)
    with pytest.raises(InputError, match="expected"):
        cache.build(lambda slots: torch.zeros(len(slots), 1))
    with pytest.raises(InputError, match="float16"):
        cache.build(lambda slots: encode(slots) + 1e6)
    assert cache.done == 0
    cache.build(encode)
    with pytest.raises(InputError, match="holds latents"):
        LatentCache(tmp_path, "a", 4, (1, 3, 3)).build(encode)
