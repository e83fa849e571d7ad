"""The dense reader: its shapes, its files, its signals, and what it says where it is not installed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.backbones import loading
from controlroom.core.errors import InputError, ModelError
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.signals.choose import choose_signal
from controlroom.signals.dense_reader import DenseReader, DenseSignal
from controlroom.signals.normal import Normal

SCENES = [sample_scene(seed, "held_out") for seed in range(2)]


@pytest.fixture(scope="module")
def reader() -> DenseReader:
    torch.manual_seed(0)
    return DenseReader([f"class {i}" for i in range(15)], width=8).eval()


def test_the_full_reader_is_small() -> None:
    assert sum(p.numel() for p in DenseReader(list(map(str, range(15)))).parameters()) < 1_500_000


def test_every_pixel_is_read_in_the_pictures_own_size(reader: DenseReader) -> None:
    for size in ((128, 128), (200, 97), (64, 64)):
        (one,) = reader.read([render(SCENES[0]).resize(size)])
        for values in (one.depth, one.labels, one.edges):
            assert values.shape == size[::-1] and values.dtype == np.float32
        assert 0 <= one.depth.min() and one.depth.max() <= 1 and set(np.unique(one.labels)) <= set(range(15))


def test_several_pictures_are_read_as_one_by_one(reader: DenseReader) -> None:
    pictures = [render(scene) for scene in SCENES]
    for together, alone in zip(reader.read(pictures), [reader.read([p])[0] for p in pictures], strict=True):
        assert np.abs(together.depth - alone.depth).max() < 1e-5
        assert np.array_equal(together.labels, alone.labels)
    mixed = reader.read([pictures[0], pictures[1].resize((150, 128))])
    assert [one.depth.shape for one in mixed] == [(128, 128), (128, 150)]
    with pytest.raises(InputError, match="times as long as wide"):
        reader.read([Image.new("RGB", (2000, 64))])


def test_a_place_answers_for_its_own_pixels(reader: DenseReader) -> None:
    """The heads' 2 x 2 answers lie where they are asked: a gradient of one pixel's depth is centred on it."""
    pixels = torch.zeros(1, 3, 128, 128, requires_grad=True)
    with torch.enable_grad():
        reader(pixels).depth[0, 40, 77].backward()
    assert pixels.grad is not None
    weight = pixels.grad[0].abs().sum(0)
    rows, columns = torch.meshgrid(torch.arange(128.0), torch.arange(128.0), indexing="ij")
    near = ((rows - 40).abs() < 12) & ((columns - 77).abs() < 12)
    assert weight[near].mean() > 3 * weight[~near].mean()


def test_it_is_saved_and_loaded(reader: DenseReader, tmp_path: Path) -> None:
    reader.save(tmp_path / "dense")
    again = DenseReader.load(tmp_path / "dense")
    assert again.classes == reader.classes
    picture = render(SCENES[0])
    assert np.abs(again.read([picture])[0].depth - reader.read([picture])[0].depth).max() < 5e-3  # half precision
    with pytest.raises(ModelError, match="not a reader"):
        DenseReader.load(tmp_path)


def test_its_signals(reader: DenseReader) -> None:
    picture = render(SCENES[0])
    for kind in ("depth", "segmentation", "soft_edge"):
        found = DenseSignal(kind, reader)(picture)
        assert found.kind == kind and not found.recognised
        given = condition(SCENES[0], kind, 256)
        passed = DenseSignal(kind, reader)(given.picture)
        assert passed.recognised and np.abs(passed.values - given.values).max() < 0.01
        assert not DenseSignal(kind, reader, recognise=False)(given.picture).recognised
    assert Normal(DenseSignal("depth", reader))(picture).values.shape == (128, 128, 3)
    with pytest.raises(InputError, match="got 'canny'"):
        DenseSignal("canny", reader)  # type: ignore[arg-type]


def test_where_it_is_not_installed_it_says_how_it_is_made(
    reader: DenseReader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "theatre_folder", lambda: tmp_path)
    for kind in ("depth", "normal", "segmentation"):
        with pytest.raises(ModelError, match="training.theatre dense_reader"):
            choose_signal(kind)
    with pytest.raises(ModelError, match="training.theatre dense_reader"):
        choose_signal("soft_edge", "theatre")
    reader.save(tmp_path / "readers/dense")
    assert choose_signal("normal")(render(SCENES[0])).kind == "normal"
