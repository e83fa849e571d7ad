"""Whether pictures show what their captions say: one puppet, flat and from the front, in a named pose.

The measurement of `theatre_quality`, as a suite: the same scenes, captions, noise and questions. The true pictures are
read too, so the reader's own error stands beside; KID and FID compare the sets, CLIP score each picture with its words.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import read_caption
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Mix, Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import Extractor, TextExtractor, content_hash
from controlroom.evaluation.extractors.theatre import TheatreFeatures, theatre_clip, theatre_reader
from controlroom.evaluation.metrics.agreement import ALL, agreement
from controlroom.evaluation.suites.attend_and_excite import FIRST_SCENE, KINDS, TwoObjects
from controlroom.evaluation.suites.judges import PromptScore, SetDistance
from controlroom.evaluation.suites.suite import Arm, Case, Judge, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, JUDGED, TWO_OBJECTS, scenes_of
from controlroom.signals.readers import AttributeReader

DRAWN, TRUE = "drawn", "truth"


class Settings(SuiteSettings):
    """Nothing beside what every suite has."""


class CaptionJudge:
    """Whether the reader finds what the caption states, question by question, and all of it."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"captions {label}"
        self.measures = tuple(Measure(question, "share", extractor=label) for question in (*JUDGED, ALL))

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                right = agreement(read, read_caption(full_caption(one.case.truth)), JUDGED)
                row[arm] = {**{q: float(value) for q, value in right.items()}, ALL: float(all(right.values()))}
        return found


def build(
    settings: Settings,
    n: int,
    reader: AttributeReader | None = None,
    clip: TextExtractor | None = None,
) -> Suite[Scene]:
    """The suite of ``n`` captions of one puppet.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    reader = reader or theatre_reader()
    judge = CaptionJudge(reader)

    def rank(values: Values) -> tuple[float, ...]:
        own = [value for question, value in values[DRAWN].items() if question in JUDGED and value is not None]
        return float(np.mean(own)) if own else 0.0, values[DRAWN]["CLIP score"] or 0.0

    title = "Captions of one puppet: what is shown of what is said"
    return _suite("captions", title, settings, n, CORE_MIX, 10_000, judge, clip, rank, TheatreFeatures(reader))


def build_two_objects(
    settings: Settings,
    n: int,
    reader: AttributeReader | None = None,
    clip: TextExtractor | None = None,
) -> Suite[Scene]:
    """The suite of ``n`` captions of two props.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    reader = reader or theatre_reader()

    def rank(values: Values) -> tuple[float, ...]:
        own: Any = values[DRAWN]
        return own["both kinds and colours"], own[KINDS], own["CLIP score"]

    title = "Captions of two objects: whether both are there"
    judge = TwoObjects(reader)
    return _suite(
        "two_objects", title, settings, n, TWO_OBJECTS, FIRST_SCENE, judge, clip, rank, TheatreFeatures(reader)
    )


def _suite(
    name: str,
    title: str,
    settings: Settings,
    n: int,
    mix: Mix,
    first: int,
    judge: Judge[Scene],
    clip: TextExtractor | None,
    rank: Any,
    features: Extractor,
) -> Suite[Scene]:
    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(mix, 1, first + number)
        spec = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        return Case(number, full_caption(scene), scene, {DRAWN: spec}, {TRUE: lambda: render(scene)})

    return Suite(
        name=name,
        title=title,
        n=n,
        settings=settings,
        arms=(Arm(DRAWN, "drawn"), Arm(TRUE, "true picture (reader)", known=True)),
        case=case,
        judges=(judge, PromptScore(clip or theatre_clip(), {DRAWN: DRAWN, TRUE: DRAWN})),
        table=Table(rank=rank, note="The reader's own error is in the column of the true picture."),
        set_judges=(SetDistance(features, TRUE),),
        reference=TRUE,
        world=WORLD_VERSION,
    )
