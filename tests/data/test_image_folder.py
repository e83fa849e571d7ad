"""A folder becomes pictures with captions and masks, or one error that names the file."""

from __future__ import annotations

import hashlib
import json
import pickle
import tempfile
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.image_folder import image_folder
from tests.data.folders import paint, paint_mask, write_lines


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def test_captions_beside_pictures(tmp_path: Path) -> None:
    b = paint(tmp_path / "b.JPG", "blue")
    paint(tmp_path / "a.png", "green", (5, 9))
    (tmp_path / "a.txt").write_bytes("\ufeff a  green\n thing \n".encode())
    (tmp_path / "c.caption").write_text("of c")
    paint(tmp_path / "c.webp", "red")
    paint(tmp_path / ".hidden.png")
    (tmp_path / "notes.md").write_text("no picture")
    pictures = image_folder(tmp_path)
    assert [(p.name, p.caption, p.size) for p in pictures] == [
        ("a.png", "a green thing", (5, 9)),
        ("b.JPG", "", (8, 6)),
        ("c.webp", "of c", (8, 6)),
    ]
    assert pictures[1].content == hashlib.sha256(b.read_bytes()).hexdigest()
    assert pictures[0].read().getpixel((0, 0)) == (0, 128, 0) and pictures[0].read_mask is None
    assert pickle.loads(pickle.dumps(pictures[0])).read().size == (5, 9)  # worker processes get them


def test_metadata_lists_the_set(tmp_path: Path) -> None:
    paint(tmp_path / "one.png", "red")
    paint(tmp_path / "cats" / "two.png", "blue")
    paint_mask(tmp_path / "masks" / "2.png")
    paint_mask(tmp_path / "mask" / "one.png", (4, 3))
    rows = [
        {"file_name": "cats/two.png", "text": "two", "mask": "masks/2.png", "seed": 4, "author": "me"},
        "",
        {"file_name": "one.png", "text": "one"},
    ]
    write_lines(tmp_path / "metadata.jsonl", rows)
    with pytest.warns(UserWarning, match="not read: author, seed"):
        two, one = image_folder(tmp_path)
    assert (two.name, two.caption, two.subject, one.subject) == ("cats/two.png", "two", "cats", "")
    for picture in (one, two):
        assert picture.read_mask is not None
        mask = np.asarray(picture.read_mask())
        assert mask.shape == (6, 8) and mask[:, 0].tolist() == [255] * 6 and mask[:, -1].tolist() == [0] * 6
    assert one.content != hashlib.sha256((tmp_path / "one.png").read_bytes()).hexdigest()  # the mask counts
    paint(tmp_path / "three.png", "green")
    with pytest.warns(UserWarning) as told:
        assert len(image_folder(tmp_path)) == 2
    assert any("does not list 1 of the pictures beside it (three.png)" in str(w.message) for w in told)


def test_csv_and_the_train_folder(tmp_path: Path) -> None:
    paint(tmp_path / "train" / "a.png", "red")
    paint(tmp_path / "test" / "b.png", "blue")
    (tmp_path / "train" / "metadata.csv").write_text('file_name,text\na.png,"a, red"\n')
    (only,) = image_folder(tmp_path)
    assert (only.name, only.caption) == ("a.png", "a, red")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,text\na.png," + "x" * 200_000)
    with pytest.raises(InputError, match="not a table"):
        image_folder(tmp_path)
    (tmp_path / "train" / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match="which one counts"):
        image_folder(tmp_path)


def test_subfolders_name_subjects(tmp_path: Path) -> None:
    for place in ("ann/1.png", "bob/1.png", "bob/more/2.png"):
        paint(tmp_path / place, (len(place), 0, len(place) * 9))
    paint_mask(tmp_path / "mask" / "ann" / "1.png")
    paint_mask(tmp_path / "bob" / "mask" / "1.png")
    paint_mask(tmp_path / "bob" / "more" / "2-masklabel.png")
    with pytest.warns(UserWarning, match=r"bob/1.png is ann/1.png"):
        pictures = image_folder(tmp_path)
    assert [(p.name, p.subject) for p in pictures] == [
        ("ann/1.png", "ann"),
        ("bob/1.png", "bob"),
        ("bob/more/2.png", "bob"),
    ]
    assert all(picture.read_mask is not None for picture in pictures)


