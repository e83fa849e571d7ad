"""StyleAligned: a set of pictures in one style, or in that of a given picture (arXiv 2312.02133).

The idea: the pictures of a set look at the first of them. Their self-attention also sees its keys and values, after
queries and keys have been given the mean and deviation of its own (AdaIN), so that they look enough alike for it to be
seen; group norms take their statistics over both. Each half of the guidance sees the first picture's same half.

Here the first picture of the set is a branch of its own, drawn along from the noise and the prompt of the run's first
(or from others, so that a set can be added to later). The published code takes row 0 of the batch, which comes to the
same: image 0 then sees only itself. A given picture is held to the levels of its DDIM inversion.

Deviations: ``scale`` and ``mask``; the reference's row is one more; with ``full_attention_share`` a given reference is
seen by all but does not look at them; a picture is inverted without guidance (there: 2); a share ``only_self_level``
that is less than one layer is none (there: a division by zero).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator

from controlroom.controls.condition_map import resized_mask, rows_of
from controlroom.controls.reference_images import reference_pixels, token_bias
from controlroom.controls.reference_inversion import InvertedPicture, ReferenceInput, is_inversion, recorded
from controlroom.controls.reference_states import adain, told_as, told_text
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall, FeatureCall, Lookup
from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.random import draw
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step

STYLE = "style"
"""Name of the state of the picture that the others are aligned with."""


class StyleAligned(Control):
    """Draw the pictures of a run in one style: that of the first of them, or of a reference.

    Args:
        reference: a picture, or an `Inversion` (or its file); None: the first picture of the run, drawn along.
        scale: 0 is its absence, 1 all of it; between, how far attention and statistics go towards it.
        start, end: share of the steps between which it acts.
        mask: white where pictures are aligned. A picture, a list with one for each prompt, or words of the prompts
            (``"words: red hat"``): where the network reads them, from the second step on.
        prompt: of the reference: what a given one shows ("" unless said otherwise), or the prompt of one drawn along
            (None: the run's first).
        seed: of a reference drawn along, which is then the picture that ``prompt`` and this seed give alone; None: the
            noise of the run's first picture.
        share_attention: pictures see the reference's keys and values.
        adain_queries, adain_keys, adain_values: these take over the reference's mean and deviation.
        share_group_norm: group norms have their statistics over picture and reference.
        share_layer_norm: accepted, since the published code has it; layer norms see tokens one by one, so it changes
            nothing.
        full_attention_share: all pictures of a run see each other's keys and values, without AdaIN.
        shared_score_scale: factor on the reference's keys; less than 1 for very famous pictures.
        shared_score_shift: added to the logits of the reference's keys; log 2 for more of a given picture.
        only_self_level: share of the self-attentions, evenly spread, that are left alone.

    Raises:
        InputError: settings with which nothing would happen; at the start, a reference or mask that cannot be read or
            does not fit, or a prompt of another length.
        ConflictError: when the run is planned: with a control that sees the canvas through views.
    """

    type: Literal["style_aligned"] = Field(default="style_aligned", kw_only=True)
    reference: ReferenceInput = None
    scale: float = Field(default=1.0, ge=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    prompt: str | None = None
    seed: int | None = Field(default=None, ge=0, le=2**63 - 1)
    share_attention: bool = True
    adain_queries: bool = True
    adain_keys: bool = True
    adain_values: bool = False
    share_group_norm: bool = True
    share_layer_norm: bool = True
    full_attention_share: bool = False
    shared_score_scale: float = Field(default=1.0, ge=0.0)
    shared_score_shift: float = 0.0
    only_self_level: float = Field(default=0.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _acts(self) -> Self:
        any_adain = self.adain_queries or self.adain_keys or self.adain_values
        attends = self.share_attention or any_adain or self.full_attention_share
        if not (self.share_group_norm or (attends and self.only_self_level < 1)):
            raise ValueError("attention, AdaIN and group norms are all left alone, so nothing would happen; share one")
        if self.reference is not None and self.seed is not None:
            raise ValueError("seed is of a reference that is drawn along; a given one has no noise. Leave one out")
        return self

    # Planning.

    def _alone(self, outline: Outline) -> bool:
        """Whether there is no set: one picture that would be aligned with itself."""
        return outline.images == 1 and self._first()

    def _first(self) -> bool:
        """Whether the reference is the first picture of the run."""
        return self.reference is None and self.prompt is None and self.seed is None

    def _looked_at(self) -> bool:
        """Whether there is a reference beside the pictures (those that all see each other need none)."""
        return not (self._first() and self.full_attention_share)

    def declare(self, outline: Outline) -> Declaration:
        """The reference's state and branches, and the layers that see it."""
        if self._alone(outline):
            return Declaration(notes=("one picture is no set: there is nothing to align it with",))
        attention = self._attention_sites(outline)
        norms = outline.sites("norm") if self.share_group_norm else ()
        layers = frozenset(site.name for site in attention)
        claims = [] if not layers else [Claim(operand, "affine", layers) for operand in self._operands()]
        if layers and (self.share_attention or self.full_attention_share):
            claims += [Claim("k", "extend", layers), Claim("v", "extend", layers)]
        if norms:
            claims.append(Claim("feature", "affine", frozenset(site.name for site in norms)))
        states: tuple[State, ...] = ()
        branches: tuple[Branch, ...] = ()
        if self._looked_at():
            drawn = self.reference is None
            noise = None if self.seed is not None else IMAGE
            states = (State(STYLE, rows=1, noise_from=noise) if drawn else State(STYLE, "derived", rows=1),)
            branches = tuple(
                Branch(f"{STYLE}/{role}", STYLE, role if drawn else "extra", "reference", read_by=(role,))
                for role in ("uncond", "cond")
                if role in outline.text_branches
            )
        read = joined_sites(attention, mask_sites(outline, self.mask))
        return Declaration(states=states, branches=branches, attention=read, features=norms, claims=tuple(claims))

    def _operands(self) -> tuple[Literal["q", "k", "v"], ...]:
        chosen: tuple[tuple[Literal["q", "k", "v"], bool], ...] = (
            ("q", self.adain_queries),
            ("k", self.adain_keys),
            ("v", self.adain_values),
        )
        return () if self.full_attention_share else tuple(operand for operand, on in chosen if on)

    def _attention_sites(self, outline: Outline) -> tuple[Site, ...]:
        """All but those that ``only_self_level`` leaves alone, in the published order of layers: down, up, mid."""
        sites = outline.sites("self")
        order = {"down": 0, "up": 1, "mid": 2}
        listed = sorted(sites, key=lambda site: (order[site.place], site.index))
        alone = left_alone(len(listed), self.only_self_level)
        kept = {site.name for site, one in zip(listed, alone, strict=True) if not one}
        acts = self.share_attention or self.full_attention_share or bool(self._operands())
        return tuple(site for site in sites if acts and site.name in kept)

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Invert the reference, or say what is drawn along."""
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        memory = _Memory({site.name: run.backbone.unet.get_submodule(site.name) for site in self._layers(run)}, mask)
        if f"{STYLE}/cond" not in run.plan.branches:
            return memory
        prompt = self.prompt
        if is_inversion(self.reference):
            levels, known = recorded(run, self.reference, self.label)
            run.derive(STYLE, levels)
            prompt = known if prompt is None else prompt
        elif self.reference is not None:
            (pixels,) = self._pixels(run)
            prompt = prompt or ""
            run.derive(STYLE, InvertedPicture(pixels, f"{STYLE}/cond"))
        elif self.seed is not None:
            shape = run.latent_shape(STYLE)
            noise = draw([torch.Generator("cpu").manual_seed(self.seed)], shape, run.device, run.dtype)
            run.set_initial(STYLE, noise * run.scheduler.init_noise_sigma)
        run.set_condition(f"{STYLE}/cond", told_as(run, "cond", 0) if prompt is None else told_text(run, [prompt]))
        if f"{STYLE}/uncond" in run.plan.branches:
            run.set_condition(f"{STYLE}/uncond", told_as(run, "uncond", 0))
        return memory

    def _layers(self, run: Run) -> tuple[Site, ...]:
        declared = run.plan.controls[run.plan.indices[id(self)]].declaration
        return (*declared.attention, *declared.features)

    def _pixels(self, run: Run) -> list[torch.Tensor]:
        found = reference_pixels(self.reference, run)
        if len(found) != 1 or found[0].shape[0] != 1:
            raise InputError(
                f"{self.label} takes one reference for all pictures of a run. Draw other styles in runs of their own."
            )
        return found

    def before(self, step: Step) -> None:
        """A mask by words moves on. Whether the reference shares the pass of the pictures that look at it."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.made.clear()
        if f"{STYLE}/cond" not in step.running:
            return
        own, other = (step.condition(name).tokens.shape[1] for name in (f"{STYLE}/cond", "cond"))
        if own != other:
            raise InputError(
                f"{self.label}: the reference's prompt is encoded as {own} tokens and the run's as {other}, so they "
                "cannot be drawn in one pass. Shorten the prompt, or leave out the control that encodes long ones."
            )

    # A layer.

    def _style(self, call: AttentionCall | FeatureCall, branch: str) -> str | None:
        """The reference's branch that a branch sees; None where there is none in this pass."""
        role = "uncond" if call.step.run.plan.branches[branch].role == "uncond" else "cond"
        name = f"{STYLE}/{role}"
        return name if name in call else None

    def attention(self, call: AttentionCall) -> None:
        """AdaIN of queries, keys and values, then the reference's among the keys."""
        memory: _Memory = call.step.memory(self)
        if memory.mask is not None:
            memory.mask.attention(call)
        for branch in call.reached(self) if call.site.kind == "self" else ():
            style = self._style(call, branch)
            if self.full_attention_share:
                self._see_each_other(call, branch, memory)
            if style is None:
                continue
            weight: Any = self.scale
            if memory.mask is not None:
                weight = self.scale * memory.of(call, branch, "tokens", lambda mask: _tokens(mask, call.site.hw))
            for operand in self._operands():
                call.affine(branch, operand, partial(_aligned, style, weight))
            if self.share_attention or self.full_attention_share:
                self._see(call, branch, style, memory)

    def _see(self, call: AttentionCall, branch: str, style: str, memory: _Memory) -> None:
        bias = self._bias(call, branch, memory)
        if self.shared_score_shift:
            shift = torch.full((1, 1, 1, 1), self.shared_score_shift, device=call.hidden.device)
            bias = shift if bias is None else bias + shift
        if self.shared_score_scale == 1:
            call.extend(branch, source=style, bias=bias, share=self.scale)
            return
        layer, hidden = memory.modules[call.site.name], call.input_of(style)
        k, v = layer.to_k(hidden).repeat(call.layout.size(branch), 1, 1), layer.to_v(hidden)
        others = torch.ones(len(k), dtype=torch.bool, device=k.device)
        if self._first():
            # The first picture of a set is the reference, and sees itself.
            others[:: call.step.run.images] = False
        k[others] = k[others] * self.shared_score_scale
        call.extend(branch, k=k, v=v, bias=bias, share=self.scale)

    def _see_each_other(self, call: AttentionCall, branch: str, memory: _Memory) -> None:
        """Keys and values of all rows of a branch; a row's own are among them already."""
        hidden = call.input_of(branch)
        rows, tokens = hidden.shape[:2]
        if rows == 1:
            return
        layer = memory.modules[call.site.name]
        k, v = (project(hidden).flatten(0, 1)[None] for project in (layer.to_k, layer.to_v))
        own = torch.eye(rows, dtype=torch.bool, device=hidden.device).repeat_interleave(tokens, dim=1)
        bias = torch.zeros(own.shape, device=hidden.device).masked_fill(own, float("-inf"))[:, None, None, :]
        masked = self._bias(call, branch, memory)
        call.extend(branch, k=k, v=v, bias=bias if masked is None else bias + masked, share=self.scale)

    def _bias(self, call: AttentionCall, branch: str, memory: _Memory) -> torch.Tensor | None:
        if memory.mask is None:
            return None
        return memory.of(call, branch, "bias", lambda mask: token_bias(mask, call.site.hw)[:, None, :, None])

    def feature(self, call: FeatureCall) -> torch.Tensor | None:
        """A group norm over picture and reference, of which the picture's part is kept."""
        memory: _Memory = call.step.memory(self)
        norm = memory.modules[call.site.name]
        result = None
        for branch in call.reached(self):
            style = self._style(call, branch)
            if style is None and self._looked_at():
                continue
            own = call.input[call.rows(branch)]
            first = own[:1] if style is None else call.input[call.rows(style)]
            joined = torch.cat([own, first.expand_as(own)], dim=2)
            shared = F.group_norm(joined, norm.num_groups, norm.weight, norm.bias, norm.eps)[:, :, : own.shape[2]]
            plain = call.hidden[call.rows(branch)]
            weight: Any = self.scale
            if memory.mask is not None:
                hw = (own.shape[2], own.shape[3])
                weight = weight * memory.of(call, branch, "pixels", lambda mask, hw=hw: resized_mask(mask, hw))
            result = call.hidden.clone() if result is None else result
            result[call.rows(branch)] = plain + (weight * (shared - plain)).to(plain)
        return result


@dataclass
class _Memory:
    """What a run knows: its layers, the mask or None, and what is made of that for a layer."""

    modules: dict[str, Any]
    mask: RunMask | None
    made: dict[tuple[str, str, str], torch.Tensor] = field(default_factory=dict)

    def of(
        self,
        call: AttentionCall | FeatureCall,
        branch: str,
        kind: str,
        make: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        """The mask as a layer and a branch need it."""
        key = (call.site.name, branch, kind)
        if key not in self.made:
            assert self.mask is not None
            self.made[key] = make(rows_of(self.mask.pixels, call.step.run, branch))
        return self.made[key]


def _aligned(style: str, weight: Any, x: torch.Tensor, lookup: Lookup) -> torch.Tensor:
    """[rows, heads, tokens, width] with the statistics of the reference's tokens in each channel of each head."""
    return x + weight * (adain(x, lookup(style), -2) - x)


def _tokens(mask: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[rows, 1, H, W] -> [rows, 1, tokens, 1]."""
    return F.interpolate(mask.float(), size=hw, mode="area").flatten(2)[..., None]


def left_alone(layers: int, level: float) -> list[bool]:
    """Which of so many layers a share of them, evenly spread, is.

    >>> left_alone(6, 0.34), left_alone(4, 0.75)
    ([True, False, False, True, False, False], [False, True, True, True])
    """
    few = min(level, 1 - level) if 0 < level < 1 else 0.0
    count = int(few * layers)
    chosen = [count > 0 and i % (layers // count) == 0 for i in range(layers)]
    return [not one for one in chosen] if level > 0.5 else chosen
