"""What is on the stage: scenes as plain data, drawn from a seed.

A scene says everything that can be seen; drawing (`render.py`), wording (`captions.py`) and truth (`truth.py`) are pure
functions of it. Lengths are in pixels of a 128 x 128 canvas, angles in degrees.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.poses import FREE, JointAngles, fit_to_canvas, free_pose, named_pose

T = TypeVar("T")
Split = Literal["train", "held_out", "combination"]

CANVAS = 128


class Dice:
    """Random choices from ``random.Random.random`` alone, the one draw Python keeps stable between versions."""

    def __init__(self, *key: object) -> None:
        self._rng = random.Random("/".join(map(str, (v.WORLD_VERSION, *key))))

    def unit(self) -> float:
        return self._rng.random()

    def chance(self, probability: float) -> bool:
        return self._rng.random() < probability

    def between(self, low: float, high: float) -> float:
        return low + (high - low) * self._rng.random()

    def pick(self, options: tuple[T, ...] | list[T]) -> T:
        return options[int(self._rng.random() * len(options))]

    def weighted(self, options: dict[T, float]) -> T:
        point = self._rng.random() * sum(options.values())
        for option, weight in options.items():
            point -= weight
            if point < 0:
                return option
        return next(iter(options))

    def normal(self, sigma: float) -> float:
        """About normal: the sum of four uniform draws, bounded at 3.5 sigma."""
        return sigma * 1.7320508 * (sum(self._rng.random() for _ in range(4)) - 2.0)


@dataclass(frozen=True)
class Garment:
    """A piece of clothing: kind, colour and pattern by their names in the vocabulary."""

    kind: str
    colour: str
    pattern: str = "plain"


@dataclass(frozen=True)
class Identity:
    """What stays the same when a puppet changes pose, place or mood."""

    figure: str
    skin: str
    hair_colour: str
    hair_length: str
    top: Garment
    lower: Garment
    hat: str = "none"
    hat_colour: str = "black"


@dataclass(frozen=True)
class Puppet:
    """A person on the stage."""

    identity: Identity
    angles: JointAngles
    pose: str = FREE  # one of vocabulary.POSES, or FREE
    expression: str = "neutral"
    view: str = "front"
    facing: int = 1  # side view: +1 looks to the right of the picture, -1 to the left
    x: float = 64.0  # middle of the hips
    ground: float = 119.0  # the lowest foot stands here
    scale: float = 1.0

    kind: Literal["puppet"] = "puppet"


@dataclass(frozen=True)
class Prop:
    """An animal or a thing."""

    kind: str
    colour: str
    size: str = "medium"
    view: str = "front"
    facing: int = 1
    x: float = 64.0
    ground: float = 116.0
    scale: float = 1.0


Actor = Puppet | Prop


@dataclass(frozen=True)
class Scene:
    """A place and who is there, first named first."""

    place: str
    actors: tuple[Actor, ...]
    style: str = "flat"
    backdrop_seed: int = 0
    framing: Literal["full", "portrait", "flat_lay"] = "full"
    garment: Garment | None = None  # flat_lay: this garment on white, no actors

    @property
    def puppets(self) -> tuple[Puppet, ...]:
        return tuple(actor for actor in self.actors if isinstance(actor, Puppet))

    @property
    def props(self) -> tuple[Prop, ...]:
        return tuple(actor for actor in self.actors if isinstance(actor, Prop))


def is_held_out_combination(scene: Scene) -> bool:
    """Combinations that training never shows, each of whose parts it does show: they test generalisation."""
    return bool(held_out_combination(scene))


def held_out_combination(scene: Scene) -> tuple[str, ...]:
    """The questions (`attributes`) whose answers together make a combination of that kind; none: it has none."""
    for actor in scene.actors:
        if isinstance(actor, Puppet):
            one = actor.identity
            if one.lower.kind == "skirt" and one.lower.colour == "green" and scene.place == "night":
                return ("lower", "lower colour", "place")
            if one.hair_colour == "red" and one.top.colour == "purple":
                return ("hair colour", "top colour")
            if actor.pose == "kicking" and scene.place == "stage":
                return ("pose", "place")
            if one.top.pattern == "dotted" and one.top.colour == "brown":
                return ("top pattern", "top colour")
        elif (actor.kind, actor.colour) in (("cat", "blue"), ("star", "pink")):
            return (actor.kind,)
    return ()


@dataclass(frozen=True)
class Mix:
    """Shares of the kinds of scenes; the default keeps most of the mass on one flat puppet seen from the front."""

    kinds: dict[str, float] = field(
        default_factory=lambda: {
            "puppet": 0.56,
            "portrait": 0.05,
            "puppet_and_prop": 0.09,
            "two_puppets": 0.05,
            "prop": 0.07,
            "two_props": 0.14,
            "three": 0.02,
            "flat_lay": 0.02,
        }
    )
    styles: dict[str, float] = field(
        default_factory=lambda: {"flat": 0.84, "sketch": 0.04, "watercolour": 0.04, "pixel": 0.04, "neon": 0.04}
    )
    views: dict[str, float] = field(default_factory=lambda: {"front": 0.85, "side": 0.07, "back": 0.05, "above": 0.03})
    free_pose: float = 0.4


DEFAULT_MIX = Mix()


def sample_garment(dice: Dice, kinds: tuple[str, ...], patterned: float) -> Garment:
    """A garment of one of ``kinds``, with a pattern with a chance of ``patterned``."""
    pattern = dice.pick(v.PATTERNS[1:]) if dice.chance(patterned) else "plain"
    return Garment(dice.pick(kinds), dice.pick(tuple(v.COLOURS)), pattern)


def sample_identity(dice: Dice) -> Identity:
    """A puppet's looks: hair goes with the figure most of the time, everything else is drawn evenly."""
    figure = dice.pick(v.FIGURES)
    long_hair = dice.chance(0.75 if figure == "woman" else 0.2)
    lower = sample_garment(dice, v.LOWERS if figure == "woman" else ("trousers", "shorts"), patterned=0.12)
    hat = dice.pick(v.HATS[1:]) if dice.chance(0.3) else "none"
    return Identity(
        figure=figure,
        skin=dice.pick(tuple(v.SKINS)),
        hair_colour=dice.pick(tuple(v.HAIR_COLOURS)),
        hair_length="long" if long_hair else "short",
        top=sample_garment(dice, v.TOPS, patterned=0.6),
        lower=lower,
        hat=hat,
        hat_colour=dice.pick(tuple(v.COLOURS)),
    )


