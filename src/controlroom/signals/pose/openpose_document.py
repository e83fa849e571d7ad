"""What an OpenPose JSON document says, in any of its dialects (see `openpose_json`), as poses.

Nothing about the document is trusted: every list's length and every number is checked, and whatever is wrong becomes an
`InputError` that says where.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from controlroom.core.errors import InputError
from controlroom.core.pose import FACE_POINTS, HAND_POINTS, Keypoints, Pose

_BODY_25: Final = (*range(8), *range(9, 19))  # its ninth point is the middle of the hips; the last six are feet
# Nose, (neck), right arm, left arm, right leg, left leg, eyes, ears; -1 is the neck, which COCO does not have.
_COCO_17: Final = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_UNIT_CANVAS: Final = 512  # pixels given to a canvas of 1 x 1
EXPECTED: Final = (
    'expected OpenPose JSON: {"people": [{"pose_keypoints_2d": [x, y, confidence, ...]}], '
    '"canvas_width": ..., "canvas_height": ...}'
)

Person = int | Literal["largest"]


@dataclass(frozen=True)
class OpenPoseDocument:
    """What one JSON document says.

    Attributes:
        people: a pose for each person in it, in its order; None where no joint is there.
        canvas_guessed: it did not name the size of its canvas, which was guessed by `_guessed_canvas`.
    """

    people: tuple[Pose | None, ...]
    canvas_guessed: bool = False

    def choose(self, person: Person = "largest", name: str = "The pose file") -> Pose:
        """The person with that number, or the one whose joints span the largest box.

        Raises:
            InputError: nobody is in it, or not that one.
        """
        if person != "largest":
            if isinstance(person, bool) or not isinstance(person, int):
                raise InputError(
                    f"Person {person!r} is not a number; expected 0 to {len(self.people) - 1} or 'largest'."
                )
            if not 0 <= person < len(self.people):
                raise InputError(f"{name} has {len(self.people)} people; there is no person {person} (counted from 0).")
            chosen = self.people[person]
            if chosen is None:
                raise InputError(f"{name}: person {person} has no keypoints (every confidence is 0).")
            return chosen
        poses = [pose for pose in self.people if pose is not None]
        if not poses:
            raise InputError(f"{name} has no people in it; expected at least one person with keypoints.")
        return max(poses, key=_area)


def parse_document(document: Any, frame: int | None = None, canvas: tuple[int, int] | None = None) -> OpenPoseDocument:
    """Everybody in one frame of a parsed JSON document.

    Args:
        document: what ``json.load`` gave.
        frame: which frame of a list of frames, from 0; None takes the first with somebody in it.
        canvas: ``(width, height)`` in pixels for a document that does not name it.

    Raises:
        InputError: it is not such a document, or holds what cannot be a pose.
    """
    if frame is not None and (isinstance(frame, bool) or not isinstance(frame, int) or frame < 0):
        raise InputError(f"Frame {frame!r} is not a number from 0.")
    if isinstance(document, Mapping):
        if frame:
            raise InputError(f"It is one frame, not a list of them; there is no frame {frame} (counted from 0).")
        return _people(document, canvas)
    if not isinstance(document, list | tuple):
        raise InputError(f"It holds {_kind(document)}; {EXPECTED}.")
    if frame is not None and frame >= len(document):
        raise InputError(f"It has {len(document)} frames; there is no frame {frame} (counted from 0).")
    read = OpenPoseDocument(())
    for entry in document if frame is None else [document[frame]]:
        if not isinstance(entry, Mapping):
            raise InputError(f"A frame of it is {_kind(entry)}; {EXPECTED}.")
        read = _people(entry, canvas)
        if any(read.people):
            return read
    return read


def _people(document: Mapping[str, Any], canvas: tuple[int, int] | None) -> OpenPoseDocument:
    groups: list[tuple[Keypoints | None, ...]]
    if "people" in document:
        people = document["people"]
        if not isinstance(people, list | tuple):
            raise InputError(f'"people" is {_kind(people)}; expected a list.')
        groups = [_person(person, index) for index, person in enumerate(people)]
    elif "pose_keypoints_2d" in document:
        groups = [_person(document, 0)]
    elif "keypoints" in document and "width" in document:
        groups = _editor_people(document["keypoints"])
    else:
        keys = ", ".join(repr(key)[:30] for key in list(document)[:6]) or "none"
        raise InputError(f"It has no people (its keys: {keys}); {EXPECTED}.")
    size = _canvas(document)
    there = [part.points[part.visible] for group in groups for part in group if part is not None]
    points = np.concatenate(there) if there else np.zeros((0, 2))
    shares = (
        len(points) > 0 and bool((points > -0.5).all() and (points < 1.5).all()) and document.get("units") != "pixels"
    )
    if shares and size is not None and max(size) <= 2:
        size = canvas or (_UNIT_CANVAS, _UNIT_CANVAS)
    guessed = size is None and canvas is None
    if guessed and shares:
        raise InputError(
            'Its coordinates are shares of a canvas of unknown size; add "canvas_width" and "canvas_height".'
        )
    width, height = size or canvas or _guessed_canvas(points)
    scale = (width, height) if shares else (1.0, 1.0)

    def pose(body: Keypoints | None, *parts: Keypoints | None) -> Pose | None:
        if body is None or not body.visible.any():
            return None
        body, *rest = (part and part.moved(scale, (0.0, 0.0)) for part in (body, *parts))
        assert body is not None
        return Pose(body.points, body.confidence, width, height, *rest)

    return OpenPoseDocument(tuple(pose(*group) for group in groups), guessed)


def _canvas(document: Mapping[str, Any]) -> tuple[int, int] | None:
    keys = ("canvas_width", "canvas_height")
    if not any(key in document for key in keys):
        keys = ("width", "height")
    values: list[Any] = [document.get(key) for key in keys]
    if values == [None, None]:
        return None
    for key, value in zip(keys, values, strict=True):
        number = not isinstance(value, bool) and isinstance(value, int | float)
        if not number or not 1 <= value <= 65535 or value != int(value):
            raise InputError(f'"{key}" is {_shown(value)}; expected a whole number of pixels from 1 to 65535.')
    return int(values[0]), int(values[1])


def _guessed_canvas(points: np.ndarray) -> tuple[int, int]:
    """The canvas that has the same margin right of the people as left of them, and below as above."""
    if not len(points):
        return _UNIT_CANVAS, _UNIT_CANVAS
    width, height = np.ceil(np.maximum(points.max(0), 1) + np.maximum(points.min(0), 0)).tolist()
    return int(min(width, 65535)), int(min(height, 65535))


def _person(person: Any, index: int) -> tuple[Keypoints | None, ...]:
    if not isinstance(person, Mapping):
        raise InputError(f"Person {index} is {_kind(person)}; {EXPECTED}.")
    points, sure = _triples(person.get("pose_keypoints_2d"), "pose_keypoints_2d", index, (18, 25, 17))
    if len(points) == 25:
        points, sure = points[list(_BODY_25)], sure[list(_BODY_25)]
    elif len(points) == 17:
        points, sure = coco_to_openpose(points, sure)
    parts = [Keypoints(points, sure) if len(points) else None]
    for key, counts in (
        ("face_keypoints_2d", (FACE_POINTS, 68)),
        ("hand_right_keypoints_2d", (HAND_POINTS,)),
        ("hand_left_keypoints_2d", (HAND_POINTS,)),
    ):
        points, sure = _triples(person.get(key), key, index, counts)
        missing = counts[0] - len(points)  # the pupils of a face, or everything
        full = Keypoints(np.pad(points, ((0, missing), (0, 0))), np.pad(sure, (0, missing)))
        parts.append(full if len(points) else None)
    return tuple(parts)


def _triples(values: Any, key: str, person: int, counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """[N, 2] and [N] from a flat list of x, y, confidence; N is 0 where there is none."""
    if values is None:
        values = ()
    if not isinstance(values, list | tuple):
        raise InputError(f'"{key}" of person {person} is {_kind(values)}; expected a list of numbers.')
    if len(values) not in (0, *(3 * count for count in counts)):
        allowed = " or ".join(f"{3 * count} ({count} points)" for count in counts)
        raise InputError(f'"{key}" of person {person} has {len(values)} numbers; expected {allowed}: x, y, confidence.')
    rows = [values[start : start + 3] for start in range(0, len(values), 3)]
    table = [(0.0, 0.0, 0.0) if all(v is None for v in row) else tuple(_number(v, key) for v in row) for row in rows]
    array = np.array(table, dtype=np.float64).reshape(-1, 3)
    # Scores of some detectors leave [0, 1] a little; what is below 0 was not seen.
    return array[:, :2], np.clip(array[:, 2], 0, 1)


def _editor_people(values: Any) -> list[tuple[Keypoints | None, ...]]:
    """The older editor's [x, y], 18 for each person; null, [0, 0] and [-1, -1] are joints that are not there."""
    if not isinstance(values, list | tuple) or len(values) % 18:
        found = f"{len(values)} entries" if isinstance(values, list | tuple) else _kind(values)
        raise InputError(f'"keypoints" has {found}; expected 18 pairs [x, y] for each person.')
    rows = []
    for pair in values:
        if pair is None:
            rows.append((0.0, 0.0))
            continue
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f'An entry of "keypoints" is {_shown(pair)}; expected a pair [x, y].')
        rows.append((_number(pair[0], "keypoints"), _number(pair[1], "keypoints")))
    points = np.array(rows, dtype=np.float64).reshape(-1, 18, 2)
    there = ~((points == 0).all(-1) | (points < 0).all(-1))
    return [(Keypoints(*person), None, None, None) for person in zip(points, there.astype(float), strict=True)]


