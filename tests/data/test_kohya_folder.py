"""Folders of kohya's trainers: repeats and words from names; and which layout a folder has."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlroom.core.errors import InputError
from controlroom.data.kohya_folder import Concept, concept_of, kohya_folder, training_pictures
from tests.data.folders import paint, paint_mask, write_lines


def kohya(folder: Path) -> Path:
    paint(folder / "10_sks dog" / "1.png", "red")
    paint(folder / "10_sks dog" / "2.png", "blue")
    paint(folder / "10_sks dog" / "3.png", "green")
    (folder / "10_sks dog" / "1.txt").write_text("a sks dog, running\nsecond line\n")
    (folder / "10_sks dog" / "2.txt").write_text("not this")
    (folder / "10_sks dog" / "2.caption").write_text("a sks dog\r\n")
    paint_mask(folder / "10_sks dog" / "mask" / "3.png")
    paint(folder / "1_dog" / "a.png", "white")
    return folder


def test_repeats_captions_and_subjects(tmp_path: Path) -> None:
    pictures = kohya_folder(kohya(tmp_path))
    assert [(p.name, p.caption, p.repeats, p.subject) for p in pictures] == [
        ("10_sks dog/1.png", "a sks dog, running", 10, "sks dog"),
        ("10_sks dog/2.png", "a sks dog", 10, "sks dog"),
        ("10_sks dog/3.png", "sks dog", 10, "sks dog"),
        ("1_dog/a.png", "dog", 1, "dog"),
    ]
    assert [p.read_mask is not None for p in pictures] == [False, False, True, False]


def test_names() -> None:
    assert concept_of("10_sks  dog") == Concept(10, "sks dog")
    assert concept_of("3_my_cat toy") == Concept(3, "my_cat toy")
    assert [concept_of(name) for name in ("dog", "x_dog", "10_", "10_ ", "10 dog")] == [None] * 5
    assert Concept(1, "sks big dog").class_words == "big dog" and Concept(1, "dog").class_words == "dog"


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    kohya(tmp_path)
    paint(tmp_path / "old" / "x.png")
    paint(tmp_path / "0_sks cat" / "x.png")
    (tmp_path / "5_empty").mkdir()
    with pytest.warns(UserWarning) as told:
        assert len(kohya_folder(tmp_path)) == 4
    said = " ".join(str(w.message) for w in told)
    assert "'old' is left out" in said and "'0_sks cat' is left out" in said and "no picture in" in said


def test_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        kohya_folder(tmp_path / "gone")
    paint(tmp_path / "dogs" / "1.png")
    with pytest.raises(InputError, match="no subfolder such as"):
        kohya_folder(tmp_path)
    (tmp_path / "2_dog").mkdir()
    with pytest.raises(InputError, match="no picture to train on"):
        kohya_folder(tmp_path)


def test_which_layout_it_is(tmp_path: Path) -> None:
    plain, numbered, both = tmp_path / "plain", kohya(tmp_path / "numbered"), kohya(tmp_path / "both")
    paint(plain / "ann" / "1.png", "red")
    assert [(p.subject, p.repeats) for p in training_pictures(plain)] == [("ann", 1)]
    assert {p.repeats for p in training_pictures(numbered)} == {1, 10}
    paint(both / "loose.png")
    with pytest.raises(InputError, match="1 pictures beside folders such as"):
        training_pictures(both)
    with pytest.warns(UserWarning, match="1 pictures directly in"):
        assert len(kohya_folder(both)) == 4
    write_lines(both / "metadata.jsonl", [{"file_name": "loose.png", "text": "l"}])
    with pytest.warns(UserWarning, match="does not list 4"):
        assert [p.name for p in training_pictures(both)] == ["loose.png"]
