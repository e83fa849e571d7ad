"""Ctrl-X: the structure of one picture and the appearance of another, without training or guidance (arXiv 2406.07540).

The idea: a network shows where things are in the features and the attention of its decoder's first blocks, and what
they look like in the mean and deviation of its features. Both pictures, noised to each step's level, run beside the
run's. Its features and its queries and keys become the structure's in these blocks; the inputs of its self-attentions
are normalised and get, token by token, mean and deviation from the tokens of the appearance that they attend to. Some
steps are taken more than once (self-recurrence), which takes away what does not fit. Only the branch with the prompt is
controlled, so that guidance strengthens the control.

What is not given is drawn along from the run's noise: the structure or appearance that a prompt alone would have.

Deviations from the published code: ``scale`` and ``mask``; a given picture is noised at the first step too (there: the
run's own noise stands in); a picture that is drawn along shares the noise of the steps with the run's; the published
layers are those of Stable Diffusion XL, of which other networks have the counterparts at the same share of the size.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator, model_validator

from controlroom.controls.condition_map import resized_mask, rows_of
from controlroom.controls.named_layers import check_layers, named_sites
from controlroom.controls.reference_states import noised_anew, told_as, told_text
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.source_pixels import for_each_image, source_pixels
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall, FeatureCall, Lookup
from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step
from controlroom.sampling.guidance import rescaled
from controlroom.sampling.solver import step_arguments

STRUCTURE, APPEARANCE = "structure", "appearance"
"""States of the two pictures."""
RECURRENCE = "ctrl_x:recurrence"
_STATELESS = ("DDIMScheduler", "DDPMScheduler")
_ATTENTION = re.compile(r"\.attentions\.(\d+)\.")


class CtrlX(Control):
    """Draw with the structure of one picture and the appearance of another.

    Args:
        structure: any picture (a photo, a drawing, a map), stretched to the size of the run; a list: one for each
            prompt. None: drawn along from ``structure_prompt``, or from the run's prompt.
        appearance: as ``structure``. With neither, and no prompt for either, there is nothing to control.
        scale: 0 is its absence, 1 all of it.
        start, end: share of the steps between which it acts.
        mask: white where the picture is controlled. A picture, a list with one for each prompt, or words of the prompt
            (``"words: red hat"``): where the network reads them, from the second step on.
        structure_prompt, appearance_prompt: what a given picture shows, or what one drawn along is drawn from; None:
            the run's prompt. A list: one for each prompt.
        structure_schedule, appearance_schedule: share of the steps, from the first, with that control; 0: without.
        recurrence: from and to which share of the steps each is repeated, and how many times; (0, 0, 0): never.
        structure_features: resnets whose output becomes the structure's, by name; None: the published one's like.
        structure_attention: self-attentions whose queries and keys do.
        appearance_attention: self-attentions whose input takes over the appearance.

    Raises:
        InputError: at planning, a layer that the network does not have; at the start, pictures that cannot be read, or
            recurrence with a scheduler whose steps cannot be taken twice.
        ConflictError: when the run is planned: with a control that sees the canvas through views.
    """

    type: Literal["ctrl_x"] = Field(default="ctrl_x", kw_only=True)
    structure: Any = None
    appearance: Any = None
    scale: float = Field(default=1.0, ge=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    structure_prompt: str | list[str] | None = None
    appearance_prompt: str | list[str] | None = None
    structure_schedule: float = Field(default=0.6, ge=0.0, le=1.0)
    appearance_schedule: float = Field(default=0.6, ge=0.0, le=1.0)
    recurrence: tuple[float, float, int] = (0.1, 0.5, 2)
    structure_features: str | list[str] | None = None
    structure_attention: str | list[str] | None = None
    appearance_attention: str | list[str] | None = None

    @field_validator("recurrence")
    @classmethod
    def _in_order(cls, value: tuple[float, float, int]) -> tuple[float, float, int]:
        begin, end, count = value
        if not (0 <= begin <= end <= 1 and 0 <= count <= 10):
            raise ValueError("expected (from, to, times) with 0 <= from <= to <= 1 and 0 to 10 times")
        return value

    @model_validator(mode="after")
    def _named(self) -> Self:
        for layers in (self.structure_features, self.structure_attention, self.appearance_attention):
            if layers is not None:
                check_layers(layers)
        return self

    # Planning.

    def neutral(self, n: int) -> bool:
        """No picture and no prompt, no scale, or no step."""
        asked = (self.structure, self.appearance, self.structure_prompt, self.appearance_prompt)
        return all(one is None for one in asked) or self.scale == 0 or not self.window(n)

    def window(self, n: int) -> frozenset[int]:
        """Steps with a control, or more than one pass."""
        acting = self._steps(STRUCTURE, n) | self._steps(APPEARANCE, n)
        return acting | (frozenset(self._repeats(n)) if acting else acting)

    def _steps(self, which: str, n: int) -> frozenset[int]:
        """The first steps of the schedule that lie in the window."""
        share = self.structure_schedule if which == STRUCTURE else self.appearance_schedule
        return super().window(n) & frozenset(range(round(n * share)))

    def _repeats(self, n: int) -> dict[int, int]:
        """Step -> how many times it is taken again."""
        begin, end, count = self.recurrence
        steps = super().window(n) & frozenset(range(round(n * begin), round(n * end)))
        return dict.fromkeys(sorted(steps), count) if count else {}

    def reaches(self, branch: Branch) -> bool:
        """The branches that denoise the picture with its prompt."""
        return branch.state == IMAGE and branch.purpose != "reference" and branch.role != "uncond"

    def _given(self, which: str) -> Any:
        return self.structure if which == STRUCTURE else self.appearance

    def declare(self, outline: Outline) -> Declaration:
        """States and branches of the pictures, their layers, and the passes of the recurrence."""
        states: list[State] = []
        branches: list[Branch] = []
        claims: list[Claim] = []
        attention: dict[str, Site] = {}
        features: tuple[Site, ...] = ()
        for which in (STRUCTURE, APPEARANCE):
            steps = self._steps(which, outline.steps)
            if not steps:
                continue
            pinned = self._given(which) is not None
            states.append(State(which, "derived") if pinned else State(which, noise_from=IMAGE))
            for role in ("cond",) if pinned else outline.text_branches[::-1]:
                kind: Any = "extra" if pinned else role
                read_by = ("cond",) if role == "cond" else ()
                # A picture that is drawn along is drawn to its end, so that it can be seen.
                runs = steps if pinned else None
                branches.append(Branch(f"{which}/{role}", which, kind, "reference", read_by=read_by, steps=runs))
            sites = self._layers(which, outline)
            attention.update({site.name: site for site in sites})
            names = frozenset(site.name for site in sites)
            source = f"{which}/cond"
            if which == STRUCTURE:
                features = self._features(outline)
                resnets = frozenset(site.name for site in features)
                claims += [Claim(operand, "route", names, steps=steps, source=source) for operand in ("q", "k")]
                claims.append(Claim("feature", "route", resnets, steps=steps, source=source))
            else:
                claims.append(Claim("input", "edit", names, steps=steps))
        repeats = self._repeats(outline.steps)
        return Declaration(
            states=tuple(states),
            branches=tuple(branches),
            attention=joined_sites(
                tuple(site for site in outline.attention if site.name in attention), mask_sites(outline, self.mask)
            ),
            features=features,
            claims=tuple(claims),
            # The passes of the recurrence are without control.
            phases=frozenset({"main"}),
            probes=outline.text_branches if repeats else (),
            probe_passes={i: repeats.get(i, 0) for i in range(outline.steps)},
        )

    def _layers(self, which: str, outline: Outline) -> tuple[Site, ...]:
        sites = outline.sites("self")
        named = self.structure_attention if which == STRUCTURE else self.appearance_attention
        if named is not None:
            return named_sites(named, sites)
        first, second = _decoder(sites)
        if which == STRUCTURE:
            return first
        down = [site for site in sites if site.place == "down"]
        last = sorted({site.block for site in down})[-2:]
        widest = max((_number(site) for site in second), default=0)
        chosen = [site for site in down if site.block in last]
        chosen += [site for site in first if _number(site) > 0]
        chosen += [site for site in second if _number(site) < widest]
        return tuple(chosen)

    def _features(self, outline: Outline) -> tuple[Site, ...]:
        resnets = outline.sites("resnet")
        if self.structure_features is not None:
            return named_sites(self.structure_features, resnets)
        first, _ = _decoder(outline.sites("self"))
        block = first[0].block
        return next((site,) for site in resnets if site.place == "up" and site.block == block)

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Encode the pictures, and tell their branches what they show."""
        repeats = self._repeats(run.n)
        kind = type(run.scheduler).__name__
        if repeats and kind not in _STATELESS:
            raise InputError(
                f'{self.label} takes some steps more than once, which {kind} cannot. Give scheduler="ddim" (eta=1, as '
                "published), or recurrence=(0, 0, 0)."
            )
        for which in (STRUCTURE, APPEARANCE):
            if which not in run.plan.states:
                continue
            given = self._given(which)
            if given is not None:
                pixels = source_pixels(given, run, which)
                clean = torch.cat([run.backbone.encode_picture(row) for row in pixels.split(1)])
                run.derive(which, noised_anew(which, for_each_image(clean, run)))
            run.set_condition(f"{which}/cond", self._told(run, which))
            if f"{which}/uncond" in run.plan.branches:
                run.set_condition(f"{which}/uncond", told_as(run, "uncond"))
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        modules = {site.name: run.backbone.unet.get_submodule(site.name) for site in run.plan.outline.attention}
        layers = {which: frozenset(s.name for s in self._layers(which, run.plan.outline)) for which in run.plan.states}
        return _Memory(repeats, layers.get(STRUCTURE, _NONE), layers.get(APPEARANCE, _NONE), modules, mask)

    def _told(self, run: Run, which: str) -> Any:
        prompt = self.structure_prompt if which == STRUCTURE else self.appearance_prompt
        if prompt is None:
            return told_as(run, "cond")
        listed = [prompt] if isinstance(prompt, str) else prompt
        if not listed or run.images % len(listed):
            raise InputError(f"{self.label}: {which}_prompt has {len(listed)} prompts for {run.images} pictures.")
        return told_text(run, [text for text in listed for _ in range(run.images // len(listed))])

    def before(self, step: Step) -> None:
        """A mask by words moves on. Whether the pictures share the pass of the run's."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.made.clear()
        for which in (STRUCTURE, APPEARANCE):
            name = f"{which}/cond"
            if name in step.running and step.condition(name).tokens.shape[1] != step.condition("cond").tokens.shape[1]:
                raise InputError(
                    f"{self.label}: {which}_prompt is encoded in another length than the run's, so they cannot share "
                    "a pass. Shorten the prompt, or leave out the control that encodes long ones."
                )

    # A layer.

    def _acts(self, call: AttentionCall | FeatureCall, which: str) -> bool:
        return f"{which}/cond" in call and call.step.i in self._steps(which, call.step.n)

    def feature(self, call: FeatureCall) -> torch.Tensor | None:
        """The structure's output in place of the picture's."""
        if not self._acts(call, STRUCTURE):
            return None
        memory: _Memory = call.step.memory(self)
        result = call.hidden.clone()
        for branch in call.reached(self):
            own, other = call.hidden[call.rows(branch)], call.hidden[call.rows(f"{STRUCTURE}/cond")]
            hw = (own.shape[2], own.shape[3])
            weight = self._weight(call, branch, memory, lambda mask, hw=hw: resized_mask(mask, hw))
            result[call.rows(branch)] = torch.lerp(own, other.expand_as(own), _like(weight, own))
        return result

    def attention(self, call: AttentionCall) -> None:
        """The input takes over the appearance; queries and keys are the structure's."""
        memory: _Memory = call.step.memory(self)
        if memory.mask is not None:
            memory.mask.attention(call)
        structure = call.site.name in memory.structure and self._acts(call, STRUCTURE)
        appearance = call.site.name in memory.appearance and self._acts(call, APPEARANCE)
        for branch in call.reached(self) if structure or appearance else ():
            weight = self._weight(call, branch, memory, lambda mask: _tokens(mask, call.site.hw))
            if appearance:
                own = call.input_of(branch)
                asking = call.input_of(f"{STRUCTURE}/cond") if structure else own
                layer = memory.modules[call.site.name]
                new = dressed(layer, own, asking.expand_as(own), call.input_of(f"{APPEARANCE}/cond").expand_as(own))
                call.edit_input(branch, torch.lerp(own, new.to(own), _like(weight, own)))
            if structure:
                heads = weight[:, None] if isinstance(weight, torch.Tensor) else weight
                for operand in ("q", "k"):
                    call.affine(branch, operand, partial(_taken, f"{STRUCTURE}/cond", heads))

    def _weight(
        self,
        call: AttentionCall | FeatureCall,
        branch: str,
        memory: _Memory,
        make: Callable[[torch.Tensor], torch.Tensor],
    ) -> float | torch.Tensor:
        if memory.mask is None:
            return self.scale
        key = (call.site.name, branch)
        if key not in memory.made:
            memory.made[key] = make(rows_of(memory.mask.pixels, call.step.run, branch))
        return self.scale * memory.made[key]

    # After a step.

    def finish(self, step: Step) -> None:
        """Self-recurrence: back to the step's level with new noise, and on again without control."""
        run, memory = step.run, step.memory(self)
        names = run.plan.outline.text_branches
        for _ in range(memory.repeats.get(step.i, 0)):
            share = step.alpha_bar / step.alpha_bar_next
            x = step.latents[IMAGE]
            x = share**0.5 * x + (1 - share) ** 0.5 * run.noise(RECURRENCE, x.shape)
            found = step.forward(names, {IMAGE: x})
            prediction = found["cond"]
            if "uncond" in found and step.i not in run.plan.unguided:
                prediction = found["uncond"] + run.guidance.scale * (found["cond"] - found["uncond"])
                rescale = run.plan.rescale(step.i) or run.guidance.rescale
                prediction = rescaled(prediction, found["cond"], rescale) if rescale > 0 else prediction
            more = step_arguments(run.scheduler, run.rng(RECURRENCE)[: len(x)], run.eta)
            step.latents[IMAGE] = run.scheduler.step(prediction, step.t, x, **more, return_dict=False)[0]


_NONE: frozenset[str] = frozenset()


@dataclass
class _Memory:
    """What a run knows.

    Attributes:
        repeats: step -> how many times it is taken again.
        structure, appearance: names of their self-attentions.
        modules: self-attentions by name.
        mask: of the control, or None; made: what is made of it for a layer and a branch.
    """

    repeats: dict[int, int]
    structure: frozenset[str]
    appearance: frozenset[str]
    modules: dict[str, Any]
    mask: RunMask | None
    made: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)


def dressed(layer: Any, own: torch.Tensor, asking: torch.Tensor, appearance: torch.Tensor) -> torch.Tensor:
    """Spatially aware appearance transfer, equations 4 to 6 of the paper; float32.

    Args:
        layer: self-attention, for its projections.
        own: [rows, tokens, channels] input that is to be dressed.
        asking: input whose normalised queries look for tokens that correspond: its own, or the structure's.
        appearance: input to take mean and deviation from.
    """

    def split(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (layer.heads, -1)).transpose(1, 2).float()

    q, k = split(layer.to_q(_normal(asking).to(own))), split(layer.to_k(_normal(appearance).to(own)))
    value = split(appearance)
    mean = F.scaled_dot_product_attention(q, k, value)
    square = F.scaled_dot_product_attention(q, k, value.square())
    # The difference of two large numbers may be a little below 0.
    deviation = (square - mean.square()).relu().sqrt()
    return (deviation * split(_normal(own)) + mean).transpose(1, 2).flatten(2)


def _normal(x: torch.Tensor) -> torch.Tensor:
    """Mean 0 and deviation 1 over the tokens; float32."""
    deviation, mean = torch.std_mean(x.float(), dim=-2, keepdim=True)
    return (x.float() - mean) / deviation.clamp(min=torch.finfo(torch.float32).tiny)


def _taken(source: str, weight: float | torch.Tensor, x: torch.Tensor, lookup: Lookup) -> torch.Tensor:
    return torch.lerp(x, lookup(source).expand_as(x), _like(weight, x))


def _like(weight: float | torch.Tensor, x: torch.Tensor) -> Any:
    return weight.to(x) if isinstance(weight, torch.Tensor) else weight


def _tokens(mask: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[rows, 1, H, W] -> [rows, tokens, 1]."""
    return F.interpolate(mask.float(), size=hw, mode="area").flatten(2).transpose(1, 2)


def _number(site: Site) -> int:
    """Number of its transformer within its block."""
    match = _ATTENTION.search(site.name)
    return int(match[1]) if match else 0


def _decoder(sites: tuple[Site, ...]) -> tuple[tuple[Site, ...], tuple[Site, ...]]:
    """Self-attentions of the first decoder block that has any, and of the next."""
    up = [site for site in sites if site.place == "up"]
    blocks = [*sorted({site.block for site in up}), None, None][:2]
    if blocks[0] is None:
        raise InputError("Ctrl-X needs self-attention in the decoder, and this network has none there. Name layers.")
    first, second = (tuple(site for site in up if site.block == block) for block in blocks)
    return first, second
