"""MasaCtrl: the same things in another pose or arrangement (arXiv 2304.08465).

The idea: what a thing looks like is in the keys and values of self-attention. A source picture is drawn along from the
same noise with the source prompt; from some step and some layer on, the picture of the run's prompt asks with its own
queries but is answered with the source's keys and values, each half of the guidance by the source's same half. Early
steps and the encoder stay its own, so the new prompt lays it out.

With masks, queries in the foreground see the source's foreground only, those in the background its background:
out = Attention(Q, K_s, V_s; M_s) · M + Attention(Q, K_s, V_s; 1 − M_s) · (1 − M). Since masks are binary, every query
is in one of the two, so this is one attention that leaves out the keys of the other kind. Masks are given, or found in
the cross-attention maps that the layers of one resolution have shown so far in the pass.

Deviations from the published code: where a mask leaves a query no key at all, it sees all of the source (there: the
mean of all values); given masks may be soft, and are cut at one half; in a network of another depth the first layer is
at the published share of it (10 of 16, which is the 44 of 70 that the authors use first for Stable Diffusion XL).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field, field_validator, model_validator
from torch.nn import functional as F

from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.controls.condition_map import mask_map
from controlroom.controls.drawn_along import DrawnAlong, source_prompts
from controlroom.controls.word_mask import MaskInput, WordMask, read_mask
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE, Branch
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site, nearest_size
from controlroom.core.step import Step

SOURCE = DrawnAlong("source")
PUBLISHED_SHARE = 10 / 16
"""Of the self-attention layers, this share from the first is left alone."""


class MasaCtrl(Control):
    """Draw the run's prompt with the things of the source picture.

    Several pictures of a run are edited each on its own. The source picture is in ``result.states["source"]``
    (latents; ``pipe.decode`` shows them). To edit a photo, give the run its inverted ``latents`` and its prompt as
    ``source`` ("" where there is none).

    Args:
        source: the source prompt; a list has one for each picture, or one for each prompt.
        start_step: first step at which keys and values are the source's, from 0.
        start_layer: first self-attention layer, in the order of execution, from 0; None: the published share of the
            network's (10 for Stable Diffusion 1 and 2, 44 for XL). `explain` says which was chosen.
        source_mask: white where the foreground is in the source picture; a list has one for each prompt. If both masks
            are words (``"words: cat"``), they are ``words``.
        target_mask: the same for the run's picture.
        words: instead of masks, words of the foreground thing, looked up in both prompts; a pair of lists names them
            for the source and for the prompt apart.
        threshold: a place belongs to the words where their attention, scaled to 0 … 1, is at least this.
        resolution: shorter side in tokens of the layers whose attention to the words is read; None: a quarter of the
            latents' side (16 for Stable Diffusion at 64x64 latents), or the nearest there is.

    Raises:
        InputError: one mask without the other, or masks and words; at planning, a layer that the network does not
            have; at the start, words that are in no prompt, each named, and masks that cannot be read.
    """

    type: Literal["masactrl"] = Field(default="masactrl", kw_only=True)
    source: str | list[str]
    start_step: int = Field(default=4, ge=0)
    start_layer: int | None = Field(default=None, ge=0)
    source_mask: MaskInput = None
    target_mask: MaskInput = None
    words: str | list[str] | tuple[list[str], list[str]] | None = None
    threshold: float = Field(default=0.1, gt=0, le=1)
    resolution: int | None = Field(default=None, ge=1)

    @field_validator("words")
    @classmethod
    def _something(cls, value: Any) -> Any:
        if value is not None and (not value or any(not item for item in value)):
            raise ValueError("an empty text or list")
        return value

    @field_validator("source")
    @classmethod
    def _listed(cls, value: str | list[str]) -> str | list[str]:
        if isinstance(value, list) and not value:
            raise ValueError("an empty list")
        return value

    @model_validator(mode="before")
    @classmethod
    def _masks_by_words(cls, given: dict[str, Any]) -> dict[str, Any]:
        """Masks that are words are looked up as `words` are: in the maps of the pass under way."""
        masks = [read_mask(given.get(name)) for name in ("source_mask", "target_mask")]
        found = [mask for mask in masks if isinstance(mask, WordMask)]
        if not found:
            return given
        if len(found) != 2 or given.get("words") is not None or any(m.model_fields_set != {"words"} for m in found):
            raise ValueError(
                "words stand for both masks or for none, and alone: give source_mask and target_mask as words, and "
                "threshold and resolution to the control"
            )
        words = tuple(list(mask.words) for mask in found)
        return {**given, "words": words, "source_mask": None, "target_mask": None}

    @model_validator(mode="after")
    def _one_kind_of_mask(self) -> MasaCtrl:
        given = [mask is not None for mask in (self.source_mask, self.target_mask)]
        if any(given) and not all(given):
            raise ValueError("source_mask and target_mask belong together: give both, or words to find them by")
        if any(given) and self.words is not None:
            raise ValueError("masks and words are two ways to say where the foreground is; give one of them")
        return self

    # Planning.

    def neutral(self, n: int) -> bool:
        """No step is left."""
        return not self.window(n)

    def window(self, n: int) -> frozenset[int]:
        """The steps from ``start_step``."""
        return frozenset(range(self.start_step, n))

    def reaches(self, branch: Branch) -> bool:
        """The branches that denoise the picture; not the source, nor other controls' references."""
        return branch.state == IMAGE and branch.purpose != "reference"

    def declare(self, outline: Outline) -> Declaration:
        """A source state on the picture's noise, its branches, and the layers that are routed or read."""
        source_prompts(self.source, outline.prompts, self.label)
        sites = outline.sites("self")
        start = round(PUBLISHED_SHARE * len(sites)) if self.start_layer is None else self.start_layer
        if start >= len(sites):
            raise InputError(
                f"{self.label}: start_layer={start}, but this network has {len(sites)} self-attention layers, 0 to "
                f"{len(sites) - 1}. Choose one of them, or leave start_layer out."
            )
        routed = sites[start:]
        names = frozenset(site.name for site in routed)
        note = f"keys and values are the source's from self-attention layer {start} of {len(sites)}"
        return Declaration(
            states=SOURCE.states(),
            branches=SOURCE.branches(outline),
            attention=(*routed, *self._read_sites(outline)),
            claims=(
                Claim("k", "route", names, source=SOURCE.cond),
                Claim("v", "route", names, source=SOURCE.cond),
            ),
            notes=() if self.start_layer is not None else (note,),
        )

    def _read_sites(self, outline: Outline) -> tuple[Site, ...]:
        if self.words is None:
            return ()
        sites = outline.sites("cross")
        hw = nearest_size(sites, outline.hw, self.resolution)
        return tuple(site for site in sites if site.hw == hw)

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Encode the source prompts, read the masks, find the words."""
        sources = source_prompts(self.source, run.prompts, self.label)
        SOURCE.tell(run, sources)
        memory = _Memory(self.threshold)
        if self.source_mask is not None:
            memory.given = (
                mask_map(self.source_mask, run, "source_mask"),
                mask_map(self.target_mask, run, "target_mask"),
            )
        if self.words is not None:
            tokenizer = run.backbone.tokenizers()[0]
            texts = [[prompt_tokens(tokenizer, text) for text in prompts] for prompts in (sources, run.prompts)]
            self._check_words(*texts)
            for branch, prompts, words in zip((SOURCE.cond, "cond"), texts, self._words(), strict=True):
                memory.words[branch] = torch.stack([_places(prompt, words) for prompt in prompts]).to(run.device)
        return memory

    def _words(self) -> tuple[list[str], list[str]]:
        """Words for the source and for the prompt."""
        if isinstance(self.words, tuple):
            return self.words
        listed = [self.words] if isinstance(self.words, str) else self.words or []
        return listed, listed

    def _check_words(self, sources: list[PromptTokens], targets: list[PromptTokens]) -> None:
        """Every word is in a prompt it is looked up in, and every prompt has one of its words."""
        both = [*targets, *sources]
        for words, prompts in zip(self._words(), (sources, targets), strict=True):
            for word in words:
                looked = prompts if isinstance(self.words, tuple) else both
                if not any(word in prompt for prompt in looked):
                    looked[0].find(word)
            for prompt in prompts:
                if not any(word in prompt for word in words):
                    raise InputError(
                        f"{self.label}: none of {', '.join(map(repr, words))} is in {prompt.text!r}. Name a word of "
                        "each prompt; a pair of lists has the source's first."
                    )

    # A step.

    def before(self, step: Step) -> None:
        """Maps are those of one step."""
        SOURCE.check(step, self.label)
        step.memory(self).maps.clear()

    def finish(self, step: Step) -> None:
        """Keep where the words were in the picture, so that it can be shown."""
        found = step.memory(self).foreground(step.run.size)
        if found is not None:
            plan = step.run.plan
            step.run.masks[f"{plan.controls[plan.indices[id(self)]].label}.target_mask"] = found

    def attention(self, call: AttentionCall) -> None:
        """Read the maps of the words, route self-attention."""
        memory: _Memory = call.step.memory(self)
        if call.site.kind == "cross":
            if all(branch in call for branch in memory.words):
                for branch in memory.words:
                    call.read(branch, memory.sink(branch, call.site))
            return
        branches = call.step.run.plan.branches
        bias: torch.Tensor | None = None
        for branch in call.reached(self):
            source = SOURCE.uncond if branches[branch].role == "uncond" else SOURCE.cond
            if source not in call:
                continue
            call.route(branch, k=source, v=source)
            if bias is None:
                bias = memory.bias(call.site.hw)
            if bias is not None:
                call.bias(branch, bias)


@dataclass
class _Memory:
    """What is known of the foreground.

    Attributes:
        threshold: cut of the maps.
        given: masks [images, 1, H, W] of the source and of the picture.
        words: branch -> [images, L], 1 at the tokens of its words.
        maps: of the step under way: branch -> layer -> attention to the words [images, 1, h, w].
    """

    threshold: float
    given: tuple[torch.Tensor, torch.Tensor] | None = None
    words: dict[str, torch.Tensor] = field(default_factory=dict)
    maps: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

    def sink(self, branch: str, site: Site) -> Callable[[torch.Tensor], None]:
        """Takes probabilities [rows, heads, h·w, L]."""

        def keep(probabilities: torch.Tensor) -> None:
            words = self.words[branch].to(probabilities)
            # Beside longer prompts, what a branch is told is filled up at its end.
            words = F.pad(words, (0, probabilities.shape[-1] - words.shape[-1]))
            found = (probabilities.mean(1) @ words[:, :, None])[..., 0]
            self.maps.setdefault(branch, {})[site.name] = found.reshape(-1, 1, *site.hw)

        return keep

    def bias(self, hw: tuple[int, int]) -> torch.Tensor | None:
        """[images, 1, queries, keys], −inf between foreground and background; None where nothing is known yet."""
        if self.given is not None:
            source, target = (F.interpolate(mask.float(), size=hw) > 0.5 for mask in self.given)
        elif self.maps:
            source, target = (self._foreground(branch, hw) for branch in self.words)
        else:
            return None
        source, target = source.flatten(1)[:, None, :], target.flatten(1)[:, :, None]
        apart = source != target
        # A query with no key of its kind looks everywhere.
        apart = apart & ~apart.all(-1, keepdim=True)
        return torch.zeros(apart.shape, device=apart.device).masked_fill(apart, float("-inf"))[:, None]

    def foreground(self, size: tuple[int, int]) -> torch.Tensor | None:
        """[images, 1, height, width] in {0, 1}: where the words are in the picture; None without words."""
        return self._foreground("cond", size).to(torch.float32) if "cond" in self.maps else None

    def _foreground(self, branch: str, hw: tuple[int, int]) -> torch.Tensor:
        """[images, 1, h, w]: where the words are, on the mean over the layers so far."""
        mean = torch.stack(tuple(self.maps[branch].values())).mean(0)
        low, high = mean.amin((2, 3), keepdim=True), mean.amax((2, 3), keepdim=True)
        share = (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)
        return F.interpolate(share, size=hw) >= self.threshold


def _places(prompt: PromptTokens, words: list[str]) -> torch.Tensor:
    """[L], 1 at the tokens of those of the words that are in the prompt."""
    places = torch.zeros(prompt.length)
    for word in words:
        if word in prompt:
            places[[place for occurrence in prompt.find(word) for place in occurrence]] = 1.0
    return places
