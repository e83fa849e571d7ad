"""From whatever a person points at to a pose: a JSON file, a drawn skeleton, a doodle, a photograph, or a pose itself.

A picture is first looked at for a skeleton that is already drawn: its keypoints are read back from the colours, never
detected again. What else it may be is left to a reader: any object with ``read(image) -> Pose``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from PIL import Image

from controlroom.core.errors import InputError
from controlroom.core.images import ImageSource, load_image
from controlroom.core.pose import Pose
from controlroom.signals.pose.doodle import DoodleReader
from controlroom.signals.pose.openpose_document import Person
from controlroom.signals.pose.openpose_json import is_json_text, read_document, require_torso
from controlroom.signals.pose.paper import classify
from controlroom.signals.pose.skeleton_reader import recognise_skeleton

PoseSource: TypeAlias = "Pose | Mapping[str, Any] | Sequence[Any] | ImageSource"
PoseKind = Literal["pose", "json", "skeleton", "photo", "doodle"]


@runtime_checkable
class PoseReader(Protocol):
    """Finds a person's keypoints in a picture."""

    def read(self, image: Image.Image) -> Pose:
        """The pose of the main person of an RGB picture, in its pixels.

        Raises:
            InputError: nobody is in it, or the reader is not sure.
        """
        ...


@dataclass(frozen=True)
class PoseReading:
    """A pose and how it came about.

    Attributes:
        pose: on a canvas of the source's own size.
        kind: what the source was.
        reader: what read the keypoints: ``'json'``, ``'skeleton'``, the reader's class name, or ``'given'``.
        image: the picture it was read from, or None.
        notes: what a person should know of it, one sentence each.
    """

    pose: Pose
    kind: PoseKind
    reader: str
    image: Image.Image | None = None
    notes: tuple[str, ...] = ()


def read_pose(
    source: PoseSource, reader: PoseReader | None = None, person: Person = "largest", torso: bool = True
) -> PoseReading:
    """Read a pose from a `Pose`, OpenPose JSON (path, text, bytes or parsed), or a picture (see `load_image`).

    Args:
        source: files are known by what is in them, not by their names.
        reader: for photographs and doodles. Without one, doodles are read by `DoodleReader` and photographs refused.
        person: which person of a JSON file.
        torso: refuse a pose without a neck and a hip, which nothing can be drawn to.

    Raises:
        InputError: the source cannot be read, nobody is in it, no reader for it, or it has no torso.
    """
    reading = _read(source, reader, person)
    if torso:
        require_torso(reading.pose, _name(source))
    return reading


def _read(source: PoseSource, reader: PoseReader | None, person: Person) -> PoseReading:
    if isinstance(source, Pose):
        return PoseReading(source, "pose", "given")
    if is_json(source):
        document = read_document(source)  # type: ignore[arg-type]
        pose = document.choose(person, _name(source))
        notes = []
        people = sum(found is not None for found in document.people)
        if people > 1 and person == "largest":
            notes.append(f"The largest of {people} people was taken; choose another with person=0 to {people - 1}.")
        if document.canvas_guessed:
            notes.append(
                f"The file names no canvas; {pose.width} x {pose.height} was taken, with the person in its middle."
            )
        return PoseReading(pose, "json", "json", notes=tuple(notes))
    image = load_image(source)  # type: ignore[arg-type]
    drawn = recognise_skeleton(image)
    if drawn is not None:
        return PoseReading(drawn, "skeleton", "skeleton", image)
    kind = classify(image)
    notes = ()
    if kind == "doodle":
        reader = reader or DoodleReader()
        notes = ("A doodle does not say which side is left: the person is taken to face the viewer.",)
    if reader is None:
        raise InputError(
            f"{_name(source)} is a photograph, and there is nothing to find the person in it with. Give a pose as "
            "OpenPose JSON, a drawn skeleton or a doodle, or a reader (such as RtmlibReader with local weights)."
        )
    pose = reader.read(image)
    if (pose.width, pose.height) != image.size:
        pose = pose.scaled(*image.size)
    return PoseReading(pose, kind, type(reader).__name__, image, notes)


def is_json(source: Any) -> bool:
    """Whether it is a JSON document, or a file or bytes that start like one."""
    if isinstance(source, Mapping | list | tuple):
        return True
    if isinstance(source, bytes | bytearray):
        return _starts_like_json(bytes(source[:64]))
    if not isinstance(source, str | os.PathLike):
        return False
    text = os.fspath(source)
    if is_json_text(source):
        return True
    if isinstance(text, str) and text.lower().endswith(".json"):
        return True
    try:
        if not os.path.isfile(text):
            return False
        with open(text, "rb") as file:
            return _starts_like_json(file.read(64))
    except (OSError, ValueError):
        return False  # reading the picture says what is wrong with the path


def _starts_like_json(start: bytes) -> bool:
    return re.match(rb"(\xef\xbb\xbf)?\s*[\[{]", start) is not None


def _name(source: Any) -> str:
    if isinstance(source, str | os.PathLike) and not is_json_text(source):
        text = repr(os.fspath(source))
        return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
    return "The pose" if isinstance(source, Pose | Mapping | list | tuple | str) else "The picture"
