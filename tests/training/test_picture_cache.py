"""Encoded pictures and texts are made once, are right, and are made again when they are not whole."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from controlroom import Pipeline
from controlroom.core.errors import InputError, OutputError
from controlroom.data.image_folder import image_folder
from controlroom.training.buckets import Buckets
from controlroom.training.entry_store import EntryStore, key_of
from controlroom.training.picture_cache import PictureCache, Shown
from controlroom.training.text_cache import TextCache
from tests.data.folders import paint, paint_mask
from tests.tiny import BACKBONES, tiny_vae

BUCKETS = Buckets(32, 8)


class CountingVae:
    """The autoencoder, counting what it encodes."""

    def __init__(self, vae) -> None:
        self.vae, self.count = vae, 0

    def __getattr__(self, name: str):
        return getattr(self.vae, name)

    def encode(self, pixels: Tensor):
        self.count += len(pixels)
        return self.vae.encode(pixels)


@pytest.fixture
def shown(tmp_path: Path) -> list[Shown]:
    rng = np.random.default_rng(0)
    for name in "abc":
        noise = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8))
        (tmp_path / "set").mkdir(exist_ok=True)
        noise.save(tmp_path / "set" / f"{name}.png")
    paint_mask(tmp_path / "set" / "mask" / "b.png", (20, 20))
    paint(tmp_path / "set" / "wide.png", "red", (80, 20))
    return [(picture, BUCKETS.crop(picture)) for picture in image_folder(tmp_path / "set")]


def test_made_once_and_right(tmp_path: Path, shown: list[Shown]) -> None:
    backbone = Pipeline.from_diffusers(BACKBONES["sd1"]()).backbone
    vae = CountingVae(backbone.vae)
    cache = PictureCache(tmp_path / "cache", vae, torch.float32)
    told: list[tuple[int, int]] = []
    assert cache.fill(shown, lambda done, count: told.append((done, count))) == 4 and vae.count == 4
    assert told[-1] == (4, 4)
    assert PictureCache(tmp_path / "cache", vae, torch.float32).fill(shown) == 0
    found = cache.read(shown[:3])
    assert vae.count == 4
    pixels = torch.stack([torch.from_numpy(np.array(c.apply(p.read()))) for p, c in shown[:3]]).permute(0, 3, 1, 2)
    expected = backbone.encode_picture(pixels / 127.5 - 1)
    torch.testing.assert_close(found.latents(), expected, rtol=1e-5, atol=1e-5)
    drawn = backbone.encode_picture(pixels / 127.5 - 1, torch.Generator().manual_seed(1))
    noise = torch.randn(found.mean.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found.latents(noise), drawn, rtol=1e-4, atol=1e-4)
    assert (drawn - expected).abs().max() > 0.01
    assert found.mask.shape == (3, 1, 16, 16) and found.mask[0].min() == 1
    assert found.mask[1, 0, :, 2].min() == 1 and found.mask[1, 0, :, -3].max() == 0
    assert found.size == (32, 32) and found.time_ids[0].tolist() == [40, 40, 0, 0, 32, 32]
    wide = cache.read(shown[3:])
    assert wide.mean.shape == (1, 4, 8, 32) and wide.size == (16, 64)
    with pytest.raises(InputError, match="2 sizes"):
        cache.read(shown)


def test_half_precision_is_near_and_apart(tmp_path: Path, shown: list[Shown]) -> None:
    full = PictureCache(tmp_path, tiny_vae(), torch.float32)
    half = PictureCache(tmp_path, tiny_vae())
    assert full.fill(shown) == half.fill(shown) == 4
    a, b = full.read(shown[:2]), half.read(shown[:2])
    assert (
        not torch.equal(a.mean, b.mean) and torch.allclose(a.mean, b.mean, atol=1e-2) and b.std.dtype == torch.float32
    )


def test_the_key_follows_what_shapes_an_entry(tmp_path: Path, shown: list[Shown]) -> None:
    cache, (picture, crop) = PictureCache(tmp_path, tiny_vae()), shown[0]
    key = cache.key((picture, crop))
    assert key == PictureCache(tmp_path, tiny_vae()).key((replace(picture, name="x", caption="y", repeats=9), crop))
    assert key != cache.key((replace(picture, content="0"), crop))
    assert key != cache.key((picture, Buckets(16, 8).crop(picture)))
    assert key != PictureCache(tmp_path, tiny_vae(1)).key((picture, crop))
    other = tiny_vae()
    with torch.no_grad():
        other.decoder.conv_in.bias += 1.0
    assert key == PictureCache(tmp_path, other).key((picture, crop))  # the decoder draws, it does not encode


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "another"])
def test_a_broken_entry_is_made_again(tmp_path: Path, shown: list[Shown], how: str) -> None:
    vae = CountingVae(tiny_vae())
    cache = PictureCache(tmp_path, vae)
    cache.fill(shown)
    before, path = cache.read(shown[:1]), cache.store.path(cache.key(shown[0]))
    data = path.read_bytes()
    broken = {
        "cut": data[:-9],
        "flipped": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
        "empty": b"",
        "another": cache.store.path(cache.key(shown[2])).read_bytes(),
    }[how]
    path.write_bytes(broken)
    assert cache.store.read(cache.key(shown[0])) is None
    after = cache.read(shown[:1])
    assert vae.count == 5 and torch.equal(before.mean, after.mean) and torch.equal(before.std, after.std)
    assert path.read_bytes() == data and cache.fill(shown) == 0


def test_a_fill_that_was_cut_goes_on(tmp_path: Path, shown: list[Shown]) -> None:
    vae = CountingVae(tiny_vae())

    def stop(done: int, count: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    cache = PictureCache(tmp_path, vae)
    with pytest.raises(KeyboardInterrupt):
        cache.fill(shown, stop)
    assert cache.fill([*shown, *shown]) == 2 and vae.count == 4


def test_what_cannot_be_kept(tmp_path: Path, shown: list[Shown]) -> None:
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = float("inf")
    with pytest.raises(InputError, match=r"'a\.png' are not finite"):
        PictureCache(tmp_path / "cache", vae).fill(shown)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        PictureCache(tmp_path / "file", tiny_vae()).fill(shown)


def _hammer(folder: Path, turns: int, results) -> None:
    store = EntryStore(folder)
    keys, bad = [key_of(str(n)) for n in range(4)], 0
    for turn in range(turns):
        number = turn % 4
        store.write(keys[number], {"x": torch.full((2000,), float(number))})
        found = store.read(keys[number])
        bad += found is None or not bool((found["x"] == number).all())
    results.put(bad)


def test_two_processes_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    workers = [context.Process(target=_hammer, args=(tmp_path, 60, results)) for _ in range(2)]
    for worker in workers:
        worker.start()
    assert [results.get(timeout=60) for _ in workers] == [0, 0]
    for worker in workers:
        worker.join()
    assert not list(tmp_path.rglob("*.part*")) and len(list(tmp_path.rglob("*.safetensors"))) == 4


@pytest.mark.parametrize("name", BACKBONES)
def test_texts(tmp_path: Path, name: str) -> None:
    backbone = Pipeline.from_diffusers(BACKBONES[name]()).backbone
    cache, prompts = TextCache(tmp_path, backbone), ["a red cat", "", "a dog"]
    assert cache.fill([*prompts, ""]) == 3 and TextCache(tmp_path, backbone).fill(prompts) == 0
    with torch.no_grad():
        expected = backbone.encode_text(prompts)
    told = cache.read(prompts)
    torch.testing.assert_close(told.tokens, expected.tokens, rtol=1e-5, atol=1e-5)
    assert told.tokens.dtype == expected.tokens.dtype
    if expected.pooled is None:
        assert told.pooled is None and told.time_ids is None
    else:
        torch.testing.assert_close(told.pooled, expected.pooled, rtol=1e-5, atol=1e-5)
        assert torch.equal(told.time_ids, expected.time_ids)
        ids = torch.tensor([[40.0, 50, 0, 5, 32, 32]] * 3)
        assert torch.equal(cache.read(prompts, time_ids=ids).time_ids, ids)
        assert cache.read(prompts, (16, 8)).time_ids[1].tolist() == [16, 8, 0, 0, 16, 8]
    path = cache.store.path(cache.key("a dog"))
    path.write_bytes(path.read_bytes()[:-4])
    assert torch.equal(cache.read(["a dog"]).tokens, told.tokens[2:])
    assert TextCache(tmp_path, backbone, clip_skip=1).key("") != cache.key("")
    other = Pipeline.from_diffusers(BACKBONES[name](3)).backbone
    assert TextCache(tmp_path, other).key("a dog") != cache.key("a dog") != cache.key("a  cat")
    with pytest.raises(InputError, match="must be text"):
        cache.fill([3])  # type: ignore[list-item]
