"""What tests of recipes share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.training.theatre_parts import write_parts


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny networks of the theatre's shapes: ``unet``, ``vae``, ``clip``; and a place for latents."""
    return write_parts(tmp_path_factory.mktemp("parts"))
