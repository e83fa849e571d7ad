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

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field

from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.edits import Edit, sample_edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.background import background
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.regions import Part, part_region
from controlroom.evaluation.retarget_judge import Judge
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import JUDGED
from controlroom.signals.readers import AttributeReader, KeypointReader

SOURCE, REPROMPTED, EDITED, BEFORE, AFTER = "source", "reprompted", "prompt_to_prompt", "before", "after"
PARTS: dict[str, Part] = {"top colour": "top", "lower colour": "lower", "hair colour": "hair"}
CEILING = 60.0
"""dB at which PSNR is cut: that of rounding to bytes is 58.9."""
MADE, REST, PSNR, L1 = "change made", "rest kept", "PSNR outside", "L1 outside"
SOURCE_RIGHT, HELD = "source as asked", "change held by the region"


class Settings(SuiteSettings):
    """Those of the control are its own defaults."""

    cross_replace: float = Field(default=0.4, ge=0, le=1)
    self_replace: float = Field(default=0.4, ge=0, le=1)
    kind: Literal["all", "top colour", "lower colour", "hair colour"] = "all"
    """Of the edits; all: one after the other."""


def edit_number(number: int, kind: str = "all") -> Edit:
    """A held-out edit of one puppet, alone, flat and from the front, whose captions have as many words."""
    chosen = tuple(PARTS)[number % len(PARTS)] if kind == "all" else kind
    for attempt in range(10_000):
        edit = sample_edit(number * 10_000 + attempt, "held_out", chosen)
        scene, after = edit.before, edit.after
        alone = len(scene.actors) == 1 and scene.style == "flat" and scene.puppets[0].view == "front"
        if alone and len(full_caption(scene).split()) == len(full_caption(after).split()):
            return edit
    raise AssertionError(f"no edit of kind {chosen} was found")


class EditJudge:
    """Was the change made, is the rest as it was, and are the pixels outside the part as they were."""

    def __init__(self, attribute_reader: AttributeReader, keypoint_reader: KeypointReader) -> None:
        self.attribute_reader, self.keypoint_reader = attribute_reader, keypoint_reader
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        places = f"theatre-keypoints@{content_hash(keypoint_reader)}"
        self.fingerprint = f"edits {reads} {places}"
        self.measures = (
            Measure(MADE, "share", extractor=reads),
            Measure(REST, extractor=reads),
            Measure(PSNR, extractor=places, digits=1),
            Measure(L1, higher=False, extractor=places, digits=4),
            Measure(SOURCE_RIGHT, "share", extractor=reads),
            Measure(HELD, higher=None, extractor=places),
        )

    def __call__(self, shown: Sequence[Shown[Edit]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for source, others in ((SOURCE, (REPROMPTED, EDITED)), (BEFORE, (AFTER,))):
            pictures = [one.pictures[source] for one in shown]
            points = self.keypoint_reader.keypoints(pictures)
            regions = [
                part_region(place, PARTS[one.case.truth.kind], picture.size)
                for place, one, picture in zip(points, shown, pictures, strict=True)
            ]
            first = self.attribute_reader.read(pictures)
            for row, one, read, region in zip(found, shown, first, regions, strict=True):
                row[source] = {SOURCE_RIGHT: float(_asked(read, one.case.truth.before, one.case.truth))}
                if source == BEFORE:
                    changed = one.case.truth.changed(region.shape[0])
                    row[source][HELD] = float((changed & region).sum() / changed.sum())
            for arm in others:
                second = self.attribute_reader.read([one.pictures[arm] for one in shown])
                for row, one, read, own, region in zip(found, shown, first, second, regions, strict=True):
                    row[arm] = self._compare(one, source, arm, read, own, region)
        return found

    @staticmethod
    def _compare(
        one: Shown[Edit], source: str, arm: str, read: dict[str, str], own: dict[str, str], region: np.ndarray
    ) -> dict[str, float | None]:
        edit = one.case.truth
        rest = [question for question in JUDGED if question != edit.kind]
        values: dict[str, float | None] = {
            MADE: float(_asked(own, edit.after, edit)),
            REST: float(np.mean([own[question] == read[question] for question in rest])),
            PSNR: None,
            L1: None,
        }
        if not region.all():
            before, after = (unit_pixels([one.pictures[name]]) for name in (source, arm))
            kept = background(before, after, torch.from_numpy(region)[None])
            values[PSNR], values[L1] = min(float(kept.psnr), CEILING), float(kept.l1)
        return values


def _asked(read: dict[str, str], scene: Any, edit: Edit) -> bool:
    """Whether the part that the edit is about is read as the scene has it."""
    return read[edit.kind] == attributes(scene)[edit.kind]


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

    def case(number: int) -> Case[Edit]:
        edit = edit_number(number, settings.kind)
        before, after = full_caption(edit.before), full_caption(edit.after)
        source = RunSpec(
            model=settings.model,
            prompt=before,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        target = source.model_copy(update={"prompt": after})
        control = PromptToPrompt(
            source=[before],
            cross_replace=settings.cross_replace,
            self_replace=settings.self_replace,
            mode="replace",
            keep_source=False,
        )
        specs = {SOURCE: source, REPROMPTED: target, EDITED: target.model_copy(update={"controls": [control]})}
        known = {BEFORE: lambda: render(edit.before), AFTER: lambda: render(edit.after)}
        return Case(number, f"{before} → {after}", edit, specs, known)

    judge = EditJudge(attribute_reader or theatre_reader(), keypoint_reader or KeypointReader.load(Judge.folders()[1]))
    return Suite(
        name="prompt_to_prompt",
        title="Prompt-to-Prompt: one colour word swapped",
        n=n,
        settings=settings,
        arms=(
            Arm(SOURCE, "source"),
            Arm(REPROMPTED, "re-prompted"),
            Arm(EDITED, "Prompt-to-Prompt"),
            Arm(BEFORE, "true before (readers)", known=True),
            Arm(AFTER, "true after (readers)", known=True),
        ),
        case=case,
        judges=(judge,),
        table=Table(
            rank=_rank,
            baseline=REPROMPTED,
            ours=EDITED,
            note=f"PSNR (cut at {CEILING:.0f} dB) and L1 are to the source picture, outside the part that is edited. "
            "All three are drawn from the same noise. The true columns have the error of readers and region.",
        ),
        per_prompt=frozenset({"prompt_to_prompt.source"}),
        reference=SOURCE,
        world=WORLD_VERSION,
    )


def _rank(values: Values) -> tuple[float, ...]:
    ours: Any = values[EDITED]
    return ours[MADE], ours[PSNR] or 0.0
