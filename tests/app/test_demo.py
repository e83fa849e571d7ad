"""The demo: everything it promises, with a theatre of miniatures; and what it still does when a part is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from PIL import Image

from controlroom.app.cli import main as controlroom
from controlroom.app.demo import PROMPTS, main
from controlroom.backbones import loading
from controlroom.core.pose import pck
from controlroom.signals.pose.openpose_json import read_openpose
from tests.tasks.theatre import write_theatre

INPUTS = {"source.png", "pose_photo.png", "pose_doodle.png", "pose.json"}
WORDS = {f"words_{i}.png" for i in range(len(PROMPTS))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_theatre(tmp_path_factory.mktemp("assets") / "theatre")


@pytest.fixture
def theatre(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = tmp_path / "theatre"
    shutil.copytree(whole, copy)
    monkeypatch.setattr(loading, "theatre_folder", lambda: copy)
    return copy


def demo(tmp_path: Path) -> tuple[int, set[str]]:
    code = main(["--folder", str(tmp_path / "out"), "--steps", "2"])
    return code, {path.name for path in (tmp_path / "out").iterdir()}


def test_all_of_it(theatre: Path, tmp_path: Path) -> None:
    code, names = demo(tmp_path)
    results = {f"retarget_{kind}{end}" for kind in ("photo", "doodle", "json") for end in (".png", ".pose.json")}
    assert code == 0
    assert names == INPUTS | WORDS | results | {"demo.png", "words.png"}
    out = tmp_path / "out"
    with Image.open(out / "demo.png") as sheet:
        assert sheet.width > 4 * 256 and sheet.height > 3 * 256
    given, used = read_openpose(out / "pose.json"), read_openpose(out / "retarget_json.pose.json")
    assert pck(used.scaled(given.width, given.height), given, 0.01) == 1.0
    assert controlroom(["replay", str(out / "retarget_doodle.png"), "--verify"]) == 0
    assert controlroom(["replay", str(out / "words_2.png"), "--verify"]) == 0


@pytest.mark.parametrize(
    ("part", "drawn"),
    [
        ("appearance", WORDS | {"words.png"}),
        ("model_index.json", set()),
        ("readers", WORDS | {"words.png", "demo.png", "retarget_json.png", "retarget_json.pose.json"}),
    ],
)
def test_what_can_be_drawn_is_drawn(
    theatre: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str, drawn: set[str]
) -> None:
    target = theatre / part
    shutil.rmtree(target) if target.is_dir() else target.unlink()
    code, names = demo(tmp_path)
    assert code == 1
    optional = {"retarget_doodle.png", "retarget_doodle.pose.json"}  # its lines may do where the network is missing
    assert names - optional == INPUTS | drawn
    assert part in capsys.readouterr().err or part == "model_index.json"


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["--folder", str(tmp_path / "file" / "out")]) == 1
    assert capsys.readouterr().err.startswith("error: ")
