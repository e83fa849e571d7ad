"""Where the faces of puppets are: the five points that recognisers of faces find, from the ground truth."""

from __future__ import annotations

from collections.abc import Sequence

from controlroom.core.pose import Keypoints, Pose
from controlroom.data.theatre.people import Person
from controlroom.data.theatre.scene import CANVAS, Puppet, Scene
from controlroom.data.theatre.truth import face_keypoints, keypoints
from controlroom.signals.face import Points, five_points


def scene_pose(scene: Scene, size: int = CANVAS) -> Pose:
    """Body and face of the first puppet of a scene, in pixels of a picture of that size."""
    index = next(i for i, actor in enumerate(scene.actors) if isinstance(actor, Puppet))
    body, face = keypoints(scene, index, size), face_keypoints(scene, index, size)
    return Pose(body[:, :2], body[:, 2], size, size, Keypoints(face[:, :2], face[:, 2]))


def face_points(scene: Scene, size: int = CANVAS) -> Points:
    """Eyes, nose and corners of the mouth of the first puppet: [5, 2] in pixels.

    Raises:
        InputError: it shows its back.
    """
    return five_points(scene_pose(scene, size))


def points_of_people(people: Sequence[Person], size: int = CANVAS) -> dict[str, Points]:
    """Name of each of their pictures -> where the face is in it."""
    return {
        picture.name: face_points(scene, size)
        for person in people
        for picture, scene in zip(person.pictures(size=size), person.scenes, strict=True)
    }
