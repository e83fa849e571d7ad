"""Regions: parts of the picture with prompts of their own, as boxes or masks, and what a run makes of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_serializer, field_validator
from pydantic import SerializerFunctionWrapHandler as Handler

from controlroom.controls.condition_map import mask_map
from controlroom.controls.word_mask import picture_alone
from controlroom.core import inputs
from controlroom.core.branch import Condition
from controlroom.core.control import Settings
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step

Overlap = Literal["error", "mean"]


class Region(Settings):
    """A part of the picture with a prompt of its own; exactly one of ``box`` and ``mask`` says where.

    Args:
        prompt: what is there.
        box: left, top, right and bottom edge, as shares of the picture's width and height.
        mask: picture, array or tensor, white where the region is; no words. It is cut at one half. A list: one for
            each prompt of the run.
        negative_prompt: what must not be there; None: the run's.
        scale: 1 draws the region's prompt there, 0 is its absence, between them the two predictions are mixed.
        start, end: share of the steps between which it acts.

    Raises:
        InputError: neither or both of box and mask, or a box that has no area or leaves the picture.
    """

    prompt: str
    box: tuple[float, float, float, float] | None = None
    mask: Any = None
    negative_prompt: str | None = None
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    @field_validator("mask", mode="before")
    @classmethod
    def _decode(cls, value: Any) -> Any:
        return picture_alone(value)

    @field_serializer("mask", mode="wrap", when_used="json")
    def _encode(self, value: Any, handler: Handler) -> Any:
        return inputs.encode(value) if inputs.is_opaque(value) else handler(value)

    @field_validator("box")
    @classmethod
    def _inside(cls, box: tuple[float, float, float, float] | None) -> tuple[float, float, float, float] | None:
        if box is not None and not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise ValueError("expected left < right and top < bottom, as shares of the picture between 0 and 1")
        return box

    def model_post_init(self, context: Any) -> None:
        if (self.box is None) == (self.mask is None):
            raise InputError(
                f"The region {self.prompt[:60]!r} needs a place: give box=(left, top, right, bottom) or "
                "mask, one of them."
            )


def acting(regions: tuple[Region, ...], n: int) -> dict[int, frozenset[int]]:
    """Number of each region that does something in a run of n steps -> its steps."""
    from controlroom.core.control import window_steps

    steps = {i: window_steps(n, region.start, region.end) for i, region in enumerate(regions)}
    return {i: found for i, found in steps.items() if found and regions[i].scale != 0}


def region_masks(regions: tuple[Region, ...], run: Run, overlap: Overlap = "error") -> torch.Tensor:
    """The places of regions in the latents, 0 or 1: [regions, images, 1, h, w].

    Raises:
        InputError: a mask that cannot be read, a region smaller than a latent pixel, or two that overlap although
            they must not.
    """
    height, width = run.latent_shape()[-2:]
    found = []
    for number, region in enumerate(regions):
        if region.box is not None:
            left, top, right, bottom = region.box
            mask = torch.zeros(run.images, 1, height, width)
            rows = slice(round(top * height), round(bottom * height))
            mask[:, :, rows, round(left * width) : round(right * width)] = 1.0
        else:
            pixels = (
                mask_map(region.mask, run, f"mask of the region {region.prompt[:60]!r}").float().cpu() >= 0.5
            ).float()
            mask = F.interpolate(pixels, size=(height, width), mode="nearest")
        if not bool(mask.flatten(1).any(dim=1).all()):
            raise InputError(
                f"Region {number + 1} ({region.prompt[:60]!r}) is empty: nothing of it is left in latents of {height} "
                f"x {width}, where one pixel stands for {run.backbone.pixels_per_latent}. Make it larger."
            )
        found.append(mask)
    masks = torch.stack(found)
    if overlap == "error" and bool((masks.sum(0) > 1).any()):
        first, second = _overlapping(masks)
        share = float((masks[first] * masks[second]).mean())
        raise InputError(
            f"Regions {first + 1} ({regions[first].prompt[:40]!r}) and {second + 1} ({regions[second].prompt[:40]!r}) "
            f"overlap on {share:.1%} of the picture. Move them apart, or allow it with overlap='mean'."
        )
    return masks.to(run.device, run.dtype)


def check_covered(masks: torch.Tensor, run: Run) -> None:
    """Refuse a run that has no words for a part of its picture.

    Raises:
        InputError: the regions leave a part of the picture free, and the prompt of the run is empty.
    """
    free = masks.sum(0) == 0
    for image, text in enumerate(run.prompts):
        if bool(free[image].any()) and not text.strip() and _says_nothing(run, image):
            raise InputError(
                f"The regions leave {float(free[image].float().mean()):.0%} of the picture free, and the run has no "
                "prompt for it. Give the run a prompt for the background, or regions that cover the picture."
            )


def region_condition(run: Run, prompt: str, negative: bool = False) -> Condition:
    """Condition of a region's words, one row for each image; the sizes Stable Diffusion XL is told are the run's."""
    found, cond = run.encode_text(prompt, negative=negative), run.conditions["cond"]
    return replace(found, time_ids=cond.time_ids) if isinstance(cond, Condition) else found


def same_as(branch: str) -> Any:
    """A condition source: what another branch is told, also when that is set later."""

    def source(step: Step) -> Condition:
        return step.condition(branch)

    return source


def _says_nothing(run: Run, image: int) -> bool:
    """Whether a picture with the prompt "" has no embeddings instead."""
    cond = run.conditions["cond"]
    if not isinstance(cond, Condition):
        return False
    empty, row = run.encode_text("").tokens[:1], cond.expand(run.images).tokens[image : image + 1]
    return row.shape == empty.shape and torch.allclose(row, empty, atol=1e-4)


def _overlapping(masks: torch.Tensor) -> tuple[int, int]:
    count = len(masks)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    return max(pairs, key=lambda pair: float((masks[pair[0]] * masks[pair[1]]).sum()))
