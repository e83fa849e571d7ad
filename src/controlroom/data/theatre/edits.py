"""Before, instruction, after: what following an instruction means in the theatre, with ground truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import article
from controlroom.data.theatre.poses import fit_to_canvas, named_pose
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import (
    CANVAS,
    DEFAULT_MIX,
    Dice,
    Prop,
    Puppet,
    Scene,
    Split,
    is_held_out_combination,
    sample_scene,
)


@dataclass(frozen=True)
class Edit:
    """``after`` differs from ``before`` in what the instruction asks for and in nothing else."""

    before: Scene
    instruction: str
    after: Scene
    kind: str

    def changed(self, size: int = CANVAS, tolerance: int = 12) -> NDArray[np.bool_]:
        """Where the two pictures differ: [size, size]."""
        first, second = (np.asarray(render(scene, size), dtype=np.int16) for scene in (self.before, self.after))
        return np.abs(first - second).max(axis=-1) > tolerance


def _other(dice: Dice, options: tuple[str, ...], current: str) -> str:
    return dice.pick(tuple(option for option in options if option != current))


def _with(scene: Scene, index: int, actor: Puppet | Prop) -> Scene:
    return replace(scene, actors=tuple(actor if i == index else other for i, other in enumerate(scene.actors)))


def _say(dice: Dice, thing: str, value: str) -> str:
    return dice.pick((f"make the {thing} {value}", f"change the {thing} to {value}", f"turn the {thing} {value}"))


Change = tuple[Scene, str] | None


def _top_colour(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    top = puppet.identity.top
    colour = _other(dice, tuple(v.COLOURS), top.colour)
    identity = replace(puppet.identity, top=replace(top, colour=colour))
    return _with(scene, index, replace(puppet, identity=identity)), _say(dice, top.kind, colour)


def _top_pattern(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    top = puppet.identity.top
    pattern = _other(dice, v.PATTERNS, top.pattern)
    identity = replace(puppet.identity, top=replace(top, pattern=pattern))
    return _with(scene, index, replace(puppet, identity=identity)), f"make the {top.kind} {pattern}"


def _lower_colour(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    lower = puppet.identity.lower
    colour = _other(dice, tuple(v.COLOURS), lower.colour)
    identity = replace(puppet.identity, lower=replace(lower, colour=colour))
    return _with(scene, index, replace(puppet, identity=identity)), _say(dice, lower.kind, colour)


def _lower_kind(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    lower = puppet.identity.lower
    kind = _other(dice, v.LOWERS if puppet.identity.figure == "woman" else ("trousers", "shorts"), lower.kind)
    identity = replace(puppet.identity, lower=replace(lower, kind=kind))
    words = kind if kind != "skirt" else "a skirt"
    return _with(scene, index, replace(puppet, identity=identity)), f"change the {lower.kind} to {words}"


def _hair(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    colour = _other(dice, tuple(v.HAIR_COLOURS), puppet.identity.hair_colour)
    identity = replace(puppet.identity, hair_colour=colour)
    return _with(scene, index, replace(puppet, identity=identity)), _say(dice, "hair", colour)


def _hat(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    if puppet.identity.hat != "none":
        identity = replace(puppet.identity, hat="none")
        return _with(scene, index, replace(puppet, identity=identity)), "remove the hat"
    hat, colour = dice.pick(v.HATS[1:]), dice.pick(tuple(v.COLOURS))
    dressed = fit_to_canvas(replace(puppet, identity=replace(puppet.identity, hat=hat, hat_colour=colour)))
    if (dressed.x, dressed.scale) != (puppet.x, puppet.scale):
        return None  # it would not fit without moving the puppet
    return _with(scene, index, dressed), f"{dice.pick(('add', 'put on'))} {article(f'{colour} {hat}')}"


def _expression(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    if puppet.view == "back":
        return None
    mood = _other(dice, v.EXPRESSIONS, puppet.expression)
    return _with(scene, index, replace(puppet, expression=mood)), f"make the {puppet.identity.figure} {mood}"


def _pose(scene: Scene, index: int, puppet: Puppet, dice: Dice) -> Change:
    pose = _other(dice, v.POSES, puppet.pose)
    moved = fit_to_canvas(replace(puppet, pose=pose, angles=named_pose(pose, dice)))
    return _with(scene, index, moved), f"make the {puppet.identity.figure} {v.POSE_PHRASES[pose]}"


def _place(scene: Scene, dice: Dice) -> Change:
    place = _other(dice, v.PLACES, scene.place)
    words = dice.pick((f"move {v.PLACE_PHRASES[place]}", f"make it {v.PLACE_PHRASES[place]}"))
    return replace(scene, place=place), words


def _style(scene: Scene, dice: Dice) -> Change:
    style = _other(dice, v.STYLES[1:], scene.style)
    return replace(scene, style=style), f"make it {v.STYLE_PHRASES[style]}"


def _prop_colour(scene: Scene, index: int, prop: Prop, dice: Dice) -> Change:
    colour = _other(dice, tuple(v.COLOURS), prop.colour)
    return _with(scene, index, replace(prop, colour=colour)), _say(dice, prop.kind, colour)


def _prop_kind(scene: Scene, index: int, prop: Prop, dice: Dice) -> Change:
    family = v.ANIMALS if prop.kind in v.ANIMALS else v.THINGS
    kind = _other(dice, family, prop.kind)
    if any(isinstance(actor, Prop) and actor.kind == kind for actor in scene.actors):
        return None
    view = "side" if kind in v.SIDE_FIRST else "front"
    words = dice.pick((f"turn the {prop.kind} into {article(kind)}", f"replace the {prop.kind} with {article(kind)}"))
    return _with(scene, index, replace(prop, kind=kind, view=view)), words


def _prop_removed(scene: Scene, index: int, prop: Prop, dice: Dice) -> Change:
    if len(scene.actors) < 2:
        return None
    actors = tuple(actor for i, actor in enumerate(scene.actors) if i != index)
    return replace(scene, actors=actors), f"remove the {prop.kind}"


_ON_PUPPET: dict[str, Callable[[Scene, int, Puppet, Dice], Change]] = {
    "top colour": _top_colour,
    "top pattern": _top_pattern,
    "lower colour": _lower_colour,
    "lower kind": _lower_kind,
    "hair colour": _hair,
    "hat": _hat,
    "expression": _expression,
    "pose": _pose,
}
_ON_PROP: dict[str, Callable[[Scene, int, Prop, Dice], Change]] = {
    "prop colour": _prop_colour,
    "prop kind": _prop_kind,
    "prop removed": _prop_removed,
}
_ON_SCENE: dict[str, Callable[[Scene, Dice], Change]] = {"place": _place, "style": _style}
KINDS = (*_ON_PUPPET, *_ON_PROP, *_ON_SCENE)


def sample_edit(seed: int, split: Split = "train", kind: str | None = None) -> Edit:
    """The triple of ``seed``; of one ``kind`` if given (see `KINDS`)."""
    if kind is not None and kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; expected one of {', '.join(KINDS)}")
    for attempt in range(10_000):
        dice = Dice("edit", split, seed, attempt)
        before = sample_scene(seed * 10_007 + attempt, split, DEFAULT_MIX)
        wanted = kind or dice.weighted({name: 0.5 if name in ("pose", "style") else 1.0 for name in KINDS})
        change = _change(before, wanted, dice)
        if change is None:
            continue
        after, instruction = change
        if not is_held_out_combination(after) and after != before:
            return Edit(before, instruction, after, wanted)
    raise AssertionError(f"no scene was found in which {kind} could change")


def further_edit(edit: Edit, seed: int, kind: str, split: Split = "train") -> Edit | None:
    """One more change on top of an edit's: from its scene after to the scene after both; None: it cannot be made."""
    change = _change(edit.after, kind, Dice("further edit", split, seed, kind))
    if change is None or is_held_out_combination(change[0]) or change[0] == edit.after:
        return None
    return Edit(edit.after, change[1], change[0], kind)


def _change(scene: Scene, kind: str, dice: Dice) -> Change:
    if scene.framing != "full" or not scene.actors:
        return None
    if kind in _ON_SCENE:
        return _ON_SCENE[kind](scene, dice)
    if kind in _ON_PUPPET:
        if len(scene.puppets) != 1 or scene.style == "pixel":
            return None  # "the shirt" must mean one, and be seen
        index = next(i for i, actor in enumerate(scene.actors) if isinstance(actor, Puppet))
        actor = scene.actors[index]
        assert isinstance(actor, Puppet)
        return _ON_PUPPET[kind](scene, index, actor, dice)
    indices = [i for i, actor in enumerate(scene.actors) if isinstance(actor, Prop)]
    if not indices:
        return None
    index = dice.pick(indices)
    prop = scene.actors[index]
    assert isinstance(prop, Prop)
    return _ON_PROP[kind](scene, index, prop, dice)
