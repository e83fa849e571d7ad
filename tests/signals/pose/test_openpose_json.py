"""Every dialect of OpenPose JSON is read right, all else is one clear error, and what is written reads back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from controlroom.core.errors import InputError, OutputError
from controlroom.core.pose import JOINTS, Keypoints, Pose
from controlroom.signals.pose.openpose_json import (
    MAX_BYTES,
    openpose_json,
    read_document,
    read_openpose,
    require_torso,
    write_openpose,
)

BODY = [float(v) for i in range(18) for v in (20 + 5 * i, 30 + 4 * i, 0.9)]


def document(*people: dict, **rest: object) -> dict:
    return {"people": list(people), "canvas_width": 256, "canvas_height": 192, **rest}


def person(values: list | None = None, **rest: object) -> dict:
    return {"pose_keypoints_2d": BODY if values is None else values, **rest}


def groups(count: int) -> st.SearchStrategy[Keypoints]:
    points = hnp.arrays(np.float64, (count, 2), elements=st.floats(-1000, 5000))
    return st.builds(Keypoints, points, hnp.arrays(np.float64, count, elements=st.floats(0, 1)))


@st.composite
def poses(draw: st.DrawFn) -> Pose:
    body = draw(groups(18).filter(lambda body: bool(body.visible.any())))
    width, height = draw(st.integers(1, 4000)), draw(st.integers(1, 4000))
    parts = [draw(st.none() | groups(n).filter(lambda part: bool(part.visible.any()))) for n in (70, 21, 21)]
    return Pose(body.points, body.confidence, width, height, *parts)


SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]


@settings(deadline=None, max_examples=60, suppress_health_check=SLOW)
@given(poses())
def test_round_trip_is_exact_to_the_written_precision(pose: Pose) -> None:
    text = openpose_json(pose)
    read = read_openpose(text)
    assert openpose_json(read) == text
    assert (read.width, read.height) == (pose.width, pose.height)
    for before, after in zip(
        (pose.body, pose.face, pose.right_hand, pose.left_hand),
        (read.body, read.face, read.right_hand, read.left_hand),
        strict=True,
    ):
        if before is None or after is None:
            assert before is after
            continue
        np.testing.assert_array_equal(after.visible, before.visible)
        np.testing.assert_allclose(after.points, before.points, atol=0.0005 + 1e-9)
        np.testing.assert_allclose(after.confidence, before.confidence, atol=1e-4)


def test_written_file_has_a_joint_on_each_line(tmp_path: Path) -> None:
    pose = read_openpose(document(person()))
    write_openpose(tmp_path / "pose.json", pose)
    lines = (tmp_path / "pose.json").read_text().splitlines()
    assert "  25.0, 34.0, 0.9," in lines
    assert read_openpose(tmp_path / "pose.json") == pose == read_openpose(str(tmp_path / "pose.json"))
    plain = json.loads((tmp_path / "pose.json").read_text())
    assert plain["people"][0]["pose_keypoints_2d"] == BODY and plain["canvas_width"] == 256
    with pytest.raises(OutputError):
        write_openpose(tmp_path / "no" / "pose.json", pose)


def test_several_people_and_the_choice_among_them() -> None:
    small = [v * s for v, s in zip(BODY, [0.5, 0.5, 1] * 18, strict=True)]
    data = document(person(small), person(), person([0.0] * 54), person([]), person(None))
    assert read_openpose(data).keypoints[0].tolist() == [20, 30]
    assert read_openpose(data, person=0).keypoints[0].tolist() == [10, 15]
    assert [pose is not None for pose in read_document(data).people] == [True, True, False, False, True]
    for wrong in (2, 3, 5, -1, True, "smallest", 1.0):
        with pytest.raises(InputError):
            read_openpose(data, person=wrong)  # type: ignore[arg-type]
    both = [pose for pose in read_document(data).people[:2] if pose]
    assert list(read_document(openpose_json(*both)).people) == both


def test_body_25() -> None:
    values = [float(v) for i in range(25) for v in (i + 10, 2 * i + 10, 0.5)]
    pose = read_openpose(document(person(values)))
    order = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18]
    np.testing.assert_array_equal(pose.keypoints, [(i + 10, 2 * i + 10) for i in order])


def test_coco_17() -> None:
    names = "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow".split()
    names += "left_wrist right_wrist left_hip right_hip left_knee right_knee left_ankle right_ankle".split()
    values = [float(v) for i in range(17) for v in (i + 10, 3 * i + 10, 0.5 + i / 100)]
    pose = read_openpose(document(person(values)))
    for index, joint in enumerate(JOINTS):
        if joint == "neck":
            assert pose.keypoints[index].tolist() == [15.5, 26.5]
            assert pose.confidence[index] == pytest.approx(0.55)
        else:
            assert pose.keypoints[index].tolist() == [names.index(joint) + 10, 3 * names.index(joint) + 10], joint
    values[3 * 5 + 2] = 0.0  # without a shoulder there is no neck
    assert not read_openpose(document(person(values))).visible[1]


def test_frames() -> None:
    empty, one = document(), document(person())
    moved = document(person([v + 1 if i % 3 == 0 else v for i, v in enumerate(BODY)]))
    assert read_openpose([empty, one, moved]).keypoints[0].tolist() == [20, 30]
    assert read_openpose([empty, one, moved], frame=2).keypoints[0].tolist() == [21, 30]
    for wrong in ([], [empty], [[one]], [1]):
        with pytest.raises(InputError):
            read_openpose(wrong)
    for frame in (0, 3, -1, True):
        with pytest.raises(InputError):
            read_openpose([empty, one, moved], frame=frame)
    with pytest.raises(InputError):
        read_openpose(one, frame=1)


def test_older_editor() -> None:
    points = [[10 + i, 20 + 2 * i] for i in range(36)]
    data = {"width": 512, "height": 768, "keypoints": points}
    first = read_openpose(data, person=0)
    assert (first.width, first.height) == (512, 768)
    assert first.keypoints.tolist() == [[float(x), float(y)] for x, y in points[:18]]
    assert read_openpose(data, person=1).keypoints[0].tolist() == [28, 56]
    points[3], points[4], points[5] = [0, 0], [-1, -1], None  # type: ignore[call-overload]
    assert np.flatnonzero(~read_openpose(data, person=0).visible).tolist() == [3, 4, 5]
    for bad in (points[:17], [], {}, "x", None, [[1, 2, 3]] * 18, [["a", 1]] * 18, [5] * 18):
        with pytest.raises(InputError):
            read_openpose({"width": 512, "height": 768, "keypoints": bad})


def test_shares_of_the_canvas() -> None:
    shares = [v / s for v, s in zip(BODY, [256, 192, 1] * 18, strict=True)]
    np.testing.assert_allclose(
        read_openpose(document(person(shares))).keypoints, read_openpose(document(person())).keypoints
    )
    unit = {"people": [person(shares)], "canvas_width": 1, "canvas_height": 1.0}
    assert (read_openpose(unit).width, read_openpose(unit).height) == (512, 512)
    sized = read_openpose(unit, canvas=(256, 192))
    np.testing.assert_allclose(sized.keypoints, read_openpose(document(person())).keypoints)
    with pytest.raises(InputError, match="canvas_width"):
        read_openpose({"people": [person(shares)]})
    tiny = read_openpose(document(person(shares), units="pixels"))
    assert tiny.keypoints.max() < 1  # what says that it is pixels is pixels


def test_a_document_without_a_canvas() -> None:
    data = {"version": 1.3, "people": [person()]}
    given = read_openpose(data, canvas=(768, 1024))
    assert (given.width, given.height) == (768, 1024)
    guessed = read_document(data)
    assert guessed.canvas_guessed and not read_document(data, canvas=(768, 1024)).canvas_guessed
    pose = guessed.choose()
    left, top, right, bottom = pose.bounding_box()
    assert (pose.width - right, pose.height - bottom) == (left, top)


def test_face_hands_and_what_is_absent() -> None:
    face68 = [float(v) for i in range(68) for v in (i, i, 1)]
    hand = [float(v) for i in range(21) for v in (i, 2 * i, 0.5)]
    pose = read_openpose(
        document(person(face_keypoints_2d=face68, hand_left_keypoints_2d=hand, hand_right_keypoints_2d=[]))
    )
    assert pose.face is not None and pose.face.visible.sum() == 68 and len(pose.face) == 70
    assert pose.left_hand is not None and pose.left_hand.points[3].tolist() == [3, 6]
    assert pose.right_hand is None
    values: list = [*BODY[:9], None, None, None, *BODY[12:]]
    assert not read_openpose(document(person(values))).visible[3]


def test_scores_outside_their_range_are_clipped() -> None:
    values = [*BODY]
    values[2], values[5] = 7.25, -0.01
    pose = read_openpose(document(person(values)))
    assert pose.confidence[0] == 1 and not pose.visible[1]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{", "not JSON"),
        ("[]", "no people"),
        ("{}", "no people"),
        (b"", "not JSON"),
        (b"\xff\xfe{}", "not JSON"),
        (b"\x89PNG\r\n", "not JSON"),
        (b"3", "a number"),
        (b"null", "null"),
        ("[" * 100_000, "nested"),
        ('{"people":' * 20_000, "nested"),
        ('{"people": [{"pose_keypoints_2d": [' + "NaN," * 53 + "NaN]}]}", "NaN"),
        ('{"people": [{"pose_keypoints_2d": [' + "1e999," * 53 + "1]}]}", "finite"),
        ('{"people": [{"pose_keypoints_2d": [' + "9" * 5000 + "]}]}", "not JSON"),
        (document(), "no people"),
        (document(person([])), "no people"),
        (document(person([0.0] * 54)), "no people"),
        (document({}), "no people"),
        (document(person(BODY[:-1])), "53 numbers"),
        (document(person([1.0] * 57)), "57 numbers"),
        (document(person([float("nan")] * 54)), "finite"),
        (document(person([float("inf")] * 54)), "finite"),
        (document(person([10**400] * 54)), "finite"),
        (document(person([1e7, 1e7, 1.0] * 18)), "pixels"),
        (document(person(["1"] * 54)), "finite"),
        (document(person([True] * 54)), "finite"),
        (document(person([None, 1.0, 1.0] * 18)), "finite"),
        (document(person([[1, 2, 3]] * 54)), "finite"),
        (document(person("x" * 54)), "a text"),  # type: ignore[arg-type]
        (document(person({"a": 1})), "an object"),  # type: ignore[arg-type]
        (document(3), "a number"),  # type: ignore[arg-type]
        ({"people": {"0": person()}}, "a list"),
        ({"people": None}, "null"),
        (document(person(face_keypoints_2d=[1.0] * 9)), "face_keypoints_2d"),
        (document(person(hand_left_keypoints_2d="x")), "hand_left_keypoints_2d"),
        ({**document(person()), "canvas_width": 0}, "canvas_width"),
        ({**document(person()), "canvas_width": "256"}, "canvas_width"),
        ({**document(person()), "canvas_width": float("nan")}, "canvas_width"),
        ({**document(person()), "canvas_height": 10**9}, "canvas_height"),
        ({**document(person()), "canvas_height": 10**400}, "canvas_height"),
        ({**document(person()), "canvas_height": None}, "canvas_height"),
        ({**document(person()), "canvas_height": True}, "canvas_height"),
        ({"annotations": [], "images": []}, "annotations"),
        (3.5, "float"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_pose(source: object, expected: str) -> None:
    with pytest.raises(InputError, match=expected) as caught:
        read_openpose(source)  # type: ignore[arg-type]
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def test_files_that_are_no_pose(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text('{"people": 3}')
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    cases = {"missing.json": "not exist", "": "folder", "bad.json": "bad.json.*number", "huge.json": "huge.json.*32 MB"}
    for name, expected in cases.items():
        with pytest.raises(InputError, match=expected):
            read_openpose(tmp_path / name)
    for path in ("a\0b", "x" * 5000, ""):
        with pytest.raises(InputError):
            read_openpose(path)


KEYS = "people pose_keypoints_2d face_keypoints_2d hand_left_keypoints_2d keypoints width height canvas_width".split()
KEYS += ["canvas_height", "units"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=6)
        | st.dictionaries(
            st.sampled_from(KEYS) | st.text(max_size=5),
            inner,
            max_size=5,
        )
    ),
    max_leaves=25,
)
NUMBERS = st.lists(st.none() | st.floats() | st.integers(), min_size=54, max_size=54)
NEARLY = st.fixed_dictionaries(
    {"people": st.lists(st.fixed_dictionaries({"pose_keypoints_2d": NUMBERS | JSON}) | JSON, max_size=3)},
    optional={"canvas_width": JSON, "canvas_height": JSON | st.integers(1, 999), "units": JSON},
)


@settings(deadline=None, max_examples=150, suppress_health_check=SLOW)
@given(JSON | NEARLY | st.lists(NEARLY, max_size=2))
def test_arbitrary_json_never_raises_anything_but_input_errors(value: object) -> None:
    for source in (value, json.dumps(value).encode()):
        try:
            assert isinstance(read_openpose(source), Pose)  # type: ignore[arg-type]
        except InputError:
            pass


@settings(deadline=None)
@given(st.binary(max_size=100))
def test_arbitrary_bytes(data: bytes) -> None:
    with pytest.raises(InputError):
        read_openpose(data)


def test_a_torso_is_required() -> None:
    pose = read_openpose(document(person()))
    assert require_torso(pose) is pose
    face_only = [v if i < 3 or i >= 42 else 0.0 for i, v in enumerate(BODY)]
    with pytest.raises(InputError, match=r"pose\.json.*neck.*It has: nose, right_eye"):
        require_torso(read_openpose(document(person(face_only))), "pose.json")


def test_writing_nothing_or_mixed_canvases() -> None:
    pose = read_openpose(document(person()))
    with pytest.raises(InputError):
        openpose_json()
    with pytest.raises(InputError):
        openpose_json(pose, pose.scaled(10, 10))
