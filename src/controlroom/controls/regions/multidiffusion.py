"""MultiDiffusion (Bar-Tal et al., "MultiDiffusion: Fusing Diffusion Paths for Controlled Image Generation",
arXiv 2302.08113).

A canvas larger than the network was trained for is predicted through overlapping windows, and the predictions are
averaged where windows overlap; a region with a prompt of its own is predicted with it, and counts where its mask is.
Every solver step is linear in the prediction, so one step with the merged prediction is the mean of one step for each
window. Early on a region is shown before a random colour instead of the rest of the picture, so that its object keeps
to a tight mask (bootstrapping).

Deviations from diffusers' pipeline, which steps every window by itself: solvers that draw noise draw it once for the
canvas (averaging noise of its own for each window makes it weaker where windows overlap); a canvas that the windows do
not cover to its edge is an error (there the rest stays grey); ``guidance_rescale`` acts (there a property that is
always false keeps it out); past predictions of PNDM are the canvas's (there all windows begin with one list and add to
it); a seamless canvas as wide as one window is seamless too.
Deviations from the published code for regions: the mean of the encoder's posterior stands for a sample of a colour's
latents, and one colour for a region and step serves all windows. The published 20 steps of 50 for bootstrapping are
0.4 here; the default is the paper's 0.2.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Literal

import torch
from pydantic import Field, field_validator

from controlroom.controls.region import (
    Overlap,
    Region,
    acting,
    check_covered,
    region_condition,
    region_masks,
    same_as,
)
from controlroom.controls.windows import windows_of
from controlroom.core.branch import IMAGE, Branch
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, window_steps
from controlroom.core.run import Run
from controlroom.core.step import Step

STREAM = "multidiffusion"
WRAP = 8
"""Latent columns that a seamless picture is continued by on both sides before it is decoded, as diffusers does."""


@dataclass
class _Memory:
    """What a run knows of its regions.

    Attributes:
        weights: number of a region -> [rows, 1, h, w], its share of each pixel, through the windows.
        masks: number of a region -> [images, 1, H, W], 0 or 1.
        colours: latents of random colours, [images, colours, C, H, W]; None: no bootstrapping.
        choices: step -> colour of each region and image, [images, regions].
        noise: the picture's own, [images, C, H, W], once the run has begun.
    """

    weights: dict[int, torch.Tensor]
    masks: dict[int, torch.Tensor]
    colours: torch.Tensor | None
    choices: dict[int, torch.Tensor]
    noise: list[torch.Tensor] = field(default_factory=list)


with warnings.catch_warnings():
    # The setting has the name of a hook, which the engine therefore asks of the class.
    warnings.filterwarnings("ignore", 'Field name "window"')

    class _Windowed(Control):
        """The size of a window."""

        window: int | tuple[int, int] = 64  # pyright: ignore[reportIncompatibleMethodOverride]


class MultiDiffusion(_Windowed):
    """Panoramas of any aspect ratio, and regions with prompts of their own.

    Args:
        window: side of a window in latent pixels, or its height and width: what the network was trained at (64 for
            Stable Diffusion at 512 pixels, 16 for the theatre).
        stride: latent pixels from one window to the next. Smaller is smoother and dearer.
        circular: the right edge continues at the left one; the picture is decoded so too.
        regions: `Region`s, each a prompt with a box or a mask. The run's prompt has what they leave free.
        bootstrap: share of the steps, from the first, at which a region is seen before a random colour.
        overlap: what to do where regions overlap: ``error``, or the ``mean`` of their predictions, as published.
        view_batch_size: windows that go through the network at once; None: all. Fewer need less memory.

    Raises:
        InputError: when the run is planned, a window that does not fit the canvas, or a canvas that the stride does not
            divide; at its start, regions that are empty or overlap, or that leave a part without words.
    """

    type: Literal["multidiffusion"] = Field(default="multidiffusion", kw_only=True)
    stride: int | tuple[int, int] = 8
    circular: bool = False
    regions: tuple[Region, ...] | None = None
    bootstrap: float = Field(default=0.2, ge=0.0, le=1.0)
    overlap: Overlap = "error"
    view_batch_size: int | None = Field(default=None, ge=1)

    @field_validator("window", "stride")
    @classmethod
    def _positive(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if min(value if isinstance(value, tuple) else (value,)) < 1:
            raise ValueError("expected at least 1 latent pixel")
        return value

    def declare(self, outline: Outline) -> Declaration:
        views = windows_of(outline.latent[1:], self.window, self.stride, self.circular)
        branches = tuple(self._branches(outline))
        claims = (Claim("prediction", "add"),) if branches else ()
        notes = () if views is None else (f"{views.count} windows of {views.hw[0]} x {views.hw[1]} latent pixels.",)
        return Declaration(
            branches=branches,
            claims=claims,
            views=views,
            view_batch=None if views is None else self.view_batch_size,
            wrap=WRAP if self.circular else 0,
            notes=notes,
        )

    def _branches(self, outline: Outline) -> list[Branch]:
        regions, found = self.regions or (), []
        shown_apart = window_steps(outline.steps, 0.0, self.bootstrap)
        for i, steps in acting(regions, outline.steps).items():
            if outline.guided:
                # Away from bootstrapping the prediction without words is the picture's, if it has no others.
                apart = steps if regions[i].negative_prompt is not None else steps & shown_apart
                found.append(Branch(f"region:{i}/uncond", role="uncond", steps=apart))
            found.append(Branch(f"region:{i}", role="cond", steps=steps))
        return found

    def prepare(self, run: Run) -> _Memory | None:
        regions = self.regions or ()
        active = acting(regions, run.n)
        if not active:
            return None
        chosen = tuple(regions[i] for i in active)
        masks = region_masks(chosen, run, self.overlap)
        check_covered(masks, run)
        total = masks.sum(0).clamp(min=1)
        views = run.plan.views
        weights, placed = {}, {}
        for i, mask in zip(active, masks, strict=True):
            weight = mask / total
            weights[i] = weight if views is None else views.split(weight)
            placed[i] = mask
            run.set_condition(f"region:{i}", region_condition(run, regions[i].prompt))
            if f"region:{i}/uncond" in run.plan.branches:
                negative = regions[i].negative_prompt
                own = None if negative is None else region_condition(run, negative, negative=True)
                run.set_condition(f"region:{i}/uncond", own or same_as("uncond"))
        steps = sorted(window_steps(run.n, 0.0, self.bootstrap))
        if not steps:
            return _Memory(weights, placed, None, {})
        colours, choices = _backgrounds(run, len(steps), len(active))
        return _Memory(weights, placed, colours, dict(zip(steps, choices, strict=True)))

    def before(self, step: Step) -> None:
        """Bootstrapping: what lies outside a region is a random colour at the step's noise level."""
        memory: _Memory | None = step.memory(self)
        if memory is None or memory.colours is None:
            return
        latents = step.latents[IMAGE]
        if not memory.noise:
            # The published code noises the colours as the picture; a run from a picture starts otherwise.
            given = IMAGE in step.run.initial or step.i > 0
            own = step.run.noise(STREAM, latents.shape) if given else latents / step.run.scheduler.init_noise_sigma
            memory.noise.append(own)
        if step.i not in memory.choices:
            return
        rows = torch.arange(latents.shape[0], device=latents.device)
        for place, (i, mask) in enumerate(memory.masks.items()):
            colour = memory.colours[rows, memory.choices[step.i][:, place]]
            offset = (1 - mask) * (step.noised(colour, memory.noise[0]) - latents)
            for name in (f"region:{i}", f"region:{i}/uncond"):
                if name in step.running:
                    step.offsets[name] = offset

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """Where a region is, its prediction instead of the picture's."""
        memory: _Memory | None = step.memory(self)
        if memory is None or state != IMAGE:
            return None
        picture = _guided(step, "cond", "uncond")
        total: torch.Tensor | None = None
        for i, weight in memory.weights.items():
            name = f"region:{i}"
            if name not in step.eps:
                continue
            uncond = f"{name}/uncond" if f"{name}/uncond" in step.eps else "uncond"
            scale = (self.regions or ())[i].scale
            moved = scale * weight * (_guided(step, name, uncond) - picture)
            total = moved if total is None else total + moved
        return total


def _guided(step: Step, cond: str, uncond: str) -> torch.Tensor:
    if uncond not in step.eps:
        return step.eps[cond]
    return step.eps[uncond] + step.run.guidance.scale * (step.eps[cond] - step.eps[uncond])


def _backgrounds(run: Run, steps: int, regions: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Latents of random colours [images, steps, C, H, W], and which is whose: for each step [images, regions]."""
    height, width = run.size
    colours, choices = [], []
    for generator in run.rng(STREAM + "/colours"):
        rgb = torch.rand(steps, 3, generator=generator) * 2 - 1
        # One by one: a panorama's worth of pixels is enough for an autoencoder.
        encoded = [run.backbone.encode_picture(one[None, :, None, None].expand(1, 3, height, width)) for one in rgb]
        colours.append(torch.cat(encoded))
        choices.append(torch.randint(0, steps, (steps, regions), generator=generator))
    return torch.stack(colours), list(torch.stack(choices, dim=1).to(run.device))
