"""A doodle is told from everything else."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from skimage import data

from controlroom.data.theatre.doodle import draw_doodle
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.signals.pose.paper import classify, eroded, ink_of, thickened


def doodles(count: int, size: int = 256) -> list[Image.Image]:
    scenes = [scene for seed in range(count * 4) if (scene := sample_scene(seed)).puppets][:count]
    return [draw_doodle(scene.puppets[0], seed, size).picture for seed, scene in enumerate(scenes)]


@pytest.mark.parametrize("size", [128, 256, 700])
def test_doodles(size: int) -> None:
    assert [classify(picture) for picture in doodles(12, size)] == ["doodle"] * 12


def test_a_photographed_sheet_is_a_doodle() -> None:
    """Uneven light, a yellow lamp, blur and noise of a phone."""
    rng = np.random.default_rng(0)
    for picture in doodles(6, 512):
        sheet = np.asarray(picture.filter(ImageFilter.GaussianBlur(1)), float)
        light = np.linspace(1.0, 0.6, 512)[None, :, None] * np.array([1.0, 0.95, 0.8])
        photo = np.clip(sheet * light + rng.normal(0, 4, sheet.shape), 0, 255).astype(np.uint8)
        assert classify(photo) == "doodle"


@pytest.mark.parametrize(
    "name",
    ["astronaut", "coffee", "chelsea", "rocket", "camera", "coins", "moon", "brick", "grass", "hubble_deep_field"],
)
def test_photographs(name: str) -> None:
    assert classify(getattr(data, name)()) == "photo"


def test_theatre_scenes_are_not_doodles() -> None:
    wrong = sum(classify(render(sample_scene(seed))) == "doodle" for seed in range(60))
    assert wrong <= 1


def test_blank_and_filled_sheets_are_not_doodles() -> None:
    assert classify(Image.new("RGB", (99, 99), "white")) == "photo"
    assert classify(Image.new("RGB", (99, 99), "black")) == "photo"
    filled = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(filled).ellipse((70, 70, 180, 180), fill="black")
    assert classify(filled) == "photo"
    assert classify(Image.new("RGB", (1, 1))) == "photo"
    assert classify(Image.new("RGB", (9000, 2), "white")) == "photo"


def test_ink() -> None:
    sheet = Image.new("RGB", (512, 256), (250, 248, 240))
    ImageDraw.Draw(sheet).line((100, 100, 400, 100), fill=(30, 30, 120), width=6)
    ink = ink_of(sheet)
    assert ink.shape == (128, 256)
    rows, columns = np.nonzero(ink)
    assert abs(rows.mean() - 49.5) < 1 and abs(columns.min() - 50) <= 1 and abs(columns.max() - 199) <= 1


def test_thickened_and_eroded_are_each_others_mirror() -> None:
    mask = np.random.default_rng(0).random((20, 30)) < 0.2
    framed = np.pad(mask, 3)
    np.testing.assert_array_equal(
        eroded(~framed, 2), ~thickened(np.pad(framed, 1, constant_values=True), 2)[1:-1, 1:-1]
    )
    square = np.zeros((9, 9), bool)
    square[2:7, 2:7] = True
    assert eroded(square, 1).sum() == 9 and eroded(square, 3).sum() == 0
