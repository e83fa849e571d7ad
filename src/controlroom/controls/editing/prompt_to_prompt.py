"""Prompt-to-Prompt: edit a picture by editing its prompt (arXiv 2208.01626).

The idea: where things are is in the attention maps, what they are in the values. A source picture is drawn along from
the same noise with the source prompt; for the first steps the picture of the run's prompt takes the source's
cross-attention maps, word by word, and its self-attention maps at low resolution.

Nothing is normalised after the edit, so it is linear in V and no probabilities are written: with M the alignment of
words, e the factors of `reweight`, α the schedule of each word and κ the words the source has,
out = P(source) · M · (α e κ ⊙ V) + P(own) · ((α e (1 − κ) + 1 − α) ⊙ V), two fused attentions.

Deviations from the published code: a word of `cross_replace`, `reweight` or `local_blend` that is in no prompt is an
error (there it is ignored); words behind a swap of different numbers of tokens keep their counterpart (see
`controlroom.controls.word_alignment`); the local blend reads the layers at a quarter of the latents' side wherever they
are, which for Stable Diffusion at 64x64 latents are the published ``down[2:4] + up[:3]`` at 16x16.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch.nn import functional

from controlroom.backbones.words import PromptTokens, prompt_tokens
from controlroom.controls.local_blend import LocalBlend
from controlroom.controls.word_alignment import refinement, replacement
from controlroom.core.attention import AttentionCall, ValueTerm
from controlroom.core.branch import Branch, Condition, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site, nearest_size
from controlroom.core.step import Step

Bounds = float | tuple[float, float]
DEFAULT = "default_"
"""Key of `cross_replace` for all words that it does not name, as in the published code."""
SOURCE, SOURCE_COND, SOURCE_UNCOND = "source", "source/cond", "source/uncond"


class PromptToPrompt(Control):
    """Edit a picture by words: the run's prompt is the target, ``source`` the prompt of the picture to keep.

    Several pictures of a run are edited each on its own. The source picture is in ``result.states["source"]``
    (latents; ``pipe.decode`` shows them).

    Args:
        source: the source prompt; a list has one for each picture, or one for each prompt.
        cross_replace: share of the steps, from the first, in which cross-attention is the source's; a pair is
            (from, to); a mapping gives each word of the prompt its own, ``default_`` all others (absent: all steps).
        self_replace: the same for self-attention.
        reweight: word or phrase of the prompt -> factor on its attention; acts in the steps of ``cross_replace``.
        local_blend: only where these words are does the picture differ from the source: words that are in the source,
            in the prompt or in both; a pair of lists names them for the source and for the prompt apart. Where
            pictures have prompts of their own, a word (here, in `cross_replace` and `reweight`) may be in some of them.
        mode: ``replace`` swaps word for word, ``refine`` adds and takes away words; ``auto`` swaps where both prompts
            have as many words. `explain` says which was chosen.
        self_tokens: self-attention is taken in layers of at most this many tokens; None: 16x16, or a quarter of the
            latents' side where that is more.
        blend_threshold: a place belongs to the words where their attention is above this share of its maximum.
        blend_resolution: shorter side in tokens of the layers that the local blend reads; None: a quarter of the
            latents' side, or the nearest there is.
        keep_source: draw the source picture to its end; without it its rows end with the edit, which costs less.

    Raises:
        InputError: a share outside 0 to 1; at planning, prompts that do not fit each other; at the start, words that
            are not in a prompt, each named.
    """

    type: Literal["prompt_to_prompt"] = Field(default="prompt_to_prompt", kw_only=True)
    source: str | list[str]
    cross_replace: Bounds | dict[str, Bounds] = 0.4
    self_replace: Bounds = 0.4
    reweight: dict[str, float] | None = None
    local_blend: str | list[str] | tuple[list[str], list[str]] | None = None
    mode: Literal["auto", "replace", "refine"] = "auto"
    self_tokens: int | None = Field(default=None, ge=1)
    blend_threshold: float = Field(default=0.3, ge=0, lt=1)
    blend_resolution: int | None = Field(default=None, ge=1)
    keep_source: bool = True

    @field_validator("cross_replace", "self_replace")
    @classmethod
    def _shares(cls, value: Bounds | dict[str, Bounds]) -> Bounds | dict[str, Bounds]:
        for bounds in value.values() if isinstance(value, dict) else [value]:
            low, high = _pair(bounds)
            if not 0 <= low <= high <= 1:
                raise ValueError(f"shares of the steps lie between 0 and 1, the first not above the second: {bounds}")
        return value

    @field_validator("source", "local_blend")
    @classmethod
    def _something(cls, value: str | Sequence[str | list[str]] | None) -> str | Sequence[str | list[str]] | None:
        if value is not None and (not value or any(not item for item in value)):
            raise ValueError("an empty text or list")
        return value

    # Planning.

    def neutral(self, n: int) -> bool:
        """Nothing is replaced at any step, and nothing blended."""
        return not self.window(n)

    def window(self, n: int) -> frozenset[int]:
        """Steps with a replaced layer; all with a local blend."""
        return frozenset(range(n)) if self.local_blend else self._cross_steps(n) | self._self_steps(n)

    def _cross_steps(self, n: int) -> frozenset[int]:
        return frozenset().union(*(_cross_steps(bounds, n) for bounds in self._schedule().values()))

    def _schedule(self) -> dict[str, Bounds]:
        given = self.cross_replace if isinstance(self.cross_replace, dict) else {DEFAULT: self.cross_replace}
        return {DEFAULT: given.get(DEFAULT, 1.0), **given}

    def _self_steps(self, n: int) -> frozenset[int]:
        low, high = _pair(self.self_replace)
        return frozenset(range(int(low * n), int(high * n)))

    def declare(self, outline: Outline) -> Declaration:
        """A source state on the picture's noise, its branches, and the layers that are edited or read."""
        pairs = zip(self._sources(outline.prompts), outline.prompts, strict=True)
        notes = [" ".join(self._mode(source, prompt)) for source, prompt in pairs]
        cross_steps, self_steps = self._cross_steps(outline.steps), self._self_steps(outline.steps)
        steps = None if self.keep_source else self.window(outline.steps)
        cross = outline.sites("cross") if cross_steps else ()
        routed: tuple[Site, ...] = ()
        claims: list[Claim] = []
        edited = frozenset({"cond"})
        if cross:
            claims.append(Claim("v", "mix", frozenset(s.name for s in cross), edited, cross_steps))
        if self_steps:
            quarter = -(-outline.hw[0] // 4) * -(-outline.hw[1] // 4)
            routed = outline.sites("self", max_tokens=self.self_tokens or max(16 * 16, quarter))
            names = frozenset(s.name for s in routed)
            claims += [Claim("q", "route", names, edited, self_steps, SOURCE_COND)]
            claims += [Claim("k", "route", names, edited, self_steps, SOURCE_COND)]
        if self.local_blend:
            claims.append(Claim("latents", "blend"))
        sites = {site.name: site for site in (*cross, *routed, *self._blend_sites(outline))}
        roles = [(SOURCE_UNCOND, "uncond")] if outline.guided else []
        return Declaration(
            states=(State(SOURCE, noise_from="image"),),
            branches=(
                *(Branch(name, SOURCE, "uncond", steps=steps) for name, _ in roles),
                Branch(SOURCE_COND, SOURCE, "cond", read_by=("cond",), steps=steps),
            ),
            attention=tuple(sites.values()),
            claims=tuple(claims),
            notes=tuple(dict.fromkeys(notes)),
        )

    def _blend_sites(self, outline: Outline) -> tuple[Site, ...]:
        if not self.local_blend:
            return ()
        sites = outline.sites("cross")
        hw = nearest_size(sites, outline.hw, self.blend_resolution)
        return tuple(site for site in sites if site.hw == hw)

    def _sources(self, prompts: Sequence[str]) -> list[str]:
        """The source prompt of each picture."""
        listed = [self.source] if isinstance(self.source, str) else self.source
        if len(prompts) % len(listed):
            raise InputError(f"{self.label} has {len(listed)} source prompts for {len(prompts)} pictures.")
        return [text for text in listed for _ in range(len(prompts) // len(listed))]

    def _mode(self, source: str, prompt: str) -> tuple[str, str]:
        """The mode for a pair of prompts, and why."""
        if not prompt.split():
            raise InputError(f"{self.label} aligns words: give the prompt as text, not empty and not as embeddings.")
        counts = len(source.split()), len(prompt.split())
        if self.mode != "auto":
            chosen, why = self.mode, "as asked for"
        else:
            chosen = "replace" if counts[0] == counts[1] else "refine"
            why = f"since the source has {counts[0]} words and the prompt {counts[1]}"
        if chosen == "replace" and counts[0] != counts[1]:
            raise InputError(
                f'{self.label} with mode="replace" swaps word for word, but the source has {counts[0]} words and the '
                f'prompt {counts[1]}. Use mode="refine", or as many words in both.'
            )
        return chosen, why

    # A run.

    def prepare(self, run: Run) -> _Edit:
        """Encode the source prompts and work out the edit of every step."""
        sources = self._sources(run.prompts)
        unique = list(dict.fromkeys(sources))
        condition = run.encode_text(unique).take([unique.index(text) for text in sources])
        cond = run.conditions["cond"]
        if isinstance(cond, Condition):
            # The sizes that Stable Diffusion XL is told are the run's.
            condition = replace(condition, time_ids=cond.time_ids)
        run.set_condition(SOURCE_COND, condition)
        if "uncond" in run.plan.branches:
            run.set_condition(SOURCE_UNCOND, run.conditions["uncond"])
        tokenizer = run.backbone.tokenizers()[0]
        texts = zip(sources, run.prompts, strict=True)
        pairs = [(prompt_tokens(tokenizer, source), prompt_tokens(tokenizer, prompt)) for source, prompt in texts]
        self._check_words(pairs)
        return self._edit(pairs, run.n, run.device, self._blend_sites(run.plan.outline))

    def _edit(
        self,
        pairs: list[tuple[PromptTokens, PromptTokens]],
        n: int,
        device: torch.device,
        blend_sites: tuple[Site, ...],
    ) -> _Edit:
        found = []
        for source, target in pairs:
            mode, _ = self._mode(source.text, target.text)
            found.append((replacement if mode == "replace" else refinement)(source, target))
        matrix = torch.stack([alignment.matrix for alignment in found])
        kept = torch.stack([alignment.kept for alignment in found])
        alphas = torch.stack([self._alphas(target, n) for _, target in pairs], dim=1)
        factors = torch.stack([self._factors(target) for _, target in pairs])
        aligned = None if bool((matrix == torch.eye(matrix.shape[-1])).all()) else matrix.to(device)
        terms = []
        for alpha in alphas:
            taken, own = alpha * factors * kept, alpha * factors * (1 - kept) + (1 - alpha)
            term = (ValueTerm(SOURCE_COND, taken.to(device), aligned),) if taken.any() else ()
            if own.any() and (taken.any() or bool((own != 1).any())):
                term = (*term, ValueTerm("cond", own.to(device)))
            terms.append(term)
        blend = None
        if self.local_blend:
            words = [self._blend_words(source, target) for source, target in pairs]
            rows = [torch.stack([pair[side] for pair in words]).to(device) for side in (0, 1)]
            blend = LocalBlend({SOURCE_COND: rows[0], "cond": rows[1]}, self.blend_threshold)
        return _Edit(tuple(terms), self._self_steps(n), blend, frozenset(blend_sites))

    def _alphas(self, target: PromptTokens, n: int) -> torch.Tensor:
        """[n, L]: 1 where a token takes the source's map at a step."""
        alphas = torch.zeros(n, target.length)
        for word, bounds in self._schedule().items():
            places = slice(None) if word == DEFAULT else _places(target, word)
            steps = torch.zeros(n)
            steps[sorted(_cross_steps(bounds, n))] = 1.0
            alphas[:, places] = steps[:, None]
        return alphas

    def _factors(self, target: PromptTokens) -> torch.Tensor:
        factors = torch.ones(target.length)
        for word, factor in (self.reweight or {}).items():
            factors[_places(target, word)] = factor
        return factors

    def _blend_words(self, source: PromptTokens, target: PromptTokens) -> tuple[torch.Tensor, torch.Tensor]:
        """[L] each, 1 at the tokens of the words of the local blend."""
        found = []
        for prompt, words in zip((source, target), _two_lists(self.local_blend), strict=True):
            places = torch.zeros(prompt.length)
            for word in words:
                places[_places(prompt, word)] = 1.0
            if not places.any():
                raise InputError(f"{self.label}: no word of local_blend is in {prompt.text!r}. Name one of its words.")
            found.append(places)
        return found[0], found[1]

    def _check_words(self, pairs: list[tuple[PromptTokens, PromptTokens]]) -> None:
        """Every word that is named must be in one of the run's prompts; pictures without it leave it out."""
        sources, targets = [source for source, _ in pairs], [target for _, target in pairs]
        named = [word for word in self._schedule() if word != DEFAULT] + list(self.reweight or {})
        wanted = [(word, targets) for word in named]
        for words, prompts in zip(_two_lists(self.local_blend), (sources, targets), strict=True):
            both = prompts if isinstance(self.local_blend, tuple) else [*targets, *sources]
            wanted += [(word, both) for word in words]
        for word, prompts in wanted:
            if not any(word in prompt for prompt in prompts):
                prompts[0].find(word)

    # A step.

    def attention(self, call: AttentionCall) -> None:
        """Route self-attention, mix the values of cross-attention, read the maps of the local blend."""
        if "cond" not in call or SOURCE_COND not in call:
            return
        edit: _Edit = call.step.memory(self)
        if call.site.kind == "self":
            if call.step.i in edit.self_steps:
                call.route("cond", q=SOURCE_COND, k=SOURCE_COND)
            return
        terms = edit.terms[call.step.i]
        if terms:
            call.mix_values("cond", terms)
        if edit.blend is not None and call.phase == "main" and call.site in edit.blend_sites:
            for branch in (SOURCE_COND, "cond"):
                call.read(branch, edit.blend.sink(branch, call.site.hw))

    def finish(self, step: Step) -> None:
        """Local blend: the source's latents outside the words."""
        blend = step.memory(self).blend
        if blend is not None:
            source, latents = step.latents[SOURCE], step.latents["image"]
            mask = blend.mask(latents.shape[-2:]).to(latents)
            step.latents["image"] = source + mask * (latents - source)
            step.run.masks[f"{self.label}.local_blend"] = functional.interpolate(mask, size=step.run.size)


@dataclass(frozen=True)
class _Edit:
    """Memory of a run: the terms of each step's edit, the steps of self-replacement, the local blend."""

    terms: tuple[tuple[ValueTerm, ...], ...]
    self_steps: frozenset[int]
    blend: LocalBlend | None
    blend_sites: frozenset[Site]


def _pair(bounds: Bounds) -> tuple[float, float]:
    return bounds if isinstance(bounds, tuple) else (0.0, bounds)


def _cross_steps(bounds: Bounds, n: int) -> frozenset[int]:
    """As published, where the schedule of words has n + 1 entries, the one of self-attention n."""
    low, high = _pair(bounds)
    return frozenset(range(int(low * (n + 1)), min(int(high * (n + 1)), n)))


def _two_lists(words: str | list[str] | tuple[list[str], list[str]] | None) -> tuple[list[str], list[str]]:
    """Words for the source and for the prompt."""
    if isinstance(words, tuple):
        return words
    listed = [words] if isinstance(words, str) else words or []
    return listed, listed


def _places(prompt: PromptTokens, word: str) -> list[int]:
    """Token positions of all occurrences of a word; none where it is not in the prompt."""
    return [place for occurrence in prompt.find(word) for place in occurrence] if word in prompt else []
