"""Consistency guidance: how much of the subject, and how much of the prompt (DCO, arXiv 2402.12004).

The idea: a network θ that was tuned to a subject and the network φ that it was tuned from see the same picture. Going
from φ with plain words to θ with the subject's word is a direction that belongs to the subject alone, so it can have a
scale of its own beside that of the words. With the prompt c* that names the subject and a plain one c,

    ε = εφ(∅) + w_t · (εφ(c) − εφ(∅)) + w_c · (εθ(c*) − εφ(c))

takes the place of classifier-free guidance. θ is the network with the LoRAs of the run, φ the same without them; the
learned word stands in the prompt.

Deviations: ∅ is what the branch without the prompt is told, so a ``negative_prompt`` works; outside of its window there
is classifier-free guidance with θ. The published sampler is for one picture of one size; here any run.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.added_layers import unchanged
from controlroom.backbones.lora_names import PARTS, UNET
from controlroom.controls.drawn_along import source_prompts
from controlroom.controls.reference_states import told_as, told_text
from controlroom.core.backbone import Backbone
from controlroom.core.branch import Branch, Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step

WEIGHTS = "without loras"
NOTHING, PLAIN = "consistency/uncond", "consistency/cond"
"""Branches of the network without the run's LoRAs."""


class ConsistencyGuidance(Control):
    """Scale the subject of the run's LoRAs apart from the words.

    Args:
        plain: the prompt without the subject's word ("a photo of a dog" for "a photo of a sks dog"), one for all
            pictures or one for each prompt.
        subject_scale: w_c, at least 0: 0 draws the plain prompt without the LoRAs, more has more of the subject.
        text_scale: w_t, at least 0; None: the run's ``guidance_scale``.
        start: share of the steps from which it acts.
        end: share of the steps until which it acts; outside there is classifier-free guidance.

    Raises:
        InputError: an empty list, prompts of another number; at planning, a run without guidance.
    """

    type: Literal["consistency_guidance"] = Field(default="consistency_guidance", kw_only=True)
    plain: str | list[str]
    subject_scale: float = Field(default=3.0, ge=0.0)
    text_scale: float | None = Field(default=None, ge=0.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    @field_validator("plain")
    @classmethod
    def _something(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("expected the prompt without the subject's word")
        return value

    def declare(self, outline: Outline) -> Declaration:
        """Two branches of the network without LoRAs, and the base combination."""
        if not outline.guided:
            raise InputError(
                f"{self.label} is a kind of guidance, but guidance_scale is at most 1. Raise it, or remove the control."
            )
        source_prompts(self.plain, outline.prompts, self.label)
        branches = (Branch(NOTHING, role="uncond", weights=WEIGHTS), Branch(PLAIN, weights=WEIGHTS))
        return Declaration(branches=branches, claims=(Claim("base", "own"),))

    def weights(self, tag: str, backbone: Backbone) -> AbstractContextManager[Any]:
        """The network without the LoRAs of the run."""
        return unchanged((backbone.unet,))

    def prepare(self, run: Run) -> None:
        """What both branches are told, as text encoders without LoRAs say it."""
        parts = [getattr(run.backbone, part, None) for part in PARTS if part != UNET]
        encoders = [part for part in parts if part is not None]
        negatives = [text or "" for text in run.negative_prompts]
        # Zeros and embeddings that were given are no text, and stay what they are.
        uncond, spoken = run.conditions["uncond"], run.encode_text(negatives, negative=True)
        worded = isinstance(uncond, Condition) and torch.equal(
            uncond.tokens.expand_as(spoken.tokens) if uncond.tokens.shape[0] == 1 else uncond.tokens, spoken.tokens
        )
        with unchanged(encoders) as count:
            run.set_condition(PLAIN, told_text(run, source_prompts(self.plain, run.prompts, self.label)))
            if not (worded and count):
                run.set_condition(NOTHING, told_as(run, "uncond"))
                return
            assert isinstance(uncond, Condition)
            told = run.encode_text(negatives, negative=True)
            run.set_condition(NOTHING, replace(told, time_ids=uncond.time_ids))

    def combine(self, step: Step, state: str) -> torch.Tensor | None:
        """The prediction of the picture."""
        if state != "image":
            return None
        nothing, plain = step.eps[NOTHING], step.eps[PLAIN]
        text = step.run.guidance.scale if self.text_scale is None else self.text_scale
        return nothing + text * (plain - nothing) + self.subject_scale * (step.eps["cond"] - plain)
