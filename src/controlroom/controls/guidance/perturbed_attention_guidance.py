"""Perturbed-attention guidance: away from a picture without structure (arXiv 2403.17377).

The idea: where self-attention is replaced by the identity, every place looks at itself only, and the network predicts
a picture whose parts do not fit together. The difference to the prediction with the prompt is added, times a scale. It
works with and without classifier-free guidance, and needs no training.

Deviation: a control that edits the attention of the prompt's branch (an edit by words) does not edit the perturbed one.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from controlroom.controls.named_layers import LayersInput
from controlroom.controls.worse_attention import away_from, worse_branch
from controlroom.core.attention import AttentionCall
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.run import Run
from controlroom.core.step import Step

BRANCH = "perturbed"
LAST_TIMESTEP = 1000
"""Where the adaptive scale starts to fall, whatever the schedule."""


class PerturbedAttentionGuidance(Control):
    """Guide away from a prediction whose self-attention sees only itself.

    Args:
        scale: factor of the difference, at least 0; 0 is the absence of the control.
        layers: self-attention layers that are perturbed, by part of their module path as diffusers'
            ``pag_applied_layers`` names them: ``mid``, ``up``, ``down_blocks.1``, ``up_blocks.1.attentions.0``, or a
            regular expression.
        adaptive_scale: the scale falls by this much with each timestep below 1000, until 0 (``pag_adaptive_scale``).
        start: share of the steps from which it acts.
        end: share of the steps until which it acts.

    Raises:
        InputError: at planning, a layer that the network does not have.
    """

    type: Literal["perturbed_attention_guidance"] = Field(default="perturbed_attention_guidance", kw_only=True)
    scale: float = Field(default=3.0, ge=0.0)
    layers: LayersInput = Field(default=["mid"])
    adaptive_scale: float = Field(default=0.0, ge=0.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    def declare(self, outline: Outline) -> Declaration:
        """The perturbed branch, and the layers that are the identity there."""
        return worse_branch(BRANCH, self.layers, outline, "out", "identity")

    def prepare(self, run: Run) -> None:
        """The perturbed branch is told what the prompt's is, also where that changes from step to step."""
        run.set_condition(BRANCH, lambda step: step.condition("cond"))

    def attention(self, call: AttentionCall) -> None:
        """Every place sees itself only."""
        if BRANCH in call:
            call.identity(BRANCH)

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """Away from the perturbed prediction."""
        scale = max(self.scale - self.adaptive_scale * (LAST_TIMESTEP - float(step.t)), 0.0)
        return away_from(BRANCH, step, state, scale)
