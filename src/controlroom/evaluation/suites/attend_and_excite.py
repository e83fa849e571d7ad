"""What Attend-and-Excite repairs: two-object captions drawn without and with it, from the same noise.

Captions are held-out scenes of two props of different kinds, flat and from the front. The attribute reader says whether
both kinds are there, and whether both have their colours; the true pictures stand beside, with the reader's own error.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic import Field

from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.estimates import Estimate, share
from controlroom.evaluation.extractor import TextExtractor, content_hash
from controlroom.evaluation.extractors.theatre import theatre_clip, theatre_reader
from controlroom.evaluation.suites.judges import PromptScore
from controlroom.evaluation.suites.suite import Arm, Case, Derived, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import TWO_OBJECTS, both_shown, scenes_of
from controlroom.signals.readers import AttributeReader

WITHOUT, WITH, TRUE = "without", "with", "truth"
KINDS, COLOURS = "both kinds", "both kinds and colours"
FIRST_SCENE = 20_000


class Settings(SuiteSettings):
    """Those of the control are the paper's, for 50 steps, scaled to the steps of the suite."""

    step_size: float = Field(default=20.0, gt=0)
    moved: float = Field(default=0.5, gt=0, le=1)
    """Share of the steps, from the first, before which the latents are moved."""
    refinements: int = Field(default=20, ge=1, le=200)


class TwoObjects:
    """Whether both props are there, and in their colours, as the attribute reader sees it."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"two objects {label}"
        self.measures = (Measure(KINDS, "share", extractor=label), Measure(COLOURS, "share", extractor=label))

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            answers = self.reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                kinds, colours = both_shown(read, one.case.truth)
                row[arm] = {KINDS: float(kinds), COLOURS: float(colours)}
        return found


def control(settings: Settings, words: list[str]) -> AttendAndExcite:
    """The control for one prompt."""
    n = settings.steps
    return AttendAndExcite(
        words=[words],
        iterations=max(1, round(settings.moved * n)),
        thresholds={0: 0.05, max(1, round(0.2 * n)): 0.5, max(2, round(0.4 * n)): 0.8},
        step_size=settings.step_size,
        refinements=settings.refinements,
    )


def build(
    settings: Settings, n: int, reader: AttributeReader | None = None, clip: TextExtractor | None = None
) -> Suite[Scene]:
    """The suite of ``n`` captions.

    Args:
        settings: of the drawing.
        n: number of captions.
        reader: None: the theatre's.
        clip: for the CLIP score; None: the theatre's.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(TWO_OBJECTS, 1, FIRST_SCENE + number)
        base = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        both = control(settings, [prop.kind for prop in scene.props])
        specs = {WITHOUT: base, WITH: base.model_copy(update={"controls": [both]})}
        return Case(number, full_caption(scene), scene, specs, {TRUE: lambda: render(scene)})

    judge = TwoObjects(reader or theatre_reader())
    score = PromptScore(clip or theatre_clip(), {WITHOUT: WITHOUT, WITH: WITH, TRUE: WITHOUT})
    return Suite(
        name="attend_and_excite",
        title="Attend-and-Excite on captions of two objects",
        n=n,
        settings=settings,
        arms=(Arm(WITHOUT, "without"), Arm(WITH, "Attend-and-Excite"), Arm(TRUE, "true picture (reader)", known=True)),
        case=case,
        judges=(judge, score),
        table=Table(
            rank=_rank,
            baseline=WITHOUT,
            ours=WITH,
            derived=(
                Derived("failures repaired (both kinds)", "share", lambda rows: turned(rows, KINDS, 0.0)),
                Derived("failures repaired (kinds and colours)", "share", lambda rows: turned(rows, COLOURS, 0.0)),
                Derived("successes kept (both kinds)", "share", lambda rows: turned(rows, KINDS, 1.0)),
                Derived("successes kept (kinds and colours)", "share", lambda rows: turned(rows, COLOURS, 1.0)),
            ),
            note="Both arms of a caption are drawn from the same noise. The reader's own error is in the column of the "
            "true picture.",
        ),
        per_prompt=frozenset({"attend_and_excite.words"}),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def turned(rows: Sequence[Values], measure: str, before: float) -> Estimate:
    """Share of right pictures with the control among the cases that were right (1) or wrong (0) without it."""
    return share([row[WITH][measure] == 1.0 for row in rows if row[WITHOUT][measure] == before])


def _rank(values: Values) -> tuple[float, ...]:
    ours: Any = values[WITH]
    return ours[COLOURS], ours[KINDS], ours["CLIP score"]
