"""Pictures of every odd kind as source and as pose of ``controlroom retarget``: a result, or one line that says why."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from controlroom.app.cli import main
from controlroom.core.images import load_image
from controlroom.core.pose import Pose
from controlroom.data.theatre.pairs import sample_pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.truth import keypoints
from controlroom.signals.pose.openpose_json import write_openpose

SCENE = sample_pair(3, "held_out").source
GOOD = (
    "sixteen_bit.png",
    "cmyk.jpg",
    "palette.png",
    "alpha.png",
    "rotated.jpg",
    "wide.png",
    "one_pixel.png",
    "grey.png",
)
BAD = {
    "truncated.png": "broken|truncated|cut",
    "truncated.jpg": "broken|truncated|cut",
    "empty.png": "0 bytes",
    "text.png": "not a picture",
    "huge.png": "too large|too many pixels",
    "no_pixels.png": "broken|empty|not a picture",
    "folder.png": "is a folder",
    "missing.png": "does not exist",
    "nul\0.png": "cannot be opened|null",
}


def write_pictures(folder: Path) -> None:
    picture = render(SCENE)

    def encoded(kind: str) -> bytes:
        buffer = io.BytesIO()
        picture.save(buffer, kind)
        return buffer.getvalue()

    grey = np.asarray(picture.convert("L"), np.uint16) * 257
    Image.fromarray(grey).save(folder / "sixteen_bit.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg", quality=95)
    picture.convert("P").save(folder / "palette.png", transparency=0)
    alpha = picture.convert("RGBA")
    alpha.putalpha(128)
    alpha.save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.transpose(Image.Transpose.ROTATE_90).save(folder / "rotated.jpg", exif=exif, quality=95)
    picture.resize((20_000, 128)).save(folder / "wide.png")
    picture.resize((1, 1)).save(folder / "one_pixel.png")
    picture.convert("L").save(folder / "grey.png")
    (folder / "truncated.png").write_bytes(encoded("PNG")[:900])
    (folder / "truncated.jpg").write_bytes(encoded("JPEG")[:900])
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is not a picture")
    (folder / "folder.png").mkdir()
    Image.new("1", (30_000, 30_000)).save(folder / "huge.png")
    header = bytearray(encoded("PNG"))
    header[16:24] = bytes(8)  # no width, no height
    (folder / "no_pixels.png").write_bytes(bytes(header))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    found = keypoints(SCENE)
    write_openpose(folder / "pose.json", Pose(found[:, :2], (found[:, 2] > 0).astype(float), 128, 128))
    render(SCENE).save(folder / "anna.png")
    return folder


@pytest.mark.parametrize("name", GOOD)
def test_odd_pictures_work_as_source_and_as_pose(
    theatre: Path, pictures: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    common = ["--steps", "1", "--seed", "1", "--json"]
    odd = str(pictures / name)
    assert main(["retarget", odd, "--pose", str(pictures / "pose.json"), "-o", "source.png", *common]) == 0
    assert json.loads(capsys.readouterr().out)["size"] == [32, 32]
    assert main(["replay", "source.png", "--verify"]) == 0
    code = main(["retarget", str(pictures / "anna.png"), "--pose", odd, "-o", "pose.png", *common])
    printed = capsys.readouterr()
    assert code == 0 or (code == 2 and len(printed.err.strip().splitlines()) == 1), printed.err


def test_a_rotated_photo_is_turned_upright(pictures: Path) -> None:
    upright = np.asarray(load_image(pictures / "rotated.jpg"), np.int16)
    assert np.abs(upright - np.asarray(render(SCENE), np.int16)).mean() < 4


@pytest.mark.parametrize("role", ["source", "pose"])
@pytest.mark.parametrize("name", BAD)
def test_bad_pictures_are_one_line(
    theatre: Path, pictures: Path, capsys: pytest.CaptureFixture[str], name: str, role: str
) -> None:
    import re

    bad, pose, source = str(pictures / name), str(pictures / "pose.json"), str(pictures / "anna.png")
    given = (bad, pose) if role == "source" else (source, bad)
    Path("out.png").write_bytes(b"the old file")
    assert main(["retarget", given[0], "--pose", given[1], "-o", "out.png", "--steps", "1"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and re.search(BAD[name], lines[0]), lines
    assert Path("out.png").read_bytes() == b"the old file"
    assert [path.name for path in Path().iterdir()] == ["out.png"]
