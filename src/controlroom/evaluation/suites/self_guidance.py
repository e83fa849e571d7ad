"""Whether self-guidance moves and resizes what it is told to: one puppet, shifted or made larger or smaller.

Captions are those of one puppet. Cases take turns between a shift to the left or right and a size; the puppet is moved
as a whole (its noun, hair and garments), the place is held. Where it is in a drawn picture is what the keypoint reader
sees: its middle is the mean of the joints, its size their spread around it, both compared with the picture of the same
caption and noise without the control. The rest is judged by the other questions, and by PSNR where the puppet is in
neither picture.

A lone puppet stands near the middle in all of the theatre's training pictures, so large shifts ask for what the
checkpoint has never seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from controlroom.controls.guidance.self_guidance import SelfGuidance
from controlroom.controls.object_edits import Move, Resize
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.captions import full_caption
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.data.theatre.vocabulary import FIGURES, WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.metrics.background import background
from controlroom.evaluation.metrics.pck import PRESENT
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.regions import PUPPET, region_of
from controlroom.evaluation.suites.editing import CEILING, PSNR, REST, readers
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.evaluation.theatre_quality import CORE_MIX, JUDGED
from controlroom.signals.readers import AttributeReader, KeypointReader

PLAIN, GUIDED, TRUE = "plain", "self_guidance", "truth"
SHIFTED, SHIFT, RESIZED, SIZE = "shift reached", "shift error", "size reached", "size error"
SHIFT_WITHIN, SIZE_WITHIN = 0.10, 0.25
"""Of the width of the picture; of the area that was asked for."""
FIRST_SCENE = 50_000
_FEWEST = 6
"""Joints that both pictures must show."""


class Settings(SuiteSettings):
    """How far, how large, and those of the control."""

    shift: float = Field(default=0.15, gt=SHIFT_WITHIN, le=0.5)
    """Share of the width. Up to a tenth, standing still would count as reached."""
    sizes: tuple[float, float] = (0.6, 1.6)
    """Factors on the area."""
    scale: float | None = Field(default=1000.0, gt=0)
    """At the derived one (64) the theatre's puppets stay where they are; from 3000 on pictures fall apart."""
    resolution: int | None = Field(default=8, ge=1)
    """Of the attention that is read; the derived one of the theatre's small latents, 4x4, is coarse."""
    hold_shape: float = Field(default=1.0, ge=0)
    hold_appearance: float = Field(default=0.1, ge=0)


@dataclass(frozen=True)
class Command:
    """A scene, and what is asked: a shift in shares of the width, or a factor on the area."""

    scene: Scene
    shift: float | None = None
    size: float | None = None

    @property
    def words(self) -> list[str]:
        """Of the puppet, those that its caption has."""
        one = self.scene.puppets[0].identity
        hat = [] if one.hat == "none" else [one.hat]
        said = full_caption(self.scene).replace(",", "").split()
        noun = next(word for word in said if word in (*FIGURES, "person"))
        return [noun, "hair", one.top.kind, one.lower.kind, *hat]


def command(number: int, settings: Settings) -> Command:
    """The command of a case."""
    scene = sample_scene(FIRST_SCENE + number, "held_out", CORE_MIX)
    other = number // 2 % 2
    if number % 2 == 0:
        return Command(scene, shift=-settings.shift if other else settings.shift)
    return Command(scene, size=settings.sizes[other])


def control(asked: Command, settings: Settings) -> SelfGuidance:
    """The control of a command."""
    edit = (
        Move(asked.words, by=(asked.shift, 0.0))
        if asked.shift is not None
        else Resize(asked.words, by=asked.size or 1.0)
    )
    return SelfGuidance(
        [edit],
        scale=settings.scale,
        hold=[asked.scene.place],
        hold_shape=settings.hold_shape,
        hold_appearance=settings.hold_appearance,
        resolution=settings.resolution,
        keep_original=False,
    )


def moved(before: NDArray, after: NDArray) -> tuple[float, float] | None:
    """How far the joints of two pictures are apart in x, in pixels, and the ratio of the areas they cover.

    None where too few are in both.

    >>> points = np.array([[x, y, 1.0] for x in (0.0, 1.0, 2.0) for y in (0.0, 1.0, 2.0)])
    >>> moved(points, points * (2, 2, 1) + (3, 0, 0))
    (4.0, 4.0)
    """
    both = (before[:, 2] >= PRESENT) & (after[:, 2] >= PRESENT)
    if both.sum() < _FEWEST:
        return None
    first, second = (points[both, :2].astype(np.float64) for points in (before, after))
    spread = [float(np.square(each - each.mean(0)).sum()) for each in (first, second)]
    return float(second[:, 0].mean() - first[:, 0].mean()), spread[1] / max(spread[0], 1e-9)


