"""How well pictures come back from their inversion: DDIM, regularised and null-text, against the autoencoder's own.

Pictures are held-out scenes of one puppet; the prompt is the full caption. Each is inverted and drawn again from what
was found. The column of the autoencoder is the best that any inversion can do; "PSNR lost" is what an inversion lost
beside that. DDIM and the regularised inversion are drawn without guidance and, as the case that null-text optimisation
is for, DDIM with guidance too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from pydantic import Field

from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.estimates import Estimate, share
from controlroom.evaluation.extractors.theatre import TheatreFeatures, theatre_reader
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.metrics.psnr import psnr
from controlroom.evaluation.suites.editing import CEILING, sized
from controlroom.evaluation.suites.judges import DistanceScore
from controlroom.evaluation.suites.suite import Arm, Case, Derived, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, scenes_of
from controlroom.sampling.inversion import invert
from controlroom.sampling.inverted import Method, NullText
from controlroom.sampling.inverted_pictures import read_pixels
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader

AUTOENCODER, TRUE = "autoencoder", "truth"
DECIBELS, LOST = "PSNR", "PSNR lost"
FIRST_SCENE = 40_000


@dataclass(frozen=True)
class Way:
    """An inversion and the run that starts from it: with guidance or without."""

    title: str
    method: Method
    guided: bool


WAYS = {
    "ddim": Way("DDIM", "ddim", False),
    "ddim_guided": Way("DDIM, guided", "ddim", True),
    "regularised": Way("regularised", "regularised", False),
    "null_text": Way("null-text, guided", "null_text", True),
}
NULL_TEXT, GUIDED = "null_text", "ddim_guided"


class Settings(SuiteSettings):
    """Of the guided arms, the suite's guidance; of null-text optimisation, the iterations of each step."""

    guidance_scale: float = Field(default=5.0, gt=1)
    iterations: int = Field(default=10, ge=1)


class ReconstructionJudge:
    """PSNR to the picture, and how much less that is than the autoencoder's."""

    fingerprint = "reconstruction"
    measures = (Measure(DECIBELS, digits=2), Measure(LOST, higher=False, digits=2))

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[Values] = []
        for one in shown:
            best = _decibels(one, AUTOENCODER)
            row: dict[str, dict[str, float | None]] = {AUTOENCODER: {DECIBELS: best}}
            for arm in WAYS:
                own = _decibels(one, arm)
                row[arm] = {DECIBELS: own, LOST: best - own}
            found.append(row)
        return found


def _decibels(one: Shown[Scene], arm: str) -> float:
    true = one.pictures[TRUE]
    drawn = unit_pixels([sized(one.pictures[arm], true.size)])
    return min(float(psnr(unit_pixels([true]), drawn)), CEILING)


@torch.no_grad()
def reconstructed(pipe: Pipeline, picture: Image.Image) -> Image.Image:
    """A picture through the autoencoder and back."""
    backbone = pipe.backbone
    pixels = read_pixels([picture], backbone.default_size, "crop").to(pipe.device, pipe.dtype)
    return pipe.decode(backbone.encode_picture(pixels))[0]


def inverted(pipe: Pipeline, picture: Image.Image, spec: RunSpec, way: Way, iterations: int) -> Image.Image:
    """A picture inverted and drawn again from what was found."""
    found = invert(
        pipe,
        picture,
        str(spec.prompt),
        way.method,
        spec.num_inference_steps,
        spec.guidance_scale if way.method == "null_text" else None,
        null_text=NullText(iterations=iterations),
        seed=spec.seed or 0,
        measure=False,
    )
    scale = spec.guidance_scale if way.guided else 1.0
    again = spec.model_copy(update={"controls": [FromInversion(found)], "guidance_scale": scale, "scheduler": "ddim"})
    return pipe.run(again).images[0]


def build(settings: Settings, n: int, reader: AttributeReader | None = None) -> Suite[Scene]:
    """The suite of ``n`` pictures.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(CORE_MIX, 1, FIRST_SCENE + number)
        spec = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        made = {
            name: lambda pipe, way=way: inverted(pipe, render(scene), spec, way, settings.iterations)
            for name, way in WAYS.items()
        }
        return Case(
            number,
            full_caption(scene),
            scene,
            {},
            {TRUE: lambda: render(scene)},
            {AUTOENCODER: lambda pipe: reconstructed(pipe, render(scene)), **made},
        )

    distance = DistanceScore(TheatreFeatures(reader or theatre_reader()), TRUE, (AUTOENCODER, *WAYS))
    return Suite(
        name="inversion",
        title="Inversion: how well a picture comes back",
        n=n,
        settings=settings,
        arms=(
            Arm(TRUE, "picture", known=True),
            Arm(AUTOENCODER, "autoencoder alone"),
            *(Arm(name, way.title) for name, way in WAYS.items()),
        ),
        case=case,
        judges=(ReconstructionJudge(), distance),
        table=Table(
            rank=lambda values: (-(values[NULL_TEXT][LOST] or 0.0),),
            baseline=GUIDED,
            ours=NULL_TEXT,
            derived=(Derived("null-text within 1 dB of the autoencoder", "share", within),),
            note=f"Guidance of the guided arms: {settings.guidance_scale:g}. The prompt is the full caption.",
        ),
        reference=TRUE,
        world=WORLD_VERSION,
    )


def within(rows: Sequence[Values]) -> Estimate:
    """Share of the pictures of which null-text optimisation lost 1 dB at most."""
    return share([(row[NULL_TEXT][LOST] or 0.0) <= 1.0 for row in rows])