def sample_puppet(dice: Dice, mix: Mix, x: float, scale: float, identity: Identity | None = None) -> Puppet:
    """A puppet whose joints all lie on the canvas. ``x`` is where its hips would like to be."""
    identity = identity or sample_identity(dice)
    view = dice.weighted(mix.views)
    if dice.chance(mix.free_pose):
        pose, angles = FREE, free_pose(dice)
    else:
        pose = dice.pick(v.POSES)
        angles = named_pose(pose, dice)
    puppet = Puppet(
        identity=identity,
        angles=angles,
        pose=pose,
        expression=dice.weighted({"neutral": 0.34, "smiling": 0.26, "surprised": 0.2, "frowning": 0.2}),
        view=view,
        facing=1 if dice.chance(0.5) else -1,
        x=x,
        ground=dice.between(116, 121),
        scale=scale,
    )
    return fit_to_canvas(puppet)


def _sample_prop(dice: Dice, x: float, kinds: tuple[str, ...], size: str, mix: Mix) -> Prop:
    kind = dice.pick(kinds)
    usual = "side" if kind in v.SIDE_FIRST else "front"
    views = {usual: mix.views["front"], "front": 0.0, "side": 0.0, "back": 0.0, "above": 0.0}
    rest = 1.0 - mix.views["front"]
    for view in v.VIEWS:
        views[view] = mix.views["front"] if view == usual else rest / 3
    return Prop(
        kind=kind,
        colour=dice.pick(tuple(v.COLOURS)),
        size=size,
        view=dice.weighted(views),
        facing=1 if dice.chance(0.5) else -1,
        x=x,
        ground=dice.between(108, 118),
        scale={"small": 0.74, "medium": 1.0, "big": 1.35}[size] * dice.between(0.94, 1.06),
    )


