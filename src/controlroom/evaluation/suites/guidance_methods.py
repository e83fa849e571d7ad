"""What further guidances change: captions of one puppet, drawn with plain guidance and with each of them.

The captions, questions and true pictures are those of the suite ``captions``. Every arm draws a caption from the same
noise. Attribute accuracy is judged picture by picture, KID and the Fréchet distance between all pictures of an arm and
the true ones, with the theatre's features.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from controlroom.controls.guidance.guidance_interval import GuidanceInterval
from controlroom.controls.guidance.guidance_rescale import GuidanceRescale
from controlroom.controls.guidance.perturbed_attention_guidance import PerturbedAttentionGuidance
from controlroom.controls.guidance.self_attention_guidance import SelfAttentionGuidance
from controlroom.controls.guidance.smoothed_energy_guidance import SmoothedEnergyGuidance
from controlroom.core.control import Control
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import TextExtractor
from controlroom.evaluation.extractors.theatre import TheatreFeatures, theatre_clip, theatre_reader
from controlroom.evaluation.metrics.agreement import ALL
from controlroom.evaluation.suites.captions import CaptionJudge
from controlroom.evaluation.suites.judges import PromptScore, SetDistance
from controlroom.evaluation.suites.right import RIGHT, RightShare
from controlroom.evaluation.suites.suite import Arm, Case, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, scenes_of
from controlroom.signals.readers import AttributeReader

PLAIN, TRUE = "plain", "truth"
FIRST_SCENE = 10_000
TITLES = {"sag": "SAG", "pag": "PAG", "seg": "SEG", "rescale": "rescale", "interval": "interval"}


class Settings(SuiteSettings):
    """Scales of the methods; each is the control's default unless it says why not."""

    methods: tuple[str, ...] = tuple(TITLES)
    sag_scale: float = Field(default=0.75, gt=0)
    pag_scale: float = Field(default=3.0, gt=0)
    seg_scale: float = Field(default=3.0, gt=0)
    layers: tuple[str, ...] = ("mid",)
    """Of PAG and SEG. The theatre's middle block has 2x2 tokens, where Stable Diffusion's has 8x8."""
    rescale: float = Field(default=0.7, gt=0, le=1)
    interval: tuple[float, float] = (0.1, 0.8)
    """Shares of the steps between which there is guidance."""


def control(name: str, settings: Settings) -> Control:
    """The control of an arm.

    Raises:
        InputError: an unknown method.
    """
    layers = list(settings.layers)
    if name == "sag":
        return SelfAttentionGuidance(scale=settings.sag_scale)
    if name == "pag":
        return PerturbedAttentionGuidance(scale=settings.pag_scale, layers=layers)
    if name == "seg":
        return SmoothedEnergyGuidance(scale=settings.seg_scale, layers=layers)
    if name == "rescale":
        return GuidanceRescale(scale=settings.rescale)
    if name == "interval":
        return GuidanceInterval(guidance_start=settings.interval[0], guidance_end=settings.interval[1])
    raise InputError(f"There is no guidance method {name!r}. There are: {', '.join(TITLES)}.")


def build(
    settings: Settings, n: int, reader: AttributeReader | None = None, clip: TextExtractor | None = None
) -> Suite[Scene]:
    """The suite of ``n`` captions.

    Raises:
        InputError: an unknown method, or none.
        ModelError: the theatre's readers are not in this installation.
    """
    controls = {name: control(name, settings) for name in settings.methods}
    if not controls:
        raise InputError(f"Give one or more methods of {', '.join(TITLES)}.")
    first, *others = controls

    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(CORE_MIX, 1, FIRST_SCENE + number)
        plain = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        guided = {name: plain.model_copy(update={"controls": [one]}) for name, one in controls.items()}
        return Case(number, full_caption(scene), scene, {PLAIN: plain, **guided}, {TRUE: lambda: render(scene)})

    reader = reader or theatre_reader()
    drawn = dict.fromkeys((PLAIN, *controls, TRUE), PLAIN)
    judges = (RightShare(CaptionJudge(reader)), PromptScore(clip or theatre_clip(), drawn))
    return Suite(
        name="guidance_methods",
        title="Plain guidance, SAG, PAG, SEG, rescaled guidance and guidance in an interval",
        n=n,
        settings=settings,
        arms=(
            Arm(PLAIN, "plain guidance"),
            *(Arm(name, TITLES[name]) for name in controls),
            Arm(TRUE, "true picture (reader)", known=True),
        ),
        case=case,
        judges=judges,
        table=Table(
            rank=lambda values: _rank(values, first),
            baseline=PLAIN,
            ours=first,
            others=tuple(others),
            note="All arms of a caption are drawn from the same noise. The reader's own error is in the column of the "
            "true picture.",
        ),
        set_judges=(SetDistance(TheatreFeatures(reader), TRUE),),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def _rank(values: Values, arm: str) -> tuple[float, ...]:
    own = values[arm]
    return own[RIGHT] or 0.0, own[ALL] or 0.0, float(np.nan_to_num(own["CLIP score"] or 0.0))
