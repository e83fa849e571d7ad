"""Inpainting by a UNet of nine channels, as Stable Diffusion's (arXiv 2112.10752), on pictures of one's own.

Beside the noisy latents stand the mask, and the latents of the picture without the masked part. Every picture gets
another hole each time it is shown: strokes of a brush, boxes, and in a quarter the whole picture, as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from controlroom.backbones.lora_names import UNET
from controlroom.controls.editing.inpaint import Inpaint
from controlroom.core.control import Control
from controlroom.data.holes import random_hole
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.conditioned_channels import ChannelRecipe, ChannelSettings
from controlroom.training.conditions import Row, pixels_shown, row_pixels
from controlroom.training.shown import Shown


class InpaintSettings(ChannelSettings):
    """How a model learns to fill holes."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> InpaintRecipe:
        base, shown, held_out = self.sources(pipe, pictures, (UNET,))
        return InpaintRecipe(base, shown, self, held_out)


class InpaintRecipe(ChannelRecipe[InpaintSettings]):
    """Recipe: pictures out of their words, a mask, and what is outside of it. Exported is ``unet`` for `cr.Inpaint`.

    Args:
        base: the model, whose UNet trains; it gets five further channels here.
        shown: the pictures.
        settings: see `InpaintSettings`.
        held_out: pictures that the error is measured on, on the way; None: none.

    Raises:
        ModelError: the UNet reads more than latents already.
    """

    name = "inpaint"

    def __init__(self, base: BaseModel, shown: Shown, settings: InpaintSettings, held_out: Shown | None = None) -> None:
        super().__init__(base, shown, settings, 1 + base.backbone.latent_channels, held_out)

    def hole(self, shown: Shown, row: Row, step: int) -> np.ndarray:
        """[height, width], true where a picture is missing at that step."""
        picture, size = shown.pictures[row[0]], shown.crops[row[0]].bucket.size
        return random_hole(size, self.settings.seed, picture.content, row[1], step)

    @torch.no_grad()
    def maps(self, shown: Shown, rows: Sequence[Row], step: int) -> Tensor:
        """[B, 1 + C, h, w]: the mask, in the size of latents by the nearest pixel as in a run, and what is known."""
        vae, device = self.base.vae, self.base.device
        pixels = row_pixels(pixels_shown(shown, row) for row in rows).to(device, vae.dtype) / 127.5 - 1.0
        masks = torch.stack([torch.from_numpy(self.hole(shown, row, step))[None] for row in rows]).to(device)
        known = self.base.backbone.encode_picture(pixels * ~masks).float()
        return torch.cat([F.interpolate(masks.float(), size=known.shape[-2:]), known], dim=1)

    def controls(self, row: Row) -> list[Control]:
        mask = Image.fromarray(self.hole(self.shown, row, 0).astype(np.uint8) * 255)
        return [Inpaint(pixels_shown(self.shown, row), mask)]
