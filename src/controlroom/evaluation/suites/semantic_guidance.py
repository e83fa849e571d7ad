"""What SEGA adds and leaves alone: an attribute of the caption is changed by a concept, not by the words of the prompt.

The source picture is drawn from the caption. SEGA draws the same caption from the same noise with two concepts: what is
wanted is added, what it stands in the place of is taken away ("a blue shirt" and not "a red shirt"). Beside it is
re-prompting with the caption of the scene after the change.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from controlroom.controls.guidance.semantic_guidance import SemanticEdit, SemanticGuidance
from controlroom.core.spec import RunSpec
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import article, garment_phrase
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.scene import Garment, Scene
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.signals.readers import AttributeReader, KeypointReader

SEGA = "semantic_guidance"
KINDS = ("top colour", "hair colour", "top pattern", "lower colour", "lower kind", "place")


class Settings(SuiteSettings):
    """Kinds are those that the checkpoint can draw from words at all; ``hat`` is one more."""

    kinds: tuple[str, ...] = KINDS
    scale: float = Field(default=8.0, gt=0)
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the concepts are not added yet."""
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Share of a direction's values that are left out, where the change is of a part;"""
    whole_threshold: float = Field(default=0.5, ge=0, le=1)
    """where it is of the whole picture (the place)."""
    take_away: bool = True
    """Also take away what was there; otherwise concepts are only added."""


def concept(scene: Scene, kind: str) -> str | None:
    """What a scene has of a kind, in words; None where there is no word for it (no hat, a plain shirt)."""
    if kind == "place":
        return v.PLACE_PHRASES[scene.place]
    if kind == "style":
        return v.STYLE_PHRASES[scene.style] or None
    puppet = scene.puppets[0]
    one = puppet.identity
    if kind == "hat":
        return None if one.hat == "none" else article(f"{one.hat_colour} {one.hat}")
    if kind == "top pattern":
        return None if one.top.pattern == "plain" else article(f"{one.top.pattern} {one.top.kind}")
    if kind == "lower kind":
        return garment_phrase(Garment(one.lower.kind, one.lower.colour))
    colours = {
        "hair colour": f"{one.hair_colour} hair",
        "top colour": garment_phrase(Garment(one.top.kind, one.top.colour)),
        "lower colour": garment_phrase(Garment(one.lower.kind, one.lower.colour)),
        "expression": f"{puppet.expression} face",
        "pose": v.POSE_PHRASES.get(puppet.pose),
    }
    return colours[kind]


def sentence(scene: Scene, kind: str) -> str | None:
    """The same as captions say it, of the figure: a small model hardly knows "red hair" without a woman who has it."""
    thing = concept(scene, kind)
    if thing is None or kind == "style":
        return thing
    puppet = scene.puppets[0]
    if kind == "expression":
        return article(f"{puppet.expression} {puppet.identity.figure}")
    link = {"place": "", "pose": "", "hair colour": "with "}.get(kind, "wearing ")
    return article(f"{puppet.identity.figure} {link}{thing}")


def control(edit: Edit, settings: Settings) -> SemanticGuidance:
    """The concepts of an edit."""
    threshold = settings.threshold if edit.kind in editing.ABOUT else settings.whole_threshold
    warmup = round(settings.warmup * settings.steps)
    wanted, there = sentence(edit.after, edit.kind), sentence(edit.before, edit.kind)
    said = [(wanted, False)] if wanted else []
    if there and (settings.take_away or not wanted):
        said.append((there, True))
    return SemanticGuidance(
        [
            SemanticEdit(prompt=text, reverse=away, scale=settings.scale, warmup=warmup, threshold=threshold)
            for text, away in said
        ]
    )


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
        return {SEGA: source.model_copy(update={"controls": [control(edit, settings)]})}

    return editing.editing_suite(
        "semantic_guidance",
        "SEGA: an attribute changed by concepts",
        settings,
        n,
        lambda number: editing.edit_number(number, settings.kinds, _sayable),
        (Arm(SEGA, "SEGA"),),
        ours,
        attribute_reader,
        keypoint_reader,
        note=f"Kinds of edits, in turn: {', '.join(settings.kinds)}. A change of the place has no outside.",
    )


def _sayable(edit: Edit) -> bool:
    """Whether what is wanted has a word: a pattern or a hat is added or changed, and never only taken away."""
    return concept(edit.after, edit.kind) is not None
