"""A folder with subjects becomes groups, or one error that names the file and the line."""

from __future__ import annotations

import json
import pickle
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.data.group_folder import group_folder, has_groups
from controlroom.data.groups import Group, groups_fingerprint
from controlroom.data.image_folder import image_folder
from tests.data.folders import paint, paint_mask, write_lines

ANNA = {"word": "anna", "box": [0.1, 0.2, 0.5, 0.9], "image": "anna/3.png"}
DOG = {"word": "big  dog", "box": [0, 0, 1, 1], "image": "dog.png"}


@pytest.fixture(autouse=True)
def no_warnings() -> object:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures of 8 x 6, and two that subjects are known from."""
    root = tmp_path / "set"
    for name, colour in (("two.png", "red"), ("one.png", "green"), ("anna/3.png", "blue"), ("dog.png", "gold")):
        paint(root / name, colour)
    paint_mask(root / "masks/two-anna.png")
    return root


def line(*subjects: Any, **more: Any) -> dict[str, Any]:
    return {"file_name": "two.png", "text": "anna and a dog", "subjects": list(subjects), **more}


def read(folder: Path, *rows: object, **more: Any) -> tuple[Group, ...]:
    write_lines(folder / "metadata.jsonl", rows)
    return group_folder(folder, **more)


def test_lines_are_groups(folder: Path) -> None:
    (folder / "one.txt").write_text("a  dog\nruns")
    rows = [line({**ANNA, "mask": "masks/two-anna.png"}, DOG), "", {"file_name": "one.png", "subjects": [DOG]}]
    two, one = read(folder, *rows)
    assert (two.picture.name, two.picture.caption, one.picture.caption) == ("two.png", "anna and a dog", "a dog runs")
    anna, dog = two.subjects
    assert (anna.word, anna.box, anna.picture.name) == ("anna", (0.1, 0.2, 0.5, 0.9), "anna/3.png")
    assert (dog.word, dog.box, dog.read_mask) == ("big dog", (0, 0, 1, 1), None)
    assert anna.picture.read().getpixel((0, 0)) == (0, 0, 255) and anna.read_mask is not None
    mask = np.asarray(anna.read_mask())
    assert mask.shape == (6, 8) and mask[0].tolist() == [255] * 4 + [0] * 4
    assert pickle.loads(pickle.dumps(two)).subjects[0].picture.read().size == (8, 6)  # worker processes get them
    assert groups_fingerprint([two, one]) == groups_fingerprint(group_folder(folder))
    paint(folder / "dog.png", "black")
    assert groups_fingerprint([two, one]) != groups_fingerprint(group_folder(folder))


def test_boxes_in_pixels_are_of_the_upright_picture(folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    paint(folder / "turned.jpg", "red", (40, 20), exif=exif)
    row = {"file_name": "turned.jpg", "text": "a dog", "box_unit": "pixels"}
    (group,) = read(folder, {**row, "subjects": [{**DOG, "box": [5, 0, 20, 30.0]}]})
    assert group.picture.size == (20, 40) and group.subjects[0].box == (0.25, 0.0, 1.0, 0.75)
    with pytest.raises(InputError, match=r"line 1, subject 1: 'box' is \[0, 0, 21, 30\]; .* in pixels, of 20 x 40"):
        read(folder, {**row, "subjects": [{**DOG, "box": [0, 0, 21, 30]}]})
    (same,) = read(folder, line({**DOG, "box": [0.25, 0, 1, 0.5]}, box_unit="fraction"))
    assert same.subjects[0].box == (0.25, 0, 1, 0.5)


def test_boxes_may_be_left_to_the_whole_picture(folder: Path) -> None:
    bare = {"word": "anna", "image": "anna/3.png"}
    (group,) = read(folder, line(bare, DOG), boxes=False)
    assert [subject.box for subject in group.subjects] == [(0, 0, 1, 1)] * 2
    with pytest.raises(InputError, match="line 1, subject 1: 'box' is missing"):
        group_folder(folder)


def test_what_is_told_and_not_refused(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "two.png").read_bytes())
    with pytest.warns(UserWarning) as told:
        read(folder, line(ANNA, seed=3), line(DOG, file_name="copy.png"))
    said = [str(one.message) for one in told]
    assert any("not read: seed" in one for one in said) and any("copy.png is two.png" in one for one in said)


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in ANNA.items() if key != name}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([line(ANNA), "", "{nonsense"], r"metadata\.jsonl', line 3 is not JSON"),
        ([[1]], "line 1 is list, expected an object with file_name, text, subjects"),
        (["[" * 100_000], "line 1 is not JSON"),
        ([{"text": "a", "subjects": [ANNA]}], "line 1: 'file_name' is missing"),
        ([{"file_name": "two.png", "subjects": [ANNA]}], "line 1: 'text' is missing"),
        ([line(ANNA, text=3)], "line 1: 'text' is 3"),
        ([line(ANNA), line(ANNA, file_name="./two.png")], "line 2 names './two.png', which .* line 1 names already"),
        ([line(ANNA, file_name="gone.png")], "line 1 names 'gone.png', which is not in"),
        ([line(ANNA, file_name="../two.png")], "line 1 names .* expected a path inside"),
        ([line(ANNA, file_name="/etc/two.png")], "expected a path inside"),
        ([line(ANNA, file_name="C:\\two.png")], "expected a path inside"),
        ([line(ANNA, file_name="a" * 5000)], "cannot be a path"),
        ([line(ANNA, box_unit="percent")], "line 1: 'box_unit' is 'percent'; expected 'fraction' or 'pixels'"),
        ([line(ANNA, box_unit=["pixels"])], "'box_unit' is"),
        ([{"file_name": "two.png", "text": "a"}], "line 1: 'subjects' is missing.*who is in it"),
        ([line()], r"'subjects' is \[\]"),
        ([line(subjects={"anna": 1})], "'subjects' is {'anna': 1}"),
        ([line(ANNA, "anna")], "line 1, subject 2 is 'anna'; expected an object with word, box, image, mask"),
        ([line({**ANNA, "bbox": 1})], "subject 1 has 'bbox'; a subject has word, box"),
        ([line(without("word"))], "subject 1: 'word' is missing"),
        ([line({**ANNA, "word": "  "})], "subject 1: 'word' is '  '"),
        ([line(without("box"))], "subject 1: 'box' is missing; expected .*from 0 to 1.*box_unit"),
        ([line({**ANNA, "box": [10, 20, 50, 90]})], r"'box' is \[10, 20, 50, 90\]; .*\"box_unit\": \"pixels\""),
        ([line({**ANNA, "box": [0.5, 0, 0.5, 1]})], "'box' is"),
        ([line({**ANNA, "box": [0, 0, 1]})], "'box' is"),
        ([line({**ANNA, "box": "0 0 1 1"})], "'box' is"),
        ([line({**ANNA, "box": [False, 0, True, 1]})], "'box' is"),
        ([line({**ANNA, "box": [float("nan"), 0, 1, 1]})], r"'box' is \[nan"),
        ([line({**ANNA, "box": [0, 0, float("inf"), 1]})], r"'box' is \[0, 0, inf"),
        ([line({**ANNA, "box": [0, 0, 10**400, 1]})], "'box' is"),
        ([line({**ANNA, "box": [-(10**400), 0, 1, 1]})], "'box' is"),
        ([line(without("image"))], "subject 1: 'image' is missing"),
        ([line({**ANNA, "image": "anna/4.png"})], "subject 1 names the picture 'anna/4.png', which is not in"),
        ([line({**ANNA, "image": "anna/../../x.png"})], "subject 1 names .* expected a path inside"),
        ([line({**ANNA, "image": "two.png"})], "subject 1 is known from 'two.png', which is the very picture"),
        ([line({**ANNA, "image": "copy.png"})], r"is known from 'copy.png', which is the very picture .*two\.png"),
        ([line({**ANNA, "image": "broken.png"})], r"line 1, subject 1: .*broken\.png' is not a picture"),
        ([line(ANNA, file_name="broken.png")], r"line 1: .*broken\.png' is not a picture"),
        ([line({**ANNA, "mask": "m.png"})], "subject 1 names the mask 'm.png', which is not in"),
        ([line({**ANNA, "mask": "tall.png"})], "subject 1: The mask .*expected the same shape"),
        ([line({**ANNA, "mask": 4})], "subject 1: 'mask' is 4"),
        ([], "lists nothing"),
    ],
)
def test_bad_lines(folder: Path, rows: list[object], message: str) -> None:
    (folder / "copy.png").write_bytes((folder / "two.png").read_bytes())
    (folder / "broken.png").write_bytes(b"not a picture at all")
    paint_mask(folder / "tall.png", (6, 8))
    with pytest.raises(InputError, match=message):
        read(folder, *rows)


def test_a_truncated_picture_is_told_when_it_is_read(folder: Path) -> None:
    for name in ("two.png", "anna/3.png", "masks/two-anna.png"):
        path = folder / name
        path.write_bytes(path.read_bytes()[:45])  # the header is whole, the pixels are not
    (group,) = read(folder, line({**ANNA, "mask": "masks/two-anna.png"}))
    (anna,) = group.subjects
    assert anna.read_mask is not None
    for decode, said in (
        (group.picture.read, r"metadata.jsonl', line 1: .*two\.png'"),
        (anna.picture.read, r"line 1, subject 1: .*3\.png'"),
        (anna.read_mask, r"line 1, subject 1: .*two-anna\.png'"),
    ):
        with pytest.raises(InputError, match=said):
            decode()


def test_bad_folders(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        group_folder(tmp_path / "gone")
    with pytest.raises(InputError, match="no metadata.jsonl .*subjects"):
        group_folder(folder)
    (folder / "metadata.jsonl").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        group_folder(folder)


def test_a_folder_says_whether_it_has_groups(folder: Path) -> None:
    assert not has_groups(folder)
    write_lines(folder / "metadata.jsonl", ["", line(ANNA)])
    assert has_groups(folder)
    with pytest.warns(UserWarning) as told:
        assert image_folder(folder)[0].caption == "anna and a dog"  # it stays an imagefolder
    assert any("not read: subjects" in str(one.message) for one in told)
    write_lines(folder / "metadata.jsonl", [{"file_name": "two.png", "text": "anna"}])
    assert not has_groups(folder)


LEAVES = st.one_of(
    st.sampled_from(("two.png", "dog.png", "b/../a.png", ".", "", "pixels", "m.png")),
    st.text(max_size=6),
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
)
BOXES = st.lists(st.one_of(st.floats(0, 1), st.integers(0, 9), LEAVES), min_size=3, max_size=5).map(
    lambda box: sorted(box) if all(type(one) is int for one in box) else box
)
SUBJECTS = st.fixed_dictionaries(
    {"word": st.one_of(st.just("dog"), LEAVES), "image": st.one_of(st.just("dog.png"), LEAVES)},
    optional={"box": st.one_of(st.just([0, 0, 0.5, 1]), BOXES, LEAVES), "mask": LEAVES, "x": LEAVES},
)
ROWS = st.fixed_dictionaries(
    {"file_name": st.one_of(st.just("two.png"), LEAVES), "text": st.one_of(st.just("a dog"), LEAVES)},
    optional={
        "subjects": st.one_of(st.lists(st.one_of(SUBJECTS, LEAVES), max_size=2), LEAVES),
        "box_unit": st.one_of(st.just("pixels"), LEAVES),
    },
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lines=st.lists(st.one_of(ROWS.map(json.dumps), ROWS.map(json.dumps), st.text(max_size=20)), max_size=2),
    boxes=st.booleans(),
)
def test_anything_is_groups_or_one_error(tmp_path: Path, lines: list[str], boxes: bool) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as name, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(name)
        paint(root / "two.png", "red")
        paint(root / "dog.png", "blue")
        paint_mask(root / "m.png")
        (root / "metadata.jsonl").write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
        try:
            found = group_folder(root, boxes)
        except InputError:
            return
        assert found
        for group in found:
            assert group.picture.caption and group.picture.read().size == (8, 6)
            for subject in group.subjects:
                left, top, right, bottom = subject.box
                assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
                assert subject.picture.content != group.picture.content
