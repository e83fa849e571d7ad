"""What Prompt-to-Prompt adds: words join the caption, and everything else shall stay.

A held-out edit gives a plain top a pattern ("a red shirt", "a red striped shirt"). The caption after has a word more
than the one before, so prompts are aligned instead of swapped word for word. Judge and arms are those of the suite
``prompt_to_prompt``.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.prompt_to_prompt import EDITED, control
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.signals.readers import AttributeReader, KeypointReader


class Settings(SuiteSettings):
    """Those of the control are its own defaults."""

    cross_replace: float = Field(default=0.4, ge=0, le=1)
    self_replace: float = Field(default=0.4, ge=0, le=1)


def adds_words(edit: Edit) -> bool:
    """Whether the caption after has all words of the one before in their order, and more of them."""
    before, after = (full_caption(scene).split() for scene in (edit.before, edit.after))
    rest = iter(after)
    return len(after) > len(before) and all(word in rest for word in before)


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` edits.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def ours(edit: Edit, source: RunSpec, target: RunSpec) -> Mapping[str, RunSpec]:
        return {EDITED: target.model_copy(update={"controls": [control(str(source.prompt), settings, "refine")]})}

    return editing.editing_suite(
        "prompt_to_prompt_refine",
        "Prompt-to-Prompt: words added",
        settings,
        n,
        lambda number: editing.edit_number(number, ("top pattern",), adds_words),
        (Arm(EDITED, "Prompt-to-Prompt, refine"),),
        ours,
        attribute_reader,
        keypoint_reader,
        per_prompt=frozenset({"prompt_to_prompt.source"}),
    )
