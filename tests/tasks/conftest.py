"""The package's assets as miniatures, for every test of a task."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from controlroom.backbones import loading
from controlroom.sampling.pipeline import Pipeline
from tests.tasks.theatre import write_theatre
from tests.tiny import tiny_sd1


@pytest.fixture(scope="session")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theatre(tmp_path_factory.mktemp("assets") / "theatre")


@pytest.fixture
def theatre(assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package's assets are miniatures, and the current folder is empty."""
    monkeypatch.setattr(loading, "theatre_folder", lambda: assets)
    monkeypatch.chdir(tmp_path)
    return assets


@pytest.fixture(scope="session")
def pipeline(assets: Path) -> Pipeline:
    return Pipeline.from_pretrained(str(assets))


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model's folder, to train on."""
    folder = tmp_path_factory.mktemp("model")
    tiny_sd1().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of two pictures with captions."""
    folder = tmp_path_factory.mktemp("photos")
    for colour in ("red", "blue"):
        Image.new("RGB", (40, 32), colour).save(folder / f"{colour}.png")
        (folder / f"{colour}.txt").write_text(f"a {colour} cat")
    return str(folder)
