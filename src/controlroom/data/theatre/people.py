"""The theatre's LFW: people with ten pictures and more, drawn when they are read.

A puppet's looks stay, its pose, place, mood and backdrop change. Whom training may see and who is held out is decided
by the looks themselves, so the two sides never share anybody, whatever the seeds. The number of people and of their
pictures may grow: the first ones stay the same.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, TypeVar

from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.data.subjects import TOKEN
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.pairs import appearance
from controlroom.data.theatre.poses import FREE, fit_to_canvas, named_pose
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import (
    CANVAS,
    Dice,
    Identity,
    Scene,
    is_held_out_combination,
    sample_identity,
)

T = TypeVar("T")
Side = Literal["train", "held_out"]
Words = Literal["subject", "class", "full"]


@dataclass(frozen=True)
class Person:
    """Somebody, and scenes of them alone on the stage.

    Attributes:
        name: "train-0007".
        identity: their looks.
        scenes: all different; poses, places and moods are spread evenly over them.
    """

    name: str
    identity: Identity
    scenes: tuple[Scene, ...]

    def pictures(self, words: Words = "subject", size: int = CANVAS) -> tuple[Picture, ...]:
        """Their pictures, captioned as `theatre_people` says."""
        return tuple(
            scene_picture(scene, f"{self.name}/{number:02d}", _worded(scene, words), self.name, size)
            for number, scene in enumerate(self.scenes)
        )


def people(side: Side, count: int, scenes_each: int = 12, seed: int = 0) -> tuple[Person, ...]:
    """``count`` people who all look different, of one side of the split (two thirds of all looks are trained on).

    Raises:
        InputError: an unknown side, or counts below one.
    """
    if side not in ("train", "held_out"):
        raise InputError(f"There is no side {side!r}; expected 'train' or 'held_out'.")
    if count < 1 or scenes_each < 1:
        raise InputError(f"{count} people with {scenes_each} pictures each are none; expected 1 or more of both.")
    found: list[Person] = []
    seen: set[str] = set()
    attempt = 0
    while len(found) < count:
        identity = sample_identity(Dice("people", side, seed, attempt))
        attempt += 1
        if side_of(identity) != side or looks(identity) in seen or not _shown_everywhere(identity):
            continue
        seen.add(looks(identity))
        name = f"{side}-{len(found):04d}" if seed == 0 else f"{side}-{seed}-{len(found):04d}"
        scenes = tuple(_scene(identity, (side, seed, len(found)), number) for number in range(scenes_each))
        found.append(Person(name, identity, scenes))
    return tuple(found)


def theatre_people(
    side: Side, count: int, pictures_each: int = 12, words: Words = "subject", seed: int = 0, size: int = CANVAS
) -> tuple[Picture, ...]:
    """Pictures of ``count`` people; ``subject`` is the person's name.

    Args:
        side: ``train`` or ``held_out``; nobody is in both.
        count: of people.
        pictures_each: of every person.
        words: captions. ``subject``: "a smiling {token} waving on the beach"; ``class``: the same with "woman" or
            "man"; ``full``: everything that can be said of the looks as well.
        seed: of the people; another one draws others of the same side (some may be the same).
        size: of the pictures in pixels.

    Raises:
        InputError: as `people`.
    """
    return tuple(
        picture for person in people(side, count, pictures_each, seed) for picture in person.pictures(words, size)
    )


def looks(identity: Identity) -> str:
    """Everything that can be seen of somebody's looks; equal for people who cannot be told apart."""
    seen = replace(identity, hat_colour="none") if identity.hat == "none" else identity
    return repr(seen)


def side_of(identity: Identity) -> Side:
    """On which side of the split somebody of these looks is."""
    digest = hashlib.sha256(f"{v.WORLD_VERSION} {looks(identity)}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") % 3 == 0 else "train"


def subject_caption(scene: Scene, words: str = TOKEN) -> str:
    """What the first puppet of a scene does, how it feels and where it is, but nothing of its looks."""
    puppet = scene.puppets[0]
    mood = "" if puppet.expression == "neutral" else f"{puppet.expression} "
    pose = "" if puppet.pose == FREE else f" {v.POSE_PHRASES[puppet.pose]}"
    return f"a {mood}{words}{pose} {v.PLACE_PHRASES[scene.place]}"


def scene_picture(scene: Scene, name: str, caption: str, subject: str, size: int = CANVAS) -> Picture:
    """A scene as a picture that is drawn when it is read."""
    content = hashlib.sha256(f"{v.WORLD_VERSION} {size} {scene!r}".encode()).hexdigest()
    return Picture(name, content, (size, size), partial(render, scene, size), caption, subject=subject)


def spread(options: tuple[T, ...], number: int, *key: object) -> T:
    """The ``number``-th of endless rounds through the options, each round in another order."""
    turn, place = divmod(number, len(options))
    dice = Dice(*key, "round", turn)
    order = sorted((dice.unit(), index) for index in range(len(options)))
    return options[order[place][1]]


def _worded(scene: Scene, words: Words) -> str:
    if words == "full":
        return full_caption(scene)
    return subject_caption(scene, scene.puppets[0].identity.figure if words == "class" else TOKEN)


def _shown_everywhere(identity: Identity) -> bool:
    """Whether no place makes a combination that is kept from all training (a pose on the stage may still)."""
    puppet = appearance(identity, Dice("anywhere"), "studio", 0).puppets[0]
    return not any(is_held_out_combination(Scene(place, (replace(puppet, pose=FREE),))) for place in v.PLACES)


def _scene(identity: Identity, key: tuple[object, ...], number: int) -> Scene:
    place = spread(v.PLACES, number, "person place", *key)
    mood = spread(v.EXPRESSIONS, number, "person mood", *key)
    for attempt in range(100):
        dice = Dice("person scene", *key, number, attempt)
        scene = appearance(identity, dice, place, int(dice.unit() * 2**31), free=1.0)
        puppet = replace(scene.puppets[0], expression=mood)
        if number % 2 == 0:
            # Every second picture is in a pose that has a name; where it may not be shown, the next name is taken.
            pose = spread(v.POSES, number // 2 + attempt, "person pose", *key)
            puppet = fit_to_canvas(replace(puppet, pose=pose, angles=named_pose(pose, dice)))
        scene = replace(scene, actors=(puppet,))
        if not is_held_out_combination(scene):
            return scene
    raise AssertionError("no scene of this person was found")
