"""Whether depth to image keeps the depth and follows the words: a puppet in other colours.

A true picture and the caption after an edit of a colour are given, from the same noise, to the depth network with the
true depth, to the same network without words, and to the base network by image to image at the same strength. The dense
reader reads the depth again out of what was drawn; the attribute reader says what was followed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.spatial.depth_to_image import DepthToImage
from controlroom.core.control import Control
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.attributes import attributes
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.condition_match import condition_match
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.suites.editing import edit_number
from controlroom.evaluation.suites.instruct_pix2pix import editor
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import JUDGED
from controlroom.signals.dense_reader import DenseReader, DenseSignal, theatre_dense_reader
from controlroom.signals.readers import AttributeReader

DEPTH, NO_WORDS, IMAGE, GIVEN, TRUE = "depth2img", "no_words", "image_to_image", "given", "truth"
KEPT, MADE, RIGHT = "depth rank correlation", "change made", "attributes right"
KINDS = ("top colour", "lower colour", "hair colour")


class Settings(SuiteSettings):
    """Of the control, and where the network is."""

    weights: str = "theatre/depth2img"
    """A UNet of five channels in diffusers' layout; the other parts are the model's."""
    strength: float = Field(default=0.9, gt=0, le=1)


class DepthJudge:
    """Is the depth that of the scene, is the colour the one that was asked for, and is the rest as the words say."""

    def __init__(self, dense_reader: DenseReader, attribute_reader: AttributeReader) -> None:
        self.attribute_reader = attribute_reader
        self.signal = DenseSignal("depth", dense_reader, recognise=False)
        maps = f"theatre-dense@{content_hash(dense_reader)}"
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        self.fingerprint = f"depth2img {maps} {reads}"
        self.measures = (
            Measure(KEPT, extractor=maps),
            Measure(MADE, "share", extractor=reads),
            Measure(RIGHT, extractor=reads),
        )

    def __call__(self, shown: Sequence[Shown[Edit]]) -> Sequence[Values]:
        found: list[dict[str, dict[str, float | None]]] = [{} for _ in shown]
        for arm in shown[0].pictures:
            answers = self.attribute_reader.read([one.pictures[arm] for one in shown])
            for row, one, read in zip(found, shown, answers, strict=True):
                edit, picture = one.case.truth, one.pictures[arm]
                truth = attributes(edit.after)
                asked = [question for question in JUDGED if truth[question] is not None]
                row[arm] = {
                    KEPT: condition_match(self.signal(picture), condition(edit.after, "depth", picture.width)),
                    MADE: float(read[edit.kind] == truth[edit.kind]),
                    RIGHT: float(np.mean([read[question] == truth[question] for question in asked])),
                }
        return found


def build(
    settings: Settings,
    n: int,
    dense_reader: DenseReader | None = None,
    attribute_reader: AttributeReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` scenes.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """
    judge = DepthJudge(dense_reader or theatre_dense_reader(), attribute_reader or theatre_reader())

    def case(number: int) -> Case[Edit]:
        edit = edit_number(number, KINDS)
        picture, prompt = render(edit.before), full_caption(edit.after)
        depth = condition(edit.before, "depth").values

        def spec(control: Control, words: bool = True) -> RunSpec:
            return RunSpec(
                model=settings.model,
                prompt=prompt if words else "",
                controls=[control],
                num_inference_steps=settings.steps,
                guidance_scale=settings.guidance_scale if words else 1.0,
                seed=settings.seed + number,
            )

        with_depth = DepthToImage(picture, depth, settings.strength)
        return Case(
            number,
            prompt,
            edit,
            {IMAGE: spec(ImageToImage(picture, settings.strength))},
            {GIVEN: lambda: picture, TRUE: lambda: render(edit.after)},
            {
                DEPTH: lambda pipe: editor(pipe, settings.weights).run(spec(with_depth)).images[0],
                NO_WORDS: lambda pipe: editor(pipe, settings.weights).run(spec(with_depth, words=False)).images[0],
            },
        )

    def rank(values: Values) -> tuple[float, ...]:
        return values[DEPTH][MADE] or 0.0, values[DEPTH][KEPT] or 0.0

    return Suite(
        name="depth2img",
        title="Depth to image: the depth kept, the words followed",
        n=n,
        settings=settings,
        arms=(
            Arm(GIVEN, "picture given", known=True),
            Arm(IMAGE, "image to image"),
            Arm(DEPTH, "depth to image"),
            Arm(NO_WORDS, "the same without words"),
            Arm(TRUE, "true after (readers)", known=True),
        ),
        case=case,
        judges=(judge,),
        table=Table(
            rank=rank,
            baseline=IMAGE,
            ours=DEPTH,
            others=(NO_WORDS,),
            note=f"All from the same noise at a strength of {settings.strength:g}. The depth is read again by the "
            "dense reader; its own error stands in the column of the true picture.",
        ),
        weights=(settings.weights,),
        reference=GIVEN,
        world=WORLD_VERSION,
    )
