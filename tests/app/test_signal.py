"""``controlroom signal``: files, numbers, and one line for what cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlroom.app.cli import main
from controlroom.backbones import loading
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captioner import caption_of
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.signals.canny import canny
from tests.evaluation.suites.stage import Knows

SCENE = sample_scene(0, "held_out")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    render(SCENE).save(tmp_path / "picture.png")
    return tmp_path / "picture.png"


def test_a_map_is_written_with_its_numbers(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = picture.with_name("edges.png")
    assert main(["signal", "canny", str(picture), "-o", str(out), "--values", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    true = canny(np.asarray(Image.open(picture)))
    assert np.array_equal(np.asarray(Image.open(out))[..., 0] > 0, true)
    assert np.array_equal(np.load(out.with_suffix(".npy")) > 0, true)
    assert said["files"] == [str(out), str(out.with_suffix(".npy"))]
    assert said["recognised"] is False and said["values"] == {"shape": [128, 128], "min": 0.0, "max": 1.0}


def test_a_preview_shows_both_and_a_map_is_passed_on(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = picture.with_name("given.png"), picture.with_name("out.png")
    condition(SCENE, "scribble").picture.save(given)
    assert main(["signal", "scribble", str(given), "-o", str(out), "--preview"]) == 0
    assert "map already" in capsys.readouterr().err
    sheet = np.asarray(Image.open(out))
    assert sheet.shape == (128, 256, 3) and np.array_equal(sheet[:, :128], sheet[:, 128:])


def test_what_cannot_be_is_one_line(
    picture: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "theatre_folder", lambda: picture.parent)
    out = str(picture.with_name("out.png"))
    for arguments, message in (
        (["hed", str(picture), "-o", out], "no signal 'hed'"),
        (["depth", str(picture), "-o", out], "dense_reader"),
        (["depth", str(picture), "-o", out, "--model", "nowhere"], "nowhere"),
        (["canny", str(picture.with_name("no.png")), "-o", out], "no.png"),
        (["canny", str(picture), "-o", str(picture.with_name("out.jpg"))], "does not end with .png"),
    ):
        assert main(["signal", *arguments]) == 2
        found = capsys.readouterr().err.strip()
        assert message in found and found.count("\n") == 0
    assert not Path(out).exists()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> None:
    from controlroom.evaluation.extractors import theatre

    monkeypatch.setattr(theatre, "theatre_reader", lambda: Knows([SCENE]))


@pytest.mark.usefixtures("reader")
def test_a_caption_is_printed_and_written(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected, out = caption_of(attributes(SCENE)), picture.with_name("said.txt")
    assert expected and main(["signal", "caption", str(picture)]) == 0
    assert capsys.readouterr().out == f"{expected}\n"
    assert main(["signal", "caption", str(picture), "-o", str(out), "--model", "theatre", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"caption": expected, "files": [str(out)]}
    assert out.read_text() == f"{expected}\n"


@pytest.mark.usefixtures("reader")
def test_what_is_no_caption_is_one_line(picture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["caption", str(picture), "--preview"], "A caption is a sentence"),
        (["caption", str(picture), "-o", str(picture.with_name("said.png"))], "ends with .txt"),
        (["caption", str(picture), "--model", "nowhere"], "nowhere"),
        (["canny", str(picture)], "Where shall the map go"),
    ):
        assert main(["signal", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in picture.parent.iterdir()] == [picture.name]
