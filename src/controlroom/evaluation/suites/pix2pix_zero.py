"""What Pix2Pix-Zero changes along a direction: a colour, without words for the edit in the prompt.

The direction is the mean embedding of captions of other puppets whose part has the new colour, minus that of the same
captions with the old one. A direction has a vector for each place of the prompt, so the captions are of many forms:
where all have the colour as their fourth word, the direction colours whatever stands fourth in the prompt. The prompt
stays the caption before; re-prompting is told the caption after. Edits and judge are those of the suite
``prompt_to_prompt``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field

from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import training_caption
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.scene import Dice, Identity, Scene, sample_scene
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.prompt_to_prompt import COLOURS, as_many_words
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.evaluation.theatre_quality import CORE_MIX
from controlroom.signals.readers import AttributeReader, KeypointReader

ZERO = "pix2pix_zero"
SENTENCES = 64
_FIRST_SENTENCE = 70_000
_NO_COLOUR = "colourless"


class Settings(SuiteSettings):
    """Of the control: its step size, its share of the steps, and a factor on the direction."""

    kinds: tuple[str, ...] = COLOURS
    scale: float = Field(default=0.1, ge=0)
    end: float = Field(default=1.0, gt=0, le=1)
    direction: float = 1.0


def sentences(scene: Scene, kind: str, count: int = SENTENCES) -> list[str]:
    """Captions of other puppets with the colour that the scene's has; for another colour the same, with that one.

    Raises:
        InputError: not a colour of a puppet.

    >>> from controlroom.data.theatre.edits import sample_edit
    >>> edit = sample_edit(0, "held_out", "hair colour")
    >>> there, wanted = (sentences(scene, "hair colour") for scene in (edit.before, edit.after))
    >>> sum(a != b for a, b in zip(there, wanted))
    64
    """
    if kind not in COLOURS:
        raise InputError(f"Directions are measured of {', '.join(COLOURS)}; got {kind!r}.")
    like, found, number = scene.puppets[0].identity, list[str](), 0
    # A terse caption may leave the colour out; whether it does is the same for every colour.
    while len(found) < count:
        other = sample_scene(_FIRST_SENTENCE + number, "train", CORE_MIX)
        puppet = other.puppets[0]
        said, unsaid = (
            training_caption(replace(other, actors=(replace(puppet, identity=identity),)), Dice("sentence", number))
            for identity in (_coloured(puppet.identity, kind, like), _coloured(puppet.identity, kind, None))
        )
        number += 1
        if said != unsaid:
            found.append(said)
    return found


def _coloured(identity: Identity, kind: str, like: Identity | None) -> Identity:
    """An identity with one colour of another; None: with a colour that no puppet has."""
    if kind == "hair colour":
        return replace(identity, hair_colour=_NO_COLOUR if like is None else like.hair_colour)
    if kind == "top colour":
        return replace(identity, top=replace(identity.top, colour=_NO_COLOUR if like is None else like.top.colour))
    return replace(identity, lower=replace(identity.lower, colour=_NO_COLOUR if like is None else like.lower.colour))


def control(edit: Edit, settings: Settings) -> Pix2PixZero:
    """The direction of an edit."""
    there, wanted = (sentences(scene, edit.kind) for scene in (edit.before, edit.after))
    return Pix2PixZero(there, wanted, scale=settings.scale, end=settings.end, direction=settings.direction)


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` edits.

    Raises:
        InputError: an unknown kind of edit.
        ModelError: the theatre's readers are not in this installation.
    """

    def ours(edit: Edit, source: RunSpec, target: RunSpec) -> Mapping[str, RunSpec]:
        return {ZERO: source.model_copy(update={"controls": [control(edit, settings)]})}

    return editing.editing_suite(
        "pix2pix_zero",
        "Pix2Pix-Zero: one colour changed along a direction",
        settings,
        n,
        lambda number: editing.edit_number(number, settings.kinds, as_many_words),
        (Arm(ZERO, "Pix2Pix-Zero"),),
        ours,
        attribute_reader,
        keypoint_reader,
    )
