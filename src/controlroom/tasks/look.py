"""Seeing inside: what the model looks at, at one step of drawing a picture.

Three things are read, and nothing is changed: how much each place attends to each word (cross-attention, after
arXiv 2210.04885 and 2208.01626), how places of one picture find those of another or of itself (self-attention; the
queries of one against the keys of the other), and the first three principal components of a layer's features as red,
green and blue (as arXiv 2211.12572 shows them), over all pictures together, so that colours mean the same in each.

The picture is drawn from words, or given: noised to the step, or inverted (DDIM) and read on the way back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.controls.editing.from_inversion import FromInversion
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.observe import Observation, Observe
from controlroom.core.control import Control, describe
from controlroom.core.errors import InputError
from controlroom.core.images import fit, load_image
from controlroom.core.sites import Site, nearest_size
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.execute import plan_run
from controlroom.sampling.inversion import invert
from controlroom.sampling.observed import draw_observed
from controlroom.sampling.pipeline import Pipeline

Point = tuple[float, float]
Maps = NDArray[np.float32]
_MOST_WORDS = 12


class LookOptions(BaseModel):
    """What to look at, and how the picture is drawn.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    words: tuple[str, ...] | None = None
    """Words or phrases; None: every word of the prompts, the first twelve."""
    step: int | None = Field(default=None, ge=0)
    """From 0, of those that are run; None: half way."""
    layer: str | None = None
    """Name of a layer, or how names begin (``up_blocks.1``); None: those at which objects show."""
    resolution: int | None = Field(default=None, ge=1)
    """Shorter side in tokens of the layers that are read."""
    points: tuple[Point, ...] = ()
    """x, y in [0, 1] of the first picture, whose matches are shown."""
    inverted: bool = False
    """Given pictures are inverted instead of noised."""
    num_inference_steps: int = Field(default=50, ge=1)
    guidance_scale: float = 7.5
    negative_prompt: str | None = None
    scheduler: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)
    size: tuple[int, int] | None = None
    """Height and width; None: what the model was trained at."""

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("LookOptions", error)) from error
        if any(not 0 <= value <= 1 for point in self.points for value in point):
            raise InputError(f"Points are x, y from 0 to 1, as shares of width and height; got {self.points}.")


@dataclass(frozen=True)
class Look:
    """What was seen.

    Attributes:
        pictures: that were drawn, or given, in the size of the run.
        prompts: of each picture.
        words: word -> [images, h, w] float32: share of a place's attention that goes to the word's tokens, mean over
            layers and heads. NaN in pictures whose prompt lacks it.
        components: [images, 3, h, w] float32: the features along their first three principal components.
        explained: share of the features' variance along each of the three.
        between: [images, images, h, w, h, w] float32: entry [a, b] is where places of picture a look in picture b.
        points: x, y in [0, 1] of the first picture.
        step, timestep: when.
        layers: what was read: ``words``, ``between``, ``components`` -> names of layers.
        spec: the run, without what read it.
    """

    pictures: list[Image.Image]
    prompts: tuple[str, ...]
    words: dict[str, Maps]
    components: Maps
    explained: tuple[float, ...]
    between: Maps
    points: tuple[Point, ...]
    step: int
    timestep: int
    layers: dict[str, tuple[str, ...]]
    spec: RunSpec

    def match(self, point: Point, source: int = 0, target: int = -1) -> Point:
        """Where the most attention of a place of one picture lies in another: x, y in [0, 1]."""
        field = self.attended(point, source, target)
        y, x = np.unravel_index(int(field.argmax()), field.shape)
        return (float(x) + 0.5) / field.shape[1], (float(y) + 0.5) / field.shape[0]

    def attended(self, point: Point, source: int = 0, target: int = -1) -> Maps:
        """[h, w]: how much a place of picture ``source`` attends to each place of ``target``."""
        height, width = self.between.shape[2:4]
        x, y = min(int(point[0] * width), width - 1), min(int(point[1] * height), height - 1)
        return self.between[source, target, y, x]

    def numbers(self) -> dict[str, Any]:
        """Everything that can be said in numbers, as plain data."""
        words = {
            word: [None if np.isnan(one).any() else _place_of(one) for one in maps] for word, maps in self.words.items()
        }
        return {
            "step": self.step,
            "timestep": self.timestep,
            "prompts": list(self.prompts),
            "seed": self.spec.seed,
            "layers": {name: list(layers) for name, layers in self.layers.items()},
            "words": words,
            "components": [round(share, 6) for share in self.explained],
            "matches": [
                {"point": list(point), "match": [round(value, 4) for value in self.match(point)]}
                for point in self.points
            ],
        }


