"""The package's assets as miniatures, for every test of a task."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlroom.backbones import loading
from controlroom.sampling.pipeline import Pipeline
from tests.tasks.theatre import write_theatre


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
