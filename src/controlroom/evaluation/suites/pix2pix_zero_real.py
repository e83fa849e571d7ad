"""Pix2Pix-Zero on true pictures, as published: its regularised inversion, then a direction from sentences.

A held-out scene is rendered and inverted with its caption. The direction changes one colour, without words for it in
the prompt; beside it the inversion is drawn again from the caption after the change. Edits and directions are those of
the suite ``pix2pix_zero``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from pydantic import Field

from controlroom.controls.editing.pix2pix_zero import Pix2PixZero
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.inverted_edits import Inverted, again_arm
from controlroom.evaluation.suites.pix2pix_zero import ZERO, sentences
from controlroom.evaluation.suites.prompt_to_prompt import COLOURS, as_many_words
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.evaluation.suites.true_pictures import Make, true_picture_suite
from controlroom.sampling.inverted import Method
from controlroom.signals.readers import AttributeReader, KeypointReader


class Settings(SuiteSettings):
    """Of the control, as in the suite ``pix2pix_zero``, and the inversion."""

    guidance_scale: float = Field(default=5.0, gt=1)
    kinds: tuple[str, ...] = COLOURS
    scale: float = Field(default=0.1, ge=0)
    end: float = Field(default=1.0, gt=0, le=1)
    direction: float = 1.0
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
        there, wanted = (sentences(scene, edit.kind) for scene in (edit.before, edit.after))
        control = Pix2PixZero(there, wanted, scale=settings.scale, end=settings.end, direction=settings.direction)
        return {
            ZERO: lambda pipe: inverted.draw(pipe, by, before, [control]),
            again: lambda pipe: inverted.draw(pipe, by, after),
        }

    suite = true_picture_suite(
        "pix2pix_zero_real",
        "Pix2Pix-Zero on true pictures: one colour changed along a direction",
        settings,
        n,
        lambda number: editing.edit_number(number, settings.kinds, as_many_words),
        [Arm(ZERO, "Pix2Pix-Zero"), Arm(again, "inverted, re-prompted")],
        made,
        lambda edit: f"{full_caption(edit.before)} → {full_caption(edit.after)}",
        attribute_reader,
        keypoint_reader,
        note=f"The inversion is {by}; guidance: {settings.guidance_scale:g}.",
    )
    # What an inversion alone can do is what the control is compared with, not a picture from other noise.
    return replace(suite, table=replace(suite.table, baseline=again, others=(editing.REPROMPTED,)))
