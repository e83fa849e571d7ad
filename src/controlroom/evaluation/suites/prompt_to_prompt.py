"""What Prompt-to-Prompt keeps: one colour word is swapped, and everything else shall stay.

A held-out edit of the theatre (top, trousers or hair in another colour) gives two captions that differ in that word,
and in the article before it. The source picture is drawn from the first; the edit is drawn from the second by
Prompt-to-Prompt, and by plain re-prompting, all three from the same noise. The attribute reader says whether the change
was made and the rest kept; PSNR to the source is taken outside the region where the part is in the source picture, by
its keypoints.

The truth of the same edit, rendered before and after, goes through the same judge: its column has the readers' and the
region's own error, and how much of the true change (`Edit.changed`) the region holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

from pydantic import Field

from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.signals.readers import AttributeReader, KeypointReader

EDITED = "prompt_to_prompt"
COLOURS = ("top colour", "lower colour", "hair colour")


class Settings(SuiteSettings):
    """The theatre's few layers keep more where self-attention is the source's for longer than by default (0.4)."""

    cross_replace: float = Field(default=0.4, ge=0, le=1)
    self_replace: float = Field(default=0.8, ge=0, le=1)
    kind: Literal["all", "top colour", "lower colour", "hair colour"] = "all"
    """Of the edits; all: one after the other."""


def edit_number(number: int, kind: str = "all") -> Edit:
    """A held-out edit of one puppet, alone, flat and from the front, whose captions have as many words."""
    return editing.edit_number(number, COLOURS if kind == "all" else (kind,), as_many_words)


def as_many_words(edit: Edit) -> bool:
    """Whether both captions have as many words, so that one stands for the other."""
    return len(full_caption(edit.before).split()) == len(full_caption(edit.after).split())


class Replaces(Protocol):
    """Settings with the shares of the steps in which attention is the source's."""

    @property
    def cross_replace(self) -> float: ...
    @property
    def self_replace(self) -> float: ...


def control(
    source: str, settings: Replaces, mode: Literal["replace", "refine"], reweight: dict[str, float] | None = None
) -> PromptToPrompt:
    """The control of an edit; the picture of its source is an arm of its own, and not drawn again beside it."""
    return PromptToPrompt(
        source=[source],
        cross_replace=settings.cross_replace,
        self_replace=settings.self_replace,
        reweight=reweight,
        mode=mode,
        keep_source=False,
    )


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` edits.

    Args:
        settings: of the drawing.
        n: number of edits.
        attribute_reader, keypoint_reader: None: the theatre's.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def ours(edit: Edit, source: RunSpec, target: RunSpec) -> Mapping[str, RunSpec]:
        return {EDITED: target.model_copy(update={"controls": [control(str(source.prompt), settings, "replace")]})}

    return editing.editing_suite(
        "prompt_to_prompt",
        "Prompt-to-Prompt: one colour word swapped",
        settings,
        n,
        lambda number: edit_number(number, settings.kind),
        (Arm(EDITED, "Prompt-to-Prompt"),),
        ours,
        attribute_reader,
        keypoint_reader,
        per_prompt=frozenset({"prompt_to_prompt.source"}),
    )
