"""SEGA, semantic guidance: concepts added or removed by degree (arXiv 2301.12247).

The idea: the difference between the prediction for a concept and the one for nothing is a direction that belongs to
that concept alone, if only its largest values are kept. Several such directions are added to the guidance of the
prompt, each from its warmup to its cooldown, with a momentum.

While some concepts are still warming up, the weights of the others are brought to a sum of 1 and there is no momentum;
it is built up from the first step on, and joins in when all have warmed up.

Deviations from diffusers' pipeline: a concept of scale or weight 0 is absent (there it still counts as one that warms
up). Where all concepts that have warmed up have cooled down again, nothing is added (there: not a number). Without
classifier-free guidance the control brings an unconditional branch of its own (there it does nothing). A concept is not
run in steps where its prediction is never used.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from controlroom.core.branch import Branch, Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Settings
from controlroom.core.run import Run
from controlroom.core.step import Step

NOTHING = "semantic/uncond"
"""The unconditional branch of a run that has none."""


class SemanticEdit(Settings):
    """A concept that is added to a picture or taken from it.

    Args:
        prompt: the concept.
        reverse: take it away instead.
        scale: how much; 0 is the absence of the concept.
        warmup: steps, from the first, in which it is not added yet.
        cooldown: step from which it is no longer added; None: it is added to the end.
        threshold: in [0, 1], share of the values of the direction, in each channel, that are left out: the smallest.
        weight: of the concept among the others, at least 0.

    Raises:
        InputError: an unknown or ill-typed setting, a cooldown that is not behind the warmup.
    """

    prompt: str
    reverse: bool = False
    scale: float = 5.0
    warmup: int = Field(default=10, ge=0)
    cooldown: int | None = Field(default=None, ge=1)
    threshold: float = Field(default=0.9, ge=0.0, le=1.0)
    weight: float = Field(default=1.0, ge=0.0)

    @field_validator("prompt")
    @classmethod
    def _something(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("an empty text names no concept")
        return value

    @model_validator(mode="after")
    def _in_this_order(self) -> SemanticEdit:
        if self.cooldown is not None and self.cooldown <= self.warmup:
            raise ValueError(f"cooldown {self.cooldown} is not behind warmup {self.warmup}; the concept never acts")
        return self

    def direction(self, concept: torch.Tensor, nothing: torch.Tensor) -> torch.Tensor:
        """[rows, C, h, w]: scaled difference of two predictions, its small values set to 0 in each channel."""
        found = (concept - nothing) * (-self.scale if self.reverse else self.scale)
        size = found.abs()
        wide = size.flatten(2).to(torch.promote_types(size.dtype, torch.float32))
        least = torch.quantile(wide, self.threshold, dim=2).to(size.dtype)
        return torch.where(size >= least[:, :, None, None], found, torch.zeros_like(found))


class SemanticGuidance(Control):
    """Add concepts to a picture, or take them from it, by degree.

    Args:
        edits: the concepts; none is the absence of the control.
        momentum_scale: how much of the momentum is added; 0: none.
        momentum_beta: share of the momentum that is kept from step to step, in [0, 1].
    """

    type: Literal["semantic_guidance"] = Field(default="semantic_guidance", kw_only=True)
    edits: list[SemanticEdit]
    momentum_scale: float = Field(default=0.1, ge=0.0)
    momentum_beta: float = Field(default=0.4, ge=0.0, le=1.0)

    # Planning.

    @property
    def _present(self) -> list[SemanticEdit]:
        return [edit for edit in self.edits if edit.scale != 0 and edit.weight > 0]

    def _with_momentum(self, n: int) -> bool:
        """Whether momentum is ever added: only when all concepts have warmed up."""
        return self.momentum_scale > 0 and all(edit.warmup < n for edit in self._present)

    def _branches(self, n: int) -> dict[str, tuple[SemanticEdit, frozenset[int]]]:
        """Branch -> its concept and the steps in which that is looked at; while warming up only for the momentum."""
        first = [0 if self._with_momentum(n) else edit.warmup for edit in self._present]
        return {
            f"semantic:{number}": (edit, frozenset(range(begin, n if edit.cooldown is None else min(edit.cooldown, n))))
            for number, (edit, begin) in enumerate(zip(self._present, first, strict=True))
        }

    def neutral(self, n: int) -> bool:
        """No concept, or none that warms up within the run."""
        return all(edit.warmup >= n for edit in self._present)

    def window(self, n: int) -> frozenset[int]:
        """Steps with a concept; all with momentum, which outlasts them."""
        if self._with_momentum(n):
            return frozenset(range(n))
        return frozenset().union(*(steps for _, steps in self._branches(n).values()))

    def declare(self, outline: Outline) -> Declaration:
        """A branch for each concept, which reads the picture."""
        found = {name: steps for name, (_, steps) in self._branches(outline.steps).items() if steps}
        # Other controls treat a concept as they treat the branch it is compared with, so that only words differ.
        role = "uncond" if outline.guided else "extra"
        branches = [Branch(name, role=role, steps=steps) for name, steps in found.items()]
        if not outline.guided:
            branches.insert(0, Branch(NOTHING, steps=frozenset().union(*found.values())))
        return Declaration(
            branches=tuple(branches),
            claims=(Claim("prediction", "add"),),
            keeps=("uncond", *found) if outline.guided else (),
        )

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Encode the concepts."""
        cond = run.conditions["cond"]
        texts = {name: edit.prompt for name, (edit, _) in self._branches(run.n).items()} | {NOTHING: ""}
        for name, text in texts.items():
            if name in run.plan.branches:
                condition = _nothing(run) if name == NOTHING else run.encode_text(text)
                if isinstance(cond, Condition):
                    # The sizes that Stable Diffusion XL is told are the run's.
                    condition = replace(condition, time_ids=cond.time_ids)
                run.set_condition(name, condition)
        return _Memory()

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """The directions of the concepts that act, and the momentum."""
        if state != "image":
            return None
        memory: _Memory = step.memory(self)
        momentum = memory.before(step.i)
        nothing = step.eps.get("uncond", step.eps.get(NOTHING))
        warm, cold = [], []
        for name, (edit, _) in self._branches(step.n).items():
            if name not in step.eps:
                continue
            assert nothing is not None
            weighted = edit.weight * edit.direction(step.eps[name], nothing)
            (warm if step.i >= edit.warmup else cold).append((edit.weight, weighted))
        everything = sum((part for _, part in (*warm, *cold)), torch.zeros_like(step.eps["cond"]))
        if momentum is not None:
            everything = everything + self.momentum_scale * momentum
        kept = 0.0 if momentum is None else self.momentum_beta * momentum
        memory.after = kept + (1 - self.momentum_beta) * everything
        if all(step.i >= edit.warmup for edit in self._present):
            return everything
        if not warm:
            return None
        return sum((part for _, part in warm), torch.zeros_like(everything)) / sum(weight for weight, _ in warm)


def _nothing(run: Run) -> Condition:
    """What a branch without a prompt is told: the empty text, or zeros where Stable Diffusion XL was trained so."""
    condition = run.encode_text("", negative=True)
    if not getattr(run.backbone, "zero_empty_negative", False) or condition.pooled is None:
        return condition
    return replace(condition, tokens=torch.zeros_like(condition.tokens), pooled=torch.zeros_like(condition.pooled))


@dataclass
class _Memory:
    """The momentum behind the last step, and the one it began with, should it be run again."""

    i: int = -1
    begun: torch.Tensor | None = None
    after: torch.Tensor | None = None

    def before(self, i: int) -> torch.Tensor | None:
        """The momentum at the beginning of step i."""
        if i != self.i:
            self.i, self.begun = i, self.after
        return self.begun
