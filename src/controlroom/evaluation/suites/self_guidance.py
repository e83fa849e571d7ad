"""Whether self-guidance moves and resizes what it is told to: one thing or animal, shifted, or made larger or smaller.

Captions are those of one thing of medium size. Cases take turns between a shift to the left or right and a size; the
place is held when the thing is moved. Where the thing is in a drawn picture is what the dense reader sees: its middle
is the mean of the pixels that show a thing or an animal, its size their number, both compared with the picture of the
same caption and noise without the control. Held are the place, and the thing as what and in which colour it is read;
and, by PSNR, what is outside the thing in both pictures.

Things, because the theatre shows them where and as large as is asked here: lone ones stand up to an eighth of the width
from the middle, and small and big ones differ in area by 3.3. Lone puppets are in the middle and as high as the picture
in all of training: of these self-guidance moves 29 % [15, 49] as far as asked, and gives none another size (48 cases).
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
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Mix, Scene, sample_scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.evaluation.extractor import content_hash
from controlroom.evaluation.extractors.theatre import theatre_reader
from controlroom.evaluation.metrics.background import background
from controlroom.evaluation.metrics.pixels import unit_pixels
from controlroom.evaluation.suites.editing import CEILING, PSNR, REST
from controlroom.evaluation.suites.suite import Arm, Case, Measure, Shown, Suite, SuiteSettings, Table, Values
from controlroom.signals.dense_reader import DenseReader, theatre_dense_reader
from controlroom.signals.readers import AttributeReader

PLAIN, GUIDED, TRUE = "plain", "self_guidance", "truth"
SHIFTED, SHIFT, RESIZED, SIZE = "shift reached", "shift error", "size reached", "size error"
SHIFT_WITHIN, SIZE_WITHIN = 0.10, 0.25
"""Of the width of the picture; of the area that was asked for."""
FIRST_SCENE = 50_000
ONE_THING = Mix(kinds={"prop": 1.0}, styles={"flat": 1.0}, views={"front": 1.0})
_CLASSES = (Part.ANIMAL.name.lower(), Part.THING.name.lower())
_FEWEST = 0.005
"""Share of the picture that a thing covers at least; less is taken for a slip of the reader."""


class Settings(SuiteSettings):
    """How far, how large, and those of the control."""

    shift: float = Field(default=0.15, gt=SHIFT_WITHIN, le=0.5)
    """Share of the width. Up to a tenth, standing still would count as reached."""
    sizes: tuple[float, float] = (0.6, 1.6)
    """Factors on the area."""
    scale: float | None = Field(default=1000.0, gt=0)
    """At the derived one (64) the theatre's puppets stay where they are; at 2000 some pictures of things fall apart."""
    size_weight: float = Field(default=3.0, gt=0)
    """Of a size, whose energy is a mean over the picture and has small gradients; a shift's is 1."""
    resolution: int | None = Field(default=8, ge=1)
    """Of the attention that is read; the derived one of the theatre's small latents, 4x4, is coarse."""
    hold_shape: float = Field(default=1.0, ge=0)
    hold_appearance: float = Field(default=0.1, ge=0)
    """Of shifts. With a new size nothing is held: what is held of the old one keeps the thing as it was."""


@dataclass(frozen=True)
class Command:
    """A scene, and what is asked: a shift in shares of the width, or a factor on the area."""

    scene: Scene
    shift: float | None = None
    size: float | None = None

    @property
    def thing(self) -> str:
        """What it is called."""
        return self.scene.props[0].kind


def command(number: int, settings: Settings) -> Command:
    """The command of a case."""
    # Of small and big things the caption says so, which would speak against another size.
    drawn = (sample_scene(FIRST_SCENE + 100 * number + k, "held_out", ONE_THING) for k in range(100))
    scene = next(scene for scene in drawn if scene.props[0].size == "medium")
    other = number // 2 % 2
    if number % 2 == 0:
        return Command(scene, shift=-settings.shift if other else settings.shift)
    return Command(scene, size=settings.sizes[other])


