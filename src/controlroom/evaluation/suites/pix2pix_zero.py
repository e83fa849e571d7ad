"""What Pix2Pix-Zero changes along a direction: a colour, without words for the edit in the prompt.

The direction is the mean embedding of sentences about the puppet with its part in the new colour, minus that of the
same sentences with the old one: every figure in every place. The prompt stays the caption before; re-prompting is told
the caption after. Edits and judge are those of the suite ``prompt_to_prompt``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.core.spec import RunSpec
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.captions import article
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.scene import Scene
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.prompt_to_prompt import COLOURS, as_many_words
from controlroom.evaluation.suites.semantic_guidance import concept
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.signals.readers import AttributeReader, KeypointReader

ZERO = "pix2pix_zero"


class Settings(SuiteSettings):
    """Of the control: its step size, its share of the steps, and a factor on the direction."""

    kinds: tuple[str, ...] = COLOURS
    scale: float = Field(default=0.1, ge=0)
    end: float = Field(default=1.0, gt=0, le=1)
    direction: float = 1.0


def sentences(scene: Scene, kind: str) -> list[str]:
    """Sentences about a puppet with what the scene has of a kind.

    >>> from controlroom.data.theatre.edits import sample_edit
    >>> edit = sample_edit(0, "held_out", "hair colour")
    >>> len(sentences(edit.before, "hair colour"))
    18
    """
    said = concept(scene, kind) or ""
    joined = "with" if kind in ("hair colour", "expression") else "wearing"
    return [f"{article(figure)} {joined} {said} {place}" for figure in v.FIGURES for place in v.PLACE_PHRASES.values()]


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
