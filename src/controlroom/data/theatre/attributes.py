"""A scene as answers to questions: what the attribute reader learns to see and quality is judged by.

An answer is a name from `ANSWERS`, or None where the question has no answer in the picture (the trousers of a portrait,
the shirt where two puppets stand). `read_caption` gives the answers that a caption states.
"""

from __future__ import annotations

import re
from typing import Final

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.poses import FREE
from controlroom.data.theatre.scene import Puppet, Scene

ABSENT: Final = "absent"

_COLOURS = tuple(v.COLOURS)
#: Questions about the one puppet of a scene.
PUPPET_ANSWERS: Final[dict[str, tuple[str, ...]]] = {
    "figure": v.FIGURES,
    "skin": tuple(v.SKINS),
    "hair colour": tuple(v.HAIR_COLOURS),
    "hair length": v.HAIR_LENGTHS,
    "top": v.TOPS,
    "top colour": _COLOURS,
    "top pattern": v.PATTERNS,
    "lower": v.LOWERS,
    "lower colour": _COLOURS,
    "lower pattern": v.PATTERNS,
    "hat": v.HATS,
    "hat colour": _COLOURS,
    "expression": v.EXPRESSIONS,
    "view": v.VIEWS,
    "pose": (*v.POSES, FREE),
}
#: Every question, with its possible answers. Each kind of prop is a question of its own: its colour, or absent.
ANSWERS: Final[dict[str, tuple[str, ...]]] = {
    "place": v.PLACES,
    "style": v.STYLES,
    "puppets": ("none", "one", "two"),
    **PUPPET_ANSWERS,
    **dict.fromkeys((*v.ANIMALS, *v.THINGS), (ABSENT, *_COLOURS)),
}

Answers = dict[str, str | None]


def attributes(scene: Scene) -> Answers:
    """The true answers for ``scene``."""
    found: Answers = dict.fromkeys(ANSWERS)
    if scene.framing == "flat_lay":
        return found
    found["place"] = scene.place
    found["style"] = scene.style
    found["puppets"] = ("none", "one", "two")[min(len(scene.puppets), 2)]
    for kind in (*v.ANIMALS, *v.THINGS):
        found[kind] = ABSENT
    for prop in scene.props:
        found[prop.kind] = prop.colour
    if len(scene.puppets) == 1:
        found.update(puppet_attributes(scene.puppets[0], scene.framing == "full", scene.style))
    return found


def puppet_attributes(puppet: Puppet, whole: bool = True, style: str = "flat") -> Answers:
    """The answers about one puppet; those that its framing, view or style hides are None."""
    one = puppet.identity
    legible = style != "pixel"
    found: Answers = {
        "figure": one.figure,
        "skin": one.skin if puppet.view != "back" or one.top.kind == "shirt" else None,
        "hair colour": one.hair_colour,
        "hair length": one.hair_length,
        "top": one.top.kind if whole else None,
        "top colour": one.top.colour,
        "top pattern": one.top.pattern if legible and whole else None,
        "lower": one.lower.kind if whole else None,
        "lower colour": one.lower.colour if whole else None,
        "lower pattern": one.lower.pattern if legible and whole else None,
        "hat": one.hat,
        "hat colour": one.hat_colour if one.hat != "none" else None,
        "expression": puppet.expression if legible and puppet.view != "back" else None,
        "view": puppet.view,
        "pose": puppet.pose if whole else None,
    }
    return found


_ANY_COLOUR = "|".join(_COLOURS)
_ANY_PATTERN = "|".join(v.PATTERNS)
_GARMENT = r"\b({colours}) (?:({patterns}) )?({kinds})\b"
_TOP = re.compile(_GARMENT.format(colours=_ANY_COLOUR, patterns=_ANY_PATTERN, kinds="|".join(v.TOPS)))
_LOWER = re.compile(_GARMENT.format(colours=_ANY_COLOUR, patterns=_ANY_PATTERN, kinds="|".join(v.LOWERS)))
_HAT = re.compile(rf"\b({_ANY_COLOUR}) ({'|'.join(v.HATS[1:])})\b")
_HAIR = re.compile(rf"\b(?:({'|'.join(v.HAIR_LENGTHS)}) )?({'|'.join(v.HAIR_COLOURS)}) hair\b")
_SKIN = re.compile(rf"\b({'|'.join(v.SKINS)}) skin\b")
_PROP = re.compile(rf"\b({_ANY_COLOUR}) ({'|'.join((*v.ANIMALS, *v.THINGS))})\b")
_WHO = re.compile(rf"\b({'|'.join((*v.FIGURES, 'person'))})\b")
_WORD_OF: Final[dict[str, dict[str, str]]] = {
    "place": v.PLACE_PHRASES,
    "style": {name: phrase for name, phrase in v.STYLE_PHRASES.items() if phrase},
    "pose": v.POSE_PHRASES,
    "view": v.VIEW_PHRASES,
    "expression": {name: name for name in v.EXPRESSIONS},
}


def read_caption(text: str) -> Answers:
    """The answers that a caption states; None where it says nothing, or where two puppets share the question."""
    found: Answers = dict.fromkeys(ANSWERS)
    people, props = _WHO.findall(text), _PROP.findall(text)
    for colour, kind in props:
        found[kind] = colour
    if people:
        found["puppets"] = "one" if len(people) == 1 else "two"
    for question in ("place", "style", "pose", "view", "expression"):
        if question in PUPPET_ANSWERS and (len(people) != 1 or (question == "view" and props)):
            continue
        for name, phrase in _WORD_OF[question].items():
            if re.search(rf"\b{phrase}\b", text):
                found[question] = name
    if len(people) != 1:
        return found
    found["figure"] = people[0] if people[0] in v.FIGURES else None
    for question, pattern in (("top", _TOP), ("lower", _LOWER)):
        match = pattern.search(text)
        if match:
            found[f"{question} colour"], found[question] = match[1], match[3]
            found[f"{question} pattern"] = match[2] or "plain"
    if match := _HAT.search(text):
        found["hat colour"], found["hat"] = match[1], match[2]
    if match := _HAIR.search(text):
        found["hair length"], found["hair colour"] = match[1], match[2]
    if match := _SKIN.search(text):
        found["skin"] = match[1]
    return found


def labels(answers: Answers) -> list[int]:
    """Class numbers in the order of `ANSWERS`; -1 for None."""
    return [
        -1 if answers[question] is None else options.index(str(answers[question]))
        for question, options in ANSWERS.items()
    ]
