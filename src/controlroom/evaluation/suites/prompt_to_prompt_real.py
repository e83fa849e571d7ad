"""Prompt-to-Prompt on true pictures: one colour word swapped in a picture that was inverted, not drawn.

A held-out scene is rendered and inverted with its caption, by null-text optimisation and by DDIM. Each inversion is
edited by Prompt-to-Prompt, and drawn again from the caption after the change, which is what an inversion alone can do.
Edits are those of the suite ``prompt_to_prompt``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.inverted_edits import Inverted, again_arm
from controlroom.evaluation.suites.prompt_to_prompt import COLOURS, as_many_words, control
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.evaluation.suites.true_pictures import Make, true_picture_suite
from controlroom.sampling.inverted import Method
from controlroom.signals.readers import AttributeReader, KeypointReader

METHODS: dict[Method, str] = {"null_text": "null-text", "ddim": "DDIM"}


class Settings(SuiteSettings):
    """Of the control, of the inversions, and of null-text optimisation."""

    guidance_scale: float = Field(default=5.0, gt=1)
    kinds: tuple[str, ...] = COLOURS
    cross_replace: float = Field(default=0.4, ge=0, le=1)
    self_replace: float = Field(default=0.4, ge=0, le=1)
    iterations: int = Field(default=10, ge=1)
    """Of each step of null-text optimisation."""
    hold_source: bool = True
    """Hold the source picture to the recorded latents."""


def edited_arm(method: Method) -> str:
    """Name of the arm that edits an inversion.

    >>> edited_arm("ddim")
    'prompt_to_prompt ddim'
    """
    return f"prompt_to_prompt {method}"


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

    def made(number: int, edit: Edit, target: RunSpec) -> Mapping[str, Make]:
        inverted, told, hold = Inverted(edit, target, settings.iterations), str(target.prompt), settings.hold_source
        changed = control(full_caption(edit.before), settings, "replace")
        found: dict[str, Make] = {}
        for by in METHODS:
            found[edited_arm(by)] = lambda pipe, by=by: inverted.draw(pipe, by, told, [changed], hold)
            found[again_arm(by)] = lambda pipe, by=by: inverted.draw(pipe, by, told)
        return found

    return true_picture_suite(
        "prompt_to_prompt_real",
        "Prompt-to-Prompt on true pictures: one colour word swapped",
        settings,
        n,
        lambda number: editing.edit_number(number, settings.kinds, as_many_words),
        [
            *(Arm(edited_arm(by), f"Prompt-to-Prompt, {title}") for by, title in METHODS.items()),
            *(Arm(again_arm(by), f"{title}, re-prompted") for by, title in METHODS.items()),
        ],
        made,
        editing.both_captions,
        attribute_reader,
        keypoint_reader,
        baseline=again_arm("null_text"),
        note=f"Guidance: {settings.guidance_scale:g}; null-text optimisation: {settings.iterations} iterations a step.",
    )
