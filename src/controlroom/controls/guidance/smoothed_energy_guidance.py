"""Smoothed energy guidance: away from a picture of blurred self-attention (arXiv 2408.00760).

The idea: self-attention descends on an energy, and blurring its logits over the queries smoothes that energy's
landscape. By linearity that is the same as blurring the queries, which costs next to nothing. The difference of the
prediction with the prompt to the smoothed one is added, times a scale: perturbed-attention guidance with a perturbation
of adjustable strength and fewer side effects at large scales.

The Gaussian is cut where it would reach beyond the feature map, mirrored at its edges and normalised. Deviation: where
the map is not square it is cut along each side by itself. A control that edits the attention of the prompt's branch (an
edit by words) does not edit the smoothed one.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from controlroom.controls.named_layers import LayersInput
from controlroom.controls.worse_attention import away_from, worse_branch
from controlroom.core.attention import AttentionCall
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.run import Run
from controlroom.core.step import Step

BRANCH = "smoothed"


class SmoothedEnergyGuidance(Control):
    """Guide away from a prediction whose self-attention has blurred queries.

    Args:
        scale: factor of the difference, at least 0; 0 is the absence of the control.
        layers: self-attention layers that are smoothed, by part of their module path: ``mid``, ``up``,
            ``down_blocks.1``, ``up_blocks.1.attentions.0``, or a regular expression.
        sigma: deviation of the Gaussian in tokens, above 0; None: infinite, every query is the mean of all.
        start: share of the steps from which it acts.
        end: share of the steps until which it acts.

    Raises:
        InputError: at planning, a layer that the network does not have.
    """

    type: Literal["smoothed_energy_guidance"] = Field(default="smoothed_energy_guidance", kw_only=True)
    scale: float = Field(default=3.0, ge=0.0)
    layers: LayersInput = Field(default=["mid"])
    sigma: float | None = Field(default=None, gt=0.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    def declare(self, outline: Outline) -> Declaration:
        """The smoothed branch, and the layers whose queries are blurred there."""
        return worse_branch(BRANCH, self.layers, outline, "q", "affine")

    def prepare(self, run: Run) -> None:
        """The smoothed branch is told what the prompt's is, also where that changes from step to step."""
        run.set_condition(BRANCH, lambda step: step.condition("cond"))

    def attention(self, call: AttentionCall) -> None:
        """Blur the queries over the feature map."""
        if BRANCH in call:
            hw = call.site.hw
            call.affine(BRANCH, "q", lambda q, _: blurred(q, hw, self.sigma))

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """Away from the smoothed prediction."""
        return away_from(BRANCH, step, state, self.scale)


def blurred(q: torch.Tensor, hw: tuple[int, int], sigma: float | None) -> torch.Tensor:
    """[rows, heads, h·w, width] after a Gaussian over the h x w tokens, or their mean; sums in float32."""
    if sigma is None:
        return q.mean(2, keepdim=True).expand_as(q)
    maps = q.transpose(2, 3).unflatten(3, hw).flatten(0, 2)[:, None].to(torch.promote_types(q.dtype, torch.float32))
    lines = [_line(sigma, side).to(maps) for side in hw]
    height, width = (len(line) // 2 for line in lines)
    padded = F.pad(maps, (width, width, height, height), mode="reflect")
    smooth = F.conv2d(F.conv2d(padded, lines[0].view(1, 1, -1, 1)), lines[1].view(1, 1, 1, -1))
    return smooth.flatten(2).view(*q.shape[:2], q.shape[3], q.shape[2]).transpose(2, 3).to(q.dtype)


def _line(sigma: float, side: int) -> torch.Tensor:
    """Weights of a Gaussian at whole distances: an odd number, six deviations wide, of which the map has room."""
    half = min(math.ceil(6 * sigma) // 2, side // 2)
    weights = torch.exp(-0.5 * (torch.arange(-half, half + 1, dtype=torch.float64) / sigma) ** 2)
    return weights / weights.sum()
