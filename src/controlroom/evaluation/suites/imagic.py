"""What Imagic changes and keeps: true pictures, each fitted, and edited by the caption of the scene after.

A fit takes minutes, so there are few cases. The strengths of a case are drawn from one fit, whose files are removed
when they are drawn. The fits are short and their rates are not those of the paper, whose network is a hundred times
larger and was tuned, not made, by few steps.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping

from PIL import Image
from pydantic import Field

from controlroom.core.spec import RunSpec
from controlroom.data.theatre.edits import Edit
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites import editing
from controlroom.evaluation.suites.prompt_to_prompt import COLOURS
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.evaluation.suites.true_pictures import Make, true_picture_suite
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader, KeypointReader
from controlroom.training.recipes.imagic import ImagicSettings, fit_imagic


class Settings(SuiteSettings):
    """Of the fit, and the strengths that are drawn; the first is the one that is ranked."""

    kinds: tuple[str, ...] = COLOURS
    alphas: tuple[float, ...] = (1.0, 0.8, 1.2)
    embedding_steps: int = Field(default=200, ge=1)
    embedding_rate: float = Field(default=1e-3, gt=0)
    unet_steps: int = Field(default=200, ge=1)
    unet_rate: float = Field(default=2e-5, gt=0)

    @property
    def fit(self) -> ImagicSettings:
        """Those of the fit."""
        return ImagicSettings(
            embedding_steps=self.embedding_steps,
            embedding_rate=self.embedding_rate,
            unet_steps=self.unet_steps,
            unet_rate=self.unet_rate,
            seed=self.seed,
        )


def arm_of(alpha: float) -> str:
    """Name of the arm of a strength."""
    return f"alpha {alpha:g}"


def drawn(pipe: Pipeline, picture: Image.Image, spec: RunSpec, settings: Settings) -> dict[str, Image.Image]:
    """All strengths of one picture, from one fit."""
    with tempfile.TemporaryDirectory(prefix="controlroom-imagic-") as folder:
        edit = fit_imagic(pipe, picture, str(spec.prompt), folder, settings.fit)
        found = {}
        for alpha in settings.alphas:
            control = edit.model_copy(update={"alpha": alpha})
            found[arm_of(alpha)] = pipe.run(spec.model_copy(update={"controls": [control]})).images[0]
    for key in [key for key in pipe.backbone.kept if key[0] == "imagic"]:
        del pipe.backbone.kept[key]  # the weights of a fit are of no more use
    return found


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` edits.

    Raises:
        InputError: an unknown kind of edit.
        ModelError: the theatre's readers are not in this installation.
    """
    pictures: dict[int, dict[str, Image.Image]] = {}

    def made(number: int, edit: Edit, target: RunSpec) -> Mapping[str, Make]:
        def one(pipe: Pipeline, arm: str) -> Image.Image:
            if number not in pictures:
                pictures[number] = drawn(pipe, render(edit.before), target, settings)
            return pictures[number][arm]

        arms = [arm_of(alpha) for alpha in settings.alphas]
        return {arm: lambda pipe, arm=arm: one(pipe, arm) for arm in arms}

    return true_picture_suite(
        "imagic",
        "Imagic: true pictures edited by a caption",
        settings,
        n,
        lambda number: editing.edit_number(number, settings.kinds),
        [Arm(arm_of(alpha), f"Imagic, α {alpha:g}") for alpha in settings.alphas],
        made,
        editing.both_captions,
        attribute_reader,
        keypoint_reader,
        note=f"Fits: {settings.embedding_steps} steps of the words, {settings.unet_steps} of the network.",
    )
