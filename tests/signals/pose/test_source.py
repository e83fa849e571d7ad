"""Whatever a person points at is recognised for what it is."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from skimage import data

from controlroom.controls.condition_map import is_pose
from controlroom.core.errors import InputError
from controlroom.core.pose import Pose
from controlroom.signals.pose.openpose_json import openpose_json, read_openpose, write_openpose
from controlroom.signals.pose.skeleton import draw_skeleton
from controlroom.signals.pose.source import PoseReader, read_pose
from tests.signals.pose.figures import draw_stick_figure, random_pose, without

POSE = read_pose(openpose_json(random_pose(np.random.default_rng(11)))).pose


class Recorder:
    """A reader that finds ``pose`` in any picture and remembers the pictures."""

    def __init__(self, pose: Pose = POSE) -> None:
        self.pose, self.seen = pose, []

    def read(self, image: Image.Image) -> Pose:
        self.seen.append(image)
        return self.pose


def test_json_in_every_form(tmp_path: Path) -> None:
    write_openpose(tmp_path / "pose.json", POSE)
    (tmp_path / "pose.txt").write_text(openpose_json(POSE))  # by content, not by name
    text = openpose_json(POSE)
    forms = [
        tmp_path / "pose.json",
        str(tmp_path / "pose.txt"),
        text,
        text.encode(),
        json.loads(text),
        [json.loads(text)],
    ]
    reader = Recorder()
    for form in forms:
        reading = read_pose(form, reader)
        assert (reading.pose, reading.kind, reading.reader, reading.image) == (POSE, "json", "json", None)
    assert not reader.seen


def test_names_may_begin_as_json_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("[anna].json", "{anna}.txt", "[anna]"):
        write_openpose(name, POSE)
        assert read_pose(name).pose == read_openpose(name) == POSE and is_pose(name)
    draw_skeleton(POSE).save("[drawn].png")
    assert read_pose("[drawn].png").kind == "skeleton" and not is_pose("[drawn].png")
    assert is_pose(openpose_json(POSE)) and read_pose("\ufeff" + openpose_json(POSE)).pose == POSE
    with pytest.raises(InputError, match="The pose document is not JSON"):
        read_pose("[missing].json")


def test_a_pose_is_itself() -> None:
    reading = read_pose(POSE)
    assert reading.pose is POSE and reading.kind == "pose"


def test_a_skeleton_is_not_read_again(tmp_path: Path) -> None:
    draw_skeleton(POSE).save(tmp_path / "skeleton.png")
    reader = Recorder()
    reading = read_pose(tmp_path / "skeleton.png", reader)
    assert reading.kind == reading.reader == "skeleton" and not reader.seen
    assert np.abs(reading.pose.keypoints - POSE.keypoints).max() < 3


def test_pictures_go_to_the_reader_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(data.coffee()).save(tmp_path / "photo.jpg", exif=exif)
    reader = Recorder()
    assert isinstance(reader, PoseReader)
    reading = read_pose(tmp_path / "photo.jpg", reader)
    assert reading.kind == "photo" and reading.reader == "Recorder"
    assert reader.seen[0].size == (400, 600) and reader.seen[0].mode == "RGB"
    assert (reading.pose.width, reading.pose.height) == (400, 600)  # brought to the picture's size
    assert reading.image is reader.seen[0]


def test_a_photograph_without_a_reader(tmp_path: Path) -> None:
    Image.fromarray(data.chelsea()).save(tmp_path / "cat.png")
    with pytest.raises(InputError, match=r"cat\.png.*photo.*reader"):
        read_pose(tmp_path / "cat.png")


def test_a_doodle_is_read_by_the_reader_or_without_weights() -> None:
    sheet = draw_stick_figure()
    reading = read_pose(sheet)
    assert (reading.kind, reading.reader) == ("doodle", "DoodleReader") and "left" in reading.notes[0]
    reader = Recorder()
    assert read_pose(sheet, reader).reader == "Recorder" and len(reader.seen) == 1


def test_a_pose_without_a_torso_is_refused() -> None:
    face = without(POSE, list(range(1, 14)))
    for source in (face, openpose_json(face)):
        with pytest.raises(InputError, match="torso"):
            read_pose(source)
        assert read_pose(source, torso=False).pose.visible.sum() == 5
    with pytest.raises(InputError, match="torso"):
        read_pose(data.coffee(), Recorder(face))


def test_notes_say_what_was_assumed() -> None:
    document = json.loads(openpose_json(POSE, POSE.translated(1, 0)))
    assert "2 people" in read_pose(document).notes[0]
    assert read_pose(document, person=1).notes == ()
    del document["canvas_width"], document["canvas_height"]
    assert "no canvas" in read_pose(document, person=1).notes[0]


def test_what_is_neither(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    (tmp_path / "c.json").write_bytes(b"")
    for source in (
        tmp_path / "a.json",
        tmp_path / "b.png",
        tmp_path / "c.json",
        tmp_path / "no.json",
        tmp_path / "no.png",
    ):
        with pytest.raises(InputError, match=Path(source).name):
            read_pose(source)
    buffer = io.BytesIO()
    Image.new("RGB", (5, 5)).save(buffer, "PNG")
    for source in (tmp_path, "", "a\0b", "[1", b"", b"[]", {}, [], None, 3, object(), buffer.getvalue()):
        with pytest.raises(InputError):
            read_pose(source)  # type: ignore[arg-type]