def _place_of(field: Maps) -> dict[str, Any]:
    """Mean share of attention, and where it is most: x, y in [0, 1]."""
    y, x = np.unravel_index(int(field.argmax()), field.shape)
    peak = [round((float(x) + 0.5) / field.shape[1], 4), round((float(y) + 0.5) / field.shape[0], 4)]
    return {"mean": round(float(field.mean()), 6), "max": round(float(field.max()), 6), "peak": peak}


def look(
    pipe: Pipeline,
    prompt: str | Sequence[str],
    images: Sequence[Any] = (),
    options: LookOptions | None = None,
    controls: Sequence[Control] = (),
) -> Look:
    """Look into a model at one step.

    Args:
        pipe: the model; left as it was.
        prompt: what is drawn, or what the given pictures show; two prompts, or one prompt for two pictures, show how
            the second finds itself in the first.
        images: pictures to look at instead of drawing any, one or two: paths, PIL pictures, arrays or tensors.
        options: everything else.
        controls: act in the run as always; what is read is what they leave. Not with pictures.

    Raises:
        InputError: no words, more than two pictures, words or layers that are not there, a step that is not run.
    """
    options = options or LookOptions()
    prompts = _prompts(prompt, len(images))
    if images and controls:
        raise InputError("Controls act on what is drawn; leave them out where pictures are given.")
    spec = RunSpec(
        model=pipe.model,
        prompt=list(prompts),
        negative_prompt=options.negative_prompt,
        controls=list(controls),
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        scheduler="ddim" if images and options.inverted else options.scheduler,
        seed=options.seed,
        height=None if options.size is None else options.size[0],
        width=None if options.size is None else options.size[1],
    )
    planned = plan_run(pipe.backbone, spec)
    steps = planned.plan.n  # fewer than are asked for where a control starts from a picture
    step = steps // 2 if options.step is None else options.step
    if step >= steps:
        raise InputError(f"Step {step} is not run: there are {steps}, from 0 to {steps - 1}. Give a smaller step.")
    tokens = [prompt_tokens(pipe.backbone.tokenizers()[0], text) for text in planned.prompts]
    words = _words(tokens, options.words)
    observe = _observer(pipe, spec, options)
    if images:
        spec = spec.model_copy(update={"controls": [_starting(pipe, images, prompts, spec, step, options)]})
        observe = observe.model_copy(update={"step": 0})
    else:
        observe = observe.model_copy(update={"step": step})
    spec = spec.model_copy(update={"controls": [*spec.controls, observe]})
    seen: list[tuple[Observation, int]] = []

    def see(at: Step) -> bool:
        if at.i == observe.step:
            seen.append((at.memory(observe), int(at.t)))
        # Given pictures are not drawn on.
        return bool(images)

    result = draw_observed(pipe, spec, see)
    (observation, timestep) = seen[0]
    hw = int(result.latents.shape[-2]), int(result.latents.shape[-1])
    size = hw[1] * pipe.backbone.pixels_per_latent, hw[0] * pipe.backbone.pixels_per_latent
    pictures = [fit(load_image(one), *size, "stretch") for one in images] or list(result.images)
    sizes = {site.name: site.hw for site in pipe.backbone.attention_sites(hw)}
    components, explained = principal_components(torch.cat(list(observation.features.values()), dim=1))
    cross = torch.stack(list(observation.cross.values())).mean(0)
    height, width = sizes[observe.cross[0]]
    between = torch.stack(list(observation.between.values())).mean(0)
    own = sizes[observe.between[0]]
    spec = result.spec
    assert spec is not None  # a run that was drawn here has one
    kept = [control for control in spec.controls if control is not observe]
    return Look(
        pictures=pictures,
        prompts=prompts,
        words={word: word_maps(cross, tokens, word).reshape(-1, height, width).numpy() for word in words},
        components=components.numpy(),
        explained=explained,
        between=between.reshape(*between.shape[:2], *own, *own).cpu().numpy(),
        points=options.points,
        step=step,
        timestep=timestep,
        layers={"words": observe.cross, "between": observe.between, "components": observe.features},
        spec=spec.model_copy(update={"controls": kept}),
    )


def word_maps(cross: torch.Tensor, tokens: Sequence[PromptTokens], word: str) -> torch.Tensor:
    """[images, places, tokens] of attention -> [images, places]: what goes to a word, wherever it stands."""
    maps = torch.full(cross.shape[:2], float("nan"))
    for row, prompt in enumerate(tokens):
        if word in prompt:
            places = [place for occurrence in prompt.find(word) for place in occurrence]
            maps[row] = cross[row, :, places].sum(-1).cpu()
    return maps


