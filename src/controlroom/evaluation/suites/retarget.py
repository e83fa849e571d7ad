"""Retargeting as a suite: the methods, pairs, noise and measures of `retarget_quality`.

That command also has the autoencoder's reconstruction as a second reference, and its own table; here are the journal
and the page that all suites share. A method whose weights are not in the installation is left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL import Image
from pydantic import Field

from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.pairs import Pair
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.retarget_judge import Judge
from controlroom.evaluation.retarget_methods import FIRST_PAIR, METHODS, POSE, Trial, available, pair_number, spec_of
from controlroom.evaluation.retarget_report import MEASURES, NUMBERS
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values

SOURCE, TRUE = "source", "truth"


class Settings(SuiteSettings):
    """Defaults are those of the command."""

    steps: int = Field(default=30, ge=1, le=1000)
    guidance_scale: float = 3.5
    seed: int = Field(default=FIRST_PAIR, ge=0)
    captions: bool = False
    """Words: a full caption of the target instead of none."""
    methods: tuple[str, ...] = ()
    """Names of `retarget_methods.METHODS`; none: all whose weights are here."""


class RetargetJudge:
    """The judge of `retarget_quality`, for every arm but the source."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        label = f"theatre-attributes@{judge.extractor}"
        self.fingerprint = f"retarget {label} keypoints@{content_hash(judge.keypoint_reader)}"
        self.measures = tuple(
            Measure(
                name,
                "number" if name in NUMBERS else "share",
                higher=name != "distance",
                extractor="" if name == "ssim" else label,
            )
            for name in MEASURES
        )

    def __call__(self, shown: Sequence[Shown[Pair]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        pairs, numbers = [one.case.truth for one in shown], [one.case.number for one in shown]
        for arm in shown[0].pictures:
            if arm == SOURCE:
                continue
            pictures = [_sized(one.pictures[arm]) for one in shown]
            for row, verdict in zip(found, self.judge(pictures, pairs, numbers, arm, ""), strict=True):
                row[arm] = {name: verdict.value(name) for name in MEASURES}
        return found


def _sized(picture: Image.Image) -> Image.Image:
    size = (CANVAS, CANVAS)
    return picture if picture.size == size else picture.resize(size, Image.Resampling.LANCZOS)


def build(settings: Settings, n: int, judge: Judge | None = None) -> Suite[Pair]:
    """The suite of ``n`` pairs.

    Raises:
        InputError: an unknown method.
        ModelError: the readers, the pose ControlNet, or weights of a method that was asked for are missing.
    """
    methods = available(settings.methods or None)

    def case(number: int) -> Case[Pair]:
        pair = pair_number(FIRST_PAIR + number)
        trial = Trial(
            model=settings.model,
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            captions=settings.captions,
            seed=settings.seed - FIRST_PAIR,
        )
        own = range(FIRST_PAIR + number, FIRST_PAIR + number + 1)
        specs = {name: _single(spec_of(name, own, trial)) for name in methods}
        known = {SOURCE: lambda: render(pair.source), TRUE: lambda: render(pair.target)}
        return Case(number, full_caption(pair.target), pair, specs, known)

    first, weights = methods[0], {POSE, *(name for method in methods for name in METHODS[method].weights)}
    return Suite(
        name="retarget",
        title="One puppet in the pose of another picture",
        n=n,
        settings=settings,
        arms=(
            Arm(SOURCE, "source", known=True),
            *(Arm(name, METHODS[name].title) for name in methods),
            Arm(TRUE, "true picture (readers)", known=True),
        ),
        case=case,
        judges=(RetargetJudge(judge or Judge.load()),),
        table=Table(
            rank=lambda values: _rank(values, first),
            baseline=methods[1] if len(methods) > 1 else None,
            ours=first,
            note="All methods draw a pair from the same noise, with the same pose ControlNet.",
        ),
        per_prompt=frozenset(
            {"appearance_control.image", "ip_adapter.image", "reference_only.image", "controlnet.image"}
        ),
        weights=tuple(sorted(weights)),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def _single(spec: Any) -> Any:
    """A run of one prompt, as cases have it; its controls keep their lists."""
    return spec.model_copy(update={"prompt": spec.prompt[0]})


def _rank(values: Values, arm: str) -> tuple[float, ...]:
    return (-(values[arm]["distance"] or 0.0),)
