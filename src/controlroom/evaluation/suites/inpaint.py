"""What inpainting draws into the hole, and what it keeps around it: a garment or the hair in another colour.

A true picture is given with a mask over the part by ground truth (before and after, and two pixels around it), and the
caption after the edit. The network that reads masks, the base network with the known part put back, and the former with
the known pixels pasted answer from the same noise. The attribute reader says whether the part is as the caption has it;
PSNR outside is to the picture given, where nothing truly changes: most of that lies outside of the mask, some within.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controlroom.controls.editing.inpaint import Inpaint
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.holes import garment_hole
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites.editing import edit_number
from controlroom.evaluation.suites.instruct_pix2pix import editor
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.evaluation.suites.true_pictures import Make, true_picture_suite
from controlroom.signals.readers import AttributeReader, KeypointReader

READS, PASTED, BLENDED = "reads_mask", "pasted", "put_back"
#: Kind of edit -> the garment that is masked.
MASKED = {"top colour": "top", "lower colour": "lower", "hair colour": "hair"}


class Settings(SuiteSettings):
    """Of the control, and where the network is."""

    weights: str = "theatre/inpaint"
    """A UNet of nine channels in diffusers' layout; the other parts are the model's."""
    strength: float = Field(default=1.0, gt=0, le=1)
    grow: int = Field(default=2, ge=0)
    """Pixels around the part that the mask holds too."""


def mask_of(edit: Edit, grow: int) -> NDArray[np.bool_]:
    """The part before and after: [128, 128]."""
    actor = next(i for i, one in enumerate(edit.before.actors) if one in edit.before.puppets)
    scenes = (edit.before, edit.after)
    return np.logical_or(*(garment_hole(scene, actor, MASKED[edit.kind], grow) for scene in scenes))


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` holes.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def made(number: int, edit: Edit, target: RunSpec) -> Mapping[str, Make]:
        picture, mask = render(edit.before), mask_of(edit, settings.grow)

        def spec(paste: bool) -> RunSpec:
            control = Inpaint(picture, mask, settings.strength, paste=paste)
            return target.model_copy(update={"controls": [control]})

        return {
            READS: lambda pipe: editor(pipe, settings.weights).run(spec(False)).images[0],
            PASTED: lambda pipe: editor(pipe, settings.weights).run(spec(True)).images[0],
            BLENDED: lambda pipe: pipe.run(spec(False)).images[0],
        }

    return true_picture_suite(
        "inpaint",
        "Inpainting: a part in another colour, the rest kept",
        settings,
        n,
        lambda number: edit_number(number, tuple(MASKED), lambda edit: bool(mask_of(edit, 0).any())),
        [
            Arm(READS, "inpainting network"),
            Arm(PASTED, "the same, pasted"),
            Arm(BLENDED, "base network, put back"),
        ],
        made,
        lambda edit: full_caption(edit.after),
        attribute_reader,
        keypoint_reader,
        weights=(settings.weights,),
        note=f"The mask is the part before and after, and {settings.grow} pixels around it.",
    )