class CommandJudge:
    """Was the command followed, and was everything else held still."""

    def __init__(self, attribute_reader: AttributeReader, keypoint_reader: KeypointReader) -> None:
        self.attribute_reader, self.keypoint_reader = attribute_reader, keypoint_reader
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        places = f"theatre-keypoints@{content_hash(keypoint_reader)}"
        self.fingerprint = f"commands {SHIFT_WITHIN} {SIZE_WITHIN} {reads} {places}"
        self.measures = (
            Measure(SHIFTED, "share", extractor=places),
            Measure(SHIFT, higher=False, extractor=places),
            Measure(RESIZED, "share", extractor=places),
            Measure(SIZE, higher=False, extractor=places),
            Measure(REST, extractor=reads),
            Measure(PSNR, extractor=places, digits=1),
        )

    def __call__(self, shown: Sequence[Shown[Command]]) -> Sequence[Values]:
        pictures = {arm: [one.pictures[arm] for one in shown] for arm in (PLAIN, GUIDED)}
        read = {arm: self.attribute_reader.read(column) for arm, column in pictures.items()}
        points = {arm: self.keypoint_reader.keypoints(column) for arm, column in pictures.items()}
        found: list[Values] = []
        for index, one in enumerate(shown):
            row: dict[str, dict[str, float | None]] = {}
            for arm in (PLAIN, GUIDED):
                width = one.pictures[arm].size[0]
                row[arm] = followed(one.case.truth, moved(points[PLAIN][index], points[arm][index]), width)
            row[GUIDED][REST] = float(np.mean([read[GUIDED][index][q] == read[PLAIN][index][q] for q in JUDGED]))
            size = one.pictures[PLAIN].size
            region = region_of(points[PLAIN][index], PUPPET, size) | region_of(points[GUIDED][index], PUPPET, size)
            if not region.all():
                before, after = (unit_pixels([one.pictures[arm]]) for arm in (PLAIN, GUIDED))
                kept = background(before, after, torch.from_numpy(region)[None])
                row[GUIDED][PSNR] = min(float(kept.psnr), CEILING)
            found.append(row)
        return found


def followed(asked: Command, change: tuple[float, float] | None, width: int) -> dict[str, float | None]:
    """The measures of a command, for a change as `moved` gives it; a puppet that was lost has not followed."""
    if asked.shift is not None:
        error = None if change is None else abs(change[0] / width - asked.shift)
        return {SHIFTED: float(error is not None and error <= SHIFT_WITHIN), SHIFT: error}
    error = None if change is None else abs(change[1] / (asked.size or 1.0) - 1)
    return {RESIZED: float(error is not None and error <= SIZE_WITHIN), SIZE: error}


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Command]:
    """The suite of ``n`` commands: one half shifts, one half sizes.

    Raises:
        ModelError: the theatre's readers are not in this installation.
    """

    def case(number: int) -> Case[Command]:
        asked = command(number, settings)
        plain = RunSpec(
            model=settings.model,
            prompt=full_caption(asked.scene),
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            seed=settings.seed + number,
        )
        guided = plain.model_copy(update={"controls": [control(asked, settings)]})
        said = f"shift {asked.shift:+g}" if asked.shift is not None else f"area times {asked.size:g}"
        specs = {PLAIN: plain, GUIDED: guided}
        return Case(number, f"{plain.prompt}: {said}", asked, specs, {TRUE: lambda: render(asked.scene)})

    return Suite(
        name="self_guidance",
        title="Self-guidance: a puppet shifted and resized",
        n=n,
        settings=settings,
        arms=(
            Arm(PLAIN, "no control"),
            Arm(GUIDED, "self-guidance"),
            Arm(TRUE, "true picture of the caption", known=True),
        ),
        case=case,
        judges=(CommandJudge(*readers(attribute_reader, keypoint_reader)),),
        table=Table(
            rank=lambda values: (
                max(values[GUIDED].get(SHIFTED) or 0.0, values[GUIDED].get(RESIZED) or 0.0),
                values[GUIDED].get(PSNR) or 0.0,
            ),
            baseline=PLAIN,
            ours=GUIDED,
            note=f"Reached: within {SHIFT_WITHIN:.0%} of the width, within {SIZE_WITHIN:.0%} of the area that was "
            f"asked for. Shifts of {settings.shift:g} of the width; areas times {settings.sizes[0]:g} and "
            f"{settings.sizes[1]:g}. Both pictures of a caption are drawn from the same noise.",
        ),
        reference=PLAIN,
        world=WORLD_VERSION,
    )
