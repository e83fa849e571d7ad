"""Two subjects on one stage, each known from another scene: what models of several subjects learn from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from controlroom.data.groups import Group, PlacedSubject
from controlroom.data.pictures import Picture
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import article, full_caption
from controlroom.data.theatre.pairs import appearance, sample_pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import (
    CANVAS,
    Actor,
    Dice,
    Mix,
    Puppet,
    Scene,
    Split,
    is_held_out_combination,
    sample_scene,
)
from controlroom.data.theatre.truth import boxes, maps

TWO_PUPPETS = Mix(kinds={"two_puppets": 1.0}, styles={"flat": 1.0}, views={"front": 1.0})
PUPPET_AND_PROP = Mix(kinds={"puppet_and_prop": 1.0}, styles={"flat": 1.0}, views={"front": 1.0})


@dataclass(frozen=True)
class Company:
    """A scene of two actors, a scene of each alone, and where they are in the first, from 0 to 1."""

    scene: Scene
    alone: tuple[Scene, ...]
    boxes: tuple[tuple[float, float, float, float], ...]

    @property
    def words(self) -> tuple[str, ...]:
        """What each actor is called."""
        return tuple(name_of(actor) for actor in self.scene.actors)


def name_of(actor: Actor) -> str:
    """The one word for an actor: ``woman``, ``ball``."""
    return actor.identity.figure if isinstance(actor, Puppet) else actor.kind


def short_caption(scene: Scene) -> str:
    """Who is where, and nothing of their looks."""
    return f"{' and '.join(article(name_of(actor)) for actor in scene.actors)} {v.PLACE_PHRASES[scene.place]}"


def sample_company(seed: int, split: Split = "train", mix: Mix | None = None) -> Company:
    """The company of ``seed``: two puppets, or a puppet and a prop, in turns unless ``mix`` says otherwise."""
    mix = mix or (TWO_PUPPETS if seed % 2 == 0 else PUPPET_AND_PROP)
    for attempt in range(10_000):
        scene = sample_scene(seed * 10_000 + attempt, split, mix)
        found = boxes(scene)
        dice = Dice("company", split, seed, attempt)
        alone = tuple(_alone(actor, dice) for actor in scene.actors)
        if all(box is not None for box in found) and not any(is_held_out_combination(one) for one in alone):
            places = tuple((b[0] / CANVAS, b[1] / CANVAS, b[2] / CANVAS, b[3] / CANVAS) for b in found if b is not None)
            return Company(scene, alone, places)
    raise AssertionError("no company of this split was found")


def theatre_groups(count: int, split: Split = "train", first: int = 0) -> tuple[Group, ...]:
    """Companies as training pictures; half of the captions leave the looks to the pictures of the subjects."""
    return tuple(_group(seed, split) for seed in range(first, first + count))


def theatre_subjects(count: int, split: Split = "train", first: int = 0, moved: float = 0.7) -> tuple[Group, ...]:
    """One puppet on the stage, known from another pose and, with a chance of ``moved``, place; captions name neither
    looks nor clothes.
    """
    return tuple(_one_subject(seed, split, moved) for seed in range(first, first + count))


def _one_subject(seed: int, split: Split, moved: float) -> Group:
    pair, name = sample_pair(seed, split, moved), f"subject {split} {seed} {moved}"
    (box,) = boxes(pair.target)
    left, top, right, bottom = box if box is not None else (0.0, 0.0, float(CANVAS), float(CANVAS))
    place = (left / CANVAS, top / CANVAS, right / CANVAS, bottom / CANVAS)
    source = _picture(f"{name} source", pair.source, alone=True)
    subject = PlacedSubject(name_of(pair.target.puppets[0]), place, source, _mask(pair.target, 0))
    return Group(_picture(name, pair.target, short_caption(pair.target)), (subject,))


def _group(seed: int, split: Split) -> Group:
    company = sample_company(seed, split)
    short = Dice("company caption", split, seed).chance(0.5)
    words = short_caption(company.scene) if short else full_caption(company.scene)
    name = f"company {split} {seed}"
    subjects = [
        PlacedSubject(word, box, _picture(f"{name} subject {i}", alone, alone=True), _mask(company.scene, i))
        for i, (word, box, alone) in enumerate(zip(company.words, company.boxes, company.alone, strict=True))
    ]
    return Group(_picture(name, company.scene, words), tuple(subjects))


def _picture(name: str, scene: Scene, caption: str = "", alone: bool = False) -> Picture:
    """A picture of a scene; of an actor who is ``alone`` the mask is known too."""
    content, mask = f"{v.WORLD_VERSION} {name}", _mask(scene, 0) if alone else None
    return Picture(name, content, (CANVAS, CANVAS), lambda: render(scene), caption, mask)


def _mask(scene: Scene, actor: int) -> Callable[[], Image.Image]:
    """Where an actor is seen."""
    return lambda: Image.fromarray(maps(scene).mask(actor).astype(np.uint8) * 255)


def _alone(actor: Actor, dice: Dice) -> Scene:
    """The actor in another place; a puppet also in another pose."""
    place, backdrop = dice.pick(v.PLACES), int(dice.unit() * 2**31)
    if isinstance(actor, Puppet):
        return appearance(actor.identity, dice, place, backdrop)
    prop = replace(actor, x=dice.between(48, 80), ground=dice.between(108, 118), scale=dice.between(0.9, 1.2))
    return Scene(place, (replace(prop, facing=1 if dice.chance(0.5) else -1),), "flat", backdrop)


def scenes_of_groups(companies: Sequence[Company]) -> list[Scene]:
    """Every scene that companies show, for readers that must know them."""
    return [scene for company in companies for scene in (company.scene, *company.alone)]