def _slots(dice: Dice, count: int) -> list[float]:
    middles = {2: [35.0, 93.0], 3: [23.0, 64.0, 105.0]}[count]
    return [middle + dice.between(-3, 3) for middle in middles]


def _compose(dice: Dice, mix: Mix) -> Scene:
    kind = dice.weighted(mix.kinds)
    place = dice.pick(v.PLACES)
    style = dice.weighted(mix.styles)
    backdrop = int(dice.unit() * 2**31)
    everything = v.ANIMALS + v.THINGS
    actors: list[Actor] = []
    framing: Literal["full", "portrait", "flat_lay"] = "full"
    if kind == "flat_lay":
        garment = sample_garment(dice, v.TOPS + v.LOWERS, patterned=0.5)
        return Scene("studio", (), "flat", backdrop, "flat_lay", garment)
    if kind in ("puppet", "portrait"):
        actors.append(sample_puppet(dice, mix, dice.between(54, 74), dice.between(1.0, 1.1)))
        framing = "portrait" if kind == "portrait" else "full"
    elif kind == "puppet_and_prop":
        first, second = _slots(dice, 2)
        if dice.chance(0.5):
            first, second = second, first
        toward = 1.0 if first < second else -1.0
        actors.append(sample_puppet(dice, mix, first + 3 * toward, dice.between(0.8, 0.9)))
        actors.append(_sample_prop(dice, second, everything, dice.pick(("small", "medium")), mix))
    elif kind == "two_puppets":
        actors.extend(sample_puppet(dice, mix, x, dice.between(0.74, 0.82)) for x in _slots(dice, 2))
    elif kind == "prop":
        actors.append(_sample_prop(dice, dice.between(48, 80), everything, dice.pick(v.SIZES), mix))
    else:
        count = 2 if kind == "two_props" else 3
        sizes = ("small", "medium") if count == 2 else ("small",)
        taken: tuple[str, ...] = ()
        for x in _slots(dice, count):
            # Two things of one kind could not be told apart by words.
            kinds = tuple(name for name in everything if name not in taken)
            prop = _sample_prop(dice, x, kinds, dice.pick(sizes), mix)
            taken += (prop.kind,)
            actors.append(prop)
    return Scene(place, tuple(actors), style, backdrop, framing)


def sample_scene(seed: int, split: Split = "train", mix: Mix = DEFAULT_MIX) -> Scene:
    """The scene of ``seed``. Splits draw from different streams, so their scenes never meet.

    ``train`` and ``held_out`` avoid the combinations of `is_held_out_combination`; ``combination`` shows only those.
    """
    wanted = split == "combination"
    for attempt in range(100_000):
        dice = Dice(split, seed, attempt)
        scene = _compose(dice, mix)
        if wanted:
            scene = _force_combination(dice, scene)
        if is_held_out_combination(scene) == wanted:
            return scene
    raise AssertionError("the mix of scenes never gives a scene of this split")


def _force_combination(dice: Dice, scene: Scene) -> Scene:
    """Turn a scene's first actor into one of the held-out combinations."""
    if not scene.actors:
        return scene
    actor, rest = scene.actors[0], scene.actors[1:]
    if isinstance(actor, Prop):
        kind, colour = dice.pick([("cat", "blue"), ("star", "pink")])
        if any(isinstance(other, Prop) and other.kind == kind for other in rest):
            return scene
        return replace(scene, actors=(replace(actor, kind=kind, colour=colour), *rest))
    identity, place = actor.identity, scene.place
    case = dice.pick(["skirt", "hair", "top"])
    if case == "skirt":
        identity = replace(identity, figure="woman", lower=Garment("skirt", "green", dice.pick(("plain", "striped"))))
        place = "night"
    elif case == "hair":
        identity = replace(identity, hair_colour="red", top=replace(identity.top, colour="purple"))
    else:
        identity = replace(identity, top=replace(identity.top, colour="brown", pattern="dotted"))
    return replace(scene, place=place, actors=(replace(actor, identity=identity), *rest))