def _number(value: Any, key: str) -> float:
    if not isinstance(value, bool) and isinstance(value, int | float):
        try:
            if math.isfinite(number := float(value)):
                return number
        except OverflowError:
            pass
    raise InputError(f'"{key}" holds {_kind(value)} {_shown(value)}; expected finite numbers.')


def _shown(value: Any) -> str:
    """At most 40 characters of it; a number of thousands of digits has no text at all."""
    try:
        return repr(value)[:40]
    except (ValueError, RecursionError):
        return "..."


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "a text",
        dict: "an object",
        list: "a list",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")


def coco_to_openpose(points: np.ndarray, confidence: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """COCO-17 as OpenPose-18; the neck is the middle of the shoulders and as sure as the less sure of them.

    Args:
        points: [17, 2].
        confidence: [17].
    """
    order = [max(index, 0) for index in _COCO_17]
    points, confidence = np.asarray(points, float), np.asarray(confidence, float)
    body, sure = points[order], confidence[order]
    body[1] = points[[5, 6]].mean(0)
    sure[1] = confidence[[5, 6]].min()
    return body, sure


def _area(pose: Pose) -> float:
    left, top, right, bottom = pose.bounding_box()
    # Points on one line have no area: the longer side decides among them.
    return (right - left) * (bottom - top) + 1e-6 * (right - left + bottom - top)