def test_exif_turns_a_picture_and_its_size(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(tmp_path / "a.jpg", "red", (40, 20), exif=exif)
    (picture,) = image_folder(tmp_path)
    assert picture.size == picture.read().size == (20, 40)


def test_sizes_are_read_without_decoding(tmp_path: Path) -> None:
    path = paint(tmp_path / "a.png", "red", (300, 200))
    path.write_bytes(path.read_bytes()[:60])  # the header is whole, the pixels are not
    (picture,) = image_folder(tmp_path)
    assert picture.size == (300, 200)
    with pytest.raises(InputError, match=r"a\.png"):
        picture.read()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"file_name": "a.png"}', "", "{nonsense"], r"metadata\.jsonl', line 3 is not JSON"),
        ([[1]], "line 1 is list, expected an object"),
        ([{"text": "a"}], "line 1 has no 'file_name'"),
        ([{"file_name": 3}], "'file_name' is 3; expected text"),
        ([{"file_name": "a.png", "text": ["a"]}], "expected text"),
        ([{"file_name": "a.png"}, {"file_name": "./a.png"}], "line 2 names './a.png', which .* line 1 names already"),
        ([{"file_name": "gone.png"}], "'gone.png', which is not in"),
        ([{"file_name": "../a.png"}], "expected a path inside"),
        ([{"file_name": "sub/../../a.png"}], "expected a path inside"),
        ([{"file_name": "/etc/a.png"}], "expected a path inside"),
        ([{"file_name": "C:\\a.png"}], "expected a path inside"),
        ([{"file_name": "..\\a.png"}], "expected a path inside"),
        ([{"file_name": "./"}], "expected a path inside"),
        ([{"file_name": "a" * 5000}], "cannot be a path"),
        ([{"file_name": "a\0.png"}], "not in"),
        ([{"file_name": "a.png", "mask": "../m.png"}], "expected a path inside"),
        ([{"file_name": "a.png", "mask": "m.png"}], "the mask 'm.png', which is not in"),
        (["[" * 100_000], "line 1 is not JSON"),
    ],
)
def test_bad_metadata(tmp_path: Path, rows: list[object], message: str) -> None:
    folder = tmp_path / "set"
    paint(folder / "a.png")
    paint(tmp_path / "a.png")
    write_lines(folder / "metadata.jsonl", rows)
    with pytest.raises(InputError, match=message):
        image_folder(folder)


LINES = st.one_of(
    st.text(max_size=30),
    st.dictionaries(
        st.sampled_from(("file_name", "text", "mask", "x")),
        st.one_of(st.sampled_from(("a.png", "b/../a.png", ".", "")), st.text(max_size=8), st.none(), st.integers()),
    ).map(json.dumps),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(LINES, max_size=4), name=st.sampled_from(("metadata.jsonl", "metadata.csv", "a.txt")))
def test_anything_is_read_or_refused(tmp_path: Path, lines: list[str], name: str) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        paint(Path(folder) / "a.png")
        (Path(folder) / name).write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        try:
            assert {p.name for p in image_folder(folder)} <= {"a.png"}
        except InputError:
            pass


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        image_folder(tmp_path / "gone")
    with pytest.raises(InputError, match="no picture"):
        image_folder(tmp_path)
    path = paint(tmp_path / "a.png")
    with pytest.raises(InputError, match="is a file"):
        image_folder(path)
    path.write_bytes(b"not a picture at all")
    with pytest.raises(InputError, match=r"a\.png' is not a picture"):
        image_folder(tmp_path)
    paint(path)
    paint_mask(tmp_path / "mask" / "a.png", (6, 8))
    with pytest.raises(InputError, match="same shape"):
        image_folder(tmp_path)
    (tmp_path / "mask" / "a.png").unlink()
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        image_folder(tmp_path)


def test_a_link_may_lead_elsewhere(tmp_path: Path) -> None:
    paint(tmp_path / "blobs" / "0123", format="PNG")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "a.png").symlink_to(tmp_path / "blobs" / "0123")
    write_lines(folder / "metadata.jsonl", [{"file_name": "a.png", "text": "a"}])
    assert image_folder(folder)[0].caption == "a"
