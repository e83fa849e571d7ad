"""Rescaled guidance: strong guidance without overexposure (arXiv 2305.08891, section 3.4).

The idea: guidance raises the deviation of the prediction, and with it the contrast. The prediction is brought back
towards the deviation of the one with the prompt, picture by picture, and mixed with what it was.

The run's argument ``guidance_rescale`` does the same at all steps; this control has a window, and can be listed.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run


class GuidanceRescale(Control):
    """Bring the deviation of the guided prediction back towards that of the prediction with the prompt.

    Args:
        scale: the paper's φ in [0, 1]: 0 is the absence of the control, 1 gives the deviation of the prediction with
            the prompt. The paper found 0.7.
        start: share of the steps from which it acts.
        end: share of the steps until which it acts.

    Raises:
        InputError: at planning, a run without guidance; at the start, one with ``guidance_rescale`` too.
    """

    type: Literal["guidance_rescale"] = Field(default="guidance_rescale", kw_only=True)
    scale: float = Field(default=0.7, ge=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    def declare(self, outline: Outline) -> Declaration:
        """What the engine rescales by, after all additions."""
        if not outline.guided:
            raise InputError(
                f"{self.label} rescales classifier-free guidance, but guidance_scale is at most 1, so there is none. "
                "Raise guidance_scale, or remove the control."
            )
        return Declaration(claims=(Claim("rescale", "set"),), rescale=self.scale)

    def prepare(self, run: Run) -> None:
        """Nothing; but one of two that rescale would be lost."""
        if run.guidance.rescale > 0:
            raise InputError(
                f"guidance_rescale={run.guidance.rescale} and {self.label}({self.scale}) both rescale guidance. "
                "Give one of them."
            )
