"""Pix2Pix-Zero: turn a thing into another and keep the layout, without words for the edit (arXiv 2302.03027).

The idea: what the picture shows is changed by a direction among text embeddings, added to the prompt's; where it shows
it is kept by the source's cross-attention maps. The source picture is drawn along without the direction. Before each
step the latents are moved down the gradient of the squared difference between the maps of all cross-attention layers
and the source's, in both halves of the guidance.

As in diffusers' pipeline, the halves are moved apart: each prediction is made where its own half was moved to, and the
solver goes on from where the half without the prompt was.

Deviations from diffusers' `StableDiffusionPix2PixZeroPipeline`: the source is drawn in the same passes instead of
before (8 rows in 2 passes for each step, there 6 rows in 3); the network's input is scaled as the solver asks and a
move is as long in it for every solver (there scaled inputs are taken back as latents); pictures of a batch are edited
each on its own (there one embedding gets the direction, and moves get shorter with the number of pictures); without
guidance the prompt gets the direction (there nothing does); and a scale near 0 takes less of the direction, so that 0
is absence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from pydantic import Field, model_validator

from controlroom.controls.drawn_along import DrawnAlong
from controlroom.controls.edit_direction import DirectionInput, EditDirection, read_direction
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE, Condition, ConditionSource
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Energy, EnergyNeed, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step

SOURCE = DrawnAlong("source")
WHOLE = 0.01
"""From this scale on, the whole direction is taken."""


class Pix2PixZero(Control):
    """Edit along a direction. The source picture is in ``result.states["source"]`` (latents).

    Args:
        source_embeds: of the thing that is there: embeddings [sentences, length, width] (or their mean), or a list of
            sentences. Without ``target_embeds``: an `EditDirection`, or the file that ``controlroom direction`` wrote.
        target_embeds: of the thing that is wanted.
        scale: step size with which the maps are brought back to the source's (diffusers'
            ``cross_attention_guidance_amount``); 0.01 or less for networks that predict v.
        start: share of the steps at which it begins to act.
        end: share of the steps at which it has ceased to act.
        direction: factor on the direction; None: 1, and for a ``scale`` below 0.01 in proportion to it.

    Raises:
        InputError: one side of the direction without the other; at the start of a run, embeddings that do not fit the
            model's or a direction of another kind of model.
    """

    type: Literal["pix2pix_zero"] = Field(default="pix2pix_zero", kw_only=True)
    source_embeds: DirectionInput
    target_embeds: DirectionInput = None
    scale: float = Field(default=0.1, ge=0)
    start: float = Field(default=0.0, ge=0, le=1)
    end: float = Field(default=1.0, ge=0, le=1)
    direction: float | None = None

    @model_validator(mode="after")
    def _two_sides(self) -> Pix2PixZero:
        whole = isinstance(self.source_embeds, EditDirection | str) or hasattr(self.source_embeds, "__fspath__")
        if self.source_embeds is None or whole != (self.target_embeds is None):
            raise ValueError(
                "give source_embeds and target_embeds (embeddings or lists of sentences), or a direction alone"
            )
        return self

    # Planning.

    @property
    def _factor(self) -> float:
        return min(1.0, self.scale / WHOLE) if self.direction is None else self.direction

    def neutral(self, n: int) -> bool:
        """No step is in the window, or nothing of the direction is taken."""
        return self._factor == 0 or not self.window(n)

    def declare(self, outline: Outline) -> Declaration:
        """A source state on the picture's noise, and energy passes over its branches and the picture's."""
        claims = [Claim("condition", "add", branches=frozenset({"cond"}))]
        notes = ()
        if self.direction is None and self.scale < WHOLE:
            notes = (
                f"{self._factor:g} of the direction is taken, as scale is below {WHOLE:g}; direction=1 takes it all",
            )
        if self.scale == 0:
            return Declaration(claims=tuple(claims), notes=notes)
        branches = SOURCE.branches(outline)
        return Declaration(
            states=SOURCE.states(),
            branches=branches,
            attention=outline.sites("cross"),
            energy=EnergyNeed((*(branch.name for branch in branches), *outline.text_branches)),
            claims=(*claims, Claim("latents", "descend")),
            phases=frozenset({"energy"}),
            notes=notes,
        )

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Read the direction."""
        found = read_direction(run.backbone, self.source_embeds, self.target_embeds)
        told = run.conditions["cond"]
        if isinstance(told, Condition):
            self._check(found.tokens, told)
        if self.scale:
            SOURCE.tell(run, None)
        tokens = self._factor * found.tokens.to(run.device, run.dtype)
        return _Memory(tokens, None if found.pooled is None else self._factor * found.pooled.to(run.device, run.dtype))

    def _check(self, tokens: torch.Tensor, told: Condition) -> None:
        if tokens.shape[1:] != told.tokens.shape[1:]:
            raise InputError(
                f"{self.label}: the embeddings of the direction are {list(tokens.shape[1:])}, the prompt's "
                f"{list(told.tokens.shape[1:])} (length, width). Make the direction with this model, and leave out "
                "what encodes long prompts."
            )

    # A step.

    def before(self, step: Step) -> None:
        """Every step compares anew. Where both halves run, the one with the prompt gets a place of its own."""
        memory, run = step.memory(self), step.run
        if not memory.moved:
            # Only now has every other control said what the picture is told.
            told, memory.moved = run.conditions["cond"], True
            if self.scale:
                run.set_condition(SOURCE.cond, told)
            run.set_condition("cond", lambda later: self._told(later, told))
        memory.losses.clear()
        if self.scale and SOURCE.uncond in run.plan.branches:
            step.offsets["cond"] = torch.zeros_like(step.latents[IMAGE]).requires_grad_(True)

    def _told(self, step: Step, source: ConditionSource) -> Condition:
        """What the picture is told: in the window, what the source is told and the direction."""
        condition = source if isinstance(source, Condition) else source(step)
        if not step.active(self):
            return condition
        memory: _Memory = step.memory(self)
        self._check(memory.tokens, condition)
        pooled = condition.pooled
        if pooled is not None and memory.pooled is not None:
            pooled = pooled + memory.pooled
        return replace(condition, tokens=condition.tokens + memory.tokens, pooled=pooled)

    def attention(self, call: AttentionCall) -> None:
        """Read the source's maps, then those of the picture."""
        memory: _Memory = call.step.memory(self)
        for branch, source in (("uncond", SOURCE.uncond), ("cond", SOURCE.cond)):
            if branch in call and source in call:
                call.read(source, memory.keep(branch))
                call.read(branch, memory.compare(branch))

    def energy(self, step: Step, round: int) -> Energy:
        """The squared differences; each half's gradient moves that half."""
        losses = step.memory(self).losses
        total = torch.stack([loss.sum() for loss in losses.values()]).sum() / len(losses)
        losses.clear()
        # d(scaled)/d(latents): the gradient arrives with this factor once, the latents are longer by its inverse.
        scaled = float(step.scaled(torch.ones((), device=total.device, dtype=torch.float32)))
        size = self.scale / scaled**2
        apart = step.offsets.get("cond")
        if apart is None:
            return Energy(size * total)
        latents = step.latents[IMAGE]
        both, cond = torch.autograd.grad(total, (latents, apart), retain_graph=True)
        uncond = both - cond
        step.offsets["cond"] = size * (uncond - cond)
        # The engine moves the latents by minus the gradient of this, together with what other controls ask for.
        return Energy(size * (latents * uncond).sum())


@dataclass
class _Memory:
    """Of a run: the direction, [1, length, width] and [1, width], and whether the picture is told it. Of a pass: branch
    ->
    [rows] its squared difference so far, and the source's maps of the layer under way.
    """

    tokens: torch.Tensor
    pooled: torch.Tensor | None
    moved: bool = False
    losses: dict[str, torch.Tensor] = field(default_factory=dict)
    source: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep(self, branch: str) -> Callable[[torch.Tensor], None]:
        """Takes the source's probabilities."""

        def keep(probabilities: torch.Tensor) -> None:
            self.source[branch] = probabilities.detach()

        return keep

    def compare(self, branch: str) -> Callable[[torch.Tensor], None]:
        """Takes the picture's; both are [rows, heads, queries, keys]."""

        def compare(probabilities: torch.Tensor) -> None:
            difference = (probabilities - self.source.pop(branch)) ** 2
            loss = difference.sum((2, 3)).mean(1)
            self.losses[branch] = self.losses[branch] + loss if branch in self.losses else loss

        return compare
