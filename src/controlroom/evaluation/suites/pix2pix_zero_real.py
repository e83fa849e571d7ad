"""Pix2Pix-Zero on true pictures, as published: its regularised inversion, then a direction from sentences.

A held-out scene is rendered and inverted with its caption. The direction changes one colour, without words for it in
the prompt; beside it the inversion is drawn again from the caption after the change. Edits and directions are those of
the suite ``pix2pix_zero``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.evaluation.suites import editing, pix2pix_zero
from controlroom.evaluation.suites.inverted_edits import Inverted, again_arm
from controlroom.evaluation.suites.pix2pix_zero import ZERO, control
from controlroom.evaluation.suites.prompt_to_prompt import as_many_words
from controlroom.evaluation.suites.suite import Arm, Suite
from controlroom.evaluation.suites.true_pictures import Make, true_picture_suite
from controlroom.sampling.inverted import Method
from controlroom.signals.readers import AttributeReader, KeypointReader


class Settings(pix2pix_zero.Settings):
    """Of the control, as in the suite ``pix2pix_zero``, and the inversion."""

    guidance_scale: float = Field(default=5.0, gt=1)
    inversion: Method = "regularised"


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
    by = settings.inversion
    again = again_arm(by)

    def made(number: int, edit: Edit, target: RunSpec) -> Mapping[str, Make]:
        inverted, before, after = Inverted(edit, target), full_caption(edit.before), str(target.prompt)
        changed = control(edit, settings)
        return {
            ZERO: lambda pipe: inverted.draw(pipe, by, before, [changed]),
            again: lambda pipe: inverted.draw(pipe, by, after),
        }

    return true_picture_suite(
        "pix2pix_zero_real",
        "Pix2Pix-Zero on true pictures: one colour changed along a direction",
        settings,
        n,
        lambda number: editing.edit_number(number, settings.kinds, as_many_words),
        [Arm(ZERO, "Pix2Pix-Zero"), Arm(again, "inverted, re-prompted")],
        made,
        editing.both_captions,
        attribute_reader,
        keypoint_reader,
        baseline=again,
        note=f"The inversion is {by}; guidance: {settings.guidance_scale:g}.",
    )
