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
from pydantic import Field, field_validator

from controlroom.controls.input_channels import channels_of
from controlroom.controls.run_mask import KeptPicture, mask_sites, run_mask
from controlroom.controls.source_pixels import for_each_image, source_pixels
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE, Branch, Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
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
        mask: white where the result may differ from the picture, which is put back outside of it after each step: a
            picture, a list with one for each prompt, or words of the instruction (``"words: shirt"``). None:
            everywhere.

    Raises:
        ModelError: when the run is planned: the UNet does not read eight channels.
        InputError: at the start of a run: a picture that cannot be read, or a number that does not fit the images.
    """

    type: Literal["instruct_pix2pix"] = Field(default="instruct_pix2pix", kw_only=True)
    image: Any
    image_guidance_scale: float = Field(default=1.5, ge=0)
    scaled: bool = False
    mask: MaskInput = None

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
            claims=() if self.mask is None else (Claim("latents", "blend"),),
            attention=mask_sites(outline, self.mask),
            channels=channels,
            checkpoint=f"an InstructPix2Pix checkpoint, whose UNet reads {2 * channels} channels, such as "
            "timbrooks/instruct-pix2pix (Stable Diffusion 1) or diffusers/sdxl-instructpix2pix-768 (XL)",
        )

    def prepare(self, run: Run) -> KeptPicture | None:
        """Encode the picture and give it to every branch but ``uncond``, which sees zeros."""
        latents = run.backbone.encode_picture(source_pixels(self.image, run))
        seen = for_each_image(latents if self.scaled else unscaled(latents, run.backbone.vae.config), run)
        for name in run.plan.branches:
            run.set_channels(
                name, torch.zeros_like(seen[:1]) if name == "uncond" else channels_of(seen, run, name, self.label)
            )
        if SEEING in run.plan.branches:
            run.set_condition(SEEING, _told(run))
        if self.mask is None:
            return None
        clean = for_each_image(latents, run)
        mask = run_mask(self.mask, run, self, beside=self.image)
        return KeptPicture(mask, clean, run.noise("kept picture", clean.shape))

    def attention(self, call: AttentionCall) -> None:
        """Read where the words of the mask are."""
        kept: KeptPicture | None = call.step.memory(self)
        if kept is not None:
            kept.mask.attention(call)

    def finish(self, step: Step) -> None:
        """Keep what is outside of the mask."""
        kept: KeptPicture | None = step.memory(self)
        if kept is not None:
            kept.finish(step)

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


def _told(run: Run) -> Any:
    """What ``uncond`` is told, also where another control sets it later or step by step."""

    def told(step: Step) -> Condition:
        source = run.conditions["uncond"]
        return source if isinstance(source, Condition) else source(step)

    return told
