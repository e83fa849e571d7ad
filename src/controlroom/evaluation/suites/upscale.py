"""What Upscale adds to a small picture: true scenes at the model's size enlarged, beside the scenes rendered large.

The small picture is a held-out scene rendered at the size the model was trained at; the truth is the same scene
rendered at twice that. Bicubic enlargement needs no model, and is what Upscale starts from but for the filter; the
autoencoder's reconstruction of the truth is the best that latents of that size can show. All are compared with the
truth at its full size, where the reader's feature maps are taken too: made smaller, every enlargement is the small
picture again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from pydantic import Field, field_validator
from torch import Tensor

from controlroom.controls.editing.upscale import Upscale
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.perceptual import perceptual_distance
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.metrics.psnr import psnr
from controlroom.evaluation.metrics.ssim import ssim
from controlroom.evaluation.suites.editing import CEILING, sized
from controlroom.evaluation.suites.judges import DistanceScore
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, scenes_of
from controlroom.sampling.inverted_pictures import read_pixels
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader

TRUE, BICUBIC, AUTOENCODER, GUIDED = "truth", "bicubic", "autoencoder", "guided"
ALIKE, DECIBELS, DISTANCE = "SSIM", "PSNR", "distance"
FIRST_SCENE = 80_000


class Settings(SuiteSettings):
    """Strengths that are drawn without guidance; the first is the one that is ranked, and drawn with guidance too."""

    guidance_scale: float = Field(default=5.0, gt=1)
    """Of that arm."""
    size: int = Field(default=CANVAS, ge=8)
    """Side of the small pictures: what the model was trained at."""
    strengths: tuple[float, ...] = (0.1, 0.2, 0.4)

    @field_validator("strengths")
    @classmethod
    def _some(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not value or not all(0 < strength <= 1 for strength in value):
            raise ValueError("one strength or more, above 0 and at most 1")
        return value


class FullSize:
    """The attribute reader's feature maps at the size that pictures have: it is a stack of convolutions."""

    def __init__(self, reader: AttributeReader) -> None:
        self.reader = reader
        self.name, self.hash = "theatre-attributes-full-size", content_hash(reader)

    @torch.no_grad()
    def distance(self, first: Tensor, second: Tensor) -> Tensor:
        """`perceptual_distance` over all stages, in [0, 4], of pictures in [0, 1]."""
        return perceptual_distance(first * 2 - 1, second * 2 - 1, self.reader.features)


class TruthJudge:
    """SSIM and PSNR to the truth at its size."""

    fingerprint = "enlarged"
    measures = (Measure(ALIKE), Measure(DECIBELS, digits=2))

    def __init__(self, arms: Sequence[str]) -> None:
        self.arms = tuple(arms)

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[Values] = []
        for one in shown:
            true = one.pictures[TRUE]
            row: dict[str, dict[str, float | None]] = {}
            for arm in self.arms:
                first, second = unit_pixels([sized(one.pictures[arm], true.size)]), unit_pixels([true])
                row[arm] = {
                    ALIKE: float(ssim(first, second)),
                    DECIBELS: min(float(psnr(first, second)), CEILING),
                }
            found.append(row)
        return found


def arm_of(strength: float) -> str:
    """Name of the arm of a strength.

    >>> arm_of(0.2)
    'strength 0.2'
    """
    return f"strength {strength:g}"


@torch.no_grad()
def large_reconstruction(pipe: Pipeline, picture: Image.Image) -> Image.Image:
    """A picture of any size through the autoencoder and back."""
    pixels = read_pixels([picture], (picture.height, picture.width), "crop").to(pipe.device, pipe.dtype)
    return pipe.decode(pipe.backbone.encode_picture(pixels))[0]


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Scene]:
    """The suite of ``n`` scenes.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    small, large = settings.size, 2 * settings.size
    strengths = {arm_of(strength): strength for strength in settings.strengths}
    first = next(iter(strengths))

    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(CORE_MIX, 1, FIRST_SCENE + number)
        picture = render(scene, small)
        spec = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            height=large,
            width=large,
            num_inference_steps=settings.steps,
            guidance_scale=1.0,
            seed=settings.seed + number,
        )
        specs = {
            arm: spec.model_copy(update={"controls": [Upscale([picture], strength=strength)]})
            for arm, strength in strengths.items()
        }
        specs[GUIDED] = specs[first].model_copy(update={"guidance_scale": settings.guidance_scale})
        return Case(
            number,
            full_caption(scene),
            scene,
            specs,
            {
                TRUE: lambda: render(scene, large),
                BICUBIC: lambda: picture.resize((large, large), Image.Resampling.BICUBIC),
            },
            {AUTOENCODER: lambda pipe: large_reconstruction(pipe, render(scene, large))},
        )

    compared = (BICUBIC, AUTOENCODER, *strengths, GUIDED)
    return Suite(
        name="upscale",
        title="Upscale: small pictures enlarged, beside scenes rendered at twice the size",
        n=n,
        settings=settings,
        arms=(
            Arm(TRUE, f"truth at {large}", known=True),
            Arm(BICUBIC, "bicubic", known=True),
            Arm(AUTOENCODER, "autoencoder of the truth"),
            *(Arm(arm, f"Upscale, {arm}") for arm in strengths),
            Arm(GUIDED, f"Upscale, {first}, guided"),
        ),
        case=case,
        judges=(
            TruthJudge(compared),
            DistanceScore(FullSize(reader or theatre_reader()), TRUE, compared, DISTANCE),
        ),
        table=Table(
            rank=lambda values: (-(values[first][DISTANCE] or 0.0),),
            baseline=BICUBIC,
            ours=first,
            others=(*tuple(strengths)[1:], GUIDED),
            note=f"Small pictures are {small} x {small}. The prompt is the full caption. The distance is taken at the "
            "full size.",
        ),
        per_prompt=frozenset({"upscale.image"}),
        reference=TRUE,
        world=WORLD_VERSION,
    )
