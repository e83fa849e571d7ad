"""What can be said about a scene: from two words to everything, always true."""

from __future__ import annotations

from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.poses import FREE
from controlroom.data.theatre.scene import Actor, Dice, Garment, Prop, Puppet, Scene

#: Views that show a difference; a ball is a ball from every side.
_VIEWLESS = ("ball",)
_SIDES_ALIKE = ("cone",)


def article(phrase: str) -> str:
    """``phrase`` with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def garment_phrase(garment: Garment, with_pattern: bool = True) -> str:
    """As in "a blue striped shirt" or "green trousers"; a plain pattern is not said."""
    pattern = f"{garment.pattern} " if with_pattern and garment.pattern != "plain" else ""
    phrase = f"{garment.colour} {pattern}{garment.kind}"
    return phrase if garment.kind in ("trousers", "shorts") else article(phrase)


def prop_phrase(prop: Prop, detail: float, dice: Dice) -> str:
    """As in "a small red ball"; the size is said with a chance of ``detail``, a medium one never."""
    size = f"{prop.size} " if prop.size != "medium" and dice.chance(detail) else ""
    return article(f"{size}{prop.colour} {prop.kind}")


def _view_shows(actor: Actor) -> bool:
    if isinstance(actor, Puppet):
        return True
    if actor.kind in _VIEWLESS:
        return False
    return actor.view == "above" if actor.kind in _SIDES_ALIKE else True


def usual_view(kind: str) -> str:
    """The view in which a prop is shown when none is asked for."""
    return "side" if kind in v.SIDE_FIRST else "front"


def puppet_phrase(puppet: Puppet, detail: float, dice: Dice, style: str = "flat", whole: bool = True) -> str:
    """A noun phrase for one puppet. ``detail`` is the chance of each fact; ``whole`` is False in a portrait."""
    one = puppet.identity
    blurred = style == "pixel"  # too coarse for mouths and patterns

    def say() -> bool:
        return dice.chance(detail)

    noun = one.figure if dice.chance(0.85) else "person"
    face = puppet.view != "back" and not blurred
    before = f"{puppet.expression} " if face and puppet.expression != "neutral" and say() else ""
    if face and puppet.expression == "neutral" and dice.chance(detail * 0.2):
        before = "neutral "
    skin = f"{one.skin} skin" if dice.chance(detail * 0.35) else ""
    hair = ""
    if say():
        length = f"{one.hair_length} " if say() else ""
        hair = f"{length}{one.hair_colour} hair"
    hat = article(f"{one.hat_colour} {one.hat}") if one.hat != "none" and say() else ""
    with_parts = [part for part in (skin, hair) if part]
    wearing = [garment_phrase(one.top, not blurred)] if say() else []
    if whole and say():
        wearing.append(garment_phrase(one.lower, not blurred))
    if hat:
        wearing.append(hat)
    phrase = article(f"{before}{noun}")
    if with_parts:
        phrase += " with " + " and ".join(with_parts)
    if wearing:
        listed = wearing[0] if len(wearing) == 1 else ", ".join(wearing[:-1]) + " and " + wearing[-1]
        phrase += " wearing " + listed
    if whole and puppet.pose != FREE and say():
        phrase += (" " if len(wearing) + len(with_parts) == 0 else ", ") + v.POSE_PHRASES[puppet.pose]
    return phrase


def caption(scene: Scene, dice: Dice, detail: float = 1.0) -> str:
    """One caption. ``detail`` 0 is the tersest true sentence, 1 says everything there is a word for."""

    def say() -> bool:
        return dice.chance(detail)

    if scene.framing == "flat_lay":
        assert scene.garment is not None
        return f"{garment_phrase(scene.garment)} laid flat"
    phrases: list[str] = []
    for actor in scene.actors:
        if isinstance(actor, Prop):
            phrase = prop_phrase(actor, detail, dice)
            unusual = actor.view != usual_view(actor.kind)
        else:
            phrase = puppet_phrase(actor, detail, dice, scene.style, scene.framing != "portrait")
            unusual = actor.view != "front"
        if _view_shows(actor) and (unusual or dice.chance(detail * 0.08)) and (unusual or scene.style != "pixel"):
            # An unusual view is nearly always said, or the words would leave too much open.
            if not unusual or dice.chance(0.9):
                phrase += ", " * (len(phrase) > 30) + " " * (len(phrase) <= 30) + f"seen {v.VIEW_PHRASES[actor.view]}"
        phrases.append(phrase)
    who = _join(phrases, dice, detail, scene)
    if scene.framing == "portrait":
        who = "a portrait of " + who
    place = v.PLACE_PHRASES[scene.place] if say() or dice.chance(0.5) else ""
    style = v.STYLE_PHRASES[scene.style]
    if place and dice.chance(0.15):
        text = f"{place}, {who}"
    else:
        text = f"{who}{', ' if len(who) > 40 else ' '}{place}" if place else who
    if style:
        text = f"{article(style)} of {text}" if scene.style != "neon" and dice.chance(0.5) else f"{text}, {style}"
    return text


def _join(phrases: list[str], dice: Dice, detail: float, scene: Scene) -> str:
    if len(phrases) == 2:
        ordered = sorted(range(2), key=lambda index: scene.actors[index].x)
        if dice.chance(detail * 0.25):
            left, right = (phrases[index] for index in ordered)
            return f"{left} on the left and {right} on the right"
        if dice.chance(0.3):
            return f"{phrases[1]} and {phrases[0]}"
        if dice.chance(0.2):
            return f"{phrases[0]} next to {phrases[1]}"
    return " and ".join(phrases) if len(phrases) <= 2 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def captions(scene: Scene, seed: int) -> tuple[str, str, str]:
    """Terse, medium and full caption of ``scene``; the same for the same seed."""
    return (
        caption(scene, Dice("caption", seed, 0), 0.15),
        caption(scene, Dice("caption", seed, 1), 0.6),
        caption(scene, Dice("caption", seed, 2), 1.0),
    )


def training_caption(scene: Scene, dice: Dice) -> str:
    """A caption as training draws it: mostly detailed, sometimes terse."""
    return caption(scene, dice, dice.weighted({1.0: 0.5, 0.75: 0.3, 0.35: 0.2}))


def full_caption(scene: Scene) -> str:
    """Everything that quality is judged by, in the canonical order: the caption used for measuring."""
    return caption(scene, Dice("full"), 1.0)
