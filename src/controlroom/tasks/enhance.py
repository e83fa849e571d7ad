"""Text-guided enhancement: a picture changed by words and enlarged, by Imagic (arXiv 2210.09276) from end to end.

Only builds runs: the picture is fitted (or the fit in the folder is used), drawn small from words between the learned
and the wanted ones at each strength asked for, and enlarged by the network that was tuned to the picture, told the
wanted words. The published system enlarges with super-resolution models of its own, tuned under the wanted words;
Stable Diffusion has none, so the one network is tuned so, at the large size, and `Upscale` stands for them.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controlroom.controls.editing.imagic import Imagic
from controlroom.controls.editing.upscale import Upscale
from controlroom.core.control import Control, describe
from controlroom.core.errors import InputError
from controlroom.core.spec import RunSpec
from controlroom.training.recipes.imagic import ImagicSettings, fit_imagic

if TYPE_CHECKING:
    from controlroom.core.result import RunResult
    from controlroom.sampling.pipeline import Pipeline


class EnhanceOptions(BaseModel):
    """Everything beside picture and words that an enhancement depends on.

    Raises:
        InputError: an unknown or ill-typed option.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    strengths: tuple[float, ...] = Field(default=(0.8, 1.0, 1.2), min_length=1)
    """One picture for each, from the same noise: 0 is the picture that was given, 1 the wanted words."""
    small_size: tuple[int, int] | None = None
    """Height and width of the first drawing; None: what the model was trained at."""
    factor: int = Field(default=2, ge=1, le=8)
    """How much larger the result is, along each side."""
    upscale_strength: float = Field(default=0.4, gt=0, le=1)
    upscale_mode: Literal["pixels", "latents"] = "pixels"
    small_network: Literal["base", "tuned"] = "base"
    """What draws first; the enlargement has the tuned network."""
    fit: ImagicSettings = ImagicSettings(unet_words="wanted")
    """Sizes left open become those of the two drawings."""
    negative_prompt: str | None = None
    num_inference_steps: int = Field(default=50, ge=1)
    guidance_scale: float = 7.5
    scheduler: str | None = None
    seed: int = Field(default=0, ge=0, lt=2**63)

    @model_validator(mode="after")
    def _enlarges(self) -> Self:
        # Found out here, not after the fit.
        if int(self.num_inference_steps * self.upscale_strength) < 1:
            raise ValueError(
                f"upscale_strength {self.upscale_strength:g} leaves none of {self.num_inference_steps} steps; raise one"
            )
        return self

    def __init__(self, **options: Any) -> None:
        try:
            super().__init__(**options)
        except ValidationError as error:
            raise InputError(describe("EnhanceOptions", error)) from error


@dataclass(frozen=True)
class EnhanceResult:
    """What an enhancement gives.

    Attributes:
        images: one for each strength, at the large size.
        strengths: of the images.
        small: the run that drew them small; ``pipe.decode(small.images)`` shows them.
        large: the run that enlarged them.
        control: the fit, for further runs with ``alpha`` and words of their own.
    """

    images: list[Any]
    strengths: tuple[float, ...]
    small: RunResult
    large: RunResult
    control: Imagic


def enhance(
    pipe: Pipeline, image: Any, prompt: str, folder: str | os.PathLike[str], options: EnhanceOptions | None = None
) -> EnhanceResult:
    """Change a picture as words say, at several strengths, and enlarge it.

    Args:
        pipe: the model; left as it was.
        image: the picture: path, PIL picture, array or tensor.
        prompt: what the changed picture shows.
        folder: of the fit; one that is finished is used again.
        options: strengths, sizes, steps.

    Raises:
        UnfinishedError: the fit was stopped; call again to continue it.
        InputError: a picture, prompt or size that cannot be used.
        ResumeError: the folder holds a fit of another picture, prompt or model, or with other settings.
    """
    chosen = options or EnhanceOptions()
    height, width = chosen.small_size or pipe.backbone.default_size
    large = (height * chosen.factor, width * chosen.factor)
    sizes = {"size": chosen.fit.size or (height, width), "unet_size": chosen.fit.unet_size or large}
    control = fit_imagic(pipe, image, prompt, folder, chosen.fit.model_copy(update=sizes))
    sweep = Imagic(str(folder), list(chosen.strengths), network=_network(control, chosen.small_network))
    small = pipe.run(_spec(pipe, prompt, chosen, (height, width), [sweep], "latent"))
    assert isinstance(small.images, torch.Tensor)
    enlarged = Upscale(small.images, chosen.upscale_strength, chosen.upscale_mode)
    wanted = Imagic(str(folder), 1.0, network=_network(control, "tuned"))
    result = pipe.run(_spec(pipe, prompt, chosen, large, [enlarged, wanted], "pil"))
    return EnhanceResult(list(result.images), chosen.strengths, small, result, control)


def _network(fit: Imagic, wanted: Literal["base", "tuned"]) -> Literal["base", "tuned"]:
    """A fit that did not tune the network has no other."""
    return "base" if fit.network == "base" else wanted


def _spec(
    pipe: Pipeline,
    prompt: str,
    chosen: EnhanceOptions,
    size: tuple[int, int],
    controls: list[Control],
    output_type: Literal["latent", "pil"],
) -> RunSpec:
    """One picture for each strength, all from the same noise."""
    return RunSpec(
        model=pipe.model,
        prompt=prompt,
        negative_prompt=chosen.negative_prompt,
        controls=controls,
        height=size[0],
        width=size[1],
        num_inference_steps=chosen.num_inference_steps,
        guidance_scale=chosen.guidance_scale,
        scheduler=chosen.scheduler,
        num_images_per_prompt=len(chosen.strengths),
        generator_seed=[chosen.seed] * len(chosen.strengths),
        output_type=output_type,
    )
