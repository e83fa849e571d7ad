"""Image to image, or SDEdit (arXiv 2108.01073): start from a picture instead of from noise.

The idea: a picture that was noised far enough looks like one of the model's own, and denoising it with new words
changes what the words ask for. ``strength`` says how far: only that share of the steps is run.

As in diffusers' pipelines, draw for draw: a sample of the encoder's posterior, the noise, then the noise of the steps.
Deviations: pictures of several prompts with several images each stay with their prompts (there they alternate).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from controlroom.controls.noised_start import sampled_latents, start_from
from controlroom.controls.run_mask import KeptPicture, mask_sites, run_mask
from controlroom.controls.source_pixels import check_count, is_latents, source_pixels
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step


class ImageToImage(Control):
    """Draw the prompt over a picture.

    Args:
        image: the picture, stretched to the size of the run: path, PIL picture, array or tensor. A list: one for each
            prompt. Latents [B, 4, h, w], scaled as ``output_type="latent"`` gives them, are taken as they are.
        strength: above 0, at most 1: share of the steps that is run. 1 keeps nothing but a trace; at 0.3 details
            change.
        mask: white where the result may differ from the picture, which is put back outside of it after each step, as
            diffusers' inpainting does with a network of four channels: a picture, a list with one for each prompt, or
            words of the prompt (``"words: red hat"``); None: everywhere.

    Raises:
        InputError: when the run is planned: a strength that leaves no step, or latents given to the call; at the start
            of a run: a picture that cannot be read or does not fit.
    """

    type: Literal["image_to_image"] = Field(default="image_to_image", kw_only=True)
    image: Any
    strength: float = Field(default=0.8, gt=0, le=1)
    mask: MaskInput = None

    @field_validator("image")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("expected the picture to start from")
        return value

    def declare(self, outline: Outline) -> Declaration:
        claims = () if self.mask is None else (Claim("latents", "blend"),)
        return Declaration(strength=self.strength, claims=claims, attention=mask_sites(outline, self.mask))

    def prepare(self, run: Run) -> KeptPicture | None:
        mask = None if self.mask is None else run_mask(self.mask, run, self, beside=self.image)
        clean, noise = start_from(run, self._latents(run))
        return None if mask is None else KeptPicture(mask, clean, noise)

    def _latents(self, run: Run) -> torch.Tensor:
        if not is_latents(self.image, run):
            return sampled_latents(run, source_pixels(self.image, run))
        check_count(len(self.image), run, "latent")
        if tuple(self.image.shape[-2:]) != run.latent_shape()[-2:]:
            height, width = run.latent_shape()[-2:]
            raise InputError(
                f"{self.label}: the latents are {self.image.shape[-2]} x {self.image.shape[-1]}, the run's "
                f"{height} x {width}. Give height and width that fit, or enlarge them with Upscale."
            )
        return self.image

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
