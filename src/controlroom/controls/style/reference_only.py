"""Reference-only: the style of a reference picture without training, from the A1111 and diffusers communities.

The reference, noised to each step's level, runs beside the picture in the same batch; the picture's self-attentions
also attend to the tokens of the reference's, and, as an option (AdaIN, arXiv 1703.06868), its features take over the
mean and the deviation of the reference's in each channel. ``style_fidelity`` says how little of that the unconditional
branch sees, that is, how strongly guidance pushes towards the reference.

As in diffusers' community pipeline ``stable_diffusion_reference``. Deviations: ``scale``, ``mask`` and several
references; AdaIN is off unless asked for (there: on); the reference's latents are the mean of the encoder's
posterior (there: a sample); at ``style_fidelity=1`` the unconditional rows of the reference are not run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator

from controlroom.controls.condition_map import resized_mask, rows_of
from controlroom.controls.reference_images import count, reference_pixels, token_bias
from controlroom.controls.reference_states import noised_anew, told_as
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall, FeatureCall
from controlroom.core.branch import Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step

# Smallest variance of a channel, as the community pipeline has it.
_EPSILON = 1e-6


@dataclass
class _Memory:
    """What a run knows: ``mask`` or None, and what is made of it for a layer and a branch."""

    mask: RunMask | None
    made: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)


class ReferenceOnly(Control):
    """Draw in the style (and with the things) of a reference picture.

    Args:
        image: the reference, stretched to the size of the run: path, PIL picture, array or tensor. A list: several
            references, all looked at; a list of lists: references of each prompt.
        style_fidelity: 0 to 1. 1: the unconditional branch does not see the reference, so guidance pushes towards it;
            0: it sees as much as the conditional one, so only the words are guided.
        scale: 0 is its absence, 1 all of it, linearly between; beyond, a factor on the attention it gets.
        start, end: share of the steps between which it acts.
        mask: white where the picture may look at the reference. A picture, a list with one for each prompt, or words of
            the prompt (``"words: red hat"``), which are looked up from the second step on.
        reference_attn: self-attentions see the reference.
        reference_adain: features take over the reference's mean and deviation.
        attention_weight: share of the self-attentions that see it, the widest first (A1111's control weight).
        adain_weight: 0: only the middle block takes over statistics, 1: also the inner half of the blocks, 2: all.

    Raises:
        InputError: at the start of a run: a picture or mask that cannot be read or does not fit.
        ConflictError: when the run is planned: with a control that sees the canvas through views.
    """

    type: Literal["reference_only"] = Field(default="reference_only", kw_only=True)
    image: Any
    style_fidelity: float = Field(default=0.5, ge=0.0, le=1.0)
    scale: float = Field(default=1.0, ge=0.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    reference_attn: bool = True
    reference_adain: bool = False
    attention_weight: float = Field(default=1.0, gt=0.0, le=1.0)
    adain_weight: float = Field(default=1.0, ge=0.0, le=2.0)

    @model_validator(mode="after")
    def _acts(self) -> Self:
        if not (self.reference_attn or self.reference_adain):
            raise ValueError("reference_attn and reference_adain are both off, so nothing would happen; turn one on")
        return self

    def declare(self, outline: Outline) -> Declaration:
        roles = [role for role in outline.text_branches if role == "cond" or self.style_fidelity < 1]
        number = count(self.image)
        names = {role: tuple(f"reference:{i}/{role}" for i in range(number)) for role in roles}
        attention = self._attention_sites(outline) if self.reference_attn else ()
        features = self._feature_sites(outline) if self.reference_adain else ()
        layers = frozenset(site.name for site in attention)
        claims = [Claim("k", "extend", layers), Claim("v", "extend", layers)] if attention else []
        if features:
            claims.append(Claim("feature", "affine", frozenset(site.name for site in features)))
        return Declaration(
            states=tuple(State(f"reference:{i}", "pinned") for i in range(number)),
            branches=tuple(
                Branch(name, name.partition("/")[0], purpose="reference", read_by=(role,))
                for role in roles
                for name in names[role]
            ),
            attention=joined_sites(attention, mask_sites(outline, self.mask)),
            features=features,
            claims=tuple(claims),
        )

    def _attention_sites(self, outline: Outline) -> tuple[Site, ...]:
        """The widest layers first; among equals in diffusers' order of modules."""
        sites = outline.sites("self")
        order = {"down": 0, "up": 1, "mid": 2}
        ranked = sorted(sites, key=lambda site: (-site.channels, order[site.place], site.index))
        chosen = {site.name for i, site in enumerate(ranked) if self.attention_weight > i / len(ranked)}
        return tuple(site for site in sites if site.name in chosen)

    def _feature_sites(self, outline: Outline) -> tuple[Site, ...]:
        """What leaves each pair of resnet and transformer (or resnet alone), and the middle block."""
        layers = [site for site in outline.features if site.kind in ("resnet", "transformer")]
        attending = {(site.place, site.block) for site in layers if site.kind == "transformer"}
        blocks = {place: 1 + max(site.block for site in layers if site.place == place) for place in ("down", "up")}
        found = []
        for site in layers:
            if site.place == "mid":
                continue
            depth = site.block / blocks[site.place]
            weight = 2 * (1 - depth if site.place == "down" else depth)
            last = "transformer" if (site.place, site.block) in attending else "resnet"
            if site.kind == last and self.adain_weight >= weight:
                found.append(site)
        middle = [site for site in layers if site.place == "mid" and site.kind == "resnet"]
        return (*found, *middle[-1:])

    def prepare(self, run: Run) -> _Memory:
        for number, pixels in enumerate(reference_pixels(self.image, run)):
            clean = run.backbone.encode_picture(pixels).expand(run.images, -1, -1, -1)
            run.derive(f"reference:{number}", noised_anew(f"reference:{number}", clean))
            for role in run.plan.outline.text_branches:
                if f"reference:{number}/{role}" in run.plan.branches:
                    run.set_condition(f"reference:{number}/{role}", told_as(run, role))
        return _Memory(None if self.mask is None else run_mask(self.mask, run, self))

    def _references(self, call: AttentionCall | FeatureCall, branch: str) -> tuple[list[str], float]:
        """Rows of the references that a branch sees, and how much of what it sees there it keeps."""
        unconditional = call.step.run.plan.branches[branch].role == "uncond"
        role = "uncond" if unconditional else "cond"
        names = [f"reference:{i}/{role}" for i in range(count(self.image))]
        share = 1 - self.style_fidelity if unconditional else 1.0
        return [name for name in names if name in call], share

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.made.clear()

    def attention(self, call: AttentionCall) -> None:
        memory: _Memory = call.step.memory(self)
        if call.site.kind == "cross":
            if memory.mask is not None:
                memory.mask.attention(call)
            return
        for branch in call.reached(self):
            names, share = self._references(call, branch)
            if not names or share == 0:
                continue
            bias = None
            if memory.mask is not None:
                bias = self._made(memory, call, branch, lambda mask: token_bias(mask, call.site.hw)[:, None, :, None])
            share *= min(self.scale, 1.0)
            for name in names:
                call.extend(branch, source=name, bias=bias, weight=max(self.scale, 1.0), share=share)

    def feature(self, call: FeatureCall) -> torch.Tensor | None:
        memory: _Memory = call.step.memory(self)
        result = None
        for branch in call.reached(self):
            names, share = self._references(call, branch)
            if not names or share == 0:
                continue
            weight: Any = share * min(self.scale, 1.0)
            own = call.hidden[call.rows(branch)]
            if memory.mask is not None:
                size = (own.shape[2], own.shape[3])
                weight = weight * self._made(memory, call, branch, lambda mask, hw=size: resized_mask(mask, hw))
            moved = restyled(own, [call.hidden[call.rows(name)] for name in names])
            result = call.hidden.clone() if result is None else result
            result[call.rows(branch)] = own + (weight * (moved - own)).to(own)
        return result

    def _made(self, memory: _Memory, call: AttentionCall | FeatureCall, branch: str, make: Any) -> torch.Tensor:
        key = (call.site.name, branch)
        if key not in memory.made:
            assert memory.mask is not None
            memory.made[key] = make(rows_of(memory.mask.pixels, call.step.run, branch))
        return memory.made[key]


def restyled(x: torch.Tensor, references: list[torch.Tensor]) -> torch.Tensor:
    """AdaIN: [rows, C, h, w] with the mean and deviation of each channel averaged over the references; float32."""
    variance, mean = torch.var_mean(x.float(), dim=(2, 3), keepdim=True, correction=0)
    pairs = [torch.var_mean(r.float(), dim=(2, 3), keepdim=True, correction=0) for r in references]
    wanted_variance = sum((pair[0] for pair in pairs), torch.zeros_like(variance)) / len(pairs)
    wanted_mean = sum((pair[1] for pair in pairs), torch.zeros_like(mean)) / len(pairs)
    deviation, wanted = variance.clamp(min=_EPSILON).sqrt(), wanted_variance.clamp(min=_EPSILON).sqrt()
    return (x.float() - mean) / deviation * wanted + wanted_mean
