"""``controlroom enhance``: a picture for each strength, enlarged; one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from controlroom.app.cli import main
from tests.sampling.test_inversion import picture
from tests.saved import tiny_folder


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    picture().resize((48, 24)).save("anna.png")
    return tmp_path


def enhance(*arguments: str) -> int:
    line = ["enhance", "anna.png", "--to", "a blue cat", "--fit", "fit", "--model", str(tiny_folder()), "--steps", "3"]
    return main([*line, "--seed", "3", "--embedding-steps", "2", "--unet-steps", "1", *arguments])


def test_a_picture_for_each_strength_enlarged(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert enhance("-o", "blue.png", "--strengths", "0.2, 1.1", "--json") == 0
    data = json.loads(capsys.readouterr().out)
    assert data["files"] == ["blue_0.png", "blue_1.png"] and data["strengths"] == [0.2, 1.1]
    # In the proportions of the picture, with the area of the model; twice as large along each side.
    width, height = data["small_size"]
    assert width > height and data["size"] == [2 * width, 2 * height]
    drawn = [Image.open(name) for name in data["files"]]
    assert all(list(one.size) == data["size"] for one in drawn) and drawn[0].tobytes() != drawn[1].tobytes()
    # The fit is used again.
    written = {file: file.read_bytes() for file in Path("fit").rglob("*.safetensors")}
    assert written and enhance("-o", "one.png", "--strengths", "1") == 0
    assert {file: file.read_bytes() for file in written} == written
    printed = capsys.readouterr()
    assert printed.out.split() == ["one.png"] and "resume: imagic_unet at step 1/1" in printed.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("-o", "blue.jpg"), "does not end with .png"),
        (("-o", "anna.png", "--strengths", "1"), "is the picture itself"),
        (("-o", "blue.png", "--strengths", "1,x"), "are not numbers"),
        (("-o", "blue.png", "--factor", "0"), "factor"),
        (("-o", "blue.png", "--embedding-steps", "0"), "embedding_steps"),
        (("-o", "blue.png", "--upscale-strength", "2"), "upscale_strength"),
        (("-o", "blue.png", "--upscale-strength", "0.3"), "leaves none of 3 steps"),
    ],
)
def test_mistakes_are_one_line(
    here: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    tiny_folder()
    capsys.readouterr()
    assert enhance(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and len(printed.err.strip().splitlines()) == 1 and said in printed.err
    assert [file.name for file in here.iterdir()] == ["anna.png"]
