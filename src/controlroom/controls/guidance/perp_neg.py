"""Perp-Neg: negative prompts that take nothing from the prompt (arXiv 2304.04968).

The idea: what a negative prompt and the prompt have in common should stay. Of the direction of each negative only the
part perpendicular to the prompt's direction is subtracted. With e = ε(prompt) − ε(nothing), eᵢ = ε(negative i) −
ε(nothing) and the guidance scale s, the prediction is

    ε(nothing) + s · (e − Σ wᵢ · (eᵢ − ⟨eᵢ, e⟩/⟨e, e⟩ · e))

which takes the place of classifier-free guidance. Products are over all values of a picture (of a view, where the
canvas is seen through views).

Deviation: ``nothing`` is what the branch without the prompt is told, the empty text unless the run has a
``negative_prompt``; the paper knows only the empty text.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from controlroom.core.branch import Branch, Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step


class PerpNeg(Control):
    """Guide away from negative prompts only where they do not touch the prompt.

    Args:
        negatives: a negative prompt, or several.
        scale: weight of the negatives, one for all or one for each; at least 0. Those of 0 are not run, and 0 for all
            is the absence of the control.
        start: share of the steps from which it acts.
        end: share of the steps until which it acts; outside there is classifier-free guidance.

    Raises:
        InputError: an empty text, weights of another number; at planning, a run without guidance.
    """

    type: Literal["perp_neg"] = Field(default="perp_neg", kw_only=True)
    negatives: str | list[str]
    scale: float | list[float] = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    @field_validator("negatives")
    @classmethod
    def _something(cls, value: str | list[str]) -> str | list[str]:
        if not value or not all(text.strip() for text in ([value] if isinstance(value, str) else value)):
            raise ValueError("an empty text or list")
        return value

    @model_validator(mode="after")
    def _a_weight_each(self) -> PerpNeg:
        if isinstance(self.scale, list) and len(self.scale) != len(self._texts):
            raise ValueError(f"{len(self.scale)} weights in scale for {len(self._texts)} negatives")
        if any(weight < 0 for weight in self._scales):
            raise ValueError("weights in scale are at least 0; a wish is part of the prompt")
        return self

    @property
    def _texts(self) -> list[str]:
        return [self.negatives] if isinstance(self.negatives, str) else self.negatives

    @property
    def _scales(self) -> list[float]:
        return self.scale if isinstance(self.scale, list) else [self.scale] * len(self._texts)

    @property
    def _weighted(self) -> dict[str, tuple[str, float]]:
        """Branch -> negative prompt and its weight, of those that count."""
        pairs = enumerate(zip(self._texts, self._scales, strict=True))
        return {f"negative:{i}": (text, weight) for i, (text, weight) in pairs if weight > 0}

    def declare(self, outline: Outline) -> Declaration:
        """A branch for each negative, and the base combination."""
        if not outline.guided:
            raise InputError(
                f"{self.label} is a kind of guidance, but guidance_scale is at most 1. Raise it, or remove the control."
            )
        # Other controls treat a negative as they treat the branch without the prompt, so that only words differ.
        return Declaration(
            branches=tuple(Branch(name, role="uncond") for name in self._weighted),
            claims=(Claim("base", "own"),),
        )

    def prepare(self, run: Run) -> None:
        """Encode the negatives."""
        uncond = run.conditions["uncond"]
        for name, (text, _) in self._weighted.items():
            condition = run.encode_text(text, negative=True)
            if isinstance(uncond, Condition):
                # The sizes that Stable Diffusion XL is told are the run's.
                condition = replace(condition, time_ids=uncond.time_ids)
            run.set_condition(name, condition)

    def combine(self, step: Step, state: str) -> torch.Tensor | None:
        """The prediction of the picture."""
        if state != "image":
            return None
        base = step.eps["uncond"]
        wanted = step.eps["cond"] - base
        direction = wanted
        for name, (_, weight) in self._weighted.items():
            direction = direction - weight * perpendicular(step.eps[name] - base, wanted)
        return base + step.run.guidance.scale * direction


def perpendicular(x: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """The part of each row of x [rows, ...] that is perpendicular to the same row of ``to``; sums in float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    flat, along = x.flatten(1).to(wide), to.flatten(1).to(wide)
    norm = (along * along).sum(1, keepdim=True)
    # Where the prompt says nothing, all of a negative is perpendicular to it.
    share = torch.where(norm > 0, (flat * along).sum(1, keepdim=True) / norm, torch.zeros_like(norm))
    return (flat - share * along).to(x.dtype).view_as(x)