def principal_components(features: torch.Tensor, count: int = 3) -> tuple[torch.Tensor, tuple[float, ...]]:
    """Features along the axes in which they vary most, and the share of variance along each.

    Args:
        features: [images, channels, h, w]; the axes are of all pictures together.
        count: of axes; fewer channels or places give components of 0.

    Returns:
        [images, count, h, w], mean 0 over all; the channel that counts most in an axis counts positively.
    """
    images, channels, height, width = features.shape
    rows = features.double().cpu().movedim(1, -1).reshape(-1, channels)
    rows = rows - rows.mean(0)
    _, strengths, axes = torch.linalg.svd(rows, full_matrices=False)
    axes, strengths = axes[:count], strengths.square()
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    found = rows @ (axes * signs).T
    found = torch.nn.functional.pad(found, (0, count - found.shape[1]))
    total = float(strengths.sum())
    shares = [float(value) / total if total else 0.0 for value in strengths[:count]]
    shares += [0.0] * (count - len(shares))
    return found.reshape(images, height, width, count).movedim(-1, 1).float(), tuple(shares)


def _prompts(prompt: str | Sequence[str], images: int) -> tuple[str, ...]:
    listed = (prompt,) if isinstance(prompt, str) else tuple(prompt)
    if len(listed) == 1:
        listed = listed * max(images, 1)
    if not 1 <= len(listed) <= 2 or images not in (0, len(listed)):
        raise InputError(f"There are {len(listed)} prompts and {images} pictures. Give one or two, of each as many.")
    if not all(text.strip() for text in listed):
        raise InputError(
            "There is nothing to look for in an empty prompt. Say what is drawn, or what is in the picture."
        )
    return listed


def _words(tokens: Sequence[PromptTokens], asked: tuple[str, ...] | None) -> tuple[str, ...]:
    """Those that are asked for, each in one of the prompts; or all."""
    if asked is None:
        every = [word.strip(",.;:!?\"'()") for prompt in tokens for word, places in prompt.words if places]
        there = [word for word in dict.fromkeys(every) if word and any(word in prompt for prompt in tokens)]
        return tuple(there[:_MOST_WORDS])
    for word in asked:
        if not any(word in prompt for prompt in tokens):
            tokens[0].find(word)
    return tuple(dict.fromkeys(asked))


def _observer(pipe: Pipeline, spec: RunSpec, options: LookOptions) -> Observe:
    """Which layers are read."""
    outline = plan_run(pipe.backbone, spec).plan.outline
    late = [site for site in outline.features if site.kind in ("resnet", "transformer") and site.place == "up"]
    features = late if options.layer is None else [site for site in outline.features if site.kind != "norm"]
    cross = [site for site in outline.attention if site.kind == "cross"]
    own = [site for site in outline.attention if site.kind == "self"]
    groups = [_chosen(group, options, outline.hw) for group in (cross, own, features)]
    if options.layer is not None and not any(groups):
        names = sorted({".".join(site.name.split(".")[:2]) for site in outline.attention})
        raise InputError(f"No layer is called {options.layer!r} or begins so. There are, among others: {names}.")
    # A layer of one sort has none of the others: those are shown as they would be without it.
    plain = options.model_copy(update={"layer": None})
    filled = [
        found or _chosen(group, plain, outline.hw) for found, group in zip(groups, (cross, own, late), strict=True)
    ]
    return Observe(
        cross=tuple(site.name for site in filled[0]),
        between=tuple(site.name for site in filled[1]),
        # One layer: features of several have axes of their own.
        features=(filled[2][-1].name,),
    )


def _chosen(sites: Sequence[Site], options: LookOptions, latent: tuple[int, int]) -> list[Site]:
    """Those of the name that is asked for, of one size: that asked for, or at which objects show."""
    if options.layer is not None:
        sites = [site for site in sites if site.name == options.layer or site.name.startswith(f"{options.layer}.")]
        if not sites:
            return []
    resolution = options.resolution
    if resolution is None:
        # A quarter of the latents' side, as the papers have it, but no fewer than eight tokens where there are as many.
        shorter = [min(site.hw) for site in sites]
        wanted = max(min(nearest_size(sites, latent)), min(8, max(shorter)))
        resolution = min((side for side in shorter if side >= wanted), default=max(shorter))
    hw = nearest_size(sites, latent, resolution)
    return [site for site in sites if site.hw == hw]


def _starting(
    pipe: Pipeline, images: Sequence[Any], prompts: tuple[str, ...], spec: RunSpec, step: int, options: LookOptions
) -> Control:
    """What brings given pictures to the level of a step."""
    steps = options.num_inference_steps
    strength = min(1.0, (steps - step + 0.5) / steps)
    if not options.inverted:
        return ImageToImage(list(images), strength)
    if options.scheduler not in (None, "ddim"):
        raise InputError(f"Pictures are inverted by DDIM; leave scheduler={options.scheduler!r} out.")
    found = invert(
        pipe,
        list(images),
        list(prompts),
        num_inference_steps=steps,
        negative_prompt=options.negative_prompt,
        height=spec.height,
        width=spec.width,
        mode="stretch",
        seed=options.seed,
        measure=False,
    )
    return FromInversion(found, strength)
