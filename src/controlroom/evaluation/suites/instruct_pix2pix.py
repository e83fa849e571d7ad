"""How well InstructPix2Pix follows instructions: held-out scenes before, an instruction, and the scene after.

The theatre's own triples of all kinds, with a network that was tuned on others of them (``python -m
controlroom.training.theatre instruct_pix2pix``). The sweep draws the same cases at every pair of image and text
guidance; its report is what the curve of consistency against edit is drawn from (`controlroom.evaluation.tradeoff`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

from PIL import Image
from pydantic import Field

from controlroom.backbones.differences import load_unet
from controlroom.backbones.loading import find_model, keep
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.data.theatre.edits import KINDS, Edit, sample_edit
from controlroom.data.theatre.render import render
from controlroom.evaluation.suites.suite import Arm, Suite, SuiteSettings
from controlroom.evaluation.suites.true_pictures import Make, true_picture_suite
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader, KeypointReader

INSTRUCTED = "instruct_pix2pix"
FIRST_EDIT = 60_000


class Settings(SuiteSettings):
    """Both guidances, and where the network is."""

    weights: str = "theatre/instruct_pix2pix"
    """A UNet of eight channels in diffusers' layout; the other parts are the model's."""
    text_guidance_scale: float = Field(default=5.0, gt=1)
    """Published: 7.5. 5 is what the theatre is guided by."""
    image_guidance_scale: float = Field(default=1.5, ge=0)
    kinds: tuple[str, ...] = KINDS
    image_scales: tuple[float, ...] = (1.0, 1.5, 2.0, 2.5)
    """Of the sweep."""
    text_scales: tuple[float, ...] = (3.0, 5.0, 7.5)
    """Of the sweep."""


def triple(number: int, kinds: Sequence[str] = KINDS) -> Edit:
    """A held-out triple; kinds take turns.

    Raises:
        InputError: an unknown kind.
    """
    if not kinds or not set(kinds) <= set(KINDS):
        raise InputError(f"kinds are some of {', '.join(KINDS)}; got {', '.join(kinds) or 'none'}.")
    return sample_edit(FIRST_EDIT + number, "held_out", kinds[number % len(kinds)])


def editor(pipe: Pipeline, weights: str) -> Pipeline:
    """The model with another UNet, loaded once.

    Raises:
        ModelError: nothing there.
    """
    folder = find_model(weights, "UNet")

    def load() -> Pipeline:
        source = pipe.to_diffusers()
        parts = {**source.components, "unet": load_unet(folder, pipe.dtype).to(pipe.device)}
        return Pipeline.from_diffusers(type(source)(**parts, requires_safety_checker=False))

    return keep(pipe.backbone, ("instruct_pix2pix",), folder, load)


def arm_of(image_scale: float, text_scale: float) -> str:
    """Name of an arm of the sweep."""
    return f"I{image_scale:g} T{text_scale:g}"


def scales_of(arm: str) -> tuple[float, float] | None:
    """Image and text guidance of an arm of the sweep; None for another arm.

    >>> scales_of(arm_of(1.5, 7)), scales_of("reprompted")
    ((1.5, 7.0), None)
    """
    first, _, second = arm.partition(" T")
    try:
        return (float(first.removeprefix("I")), float(second)) if first.startswith("I") else None
    except ValueError:
        return None


def build(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The suite of ``n`` triples.

    Raises:
        InputError: an unknown kind of edit.
        ModelError: the theatre's readers are not in this installation.
    """
    scales = {INSTRUCTED: (settings.image_guidance_scale, settings.text_guidance_scale)}
    titles = {INSTRUCTED: "InstructPix2Pix"}
    title = "InstructPix2Pix: instructions on true pictures"
    return _suite("instruct_pix2pix", title, settings, n, scales, titles, attribute_reader, keypoint_reader)


def build_sweep(
    settings: Settings,
    n: int,
    attribute_reader: AttributeReader | None = None,
    keypoint_reader: KeypointReader | None = None,
) -> Suite[Edit]:
    """The same triples at every pair of guidances.

    Raises:
        InputError: as `build`, or no guidances.
        ModelError: as `build`.
    """
    pairs = list(product(sorted(set(settings.image_scales)), sorted(set(settings.text_scales))))
    if not pairs or min(settings.text_scales) <= 1 or min(settings.image_scales) < 0:
        raise InputError("A sweep takes image_scales of 0 or more and text_scales above 1, one or more of each.")
    scales = {arm_of(*pair): pair for pair in pairs}
    titles = {arm_of(*pair): f"image {pair[0]:g}, text {pair[1]:g}" for pair in pairs}
    title = "InstructPix2Pix: image and text guidance"
    return _suite("instruct_pix2pix_sweep", title, settings, n, scales, titles, attribute_reader, keypoint_reader)


def _suite(
    name: str,
    title: str,
    settings: Settings,
    n: int,
    scales: Mapping[str, tuple[float, float]],
    titles: Mapping[str, str],
    attribute_reader: AttributeReader | None,
    keypoint_reader: KeypointReader | None,
) -> Suite[Edit]:
    def made(number: int, edit: Edit, target: RunSpec) -> Mapping[str, Make]:
        def draw(pipe: Pipeline, image_scale: float, text_scale: float) -> Image.Image:
            control = InstructPix2Pix(render(edit.before), image_guidance_scale=image_scale)
            changed = {"prompt": edit.instruction, "guidance_scale": text_scale, "controls": [control]}
            return editor(pipe, settings.weights).run(target.model_copy(update=changed)).images[0]

        return {arm: lambda pipe, pair=pair: draw(pipe, *pair) for arm, pair in scales.items()}

    return true_picture_suite(
        name,
        title,
        settings,
        n,
        lambda number: triple(number, settings.kinds),
        [Arm(arm, titles[arm]) for arm in scales],
        made,
        lambda edit: edit.instruction,
        attribute_reader,
        keypoint_reader,
        weights=(settings.weights,),
    )
