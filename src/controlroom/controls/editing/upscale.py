"""Upscale: draw small, enlarge, and finish at the large size. A technique of the A1111 community ("hires fix").

The idea: a model that draws far above the size it was trained at repeats itself. A picture drawn at that size is
enlarged, noised to the middle of the schedule, and denoised at the large size: the layout stays, details appear. It is
SDEdit (arXiv 2108.01073) from an enlarged picture, and stands for the super-resolution models of cascaded diffusion
(Imagic, arXiv 2210.09276) where there are none.

Two runs: the first gives the small picture or its latents, the second has this control and a larger height and width.
Where the large picture is beyond what the network can see, a control that sees the canvas through views goes beside it.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from controlroom.controls.noised_start import start_from
from controlroom.controls.source_pixels import check_count, is_latents, natural_pixels, stretched
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run


class Upscale(Control):
    """Enlarge a picture to the run's height and width, and draw its details.

    Args:
        image: the small picture: path, PIL picture, array or tensor; a list: one for each prompt or image. Or latents
            [B, 4, h, w] as ``output_type="latent"`` gives them.
        strength: above 0, at most 1: share of the steps that is run. 0.2 to 0.5; more invents more.
        mode: ``pixels`` enlarges the picture (decoding latents first), ``latents`` the latents (encoding a picture
            first): cheaper and softer, and wants a strength of 0.5 or more.

    Raises:
        InputError: when the run is planned: a strength that leaves no step, or latents given to the call; at the start
            of a run: a picture that cannot be read, does not fit the images, or is larger than the run's.
    """

    type: Literal["upscale"] = Field(default="upscale", kw_only=True)
    image: Any
    strength: float = Field(default=0.4, gt=0, le=1)
    mode: Literal["pixels", "latents"] = "pixels"

    @field_validator("image")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("expected the small picture")
        return value

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(strength=self.strength)

    def prepare(self, run: Run) -> None:
        """Enlarge, noise, start there."""
        latents = is_latents(self.image, run)
        given = self._given(run)
        check_count(sum(len(part) for part in given), run, "latent" if latents else "image")
        factor = run.backbone.pixels_per_latent if latents else 1
        for part in given:
            self._check_size(run, part.shape[-2] * factor, part.shape[-1] * factor)
        start_from(run, torch.cat([self._enlarged(run, part, latents) for part in given]))

    def _given(self, run: Run) -> list[torch.Tensor]:
        """Latents, or pictures in [-1, 1], each in its size."""
        parts = [self.image] if is_latents(self.image, run) else natural_pixels(self.image)
        return [part.to(device=run.device, dtype=run.dtype) for part in parts]

    def _check_size(self, run: Run, height: int, width: int) -> None:
        if height > run.size[0] or width > run.size[1]:
            raise InputError(
                f"{self.label}: the picture is {height} x {width} (height x width), the run {run.size[0]} x "
                f"{run.size[1]}. Give a larger height and width, or ImageToImage for a picture that shrinks."
            )

    def _enlarged(self, run: Run, part: torch.Tensor, latents: bool) -> torch.Tensor:
        """[rows, 4, h, w] latents in the size of the run."""
        backbone = run.backbone
        if self.mode == "pixels":
            # Latents are decoded to the picture that a run would have given.
            pixels = backbone.decode(part).clamp(-1, 1) if latents else part
            return backbone.encode_picture(stretched(pixels.float().cpu(), run.size))
        if not latents:
            step = backbone.pixels_per_latent
            height, width = (max(step, side // step * step) for side in part.shape[-2:])
            part = backbone.encode_picture(stretched(part.float().cpu(), (height, width)))
        return F.interpolate(part.float(), size=run.latent_shape()[-2:], mode="bicubic").to(run.dtype)
