"""Self-attention guidance: away from a picture that is blurred where the network looks (arXiv 2210.00939).

The idea: the places to which the middle self-attention pays most attention are blurred in the predicted clean picture,
which is noised again with the noise that was predicted. What the network makes of that, without the prompt, is what is
guided away from. A place counts where the attention to it, averaged over the heads, sums up to more than 1.

The mask, the noise and the picture are those of the branch without the prompt; without classifier-free guidance those
with it.

Deviations from diffusers' pipeline: the input of the second pass is scaled as the solver asks (there it is not, which
is wrong for solvers that keep x/√ᾱ), and noise is predicted from that scaled input. On a canvas seen through views the
picture is blurred as a whole, with the mean of the masks where views overlap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch.nn import functional as F

from controlroom.core.attention import AttentionCall
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.run import Run
from controlroom.core.step import Step

KERNEL, SIGMA = 9, 1.0
"""Size and deviation of the Gaussian, in latent pixels."""
THRESHOLD = 1.0
"""Attention to a place, summed over all places, above which it is blurred; 1 is the mean."""


class SelfAttentionGuidance(Control):
    """Guide away from the picture blurred where the middle block attends to.

    Args:
        scale: factor of the difference, at least 0; 0 is the absence of the control.
        start: share of the steps from which it acts.
        end: share of the steps until which it acts.

    Raises:
        InputError: at planning, a network without self-attention in its middle block.
    """

    type: Literal["self_attention_guidance"] = Field(default="self_attention_guidance", kw_only=True)
    scale: float = Field(default=0.75, ge=0.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    def declare(self, outline: Outline) -> Declaration:
        """The first self-attention of the middle block is read; each step has a further pass of one branch."""
        return Declaration(
            attention=outline.sites("self", places=("mid",))[:1],
            claims=(Claim("prediction", "add"),),
            phases=frozenset({"main"}),
            probes=("cond",),
        )

    def prepare(self, run: Run) -> _Memory:
        """A place for the mask."""
        return _Memory()

    def attention(self, call: AttentionCall) -> None:
        """Read where the branch without the prompt looks."""
        branch, memory = _base(call.step), call.step.memory(self)
        if branch in call:

            def keep(probabilities: torch.Tensor) -> None:
                memory.mask = looked_at(probabilities, call.site.hw)

            call.read(branch, keep)

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """Away from what the network makes of the blurred picture."""
        if state != "image":
            return None
        branch, mask = _base(step), step.memory(self).mask
        assert mask is not None
        prediction, sample = step.eps[branch], step.sample(branch)
        clean, noise = step.clean_of(prediction, sample), step.noise_of(prediction, sample)
        mask = F.interpolate(mask.to(clean.dtype), clean.shape[-2:])
        views = step.run.plan.views
        if views is not None:
            mask = mask.expand_as(clean)
            clean, noise, mask = (views.merge(part) for part in (clean, noise, mask))
        degraded = blurred(clean) * mask + clean * (1 - mask)
        blind = step.forward((branch,), {"image": step.noised(degraded, noise)})[branch]
        return self.scale * (prediction - blind)


@dataclass
class _Memory:
    """The mask [rows, 1, h, w] of the step under way, true where the middle block looks."""

    mask: torch.Tensor | None = None


def _base(step: Step) -> str:
    """The branch without the prompt, or the one with it where there is no other."""
    return "uncond" if "uncond" in step.running else "cond"


def looked_at(probabilities: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[rows, heads, queries, keys] -> [rows, 1, h, w]: the places that get more attention than the mean.

    Of keys that another control has joined to the picture's own, which come first, nothing is asked.
    """
    own = probabilities[..., : hw[0] * hw[1]]
    if own.shape[-1] < probabilities.shape[-1]:
        own = own / own.sum(-1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny)
    return (own.mean(1).sum(1) > THRESHOLD).unflatten(1, hw)[:, None]


def blurred(latents: torch.Tensor) -> torch.Tensor:
    """[rows, C, h, w] after the published Gaussian, mirrored at the edges."""
    places = torch.arange(KERNEL, dtype=torch.float64) - KERNEL // 2
    line = torch.exp(-0.5 * (places / SIGMA) ** 2)
    line = (line / line.sum()).to(latents)
    half = KERNEL // 2
    mode = "reflect" if min(latents.shape[-2:]) > half else "replicate"
    padded = F.pad(latents, (half, half, half, half), mode=mode)
    kernel = torch.outer(line, line).expand(latents.shape[1], 1, KERNEL, KERNEL)
    return F.conv2d(padded, kernel, groups=latents.shape[1])