def control(asked: Command, settings: Settings) -> SelfGuidance:
    """The control of a command."""
    moves = asked.shift is not None
    words = asked.thing.split()
    edit = (
        Move(words, by=(asked.shift, 0.0))
        if asked.shift is not None
        else Resize(words, by=asked.size or 1.0, weight=settings.size_weight)
    )
    return SelfGuidance(
        [edit],
        scale=settings.scale,
        hold=[asked.scene.place],
        hold_shape=settings.hold_shape if moves else 0.0,
        hold_appearance=settings.hold_appearance if moves else 0.0,
        resolution=settings.resolution,
        keep_original=False,
    )


def moved(before: NDArray[np.bool_], after: NDArray[np.bool_]) -> tuple[float, float] | None:
    """How far the middles of two masks are apart in x, in shares of the width, and the ratio of their areas.

    None where one of them is next to nothing.

    >>> mask = np.zeros((10, 10), bool)
    >>> mask[:, 2:4] = True
    >>> moved(mask, np.roll(mask, 3, axis=1))
    (0.3, 1.0)
    """
    if min(before.mean(), after.mean()) < _FEWEST:
        return None
    first, second = (float(np.nonzero(mask)[1].mean()) for mask in (before, after))
    return (second - first) / before.shape[1], float(after.sum() / before.sum())


class CommandJudge:
    """Was the command followed, and was everything else held still."""

    def __init__(self, attribute_reader: AttributeReader, dense_reader: DenseReader) -> None:
        self.attribute_reader, self.dense_reader = attribute_reader, dense_reader
        self.labels = [dense_reader.classes.index(name) for name in _CLASSES]
        reads = f"theatre-attributes@{content_hash(attribute_reader)}"
        places = f"theatre-dense@{content_hash(dense_reader)}"
        self.fingerprint = f"commands {SHIFT_WITHIN} {SIZE_WITHIN} {_FEWEST} {reads} {places}"
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
        masks = {
            arm: [np.isin(found.labels, self.labels) for found in self.dense_reader.read(column)]
            for arm, column in pictures.items()
        }
        rows: list[Values] = []
        for index, one in enumerate(shown):
            asked = one.case.truth
            before, after = masks[PLAIN][index], masks[GUIDED][index]
            row: dict[str, dict[str, float | None]] = {
                PLAIN: followed(asked, moved(before, before)),
                GUIDED: followed(asked, moved(before, after)),
            }
            same = [read[GUIDED][index][q] == read[PLAIN][index][q] for q in ("place", asked.thing)]
            row[GUIDED][REST] = float(np.mean(same))
            if not (before | after).all():
                first, second = (unit_pixels([one.pictures[arm]]) for arm in (PLAIN, GUIDED))
                kept = background(first, second, torch.from_numpy(before | after)[None])
                row[GUIDED][PSNR] = min(float(kept.psnr), CEILING)
            rows.append(row)
        return rows


def followed(asked: Command, change: tuple[float, float] | None) -> dict[str, float | None]:
    """The measures of a command, for a change as `moved` gives it; a thing that was lost has not followed."""
    if asked.shift is not None:
        error = None if change is None else abs(change[0] - asked.shift)
        return {SHIFTED: float(error is not None and error <= SHIFT_WITHIN), SHIFT: error}
    error = None if change is None else abs(change[1] / (asked.size or 1.0) - 1)
    return {RESIZED: float(error is not None and error <= SIZE_WITHIN), SIZE: error}


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    dense_reader: DenseReader | None = None,
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
        title="Self-guidance: a thing shifted and resized",
        n=n,
        settings=settings,
        arms=(
            Arm(PLAIN, "no control"),
            Arm(GUIDED, "self-guidance"),
            Arm(TRUE, "true picture of the caption", known=True),
        ),
        case=case,
        judges=(CommandJudge(attribute_reader or theatre_reader(), dense_reader or theatre_dense_reader()),),
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
