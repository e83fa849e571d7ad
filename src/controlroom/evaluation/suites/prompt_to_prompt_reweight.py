"""Whether Prompt-to-Prompt's re-weighting makes an attribute more or less frequent, and leaves the rest alone.

Captions and attributes are those of the suite ``prompt_weighting``. The attention on the words of the attribute is
multiplied; everything else is taken from the picture of the same caption without it, which is the factor 1. All factors
of a caption are drawn from the same noise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.metrics.background import background
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.regions import Part, region_of
from controlroom.evaluation.suites.editing import CEILING, PSNR, readers
from controlroom.evaluation.suites.prompt_to_prompt import control
from controlroom.evaluation.suites.prompt_weighting import (
    ATTRIBUTES,
    SHOWN,
    TRUE,
    Weighed,
    WeighedSettings,
    WeightJudge,
    arm_of,
    phrase,
    rate_slope,
    weighed_scene,
)
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, Table, Values
from controlroom.signals.readers import AttributeReader, KeypointReader

PLAIN = arm_of(1.0)
_ABOUT: dict[str, tuple[Part, ...]] = {
    "hair colour": ("hair",),
    "hair length": ("hair", "top"),
    "top colour": ("top",),
    "top pattern": ("top",),
    "lower": ("lower",),
    "hat": ("hat",),
}


class Settings(WeighedSettings):
    """Factors on the attention, and the steps in which it is the source's."""

    weights: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    attributes: tuple[str, ...] = ATTRIBUTES
    cross_replace: float = Field(default=0.8, gt=0, le=1)
    self_replace: float = Field(default=0.4, ge=0, le=1)


class OutsideJudge:
    """PSNR to the picture without the control, outside the part whose word is weighed."""

    def __init__(self, reader: KeypointReader) -> None:
        self.reader = reader
        label = f"theatre-keypoints@{content_hash(reader)}"
        self.fingerprint = f"outside the weighed part {label}"
        self.measures = (Measure(PSNR, extractor=label, digits=1),)

    def __call__(self, shown: Sequence[Shown[Weighed]]) -> Sequence[Values]:
        plain = [one.pictures[PLAIN] for one in shown]
        found: list[Values] = []
        for one, picture, points in zip(shown, plain, self.reader.keypoints(plain), strict=True):
            region = region_of(points, _ABOUT[one.case.truth.attribute], picture.size)
            row: dict[str, dict[str, float | None]] = {}
            for arm in one.pictures:
                if arm not in (PLAIN, TRUE) and not region.all():
                    before, after = (unit_pixels([each]) for each in (picture, one.pictures[arm]))
                    kept = background(before, after, torch.from_numpy(region)[None])
                    row[arm] = {PSNR: min(float(kept.psnr), CEILING)}
            found.append(row)
        return found


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Weighed]:
    """The suite of ``n`` captions.

    Raises:
        InputError: factors or attributes that cannot be used.
        ModelError: the theatre's readers are not in this installation.
    """
    weights = settings.checked()

    def case(number: int) -> Case[Weighed]:
        found = weighed_scene(number, settings.attributes)
        text = full_caption(found.scene)
        plain = RunSpec(
            model=settings.model,
            prompt=text,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        specs = {PLAIN: plain}
        _, words = phrase(found.scene, found.attribute)
        for weight in weights:
            if weight != 1:
                weighed = control(text, settings, "replace", {words: weight})
                specs[arm_of(weight)] = plain.model_copy(update={"controls": [weighed]})
        return Case(number, f"{text} ({words})", found, specs, {TRUE: lambda: render(found.scene)})

    low, high = arm_of(weights[0]), arm_of(weights[-1])
    looks, places = readers(attribute_reader, keypoint_reader)
    return Suite(
        name="prompt_to_prompt_reweight",
        title="Prompt-to-Prompt: the rate of an attribute by the factor on its words",
        n=n,
        settings=settings,
        arms=(
            *(Arm(arm_of(weight), f"factor {weight:g}" + " (no control)" * (weight == 1)) for weight in weights),
            Arm(TRUE, "true picture (reader)", known=True),
        ),
        case=case,
        judges=(WeightJudge(looks), OutsideJudge(places)),
        table=Table(
            rank=lambda values: (values[high][SHOWN] or 0.0, -(values[low][SHOWN] or 0.0), values[high][PSNR] or 0.0),
            baseline=PLAIN,
            ours=high,
            others=tuple(arm_of(weight) for weight in weights[:-1] if weight != 1),
            derived=(rate_slope(weights, "factor"),),
            note="All factors of a caption are drawn from the same noise. PSNR is to the picture of the factor 1, "
            "outside the part whose words are weighed.",
        ),
        per_prompt=frozenset({"prompt_to_prompt.source"}),
        reference=TRUE,
        world=WORLD_VERSION,
    )
