"""The theatre's DreamBench: subjects, 25 prompts for each, and what a reader must find in a picture of them.

A subject is a puppet (its looks) or a prop (its kind and colour). A prompt puts it in another place, pose, mood, style
or company, or gives it a hat; it says nothing else of the looks, so whatever the reader finds of them was learned. What
a prompt changes (the hat) is left out of what must stay.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from controlroom.core.errors import InputError
from controlroom.data.subjects import TOKEN, Subject
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import puppet_attributes
from controlroom.data.theatre.captions import article, usual_view
from controlroom.data.theatre.people import Side, people, scene_picture, spread, subject_caption
from controlroom.data.theatre.scene import CANVAS, Dice, Prop, Puppet, Scene, is_held_out_combination

PROMPTS = 25

_KINDS = (*v.ANIMALS, *v.THINGS)
_NOT_LOOKS = ("expression", "view", "pose")
_SCALES = {"small": 0.74, "medium": 1.0, "big": 1.35}


@dataclass(frozen=True)
class SubjectPrompt:
    """A prompt and the answers it asks for.

    Attributes:
        text: holds `TOKEN`.
        asks: question of the attribute reader -> answer.
        style, view: how the picture is drawn and seen; they hide some looks.
    """

    text: str
    asks: Mapping[str, str]
    style: str = "flat"
    view: str = "front"


@dataclass(frozen=True)
class TheatreSubject:
    """Somebody or something of the theatre, scenes of it, and prompts with their answers.

    Attributes:
        name: "held_out-0003" for a puppet, "red cat" for a prop.
        class_words: "woman", "man", or the kind of the prop.
        scenes: of it alone.
        prompts: `PROMPTS` of them.
    """

    name: str
    class_words: str
    scenes: tuple[Scene, ...]
    prompts: tuple[SubjectPrompt, ...]

    @property
    def actor(self) -> Puppet | Prop:
        """The subject, as it stands in its first scene."""
        return self.scenes[0].actors[0]

    def subject(self, size: int = CANVAS) -> Subject:
        """As datasets on disk are read: pictures captioned with where it is and what it does."""
        pictures = tuple(
            scene_picture(scene, f"{self.name}/{number:02d}", _caption(scene), self.name, size)
            for number, scene in enumerate(self.scenes)
        )
        live = self.class_words in (*v.FIGURES, *v.ANIMALS)
        return Subject(self.name, self.class_words, pictures, tuple(prompt.text for prompt in self.prompts), live)

    def keeps(self, prompt: SubjectPrompt) -> dict[str, str]:
        """Answers about its looks that must be found under a prompt."""
        actor = self.actor
        if isinstance(actor, Prop):
            return {actor.kind: actor.colour}
        seen = puppet_attributes(replace(actor, view=prompt.view), style=prompt.style)
        return {
            question: answer
            for question, answer in seen.items()
            if answer is not None and question not in (*_NOT_LOOKS, *prompt.asks)
        }


def theatre_subjects(
    puppets: int = 20, props: int = 10, pictures_each: int = 5, side: Side = "held_out", seed: int = 0
) -> tuple[TheatreSubject, ...]:
    """Subjects, puppets first; all different.

    Args:
        puppets, props: how many of each; there are 128 props.
        pictures_each: scenes of each subject.
        side: of the puppets, as in `people`; props are on both sides.
        seed: of the subjects.

    Raises:
        InputError: fewer than one subject or picture, or more props than there are.
    """
    shown = [
        (kind, colour) for kind in _KINDS for colour in v.COLOURS if not is_held_out_combination(_alone(kind, colour))
    ]
    if puppets < 0 or props < 0 or puppets + props < 1 or pictures_each < 1 or props > len(shown):
        raise InputError(
            f"{puppets} puppets and {props} props with {pictures_each} pictures each are not possible; expected at "
            f"least one subject, one picture, and at most {len(shown)} props."
        )
    found = []
    for person in people(side, puppets, pictures_each, seed) if puppets else ():
        figure = person.identity.figure
        found.append(TheatreSubject(person.name, figure, person.scenes, puppet_prompts(person.name)))
    for number in range(props):
        kind, colour = spread(tuple(shown), number, "prop subjects", seed)
        scenes = tuple(_prop_scene(kind, colour, seed, k) for k in range(pictures_each))
        found.append(TheatreSubject(f"{colour} {kind}", kind, scenes, prop_prompts(kind, colour)))
    return tuple(found)


def puppet_prompts(name: str) -> tuple[SubjectPrompt, ...]:
    """What is asked of a puppet: everywhere, in every style, and by its name some poses, moods, hats and company."""

    def some(options: tuple[str, ...], count: int, what: str) -> list[str]:
        return [spread(options, number, "prompts", what, name) for number in range(count)]

    found = _places_and_styles()
    for pose in some(tuple(pose for pose in v.POSES if pose != "standing"), 4, "pose"):
        found.append(SubjectPrompt(f"a {TOKEN} {v.POSE_PHRASES[pose]} in a studio", {"pose": pose}))
    for mood in v.EXPRESSIONS[1:]:
        found.append(SubjectPrompt(f"a {mood} {TOKEN} in a room", {"expression": mood}))
    found.append(SubjectPrompt(f"a {TOKEN} seen {v.VIEW_PHRASES['back']}", {"view": "back"}, view="back"))
    hats = zip(some(v.HATS[1:], 2, "hat"), some(tuple(v.COLOURS), 2, "hat colour"), strict=True)
    for hat, colour in hats:
        text = f"a {TOKEN} wearing {article(f'{colour} {hat}')}"
        found.append(SubjectPrompt(text, {"hat": hat, "hat colour": colour}))
    company = zip(some(_KINDS, 2, "company"), some(_safe_colours(), 2, "company colour"), strict=True)
    for kind, colour in company:
        found.append(SubjectPrompt(f"a {TOKEN} and {article(f'{colour} {kind}')}", {kind: colour}))
    assert len(found) == PROMPTS
    return tuple(found)


def prop_prompts(kind: str, colour: str) -> tuple[SubjectPrompt, ...]:
    """What is asked of a prop: everywhere, in every style, beside other props and people."""
    found = _places_and_styles()
    others = tuple(other for other in _KINDS if other != kind)
    for number in range(8):
        other = spread(others, number, "prompts", "beside", kind, colour)
        shade = spread(_safe_colours(), number, "prompts", "shade", kind, colour)
        where, asks = "", {other: shade}
        if number >= 4:
            place = spread(v.PLACES, number, "prompts", "where", kind, colour)
            where, asks = f" {v.PLACE_PHRASES[place]}", {other: shade, "place": place}
        found.append(SubjectPrompt(f"a {TOKEN} and {article(f'{shade} {other}')}{where}", asks))
    for number in range(4):
        figure, place = v.FIGURES[number % 2], spread(v.PLACES, number, "prompts", "with", kind, colour)
        text = f"a {TOKEN} and a {figure} {v.PLACE_PHRASES[place]}"
        found.append(SubjectPrompt(text, {"puppets": "one", "figure": figure, "place": place}))
    assert len(found) == PROMPTS
    return tuple(found)


def score(subject: TheatreSubject, prompt: SubjectPrompt, read: Mapping[str, str]) -> tuple[float, float]:
    """Shares of what had to stay, and of what was asked, that the attribute reader found in a picture."""

    def share(wanted: Mapping[str, str]) -> float:
        return sum(read.get(question) == answer for question, answer in wanted.items()) / len(wanted)

    return share(subject.keeps(prompt)), share(prompt.asks)


def _places_and_styles() -> list[SubjectPrompt]:
    found = [SubjectPrompt(f"a {TOKEN} {v.PLACE_PHRASES[place]}", {"place": place}) for place in v.PLACES]
    for style, phrase in v.STYLE_PHRASES.items():
        if phrase:
            text = f"a {TOKEN}, {phrase}" if style == "neon" else f"{article(phrase)} of a {TOKEN}"
            found.append(SubjectPrompt(text, {"style": style}, style=style))
    return found


def _safe_colours() -> tuple[str, ...]:
    """Colours in which every prop is shown in training."""
    return tuple(
        colour for colour in v.COLOURS if not any(is_held_out_combination(_alone(kind, colour)) for kind in _KINDS)
    )


def _alone(kind: str, colour: str) -> Scene:
    return Scene("studio", (Prop(kind, colour),))


def _prop_scene(kind: str, colour: str, seed: int, number: int) -> Scene:
    key = ("prop subject", kind, colour, seed)
    dice = Dice(*key, number)
    size = spread(v.SIZES, number, *key, "size")
    prop = Prop(
        kind,
        colour,
        size,
        usual_view(kind),
        1 if dice.chance(0.5) else -1,
        dice.between(48, 80),
        dice.between(108, 118),
        _SCALES[size] * dice.between(0.94, 1.06),
    )
    return Scene(spread(v.PLACES, number, *key, "place"), (prop,), "flat", int(dice.unit() * 2**31))


def _caption(scene: Scene) -> str:
    if scene.puppets:
        return subject_caption(scene)
    size = scene.props[0].size
    return f"a {'' if size == 'medium' else f'{size} '}{TOKEN} {v.PLACE_PHRASES[scene.place]}"
