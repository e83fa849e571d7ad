"""Miniature models of `tests.tiny` saved to folders, once for a test session."""

from __future__ import annotations

import tempfile
from functools import lru_cache
from pathlib import Path

from tests.tiny import BACKBONES


@lru_cache(maxsize=4)
def tiny_folder(kind: str = "sd1") -> Path:
    """A folder in diffusers' layout with the miniature of ``kind``. Tests that change it work on a copy."""
    folder = Path(tempfile.mkdtemp(prefix=f"tiny-{kind}-"))
    BACKBONES[kind]().save_pretrained(str(folder))
    return folder
