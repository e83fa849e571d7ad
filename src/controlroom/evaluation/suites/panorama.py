"""Panoramas of 4:1: drawn at once, through windows that do not overlap, and by MultiDiffusion, from the same noise.

Captions are held-out scenes of one puppet. Three numbers: the seam, which is the jump between the columns where one
window's width ends, as a multiple of the jump between any two columns (1: no seam); the puppets that the attribute
reader sees in each quarter, of which a panorama of one caption has one; and the CLIP score of each quarter.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image
from pydantic import Field

from controlroom.controls.regions.multidiffusion import MultiDiffusion
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.scene import CANVAS, Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import TextExtractor, content_hash, label_of
from controlroom.evaluation.extractors.theatre import theatre_clip, theatre_reader
from controlroom.evaluation.metrics.clip_score import clip_score
from controlroom.evaluation.metrics.pixels import in_batches
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, scenes_of
from controlroom.signals.readers import AttributeReader

PLAIN, WINDOWED, MULTI = "plain", "windowed", "multidiffusion"
SEAM, PUPPETS, ONE, CLIP = "seam", "puppets per width", "quarters with one puppet", "CLIP score of a quarter"
QUARTERS = 4
FIRST_SCENE = 60_000
_COUNTS = {"none": 0.0, "one": 1.0, "two": 2.0}


class Settings(SuiteSettings):
    """Of MultiDiffusion."""

    window: int = Field(default=16, ge=1)
    """Side of a window in latent pixels, which is what the theatre was trained at."""
    stride: int = Field(default=4, ge=1)
    circular: bool = False


def seam_score(picture: Image.Image, parts: int = QUARTERS) -> float:
    """Mean jump between the columns where parts meet, divided by that between all other neighbouring columns."""
    pixels = np.asarray(picture.convert("RGB"), np.float64)
    jumps = np.abs(np.diff(pixels, axis=1)).mean(axis=(0, 2))
    borders = [picture.width * part // parts - 1 for part in range(1, parts)]
    others = np.delete(jumps, borders)
    return float(jumps[borders].mean() / max(others.mean(), 1e-9))


def quarters(picture: Image.Image) -> list[Image.Image]:
    """Four parts of equal width, from the left."""
    side = picture.width // QUARTERS
    return [picture.crop((i * side, 0, (i + 1) * side, picture.height)) for i in range(QUARTERS)]


class Panoramas:
    """Seams, puppets and words of a panorama."""

    def __init__(self, reader: AttributeReader, clip: TextExtractor) -> None:
        self.reader, self.clip = reader, clip
        label = f"theatre-attributes@{content_hash(reader)}"
        self.fingerprint = f"panoramas {label} {label_of(clip)}"
        self.measures = (
            Measure(SEAM, higher=False),
            Measure(PUPPETS, higher=None, extractor=label),
            Measure(ONE, extractor=label),
            Measure(CLIP, extractor=label_of(clip), digits=2),
        )

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        texts = self.clip.text_features([text for one in shown for text in [one.case.title] * QUARTERS])
        for arm in shown[0].pictures:
            parts = [part for one in shown for part in quarters(one.pictures[arm])]
            counts = [_COUNTS[str(answers["puppets"])] for answers in self.reader.read(parts)]
            scores = clip_score(in_batches(self.clip.features, parts), texts).tolist()
            for index, (row, one) in enumerate(zip(found, shown, strict=True)):
                own = slice(QUARTERS * index, QUARTERS * (index + 1))
                row[arm] = {
                    SEAM: seam_score(one.pictures[arm]),
                    PUPPETS: float(np.mean(counts[own])),
                    ONE: float(np.mean([count == 1.0 for count in counts[own]])),
                    CLIP: float(np.mean(scores[own])),
                }
        return found


def build(
    settings: Settings, n: int, reader: AttributeReader | None = None, clip: TextExtractor | None = None
) -> Suite[Scene]:
    """The suite of ``n`` captions.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def case(number: int) -> Case[Scene]:
        (scene,) = scenes_of(CORE_MIX, 1, FIRST_SCENE + number)
        base = RunSpec(
            model=settings.model,
            prompt=full_caption(scene),
            height=CANVAS,
            width=QUARTERS * CANVAS,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        apart = MultiDiffusion(settings.window, settings.window)
        ours = MultiDiffusion(settings.window, settings.stride, settings.circular)
        specs = {
            PLAIN: base,
            WINDOWED: base.model_copy(update={"controls": [apart]}),
            MULTI: base.model_copy(update={"controls": [ours]}),
        }
        return Case(number, full_caption(scene), scene, specs)

    return Suite(
        name="panorama",
        title="Panoramas of 4:1",
        n=n,
        settings=settings,
        arms=(Arm(PLAIN, "at once"), Arm(WINDOWED, "windows side by side"), Arm(MULTI, "MultiDiffusion")),
        case=case,
        judges=(Panoramas(reader or theatre_reader(), clip or theatre_clip()),),
        table=Table(
            rank=lambda values: (values[MULTI][CLIP] or 0.0,),
            baseline=PLAIN,
            ours=MULTI,
            note="A seam of 1 is none. The caption names one puppet, which each width of a window is told.",
        ),
        world=WORLD_VERSION,
    )
