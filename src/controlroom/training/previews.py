"""Pictures on the way, drawn so that the run does not notice."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image

from controlroom.core.errors import OutputError
from controlroom.core.png import save_png


@contextmanager
def isolated_randomness(seed: int) -> Iterator[None]:
    """Within the block the global generators of torch, numpy and Python start from `seed`; after it, as before."""
    python, arrays = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(arrays)


def write_previews(pictures: Sequence[tuple[str, Image]], folder: Path, step: int) -> list[Path]:
    """Write `folder/step-N-name.png` of each; what a file name cannot hold becomes a hyphen. Raises OutputError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder} cannot be made: {error}. Give another output_dir.") from error
    names = [re.sub(r"[^\w.-]+", "-", name)[:80] for name, _ in pictures]
    paths = [folder / f"step-{step:08d}-{name}.png" for name in names]
    for path, (_, picture) in zip(paths, pictures, strict=True):
        save_png(picture, path)
    return paths
