"""Depth to image: a variation of a picture that keeps its depth. Stable Diffusion 2's depth model (arXiv 2112.10752).

The idea: a network trained with a depth map as a fifth input channel keeps what stands in front of what, and the words
may change everything else; the run starts from the picture, noised to ``strength``.

As in diffusers' pipeline, draw for draw. Deviations: a flat map gives a channel of zeros (there: NaN); pictures of
several prompts with several images each stay with their prompts. The depth is always given: readers of depth are
signals, and estimating one is a task's business.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import Field, field_validator

from controlroom.controls.input_channels import set_all_channels
from controlroom.controls.noised_start import sampled_latents, start_from
from controlroom.controls.source_pixels import check_count, for_each_image, source_pixels
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.images import load_image
from controlroom.core.run import Run


class DepthToImage(Control):
    """Draw the prompt over a picture, with its depth. For checkpoints whose UNet reads five channels.

    Args:
        image: the picture, stretched to the size of the run: path, PIL picture, array or tensor. A list: one for each
            prompt.
        depth: near is large, in any unit: it is stretched to -1 to 1 in each picture. A picture (its brightness; PIL
            pictures of 16 or 32 bits keep them), an array or tensor [H, W], [1, H, W] or [B, 1, H, W], or what a reader
            of depth gave. A list: one for each prompt.
        strength: above 0, at most 1: share of the steps that is run, from the picture noised that far.

    Raises:
        ModelError: when the run is planned: the network does not read one channel more than its latents have.
        InputError: when the run is planned: no depth, a strength that leaves no step, latents given to the call; at the
            start of a run: a picture or depth that cannot be read or does not fit the images.
    """

    type: Literal["depth_to_image"] = Field(default="depth_to_image", kw_only=True)
    image: Any
    depth: Any
    strength: float = Field(default=0.8, gt=0, le=1)

    @field_validator("depth", mode="after")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        """What a reader gave, as its values, so that the run can be written down."""
        return [_values(item) for item in value] if isinstance(value, list | tuple) else _values(value)

    @field_validator("image", "depth")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is None:
            raise ValueError("expected a picture and its depth; a reader of depth (controlroom.signals) estimates one")
        return value

    def declare(self, outline: Outline) -> Declaration:
        channels = outline.latent[0] + 1
        return Declaration(
            strength=self.strength,
            channels=1,
            checkpoint=f"a depth checkpoint, whose UNet reads {channels} channels, such as "
            "stabilityai/stable-diffusion-2-depth or theatre/depth2img",
        )

    def prepare(self, run: Run) -> None:
        """Start from the picture, and show the depth to every branch."""
        hw = run.latent_shape()[-2:]
        depth = torch.cat([depth_channel(each, (hw[0], hw[1])) for each in _maps(self.depth)])
        check_count(len(depth), run, "depth")
        depth = for_each_image(depth, run).to(device=run.device, dtype=run.dtype)
        set_all_channels(run, depth, self.label)
        start_from(run, sampled_latents(run, source_pixels(self.image, run)))


def depth_channel(depth: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[B, 1, H, W] in any unit -> [B, 1, h, w] from -1 (far) to 1 (near) in each; zeros where all is at one depth."""
    small = F.interpolate(depth, size=hw, mode="bicubic", align_corners=False)
    low, high = small.amin((1, 2, 3), keepdim=True), small.amax((1, 2, 3), keepdim=True)
    # A flat map comes out of the interpolation with rounding errors, which are not to be spread over the range.
    flat = high - low <= 1e-5 * torch.maximum(high.abs(), low.abs())
    return torch.where(flat, 0.0, 2.0 * (small - low) / torch.where(flat, 1.0, high - low) - 1.0)


def _values(item: Any) -> Any:
    values = getattr(item, "values", None)
    return item if values is None or callable(values) else values


def _maps(source: Any) -> list[torch.Tensor]:
    """[rows, 1, H, W], float32, each in its own size."""
    listed = list(source) if isinstance(source, Sequence) and not isinstance(source, str | bytes) else [source]
    if not listed:
        raise InputError("The list of depths is empty. Give one, or one for each prompt.")
    return [_one(item) for item in listed]


def _one(item: Any) -> torch.Tensor:
    if isinstance(item, Image.Image) and item.mode[:1] in ("I", "F"):
        item = np.asarray(item, dtype=np.float32)
    if not isinstance(item, np.ndarray | torch.Tensor) or (item.ndim == 3 and 3 in item.shape):
        # Pictures, coloured or not: their brightness.
        item = np.asarray(load_image(item).convert("L"), dtype=np.float32)
    given = item.detach().cpu() if isinstance(item, torch.Tensor) else torch.tensor(np.asarray(item, np.float32))
    depth = given.float()
    if depth.ndim == 3 and depth.shape[-1] == 1:
        depth = depth.movedim(-1, 0)
    depth = depth[None] if depth.ndim == 2 else depth
    depth = depth[:, None] if depth.ndim == 3 else depth
    if depth.ndim != 4 or depth.shape[1] != 1 or depth.numel() == 0 or not bool(torch.isfinite(depth).all()):
        raise InputError(
            f"A depth of shape {list(item.shape)} is none, or has values that are not finite; expected [H, W], "
            "[1, H, W] or [B, 1, H, W]."
        )
    return depth
