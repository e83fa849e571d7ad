"""Start a run from an inverted picture: real pictures for every method that edits drawn ones.

The run starts from the noise that `controlroom.invert` found, at the same timesteps, so that with the prompt of the
inversion it draws the picture again, and with another prompt another picture. Embeddings of null-text optimisation
(arXiv 2211.09794), where the inversion has them, are what every branch without a prompt is told, step by step.

Editing controls that draw a source picture along (Prompt-to-Prompt, MasaCtrl, Pix2Pix-Zero) have it start where the
picture starts. Its latents are then held to the recorded ones of the inversion, so that the source branch *is* the
picture, whatever guidance does to it; in the published null-text method (``hold_source=False``) it is drawn, and
comes as near to the picture as the embeddings bring it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field

from controlroom.controls.run_mask import RunMask, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE, Condition, ConditionSource
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.inverted import Inversion, InversionInput, peek_inversion, read_inversion

SOURCE = "source"
"""Name of the state of a picture that is drawn along to be edited."""


class FromInversion(Control):
    """Start from an inverted picture. The run needs DDIM, and the number of steps of the inversion.

    Args:
        inversion: what `controlroom.invert` gave, or the file it was saved to.
        strength: above 0, at most 1: share of the steps that is run, from the recorded latents at that level. Less
            keeps more of the picture.
        hold_source: hold the source picture of other controls to the recorded latents, so that it is exactly what was
            inverted.
        mask: white where the result may differ from the picture: a picture, or words of the prompt (``"words: red
            hat"``); None: everywhere.

    Raises:
        InputError: at the start of a run: an inversion that cannot be read or was cancelled, of another size or
            backbone, another scheduler or number of steps; words that are not in the prompt.
    """

    type: Literal["from_inversion"] = Field(default="from_inversion", kw_only=True)
    inversion: InversionInput
    strength: float = Field(default=1.0, gt=0, le=1)
    hold_source: bool = True
    mask: MaskInput = None

    def declare(self, outline: Outline) -> Declaration:
        """Where the run starts, and what branches without a prompt are told."""
        prompts, embedded = peek_inversion(self.inversion)
        claims = [Claim("latents", "blend")] if self.mask is not None else []
        if embedded and outline.guided:
            claims.append(Claim("condition", "set", branches=frozenset({"uncond"})))
        named = ", ".join(repr(text) for text in dict.fromkeys(prompts))
        return Declaration(
            strength=self.strength,
            claims=tuple(claims),
            attention=mask_sites(outline, self.mask),
            notes=(f"the picture was inverted with the prompt {named}",),
        )

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Set the start, and the embeddings of every step."""
        found = read_inversion(self.inversion)
        self._check(run, found)
        images = run.images // len(found.prompts)
        # The levels of this run, from where it starts to the picture.
        levels = found.latents[: run.n + 1].flip(0).repeat_interleave(images, dim=1).to(run.device, run.dtype)
        run.set_initial(IMAGE, levels[0])
        if found.uncond is not None and run.plan.outline.guided:
            self._tell(run, found.uncond[-run.n :].repeat_interleave(images, dim=1).to(run.device, run.dtype))
            if run.guidance.scale != found.settings.guidance_scale:
                warnings.warn(
                    f"{self.label}: the embeddings were made for guidance_scale={found.settings.guidance_scale:g}; "
                    f"with {run.guidance.scale:g} the picture does not come back.",
                    stacklevel=2,
                )
        held = tuple(
            name
            for name, state in run.plan.states.items()
            if name == SOURCE and state.advance == "solver" and state.noise_from == IMAGE and state.hw is None
        )
        memory = _Memory(levels, held if self.hold_source else ())
        if self.mask is not None:
            memory.mask = run_mask(self.mask, run, self)
        return memory

    def _tell(self, run: Run, uncond: torch.Tensor) -> None:
        """Every branch without a prompt gets the embeddings of the step."""
        for name, branch in run.plan.branches.items():
            if branch.role == "uncond":
                # Others may set theirs later; those that follow ``uncond`` follow it here too.
                told = run.conditions.get(name, run.conditions["uncond"])
                run.set_condition(name, _stepwise(told, uncond))

    def _check(self, run: Run, found: Inversion) -> None:
        kind = type(run.scheduler).__name__
        if kind != "DDIMScheduler" or run.eta:
            given = f"eta={run.eta:g}" if kind == "DDIMScheduler" else kind
            raise InputError(
                f"{self.label} needs the steps that were inverted, those of DDIM; this run has {given}. Give "
                'scheduler="ddim" and no eta.'
            )
        if tuple(int(t) for t in run.timesteps.flip(0)) != found.timesteps[: run.n]:
            raise InputError(
                f"{self.label}: the picture was inverted in {found.steps} steps, and this run has others. Give "
                f"num_inference_steps={found.steps}, and the scheduler settings of the inversion."
            )
        if run.backbone.name != found.backbone:
            raise InputError(
                f"{self.label}: the picture was inverted with a model of the kind {found.backbone}, this one is "
                f"{run.backbone.name}. Invert it with this model."
            )
        if tuple(found.latents.shape[2:]) != run.latent_shape()[1:]:
            height, width = (side * run.backbone.pixels_per_latent for side in found.latents.shape[-2:])
            raise InputError(
                f"{self.label}: the picture was inverted at {width} x {height} pixels, this run draws "
                f"{run.size[1]} x {run.size[0]}. Give height={height}, width={width}."
            )
        if run.images % len(found.prompts):
            raise InputError(
                f"{self.label} has {len(found.prompts)} inverted pictures for {run.images} images. Give one prompt for "
                "each, or one inversion."
            )

    # A step.

    def attention(self, call: AttentionCall) -> None:
        """Read the maps of the mask's words."""
        mask: RunMask | None = call.step.memory(self).mask
        if mask is not None:
            mask.attention(call)

    def finish(self, step: Step) -> None:
        """Hold the source to the record, and keep what is outside of the mask."""
        memory: _Memory = step.memory(self)
        recorded = memory.levels[step.i + 1]
        for name in memory.held:
            step.latents[name] = recorded.to(step.latents[name])
        if memory.mask is not None:
            memory.mask.update()
            latents = step.latents[IMAGE]
            kept = recorded.to(latents)
            step.latents[IMAGE] = kept + memory.mask.latents().to(latents) * (latents - kept)


@dataclass
class _Memory:
    """Of a run: recorded latents [n + 1, images, C, h, w] from its start to the picture, states to hold, the mask."""

    levels: torch.Tensor
    held: tuple[str, ...]
    mask: RunMask | None = None


def _stepwise(told: ConditionSource, uncond: torch.Tensor) -> ConditionSource:
    """What a branch is told, with the embeddings [n, rows, length, width] of the step in place of its own."""

    def at(step: Step) -> Condition:
        condition = told if isinstance(told, Condition) else told(step)
        return replace(condition, tokens=uncond[step.i])

    return at
