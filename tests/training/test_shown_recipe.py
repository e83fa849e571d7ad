"""Previews of what a training has learned so far: drawn with it, unnoticed by it, and no part of its account."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

import controlroom as cr
from controlroom.training.loop import train
from controlroom.training.recipes.dco import DCOSettings
from controlroom.training.recipes.dreambooth import DreamBoothSettings
from controlroom.training.recipes.lora import LoRASettings
from controlroom.training.recipes.textual_inversion import TextualInversionSettings
from tests.tiny import tiny_sd1
from tests.training.recipe_checks import loop, painted

KINDS: list[tuple[Any, dict[str, Any]]] = [
    (LoRASettings, {"rank": 2}),
    (DreamBoothSettings, {"prompt": "a sks cat"}),
    (DCOSettings, {"rank": 2, "word": "red", "prompt": "a {} cat"}),
    (TextualInversionSettings, {"word": "<anna>"}),
]


@pytest.mark.parametrize(("kind", "values"), KINDS)
def test_previews_show_what_was_learned(tmp_path: Path, kind: Any, values: dict[str, Any]) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    drawn: dict[str, Any] = {"previews": ("a {} cat" if kind in (DCOSettings, TextualInversionSettings) else "a cat",)}

    def run(name: str, every: int | None, **more: Any) -> Path:
        recipe = kind(**values, preview_steps=2, **more).build(pipe, painted(), tmp_path / name)
        settings = loop(tmp_path / name, learning_rate=0.05, preview_every=every)
        return train(recipe, settings).weights

    watched, alone = run("watched", 2, **drawn), run("alone", None)
    for path in sorted(p.relative_to(watched) for p in watched.rglob("*.safetensors")):
        first, second = load_file(watched / path), load_file(alone / path)
        assert all(np.array_equal(first[key], second[key]) for key in second), path
    pictures = [np.asarray(Image.open(p)) for p in sorted((tmp_path / "watched/previews").iterdir())]
    assert len(pictures) == 2 and pictures[0].shape == (32, 32, 3)
    assert not np.array_equal(pictures[0], pictures[1])  # two steps later the model draws something else
    # A change of the previews is no other training.
    assert kind(**values).fingerprint() == kind(**values, **drawn).fingerprint()
