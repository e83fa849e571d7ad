"""InstructPix2Pix: edit a picture by an instruction (arXiv 2211.09800).

The idea: a network trained on pictures before and after an instruction reads the picture to edit as four further input
channels. Two guidances: one away from not knowing the picture, one away from not knowing the instruction,
ε(∅, ∅) + s_I (ε(picture, ∅) − ε(∅, ∅)) + s_T (ε(picture, words) − ε(picture, ∅)).

As in diffusers' pipelines. Deviations: there guidance is off where ``image_guidance_scale`` is below 1, here the
formula holds for every value; several pictures are told apart by prompt. The picture is not scaled by the autoencoder's
factor, as published; CosXL Edit, which was trained with scaled latents, is ``scaled=True``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from controlroom.controls.condition_map import tiled
from controlroom.controls.source_pixels import for_each_image, source_pixels
from controlroom.core.branch import IMAGE, Branch, Condition
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step

# Sees the picture and no words. It is told what ``uncond`` is told, and other controls treat it alike.
SEEING = "image"


class InstructPix2Pix(Control):
    """Follow the instruction of the prompt on a picture. For checkpoints whose UNet reads eight channels.

    The strength of the instruction is the call's ``guidance_scale``.

    Args:
        image: the picture to edit, stretched to the size of the run: path, PIL picture, array or tensor. A list: one
            for each prompt.
        image_guidance_scale: 0 or more; how closely the result keeps to the picture (1 to 2). At guidance_scale of 1
            or less there is no guidance at all.
        scaled: the checkpoint was trained with latents scaled by the autoencoder's factor (CosXL Edit).

    Raises:
        ModelError: when the run is planned: the UNet does not read eight channels.
        InputError: at the start of a run: a picture that cannot be read, or a number that does not fit the images.
    """

    type: Literal["instruct_pix2pix"] = Field(default="instruct_pix2pix", kw_only=True)
    image: Any
    image_guidance_scale: float = Field(default=1.5, ge=0)
    scaled: bool = False

    @field_validator("image")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("expected the picture to edit")
        return value

    def declare(self, outline: Outline) -> Declaration:
        """A third branch, and as many input channels as the latents have."""
        channels = outline.latent[0]
        return Declaration(
            branches=(Branch(SEEING, role="uncond", purpose="picture"),) if outline.guided else (),
            channels=channels,
            checkpoint=f"an InstructPix2Pix checkpoint, whose UNet reads {2 * channels} channels, such as "
            "timbrooks/instruct-pix2pix (Stable Diffusion 1) or diffusers/sdxl-instructpix2pix-768 (XL)",
        )

    def prepare(self, run: Run) -> None:
        """Encode the picture and give it to every branch but ``uncond``, which sees zeros."""
        latents = run.backbone.encode_picture(source_pixels(self.image, run))
        seen = for_each_image(latents if self.scaled else unscaled(latents, run.backbone.vae.config), run)
        for name in run.plan.branches:
            run.set_channels(name, torch.zeros_like(seen[:1]) if name == "uncond" else _fitted(seen, run, name))
        if SEEING in run.plan.branches:
            run.set_condition(SEEING, _told(run))

    def combine(self, step: Step, state: str) -> torch.Tensor | None:
        """The published combination, for the picture; other states have no third branch."""
        if state != IMAGE or SEEING not in step.eps:
            return None
        words, seeing, blind = step.eps["cond"], step.eps[SEEING], step.eps["uncond"]
        return blind + step.run.guidance.scale * (words - seeing) + self.image_guidance_scale * (seeing - blind)


def unscaled(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Latents as the autoencoder gives them, out of latents as the sampler has them."""
    mean, std = getattr(config, "latents_mean", None), getattr(config, "latents_std", None)
    if mean is None or std is None:
        return latents / config.scaling_factor
    shape = (1, -1, 1, 1)
    return latents * latents.new_tensor(std).view(shape) / config.scaling_factor + latents.new_tensor(mean).view(shape)


def _fitted(seen: torch.Tensor, run: Run, branch: str) -> torch.Tensor:
    """[images, c, h, w] for a branch; one that looks at other latents than the picture's may differ in size."""
    plan = run.plan
    if plan.branches[branch].state == IMAGE:
        return seen
    rows, hw = plan.rows_of(branch), plan.hw_of(branch)
    if seen.shape[0] > rows:
        if not bool((seen == seen[:1]).all()):
            raise InputError(f"The branch {branch!r} has {rows} pictures, InstructPix2Pix {seen.shape[0]} others.")
        seen = seen[:1]
    seen = tiled(seen, rows, branch)
    return seen if tuple(seen.shape[-2:]) == hw else F.interpolate(seen, size=hw, mode="bilinear", antialias=True)


def _told(run: Run) -> Any:
    """What ``uncond`` is told, also where another control sets it later or step by step."""

    def told(step: Step) -> Condition:
        source = run.conditions["uncond"]
        return source if isinstance(source, Condition) else source(step)

    return told
