"""What MasaCtrl keeps: the words of the pose change, and the puppet shall stay who it is.

A held-out edit of the pose gives two captions. The edit is drawn from the second by MasaCtrl, with the first as its
source, and by re-prompting. Beside the judge of all edits the identity reader says how alike the puppets look; the
outside is where the puppet is in neither picture.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from controlroom.controls.editing.masactrl import MasaCtrl
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.poses import FREE
from controlroom.evaluation.extractors.theatre import TheatreIdentity
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.judges import LikenessScore
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.signals.readers import AttributeReader, KeypointReader

MASACTRL, ALIKE = "masactrl", "identity kept"


class Settings(SuiteSettings):
    """Of the control: from which share of the steps, and from which self-attention layer on."""

    start: float = Field(default=0.08, ge=0, lt=1)
    """The published 4 of 50 steps."""
    start_layer: int | None = Field(default=None, ge=0)


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` edits of the pose.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def ours(edit: Edit, source: RunSpec, target: RunSpec) -> Mapping[str, RunSpec]:
        step = round(settings.start * settings.steps)
        control = MasaCtrl(source=[str(source.prompt)], start_step=step, start_layer=settings.start_layer)
        return {MASACTRL: target.model_copy(update={"controls": [control]})}

    looks, places = editing.readers(attribute_reader, keypoint_reader)
    alike = LikenessScore(TheatreIdentity(looks), editing.SOURCE, (editing.REPROMPTED, MASACTRL), ALIKE)
    return editing.editing_suite(
        "masactrl",
        "MasaCtrl: another pose of the same puppet",
        settings,
        n,
        lambda number: editing.edit_number(number, ("pose",), _named),
        (Arm(MASACTRL, "MasaCtrl"),),
        ours,
        looks,
        places,
        per_prompt=frozenset({"masactrl.source"}),
        judges=(alike,),
        note="The rest and the identity are the look; the outside is where the puppet is in neither picture.",
    )


def _named(edit: Edit) -> bool:
    """Whether both captions say the pose."""
    return all(scene.puppets[0].pose != FREE for scene in (edit.before, edit.after))
