"""Guidance in a limited interval: guide only where it helps (arXiv 2404.07724).

The idea: classifier-free guidance harms at high noise levels, where it narrows what is drawn, and does nothing at low
ones. Outside an interval the prediction with the prompt is used as it is, and the one without it is not computed.

Deviation: the paper gives the interval as noise levels σ, this control as shares of the steps, as every window here.
The rows without the prompt that other controls add (of a source, of negative prompts) rest outside the interval too.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, window_steps
from controlroom.core.errors import InputError


class GuidanceInterval(Control):
    """Classifier-free guidance only inside an interval of the steps.

    Args:
        guidance_start: share of the steps before which there is no guidance; 0: guided from the first.
        guidance_end: share of the steps after which there is none; 1: guided to the last. Step i of n is guided when
            i/n >= guidance_start and (i+1)/n <= guidance_end. 0 and 1 are the absence of the control.

    Raises:
        InputError: at planning, an interval without a step, or a run without guidance.
    """

    type: Literal["guidance_interval"] = Field(default="guidance_interval", kw_only=True)
    guidance_start: float = Field(default=0.0, ge=0.0, le=1.0)
    guidance_end: float = Field(default=1.0, ge=0.0, le=1.0)

    def neutral(self, n: int) -> bool:
        """Every step is guided."""
        return not self.window(n)

    def window(self, n: int) -> frozenset[int]:
        """The steps without guidance."""
        return frozenset(range(n)) - window_steps(n, self.guidance_start, self.guidance_end)

    def declare(self, outline: Outline) -> Declaration:
        """The steps without guidance."""
        if not outline.guided:
            raise InputError(
                f"{self.label} limits classifier-free guidance, but guidance_scale is at most 1, so there is none. "
                "Raise guidance_scale, or remove the control."
            )
        unguided = self.window(outline.steps)
        if len(unguided) == outline.steps:
            raise InputError(
                f"{self.label}: no step of {outline.steps} lies between the shares {self.guidance_start} and "
                f"{self.guidance_end}. Widen the interval, or give guidance_scale=1 to draw without guidance."
            )
        guided = sorted(set(range(outline.steps)) - unguided)
        return Declaration(
            claims=(Claim("guidance", "set"),),
            unguided=unguided,
            notes=(f"guided in steps {guided[0]} to {guided[-1]} of {outline.steps}, counted from 0",),
        )
