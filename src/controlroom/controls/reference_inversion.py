"""A picture that a run looks at, as the model itself draws it: by DDIM inversion (arXiv 2010.02502, section 4.3).

Given as an `Inversion` (or the file of one), or as a picture, which is then inverted at the start of the run, at the
run's own noise levels. What is kept of each level is the clean picture and the noise that make it up, so that any
solver can have it in its own units.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, PlainSerializer

from controlroom.core import inputs
from controlroom.core.branch import Layout
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.inverted import KEY, Inversion, read_inversion
from controlroom.sampling.solver import alpha_bars


@dataclass(frozen=True)
class InvertedLevels:
    """A picture at every noise level of a run: ``clean[i]`` and ``noise[i]`` [rows, C, h, w] make up that of step i."""

    clean: tuple[torch.Tensor, ...]
    noise: tuple[torch.Tensor, ...]

    def __call__(self, step: Step) -> torch.Tensor:
        """The latents of a step, as the solver has them."""
        return step.noised(self.clean[step.i], self.noise[step.i])


def is_inversion(value: Any) -> bool:
    """Whether a reference is an inversion and not a picture."""
    path = isinstance(value, str | os.PathLike) and os.fspath(value).endswith(".safetensors")
    return isinstance(value, Inversion) or path


def _decode(value: Any) -> Any:
    value = inputs.decode(value)
    if isinstance(value, bytes) and KEY.encode() in value[:100_000]:
        return Inversion.from_bytes(value)
    return value


def _encode(value: Any) -> Any:
    return inputs.encode(value.to_bytes() if isinstance(value, Inversion) else value)


ReferenceInput = Annotated[Any, BeforeValidator(_decode), PlainSerializer(_encode, when_used="json")]
"""A picture, an `Inversion`, or the path of either; a setting that travels with a run, small ones inside it."""


class InvertedPicture:
    """A picture [rows, 3, H, W] in [-1, 1] at every level of a run, inverted without guidance when the first step asks.

    As many passes as the run has steps, counted as side passes, with the network as controls have attached to it.

    Args:
        pixels: the picture.
        branch: what this branch is told (and its further input channels) hold for the inversion.
    """

    def __init__(self, pixels: torch.Tensor, branch: str) -> None:
        self.pixels, self.branch = pixels, branch
        self.levels: InvertedLevels | None = None

    def __call__(self, step: Step) -> torch.Tensor:
        """The latents of a step, as the solver has them."""
        if self.levels is None:
            with torch.no_grad():
                self.levels = self._walk(step)
        return self.levels(step)

    def _walk(self, first: Step) -> InvertedLevels:
        run, condition = first.run, first.condition(self.branch)
        levels, layout = alpha_bars(run.scheduler, run.timesteps), Layout([(self.branch, len(self.pixels))])
        x = torch.cat([run.backbone.encode_picture(row) for row in self.pixels.split(1)])
        clean: list[torch.Tensor] = []
        noise: list[torch.Tensor] = []
        for i in reversed(range(run.n)):
            # Predicted at the timestep that is walked to, as a drawing does.
            step = Step(run, i, run.timesteps[i], {}, levels[i + 1], levels[i + 1])
            channels = run.channels.get(self.branch)
            sample = x if channels is None else torch.cat([x, channels.to(x).expand(len(x), -1, -1, -1)], dim=1)
            prediction = run.backbone.predict(sample, run.timesteps[i], condition, None, layout)
            step.count_side(len(x))
            clean.append(step.clean_of(prediction, x))
            noise.append(step.noise_of(prediction, x))
            x = levels[i] ** 0.5 * clean[-1] + (1 - levels[i]) ** 0.5 * noise[-1]
        return InvertedLevels(tuple(clean[::-1]), tuple(noise[::-1]))


def recorded(run: Run, inversion: Inversion | str | os.PathLike[str], label: str) -> tuple[InvertedLevels, str]:
    """The levels of an inversion of one picture, and its prompt.

    Raises:
        InputError: it cannot be read, is of several pictures, or does not fit the run: the message says what to give.
    """
    found = read_inversion(inversion)
    remedy = "Give the picture itself, which is then inverted for this run, or invert it as the run is drawn."
    if (
        type(run.scheduler).__name__ != "DDIMScheduler"
        or tuple(int(t) for t in run.timesteps.flip(0)) != (found.timesteps[: run.n])
    ):
        raise InputError(
            f"{label}: the reference was inverted in {found.steps} steps of DDIM; this run has others. {remedy}"
        )
    if found.backbone != run.backbone.name or tuple(found.latents.shape[2:]) != run.latent_shape()[1:]:
        raise InputError(f"{label}: the reference was inverted with another model or in another size. {remedy}")
    if len(found.prompts) != 1:
        raise InputError(f"{label}: the inversion has {len(found.prompts)} pictures; a reference is one.")
    # At the level of a DDIM step latents are latents: all clean, no noise, once divided by the root of the level.
    levels = alpha_bars(run.scheduler, run.timesteps)
    rows = found.latents[: run.n + 1].flip(0).to(run.device, run.dtype)
    clean = tuple(rows[i] / levels[i] ** 0.5 for i in range(run.n))
    return InvertedLevels(clean, tuple(torch.zeros_like(row) for row in clean)), found.prompts[0]
