"""What each part of stylising costs: precision, solver, estimated depth, words, and the depth itself.

A held-out flat scene is drawn anew in another of the theatre's styles, from the same noise by every arm. The first arm
takes no short cut: single precision, DDIM with many steps, the true depth, the words. Each other arm changes one thing,
and the last changes all that the task changes. Geometry is read again by the dense reader, style and things by the
attribute reader; the true picture in that style stands beside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image
from pydantic import Field

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.control import Control
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.vocabulary import STYLES, WORLD_VERSION
from controlroom.evaluation.condition_match import MATCHES, condition_match
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.metrics.psnr import psnr
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, JUDGED
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.dense_reader import DenseReader, DenseSignal, theatre_dense_reader
from controlroom.signals.readers import AttributeReader
from controlroom.signals.signal import Kind

FULL, HALF, SOLVER, ESTIMATED, NO_WORDS, NO_DEPTH, TASK = (
    "full",
    "half",
    "solver",
    "estimated",
    "no_words",
    "no_depth",
    "task",
)
GIVEN, TRUE = "given", "truth"
FIRST_SCENE = 60_000
SHOWN: tuple[Kind, ...] = ("depth", "segmentation")
STYLE, RIGHT, SAME = "style as asked", "attributes right", "PSNR to the first arm"
CEILING = 60.0
"""dB at which PSNR is cut: that of rounding to bytes is 58.9."""


class Settings(SuiteSettings):
    """``steps`` are those of the first arm; the task's defaults for the rest."""

    steps: int = Field(default=50, ge=1, le=1000)
    few_steps: int = Field(default=20, ge=1, le=1000)
    """Of UniPC."""
    strength: float = Field(default=0.8, gt=0, le=1)
    scale: float = Field(default=1.0, gt=0)
    network: str = "theatre/multi"
    half: Literal["float16", "bfloat16"] = "float16"
    style: str = ""
    """Only this style; "": all but flat, in turn."""


class StyleJudge:
    """Is the geometry kept, is it the style that was asked for, and is the rest as the words say."""

    def __init__(self, dense_reader: DenseReader, attribute_reader: AttributeReader) -> None:
        self.attribute_reader = attribute_reader
        self.signals = {
            "depth": DenseSignal("depth", dense_reader, recognise=False),
            "segmentation": DenseSignal("segmentation", dense_reader, recognise=False),
        }
        maps = f"theatre-dense@{content_hash(dense_reader)}"
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        self.fingerprint = f"stylise {maps} {reads}"
        self.measures = (
            *(Measure(f"{kind}: {MATCHES[kind]}", extractor=maps) for kind in SHOWN),
            Measure(STYLE, "share", extractor=reads),
            Measure(RIGHT, extractor=reads),
            Measure(SAME, digits=1),
        )

    def __call__(self, shown: Sequence[Shown[Scene]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            answers = self.attribute_reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                row[arm] = self._judged(one, arm, read)
        return found

    def _judged(self, one: Shown[Scene], arm: str, read: dict[str, str]) -> dict[str, float | None]:
        picture, scene = one.pictures[arm], one.case.truth
        truth = attributes(scene)
        asked = [question for question in JUDGED if truth[question] is not None]
        values: dict[str, float | None] = {
            f"{kind}: {MATCHES[kind]}": condition_match(
                self.signals[kind](picture), condition(scene, kind, picture.width)
            )
            for kind in SHOWN
        }
        values[STYLE] = float(read["style"] == truth["style"])
        values[RIGHT] = float(np.mean([read[question] == truth[question] for question in asked]))
        values[SAME] = None
        if arm not in (FULL, GIVEN, TRUE):
            pixels, first = (unit_pixels([one.pictures[name]]) for name in (arm, FULL))
            values[SAME] = min(float(psnr(pixels, first)), CEILING)
        return values


def build(
    settings: Settings,
    n: int,
    dense_reader: DenseReader | None = None,
    attribute_reader: AttributeReader | None = None,
) -> Suite[Scene]:
    """The suite of ``n`` scenes.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    dense = dense_reader or theatre_dense_reader()
    estimate = DenseSignal("depth", dense, recognise=False)
    styles = (settings.style,) if settings.style else tuple(style for style in STYLES if style != "flat")

    @cache
    def halved(model: str) -> Pipeline:
        return Pipeline.from_pretrained(model, torch_dtype=getattr(torch, settings.half))

    def in_half(spec: RunSpec) -> Image.Image:
        return halved(settings.model).run(spec).images[0]

    def case(number: int) -> Case[Scene]:
        given = sample_scene(FIRST_SCENE + number, "held_out", CORE_MIX)
        wanted = replace(given, style=styles[number % len(styles)])
        source = render(given)
        depths = {"true": condition(given, "depth").picture, "estimated": estimate(source).picture}

        def spec(depth: str | None = "true", few: bool = False, words: bool = True) -> RunSpec:
            controls: list[Control] = [ImageToImage([source], settings.strength)]
            if depth is not None:
                controls.append(ControlNet(settings.network, [depths[depth]], scale=settings.scale, kind="depth"))
            return RunSpec(
                model=settings.model,
                prompt=full_caption(wanted) if words else "",
                controls=controls,
                num_inference_steps=settings.few_steps if few else settings.steps,
                scheduler="unipc" if few else "ddim",
                guidance_scale=settings.guidance_scale,
                seed=settings.seed + number,
            )

        first, task = spec(), spec("estimated", few=True)
        return Case(
            number,
            f"{given.style} → {full_caption(wanted)}",
            wanted,
            {
                FULL: first,
                SOLVER: spec(few=True),
                ESTIMATED: spec("estimated"),
                NO_WORDS: spec(words=False),
                NO_DEPTH: spec(None),
            },
            {GIVEN: lambda: source, TRUE: lambda: render(wanted)},
            {HALF: lambda _: in_half(first), TASK: lambda _: in_half(task)},
        )

    judge = StyleJudge(dense, attribute_reader or theatre_reader())

    def rank(values: Values) -> tuple[float, ...]:
        return tuple(float(values[TASK][name] or 0.0) for name in (STYLE, RIGHT, judge.measures[0].name))

    return Suite(
        name="stylise",
        title="Stylising with the geometry kept: what each part costs",
        n=n,
        settings=settings,
        arms=(
            Arm(GIVEN, "picture given", known=True),
            Arm(FULL, "no short cut"),
            Arm(HALF, f"{settings.half}"),
            Arm(SOLVER, f"UniPC, {settings.few_steps} steps"),
            Arm(ESTIMATED, "estimated depth"),
            Arm(NO_WORDS, "no words"),
            Arm(NO_DEPTH, "no depth"),
            Arm(TASK, "as the task does it"),
            Arm(TRUE, "true picture (readers)", known=True),
        ),
        case=case,
        judges=(judge,),
        table=Table(
            rank=rank,
            baseline=FULL,
            ours=TASK,
            others=(HALF, SOLVER, ESTIMATED, NO_WORDS, NO_DEPTH),
            note=f"Every arm differs from the first, which has float32, DDIM with {settings.steps} steps, true depth "
            f"and words, in one thing; the task in all. PSNR is cut at {CEILING:.0f} dB.",
        ),
        per_prompt=frozenset({"controlnet.image", "image_to_image.image"}),
        weights=(settings.network,),
        reference=GIVEN,
        world=WORLD_VERSION,
    )
