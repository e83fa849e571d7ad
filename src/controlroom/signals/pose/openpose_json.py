"""OpenPose JSON in and out: the exchange format of detectors, pose editors and ControlNet.

Read are OpenPose's own output (``people[].pose_keypoints_2d`` with 18, 25 or 17 points, ``canvas_width/height``), lists
of such frames (sd-webui-controlnet, ComfyUI), and the older editor's ``{width, height, keypoints: [[x, y], ...]}``
(fkunn1326/openpose-editor). Coordinates may be pixels or, as early ControlNet wrote them, shares of the canvas. Written
is OpenPose's own form with 18 points, one joint on a line so that a person can edit it, and read again exactly.

Source: OpenPose `doc/02_output.md`; sd-webui-controlnet `annotator/openpose`; openpose-editor pull request 123.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Mapping, Sequence
from typing import Any, Final

from controlroom.core.errors import InputError
from controlroom.core.files import write_text_atomically
from controlroom.core.pose import JOINTS, Keypoints, Pose
from controlroom.signals.pose.openpose_document import EXPECTED, OpenPoseDocument, Person, parse_document

MAX_BYTES: Final = 32 * 1024 * 1024
_LONGEST_PATH: Final = 4096
DECIMALS: Final = 3  # thousandths of a pixel


def read_openpose(
    source: str | os.PathLike[str] | bytes | Mapping[str, Any] | Sequence[Any],
    person: Person = "largest",
    frame: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> Pose:
    """Read one person's pose from a file, JSON text, bytes, or a parsed document.

    Args:
        source: a path; a text that starts with ``{`` or ``[``; bytes; or what ``json.load`` gave.
        person: which one, from 0, or the one with the largest bounding box.
        frame: which frame of a list of frames, from 0; None takes the first with somebody in it.
        canvas: ``(width, height)`` in pixels for a document that does not name it. Without it the canvas is taken to
            have the person in its middle.

    Raises:
        InputError: no such file, not JSON, another format, wrong counts, values that are not finite numbers, nobody.
    """
    return read_document(source, frame, canvas).choose(person, _describe(source))


def read_document(
    source: str | os.PathLike[str] | bytes | Mapping[str, Any] | Sequence[Any],
    frame: int | None = None,
    canvas: tuple[int, int] | None = None,
) -> OpenPoseDocument:
    """Everybody in one frame of ``source``; arguments and errors as in `read_openpose`."""
    name = _describe(source)
    try:
        return parse_document(_parsed(source, name), frame, canvas)
    except InputError as error:
        message = str(error)
        raise InputError(message if message.startswith(name) else f"{name}: {message}") from error.__cause__


def openpose_json(*poses: Pose) -> str:
    """The poses as OpenPose JSON, to a thousandth of a pixel; `read_openpose` gives them back.

    Raises:
        InputError: no pose, or poses on canvases of different sizes.
    """
    if not poses:
        raise InputError("There is no pose to write; expected at least one.")
    width, height = poses[0].width, poses[0].height
    if any((pose.width, pose.height) != (width, height) for pose in poses):
        raise InputError("The poses are on canvases of different sizes; bring them to one with scaled().")
    people = ",\n".join(_person_json(pose) for pose in poses)
    # `units` is ours: it tells a tiny pose in pixels from one in shares of the canvas. Other readers skip it.
    head = f'"version": 1.3,\n"units": "pixels",\n"canvas_width": {width},\n"canvas_height": {height}'
    return f'{{\n{head},\n"people": [\n{people}\n]\n}}\n'


def write_openpose(path: str | os.PathLike[str], *poses: Pose) -> None:
    """Write `openpose_json` to ``path``, all of it or nothing.

    Raises:
        InputError: as `openpose_json`.
        OutputError: the file could not be written.
    """
    write_text_atomically(path, openpose_json(*poses))


def require_torso(pose: Pose, name: str = "The pose") -> Pose:
    """The pose itself, if it has a neck and a hip: without them nothing says how large the person is or where.

    Raises:
        InputError: it has not.
    """
    try:
        pose.torso_length()
    except InputError as error:
        seen = ", ".join(joint for joint, there in zip(JOINTS, pose.visible, strict=True) if there) or "nothing"
        raise InputError(f"{name} cannot be used. {error} It has: {seen}.") from None
    return pose


def _person_json(pose: Pose) -> str:
    def block(key: str, part: Keypoints | None) -> str:
        rows = []
        for (x, y), sure in zip(part.points.tolist(), part.confidence.tolist(), strict=True) if part else ():
            # A point that is there stays there, however unsure its reader was.
            shown = max(round(sure, 4), 1e-4) if sure > 0 else 0.0
            rows.append(f"{json.dumps(round(x, DECIMALS) + 0.0)}, {json.dumps(round(y, DECIMALS) + 0.0)}, {shown}")
        return f'"{key}": [' + ("\n  " + ",\n  ".join(rows) if rows else "") + "]"

    parts = (
        ("pose_keypoints_2d", pose.body),
        ("face_keypoints_2d", pose.face),
        ("hand_left_keypoints_2d", pose.left_hand),
        ("hand_right_keypoints_2d", pose.right_hand),
    )
    return '{\n"person_id": [-1],\n' + ",\n".join(block(key, part) for key, part in parts) + "\n}"


def is_json_text(source: Any) -> bool:
    """Whether a text is a JSON document itself, rather than the path of one; a file's name may begin as one does."""
    if not isinstance(source, str) or source.lstrip("\ufeff \t\r\n")[:1] not in ("{", "["):
        return False
    return len(source) > _LONGEST_PATH or not os.path.isfile(source)


def _parsed(source: Any, name: str) -> Any:
    """The JSON document as Python objects."""
    if is_json_text(source):
        data: bytes | str = source.lstrip("\ufeff")
    elif isinstance(source, bytes | bytearray):
        data = bytes(source)
    elif isinstance(source, str | os.PathLike):
        data = _file_bytes(source, name)
    elif isinstance(source, Mapping | list | tuple):
        return source
    else:
        raise InputError(f"A pose cannot be read from a value of type {type(source).__name__}; {EXPECTED}.")
    if len(data) > MAX_BYTES:
        raise InputError(f"{name} is larger than {MAX_BYTES // 2**20} MB; {EXPECTED}.")
    try:
        return json.loads(data.decode("utf-8-sig") if isinstance(data, bytes) else data, parse_constant=_no_constant)
    except RecursionError:
        raise InputError(f"{name} is nested too deeply; {EXPECTED}.") from None
    except ValueError as error:  # also wrong encodings and numbers of thousands of digits
        raise InputError(f"{name} is not JSON ({str(error)[:100]}); {EXPECTED}.".replace("\n", " ")) from None


def _no_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number")


def _file_bytes(source: Any, name: str) -> bytes:
    try:
        status = os.stat(source)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise InputError(f"{name} is {kind}; expected a JSON file.")
        if status.st_size > MAX_BYTES:
            raise InputError(f"{name} is larger than {MAX_BYTES // 2**20} MB; {EXPECTED}.")
        with open(source, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; expected a JSON file with a pose.") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{name} cannot be opened: {reason}.") from error


def _describe(source: Any) -> str:
    if isinstance(source, str) and not is_json_text(source):
        text = repr(source)
        return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
    return repr(os.fspath(source)) if isinstance(source, os.PathLike) else "The pose document"
