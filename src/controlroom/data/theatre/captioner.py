"""What a picture of the theatre shows, in the theatre's words: the attribute reader's answers as one sentence.

For methods that start from a caption. Where the scene is known, `captions.full_caption` says what is true instead. The
sentence leaves out what the reader does not answer: where actors stand, how big things are, and who two puppets are.
"""

from __future__ import annotations

from typing import Protocol

from PIL import Image

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.attributes import ABSENT, Answers
from controlroom.data.theatre.captions import article, garment_phrase
from controlroom.data.theatre.poses import FREE
from controlroom.data.theatre.scene import Garment


class AnswersQuestions(Protocol):
    """An attribute reader."""

    def read(self, pictures: list[Image.Image]) -> list[dict[str, str]]:
        """The answer to every question, for each picture."""
        ...


class TheatreCaptioner:
    """Captions of the theatre's pictures: a `controlroom.signals.captioner.Captioner`.

    Args:
        reader: the theatre's `AttributeReader`.
    """

    def __init__(self, reader: AnswersQuestions) -> None:
        self.reader = reader

    def __call__(self, image: Image.Image) -> str:
        """One sentence about an RGB picture of the theatre."""
        return caption_of(dict(self.reader.read([image])[0]))


def caption_of(answers: Answers) -> str:
    """Answers to the questions of `attributes.ANSWERS` as a caption; what is None is not said.

    Example:
        >>> caption_of({"place": "beach", "puppets": "none", "ball": "red", "style": "sketch"})
        'a pencil sketch of a red ball on the beach'
    """
    puppets = answers.get("puppets")
    actors = [_puppet(answers)] if puppets == "one" else ["two people"] if puppets == "two" else []
    for kind in (*v.ANIMALS, *v.THINGS):
        colour = answers.get(kind)
        if colour is not None and colour != ABSENT:
            actors.append(article(f"{colour} {kind}"))
    who = " and ".join(actors) if len(actors) <= 2 else ", ".join(actors[:-1]) + " and " + actors[-1]
    place, style = answers.get("place"), v.STYLE_PHRASES[answers.get("style") or "flat"]
    if place is not None:
        who = f"{who}{', ' if len(who) > 40 else ' ' if who else ''}{v.PLACE_PHRASES[place]}"
    if not style:
        return who
    return f"{article(style)} of {who}" if style != v.STYLE_PHRASES["neon"] else f"{who}, {style}"


def _puppet(answers: Answers) -> str:
    legible = answers.get("style") != "pixel"  # too coarse for mouths and patterns
    expression, view = answers.get("expression"), answers.get("view")
    mood = f"{expression} " if expression not in (None, "neutral") and legible and view != "back" else ""
    phrase = article(f"{mood}{answers.get('figure') or 'person'}")
    if answers.get("hair colour"):
        length = answers.get("hair length")
        phrase += f" with {f'{length} ' if length else ''}{answers['hair colour']} hair"
    wearing: list[str] = []
    for name in ("top", "lower"):
        kind, colour = answers.get(name), answers.get(f"{name} colour")
        if kind is not None and colour is not None:
            wearing.append(garment_phrase(Garment(kind, colour, answers.get(f"{name} pattern") or "plain"), legible))
    hat, hat_colour = answers.get("hat"), answers.get("hat colour")
    if hat not in (None, "none") and hat_colour is not None:
        wearing.append(article(f"{hat_colour} {hat}"))
    if wearing:
        phrase += " wearing " + (wearing[0] if len(wearing) == 1 else ", ".join(wearing[:-1]) + " and " + wearing[-1])
    pose = answers.get("pose")
    if pose not in (None, FREE):
        phrase += f", {v.POSE_PHRASES[str(pose)]}"
    if view not in (None, "front"):
        phrase += f", seen {v.VIEW_PHRASES[str(view)]}"
    return phrase
