"""The same puppet twice: what retargeting and identity are trained on and measured with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.poses import FREE, fit_to_canvas, free_pose, named_pose
from controlroom.data.theatre.scene import (
    Dice,
    Identity,
    Puppet,
    Scene,
    Split,
    is_held_out_combination,
    sample_identity,
)


@dataclass(frozen=True)
class Pair:
    """One puppet in two poses. ``target`` has the source's place unless ``moved``."""

    source: Scene
    target: Scene
    moved: bool


def _pose(puppet: Puppet, dice: Dice, free: float) -> Puppet:
    if dice.chance(free):
        return replace(puppet, pose=FREE, angles=free_pose(dice))
    name = dice.pick(v.POSES)
    return replace(puppet, pose=name, angles=named_pose(name, dice))


def appearance(identity: Identity, dice: Dice, place: str, backdrop_seed: int, free: float = 0.5) -> Scene:
    """``identity`` alone on the stage, from the front, in a pose of its own."""
    puppet = Puppet(
        identity=identity,
        angles=free_pose(dice),
        expression=dice.weighted({"neutral": 0.4, "smiling": 0.3, "surprised": 0.15, "frowning": 0.15}),
        x=dice.between(52, 76),
        ground=dice.between(116, 121),
        scale=dice.between(0.96, 1.1),
    )
    return Scene(place, (fit_to_canvas(_pose(puppet, dice, free)),), "flat", backdrop_seed)


def sample_pair(seed: int, split: Split = "train", moved: float = 0.0, free: float = 0.5) -> Pair:
    """The pair of ``seed``. ``moved``: chance that the target is in another place. Expression stays the source's."""
    for attempt in range(10_000):
        dice = Dice("pair", split, seed, attempt)
        identity = sample_identity(dice)
        place, backdrop = dice.pick(v.PLACES), int(dice.unit() * 2**31)
        source = appearance(identity, dice, place, backdrop, free)
        elsewhere = dice.chance(moved)
        if elsewhere:
            place, backdrop = dice.pick(v.PLACES), int(dice.unit() * 2**31)
        target = appearance(identity, dice, place, backdrop, free)
        actor = replace(target.puppets[0], expression=source.puppets[0].expression)
        target = replace(target, actors=(actor,))
        if not (is_held_out_combination(source) or is_held_out_combination(target)):
            return Pair(source, target, elsewhere)
    raise AssertionError("no pair of this split was found")


def portraits(seed: int, count: int, split: Split = "train") -> list[Scene]:
    """``count`` different pictures of one puppet, in other poses, places and moods."""
    for attempt in range(10_000):
        dice = Dice("portraits", split, seed, attempt)
        identity = sample_identity(dice)
        found = [appearance(identity, dice, dice.pick(v.PLACES), int(dice.unit() * 2**31)) for _ in range(count)]
        if not any(is_held_out_combination(scene) for scene in found):
            return found
    raise AssertionError("no portraits of this split were found")
