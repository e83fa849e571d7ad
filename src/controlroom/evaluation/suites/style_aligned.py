"""Does StyleAligned give a set one style, and are the prompts still followed.

A set has a first picture, whose prompt names a style (pencil sketch, watercolour, pixel art, neon), and others whose
prompts say what to show but no style. The others are drawn independently, with StyleAligned, and by words that name the
style too, all from the same noise. Each case is one of the others: the style reader says whether it has the style of
the set's first picture as that was drawn; the attribute reader whether its own words were followed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import Field

from controlroom.controls.style.style_aligned import StyleAligned
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import read_caption
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import STYLES, WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, JUDGED, scenes_of
from controlroom.signals.readers import AttributeReader

FIRST, ALONE, OURS, WORDS, TRUE = "first", "independent", "style_aligned", "words", "truth"
SAME, ASKED, FOLLOWED = "style of the set's first", "style asked of the set", "prompt followed"
FIRST_SCENE = 40_000


class Settings(SuiteSettings):
    """The control's own are the published ones."""

    scale: float = Field(default=1.0, gt=0, le=1)
    shift: float = 0.0
    """Added to the logits of the reference's keys."""


class StyleJudge:
    """The style of each picture, that of its set's first, and what its words say."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"style of a set {label}"
        self.measures = (
            Measure(SAME, "share", extractor=label),
            Measure(ASKED, "share", extractor=label),
            Measure(FOLLOWED, extractor=label),
        )

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        firsts = self.reader.read([one.pictures[FIRST] for one in shown])
        for arm in shown[0].pictures:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read, first in zip(found, shown, answers, firsts, strict=True):
                scene = one.case.truth
                stated = read_caption(full_caption(replace(scene, style="flat")))
                asked = [question for question in JUDGED if stated[question] is not None]
                row[arm] = {
                    SAME: float(read["style"] == first["style"]) if arm != FIRST else None,
                    ASKED: float(read["style"] == scene.style),
                    FOLLOWED: None
                    if arm == FIRST
                    else float(np.mean([read[question] == stated[question] for question in asked])),
                }
        return found


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Scene]:
    """The suite of ``n`` pictures, each beside the first of its set.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def case(number: int) -> Case[Scene]:
        # Two scenes of one set: its first picture, and the one that the case is about.
        head, scene = scenes_of(CORE_MIX, 2, FIRST_SCENE + 2 * number)
        style = STYLES[1:][number % (len(STYLES) - 1)]
        head, scene = replace(head, style=style), replace(scene, style=style)
        prompt, leader = full_caption(replace(scene, style="flat")), full_caption(head)
        base = RunSpec(
            model=settings.model,
            prompt=prompt,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            scheduler="ddim",
            seed=settings.seed + number,
        )
        aligned = StyleAligned(
            prompt=leader, seed=_seed(settings, number), scale=settings.scale, shared_score_shift=settings.shift
        )
        specs = {
            FIRST: base.model_copy(update={"prompt": leader, "seed": _seed(settings, number)}),
            ALONE: base,
            OURS: base.model_copy(update={"controls": [aligned]}),
            WORDS: base.model_copy(update={"prompt": full_caption(scene)}),
        }
        return Case(number, f"{leader} → {prompt}", scene, specs, {TRUE: lambda: render(scene)})

    def rank(values: Values) -> tuple[float, ...]:
        ours: Any = values[OURS]
        return ours[SAME], ours[FOLLOWED]

    return Suite(
        name="style_aligned",
        title="StyleAligned: one style for a set",
        n=n,
        settings=settings,
        arms=(
            Arm(FIRST, "first of the set"),
            Arm(ALONE, "independent"),
            Arm(OURS, "StyleAligned"),
            Arm(WORDS, "style in words"),
            Arm(TRUE, "true picture (reader)", known=True),
        ),
        case=case,
        judges=(StyleJudge(reader or theatre_reader()),),
        table=Table(
            rank=rank,
            baseline=ALONE,
            ours=OURS,
            others=(WORDS,),
            note="Only the first picture of a set is asked for its style. The others share a noise; the prompt is "
            "followed if what it says is read again (nine questions or fewer).",
        ),
        reference=FIRST,
        world=WORLD_VERSION,
    )


def _seed(settings: Settings, number: int) -> int:
    """Of the first picture of a set: apart from those of the cases."""
    return settings.seed + 1_000_000 + number
