"""Maps are recognised, as PNG and as JPEG; photographs, drawings and maps of other kinds are not."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image

from controlroom.data.theatre.conditions import PART_COLOURS, condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Mix, sample_scene
from controlroom.data.theatre.vocabulary import STYLES
from controlroom.signals.canny import Canny
from controlroom.signals.lines import Lines
from controlroom.signals.recognise import (
    recognise_depth,
    recognise_normals,
    recognise_segmentation,
    recognise_soft_edges,
    recognise_strokes,
)
from controlroom.signals.scribble import Scribble
from controlroom.signals.soft_edge import SoftEdge

SCENES = [sample_scene(seed, "held_out") for seed in range(3)]
RECOGNISE: dict[str, Callable[[Image.Image], Any]] = {
    "canny": recognise_strokes,
    "lines": recognise_strokes,
    "scribble": lambda image: recognise_strokes(image, thickest=6),
    "soft_edge": recognise_soft_edges,
    "depth": recognise_depth,
    "normal": recognise_normals,
    "segmentation": lambda image: recognise_segmentation(image, PART_COLOURS),
}
PHOTOS = [
    Image.fromarray(getattr(skimage.data, name)()).convert("RGB").reduce(2)
    for name in ("astronaut", "camera", "chelsea", "coffee", "moon", "page", "rocket", "text")
]


def compressed(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92, subsampling=0)
    return Image.open(buffer).convert("RGB")


@pytest.mark.parametrize("kind", RECOGNISE)
@pytest.mark.parametrize("size", [128, 512])
def test_true_maps_are_recognised_with_their_values(kind: str, size: int) -> None:
    for scene in SCENES:
        given = condition(scene, kind, size)
        if not given.values.any():
            continue
        found = RECOGNISE[kind](given.picture)
        assert found is not None
        assert np.abs(found - given.values).max() < 0.02 * (1 if kind != "normal" else 2)
        again = RECOGNISE[kind](compressed(given.picture))
        assert again is not None, "saved as JPEG"
        assert np.median(np.abs(again - given.values)) < 0.02


@pytest.mark.parametrize("kind", RECOGNISE)
def test_pictures_are_no_maps(kind: str) -> None:
    for number, photo in enumerate(PHOTOS):
        grey = photo.convert("L").convert("RGB")
        for picture in (photo.resize((128, 128)), grey, compressed(grey)):
            assert RECOGNISE[kind](picture) is None, number
    for style in STYLES:
        mix = Mix(styles={style: 1.0})
        for seed in range(3):
            assert RECOGNISE[kind](render(sample_scene(seed, "held_out", mix))) is None, (style, seed)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for picture in (Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), (255, 255, 255)), Image.fromarray(noise)):
        assert RECOGNISE[kind](picture) is None


def test_maps_of_another_kind_are_not_taken() -> None:
    alike = {("canny", "lines"), ("canny", "scribble"), ("lines", "scribble")}
    for scene in SCENES[:2]:
        for given in RECOGNISE:
            picture = condition(scene, given, 256).picture
            for kind, recognise in RECOGNISE.items():
                if kind != given and tuple(sorted((kind, given))) not in alike:
                    assert recognise(picture) is None, (given, kind)


def test_a_mask_is_no_edge_map() -> None:
    mask = Image.new("RGB", (128, 128))
    mask.paste((255, 255, 255), (40, 40, 80, 90))
    assert recognise_strokes(mask) is None and recognise_strokes(mask, thickest=6) is None


@pytest.mark.parametrize("signal", [Canny(), SoftEdge(), Lines(), Scribble()], ids=lambda signal: signal.kind)
def test_signals_pass_their_maps_on_and_can_be_told_not_to(signal: Any) -> None:
    given = condition(SCENES[0], signal.kind, 256)
    found = signal(given.picture)
    assert found.recognised and np.abs(found.values - given.values).max() < 0.01
    assert np.abs(np.asarray(found.picture, int) - np.asarray(given.picture, int)).max() <= 1
    other = type(signal)(recognise=False)(given.picture)
    assert not other.recognised and not np.array_equal(other.values, given.values)


def test_black_strokes_on_white_and_doodles_become_white_on_black() -> None:
    given = condition(SCENES[0], "scribble", 256)
    turned = Image.fromarray(255 - np.asarray(given.picture))
    assert np.array_equal(Scribble()(turned).values, given.values)
    sheet = np.asarray(turned, np.float32) * np.linspace(0.85, 0.97, 256, dtype=np.float32)[:, None]
    doodle = Image.fromarray(sheet[..., :1].repeat(3, -1).clip(40, 255).astype(np.uint8))
    found = Scribble()(doodle)
    assert found.recognised and (found.values != given.values).mean() < 0.02
