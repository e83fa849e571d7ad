"""Attend-and-Excite: no subject of the prompt is neglected (arXiv 2301.13826).

The idea: a subject is drawn where some place attends to its word. Before a step, the latents are moved down the
gradient of 1 − max(attention) of the most neglected subject; at a few steps this is repeated until every subject is
attended to as much as a threshold asks for.

Attention is averaged over all cross-attention layers of one resolution and all heads, softmaxed over the words after
multiplication by 100 (without the first and the last position), smoothed by a 3x3 Gaussian, and its maximum taken. The
step size falls as the square root of 1 … 0.5 over the steps.

Deviations from diffusers' pipeline: the network's input is scaled as the solver asks, and the step is taken in the
units of that input, so that solvers that keep x/√ᾱ (Euler, LMS) are moved as much as DDIM is; there the reference feeds
unscaled latents. A word of several tokens is one subject, with the sum of their attention. The first round of a
refinement does not repeat the pass that called for it, whose result is the same. Pictures of a batch are refined
together, each for as long as it needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch.nn import functional as F

from controlroom.backbones.words import prompt_tokens
from controlroom.core.attention import AttentionCall
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Energy, EnergyNeed, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import nearest_size
from controlroom.core.step import Step

Subject = tuple[int, ...]
"""Token positions of one subject."""


class AttendAndExcite(Control):
    """Raise the attention to the most neglected of some words.

    Args:
        indices: token positions in the prompt, each a subject; 0 is the start token (diffusers' ``token_indices``). A
            list of lists has those of each prompt.
        words: words or phrases instead of positions; a list of lists has those of each prompt.
        iterations: steps, from the first, before which the latents are moved.
        thresholds: step -> attention in [0, 1] that every subject must reach there, by repeated moves.
        step_size: factor of a move; 0 is the absence of the control.
        resolution: shorter side in tokens of the layers that are read; None: a quarter of the latents' side (16 for
            Stable Diffusion at 64x64 latents), or the nearest there is.
        refinements: moves of one refinement at most.

    Raises:
        InputError: neither or both of ``indices`` and ``words``; at planning, a resolution that no layer has; at the
            start, positions outside the prompt and words that are not in it, each named.
    """

    type: Literal["attend_and_excite"] = Field(default="attend_and_excite", kw_only=True)
    indices: list[int] | list[list[int]] | None = None
    words: list[str] | list[list[str]] | None = None
    iterations: int = Field(default=25, ge=0)
    thresholds: dict[int, float] = Field(default={0: 0.05, 10: 0.5, 20: 0.8})
    step_size: float = Field(default=20.0, ge=0)
    resolution: int | None = Field(default=None, ge=1)
    refinements: int = Field(default=20, ge=1, le=200)

    @field_validator("indices", "words")
    @classmethod
    def _something(cls, value: list[Any] | None) -> list[Any] | None:
        if value is not None and (not value or any(item in ("", []) for item in value)):
            raise ValueError("an empty list")
        return value

    @field_validator("thresholds")
    @classmethod
    def _reachable(cls, value: dict[int, float]) -> dict[int, float]:
        for step, threshold in value.items():
            if step < 0 or not 0 <= threshold <= 1:
                raise ValueError(f"steps count from 0, attention lies between 0 and 1: {{{step}: {threshold}}}")
        return value

    @model_validator(mode="after")
    def _one_of_them(self) -> AttendAndExcite:
        if (self.indices is None) == (self.words is None):
            raise ValueError('name the subjects, either words=["cat", "frog"] or indices=[2, 5]')
        return self

    # Planning.

    def neutral(self, n: int) -> bool:
        """No step is taken, or none is long."""
        return self.step_size == 0 or not self.window(n)

    def window(self, n: int) -> frozenset[int]:
        """The first ``iterations`` steps, and those with a threshold."""
        return frozenset(i for i in range(n) if i < self.iterations or i in self.thresholds)

    def declare(self, outline: Outline) -> Declaration:
        """Energy passes over ``cond`` before the steps of the window; the layers of one resolution are read."""
        self._listed(outline.images)
        sites = outline.sites("cross")
        hw = nearest_size(sites, outline.hw, self.resolution)
        return Declaration(
            attention=tuple(site for site in sites if site.hw == hw),
            energy=EnergyNeed(("cond",)),
            claims=(Claim("latents", "descend"),),
            phases=frozenset({"energy"}),
        )

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Token positions of every picture's subjects."""
        subjects = []
        for prompt, listed in zip(run.prompts, self._listed(run.images), strict=True):
            subjects.append(self._places(run, listed) if self.words is None else self._words(run, prompt, listed))
        return _Memory(tuple(subjects))

    def _listed(self, images: int) -> list[list[Any]]:
        """The subjects of each picture, from one list for all or a list for each prompt."""
        given: list[Any] = [*(self.words or self.indices or [])]
        lists: list[list[Any]] = given if isinstance(given[0], list) else [given]
        if images % len(lists):
            raise InputError(f"{self.label} has {len(lists)} lists of subjects for {images} pictures.")
        return [item for item in lists for _ in range(images // len(lists))]

    def _places(self, run: Run, indices: Sequence[int]) -> tuple[Subject, ...]:
        last = run.backbone.tokenizers()[0].model_max_length - 2
        wrong = [str(index) for index in indices if not 1 <= index <= last]
        if wrong:
            raise InputError(
                f"{self.label}: token positions lie between 1 and {last}, 0 is the start token; got {', '.join(wrong)}."
            )
        return tuple((index,) for index in indices)

    def _words(self, run: Run, prompt: str, words: Sequence[str]) -> tuple[Subject, ...]:
        """Every occurrence of a word is a subject of its own."""
        if not prompt.strip():
            raise InputError(f"{self.label} finds words in the prompt: give the prompt as text, or indices.")
        tokens = prompt_tokens(run.backbone.tokenizers()[0], prompt)
        return tuple(occurrence for word in words for occurrence in tokens.find(word))

    # A step.

    def before(self, step: Step) -> None:
        """Every picture starts anew."""
        memory: _Memory = step.memory(self)
        memory.maps.clear()
        memory.moves = [0] * step.run.images
        memory.stage = ["first"] * step.run.images

    def attention(self, call: AttentionCall) -> None:
        """Read the attention of the branch with the prompt."""
        memory: _Memory = call.step.memory(self)
        if "cond" in call and any(stage != "done" for stage in memory.stage):
            call.read("cond", memory.sink(call.site.name, call.site.hw))

    def energy(self, step: Step, round: int) -> Energy:
        """The loss of every picture that is not done, and whether one of them needs another round."""
        memory: _Memory = step.memory(self)
        strongest = memory.strongest(step.run.images)
        losses = (1 - strongest).clamp(min=0)
        moves = [self._moves(memory, index, step.i, float(loss)) for index, loss in enumerate(losses.detach())]
        size = self.step_size * math.sqrt(1 - 0.5 * step.i / max(step.n - 1, 1))
        # d(scaled)/d(latents): the gradient arrives with this factor once, the latents are longer by its inverse.
        scaled = float(step.scaled(torch.ones((), device=losses.device, dtype=torch.float32)))
        kept = torch.tensor(moves, device=losses.device)
        loss = torch.where(kept, size / scaled**2 * losses, torch.zeros_like(losses)) if any(moves) else None
        return Energy(loss, again=any(stage != "done" for stage in memory.stage))

    def _moves(self, memory: _Memory, index: int, i: int, loss: float) -> bool:
        """Whether a picture is moved in this round; sets what it does in the next.

        A round of a refinement moves and is followed by another, until a loss is at the target or there were enough.
        One more round then makes the move that every step makes.
        """
        stage = memory.stage[index]
        if stage == "done":
            return False
        target = max(0.0, 1 - self.thresholds.get(i, 0.0))
        if stage == "refine" or (stage == "first" and i in self.thresholds and loss > target):
            memory.moves[index] += 1
            # The published loop looks at the loss before the move, and never stops after the first.
            reached = stage == "refine" and loss <= target
            enough = reached or memory.moves[index] >= self.refinements
            memory.stage[index] = "last" if enough else "refine"
            if enough and i >= self.iterations:
                memory.stage[index] = "done"
            return True
        memory.stage[index] = "done"
        return i < self.iterations


@dataclass
class _Memory:
    """Subjects of each picture; of the step under way: maps by layer, moves made and what each picture does next."""

    subjects: tuple[tuple[Subject, ...], ...]
    maps: dict[str, torch.Tensor] = field(default_factory=dict)
    moves: list[int] = field(default_factory=list)
    stage: list[Literal["first", "refine", "last", "done"]] = field(default_factory=list)

    def sink(self, name: str, hw: tuple[int, int]) -> Callable[[torch.Tensor], None]:
        """Keeps the probabilities of a layer as [rows, heads, h, w, L]."""

        def keep(probabilities: torch.Tensor) -> None:
            self.maps[name] = probabilities.unflatten(2, hw)

        return keep

    def strongest(self, images: int) -> torch.Tensor:
        """[images] in [0, 1]: smoothed maximum of each picture's most neglected subject, with gradients."""
        maps = torch.cat(tuple(self.maps.values()), dim=1).mean(1)
        self.maps.clear()
        shares = (100 * maps[..., 1:-1]).softmax(-1)
        found = []
        for row, share in enumerate(shares):
            subjects = [share[..., [place - 1 for place in s]].sum(-1) for s in self.subjects[row % images]]
            found.append(smoothed(torch.stack(subjects)).flatten(1).amax(1))
        # Of a canvas seen through views (rows view by view), a subject may be in any of them.
        each = [torch.stack(found[index::images]).amax(0) for index in range(images)]
        return torch.stack([maxima.min() for maxima in each])


def smoothed(maps: torch.Tensor) -> torch.Tensor:
    """[n, h, w] after the published 3x3 Gaussian of sigma 0.5; it divides by (2σ)² and not 2σ², so it is exp(−d²)."""
    line = torch.exp(-(torch.arange(-1, 2, device=maps.device, dtype=maps.dtype) ** 2))
    kernel = torch.outer(line, line)
    mode = "reflect" if min(maps.shape[-2:]) > 1 else "replicate"
    padded = F.pad(maps[:, None], (1, 1, 1, 1), mode=mode)
    return F.conv2d(padded, (kernel / kernel.sum())[None, None])[:, 0]
