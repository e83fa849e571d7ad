"""Cross-image attention: a thing in the look of another picture's, part by part (arXiv 2311.03335).

The idea: the queries of self-attention know what a place is, keys and values what it looks like. Both pictures run
beside the run's, which starts as the structure. In the decoder its queries are answered with the keys and values of the
appearance, so that a beak finds a beak; the contrast of that attention is raised, since it is blurred between pictures
(P' = clip(c · (P − mean) + mean)). Guidance away from the prediction with the picture's own keys, and AdaIN of the
latents (colours), bring it back to what the model knows.

Pictures are inverted as the authors do, by edit-friendly DDPM (arXiv 2304.06140): independent noise at every level, and
what a step then lacks to the next level is the noise of that step. Here that happens in the run itself: the structure
is predicted beside the picture, and its lacking noise is added to both, so no pass is spent on an inversion.

Deviations from the published code: inversion and drawing have the same guidance (there: 3.5 and none); no FreeU; no
segmentation from attention, masks are given; ``scale``; attention too stays inside ``mask`` (there: AdaIN alone);
steps count from 0 (there attention's counter lags by one); with guidance above 1 swap guidance is off in both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field

from controlroom.controls.condition_map import mask_map, resized_mask
from controlroom.controls.reference_states import adain, told_as
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.source_pixels import for_each_image, source_pixels
from controlroom.controls.word_mask import MaskInput, PictureMask
from controlroom.core.attention import AttentionCall, Lookup
from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step

STRUCTURE, APPEARANCE, UNSWAPPED = "structure", "appearance", "unswapped"
# Queries that attend at a time: probabilities of 4096 tokens by 4096 in 8 heads are half a gigabyte.
_QUERIES = 1024


class CrossImageAttention(Control):
    """Draw the structure picture in the look of the appearance picture. The run needs DDIM without eta.

    The published method has no guidance: give the run ``guidance_scale=1`` and a prompt that fits both pictures ("a
    photo of an animal").

    Args:
        structure: the picture that is changed, stretched to the size of the run; a list: one for each prompt.
        appearance: the picture whose look it gets.
        strength: share of the steps that is run, above 0 to 1; less keeps more of the structure.
        start, end: share of these steps between which it acts.
        mask: white where the thing is in the structure: nothing else changes its look. A picture, a list with one for
            each prompt, or words of the prompt (``"words: giraffe"``): where the network reads them so far.
        appearance_mask: white where the thing is in the appearance: where colours are taken from; no words.
        contrast: factor on the contrast of attention; 1: none.
        swap_guidance_scale: away from the prediction with its own keys and values, falling to the half; 1: none.
        attention_start: share of the steps after which keys and values are the appearance's.
        structure_every: each so many steps they are the structure's; 0: never.
        structure_until: share of the steps after which they are no more.
        latent_adain: latents take over mean and deviation of the appearance's.
        adain_start: share of the steps after which they do.
        scale: how much of the swap, its guidance and AdaIN is done, from 0 to 1; towards 0 the structure comes back as
            it was, 0 is the absence of the control.

    Raises:
        InputError: at the start: pictures or masks that cannot be read or do not fit, or another scheduler.
        ConflictError: when the run is planned: with a control that sees the canvas through views, or starts a run.
    """

    type: Literal["cross_image_attention"] = Field(default="cross_image_attention", kw_only=True)
    structure: Any
    appearance: Any
    strength: float = Field(default=0.68, gt=0.0, le=1.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    appearance_mask: PictureMask = None
    contrast: float = Field(default=1.67, ge=0.0)
    swap_guidance_scale: float = Field(default=3.5, ge=1.0)
    attention_start: float = Field(default=0.15, ge=0.0, le=1.0)
    structure_every: int = Field(default=5, ge=0)
    structure_until: float = Field(default=0.6, ge=0.0, le=1.0)
    latent_adain: bool = True
    adain_start: float = Field(default=0.3, ge=0.0, le=1.0)
    scale: float = Field(default=1.0, ge=0.0, le=1.0)

    # Planning.

    def reaches(self, branch: Branch) -> bool:
        """The picture with its prompt. Branches of other controls that it is compared with keep their own attention."""
        return branch.state == IMAGE and branch.role == "cond"

    def _swapped(self, n: int) -> frozenset[int]:
        """Steps at which keys and values are another picture's."""
        return self.window(n) & frozenset(range(round(n * self.attention_start), n))

    def declare(self, outline: Outline) -> Declaration:
        """The two pictures, the picture with its own keys, and the decoder's layers at its two finest sizes."""
        sites = outline.sites("self", ("up",))
        finest = sorted({site.hw for site in sites}, reverse=True)[:2]
        chosen: tuple[Site, ...] = tuple(site for site in sites if site.hw in finest)
        names = frozenset(site.name for site in chosen)
        swapped = self._swapped(outline.steps)
        branches = [Branch(f"{STRUCTURE}/cond", STRUCTURE, purpose="reference", read_by=("cond",))]
        if outline.guided:
            branches.append(Branch(f"{STRUCTURE}/uncond", STRUCTURE, purpose="reference"))
        if swapped:
            told = Branch(f"{APPEARANCE}/cond", APPEARANCE, purpose="reference", read_by=("cond",), steps=swapped)
            branches.append(told)
        if swapped and not outline.guided and self.swap_guidance_scale > 1:
            branches.append(Branch(UNSWAPPED, steps=swapped))
        claims = [Claim(operand, "route", names, steps=swapped, source=f"{APPEARANCE}/cond") for operand in ("k", "v")]
        claims.append(Claim("out", "identity", names, steps=swapped))
        return Declaration(
            states=(State(STRUCTURE, "derived"), State(APPEARANCE, "derived")),
            branches=tuple(branches),
            attention=joined_sites(chosen, mask_sites(outline, self.mask)),
            claims=(*claims, Claim("prediction", "add"), Claim("latents", "blend")),
            phases=frozenset({"main"}),
            strength=self.strength,
        )

    # A run.

    def prepare(self, run: Run) -> _Memory:
        """Encode both pictures and start from the structure."""
        kind = type(run.scheduler).__name__
        if kind != "DDIMScheduler" or run.eta:
            given = f"eta={run.eta:g}" if kind == "DDIMScheduler" else kind
            raise InputError(
                f"{self.label} makes steps of edit-friendly DDPM out of DDIM's without eta; this run has {given}. "
                'Give scheduler="ddim" and no eta.'
            )
        levels = {}
        for name, source in ((STRUCTURE, self.structure), (APPEARANCE, self.appearance)):
            pixels = source_pixels(source, run, name)
            clean = torch.cat([run.backbone.encode_picture(row) for row in pixels.split(1)])
            levels[name] = _Levels(run, name, for_each_image(clean, run))
            run.derive(name, levels[name])
        run.set_initial(IMAGE, levels[STRUCTURE].at(0))
        for name in run.plan.branches:
            if name in (f"{STRUCTURE}/cond", f"{APPEARANCE}/cond", UNSWAPPED):
                run.set_condition(name, told_as(run, "cond"))
            elif name == f"{STRUCTURE}/uncond":
                run.set_condition(name, told_as(run, "uncond"))
        mask = None if self.mask is None else run_mask(self.mask, run, self, beside=self.structure)
        other = self.appearance_mask
        if other is not None:
            other = mask_map(other, run, "appearance_mask", beside=self.appearance)
        return _Memory(levels[STRUCTURE], levels[APPEARANCE], mask, other)

    def before(self, step: Step) -> None:
        """No prediction yet."""
        step.memory(self).sample = None

    # A layer.

    def attention(self, call: AttentionCall) -> None:
        """Answer with another picture's keys and values, with more contrast."""
        step = call.step
        memory: _Memory = step.memory(self)
        if memory.mask is not None:
            memory.mask.attention(call)
        if call.site.kind == "cross" or step.i not in self._swapped(step.n):
            return
        again = self.structure_every > 0 and step.i % self.structure_every == 0
        own = again and step.i < round(step.n * self.structure_until)
        source = f"{STRUCTURE if own else APPEARANCE}/cond"
        if source not in call:
            return
        for branch in call.reached(self):
            mask = None if memory.mask is None else _tokens(memory.mask.pixels, call.site.hw)
            seen = _Seen(source, self.contrast, self.scale, mask)
            call.affine(branch, "q", seen.queries)
            call.affine(branch, "k", seen.keys)
            call.affine(branch, "v", seen.values)
            # What the values were set to is the answer.
            call.identity(branch)

    # A step.

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        """Away from the prediction with the picture's own keys and values."""
        if state != IMAGE:
            return None
        # Before the solver moves them: what the prediction was made from.
        step.memory(self).sample = step.sample("cond")
        if UNSWAPPED not in step.eps:
            return None
        last = max(self.swap_guidance_scale / 2, 1.0)
        share = step.i / (step.n - 1) if step.n > 1 else 0.0
        scale = self.swap_guidance_scale + share * (last - self.swap_guidance_scale)
        return self.scale * (scale - 1) * (step.eps["cond"] - step.eps[UNSWAPPED])

    def finish(self, step: Step) -> None:
        """DDIM's step becomes one of DDPM with the structure's noise; then AdaIN."""
        memory: _Memory = step.memory(self)
        assert memory.sample is not None
        mask = memory.mask
        if mask is not None:
            mask.update()
        before, after = step.alpha_bar, step.alpha_bar_next
        variance = (1 - after) / (1 - before) * (1 - before / after)
        straight, bent = (1 - after) ** 0.5, max(1 - after - variance, 0.0) ** 0.5
        noise = step.noise_of(step.combined[IMAGE], memory.sample)
        latents = step.latents[IMAGE] + (bent - straight) * noise
        if step.i + 1 < step.n:
            prediction, sample = self._structure(step), step.sample(f"{STRUCTURE}/cond")
            clean, noise = step.clean_of(prediction, sample), step.noise_of(prediction, sample)
            lacking = memory.structure.at(step.i + 1) - (after**0.5 * clean + bent * noise)
            latents = latents + lacking.to(latents)
        if self.latent_adain and step.i >= round(step.n * self.adain_start):
            hw = (latents.shape[2], latents.shape[3])
            masks = (None if mask is None else mask.pixels, memory.appearance_mask)
            inside, other = (None if m is None else resized_mask(m, hw) for m in masks)
            moved = adain(latents, memory.appearance.at(step.i + 1), (2, 3), inside, other)
            if inside is None and self.scale == 1:
                latents = moved.to(latents)
            else:
                share = self.scale if inside is None else self.scale * inside
                latents = latents + (share * (moved - latents)).to(latents)
        step.latents[IMAGE] = latents

    def _structure(self, step: Step) -> torch.Tensor:
        """The structure's own prediction, guided as the picture's."""
        cond, uncond = step.eps[f"{STRUCTURE}/cond"], step.eps.get(f"{STRUCTURE}/uncond")
        if uncond is None or step.i in step.run.plan.unguided:
            return cond
        return uncond + step.run.guidance.scale * (cond - uncond)


class _Levels:
    """A picture at every level of a run, with independent noise at each: edit-friendly DDPM."""

    def __init__(self, run: Run, name: str, clean: torch.Tensor) -> None:
        self.run, self.name, self.clean = run, name, clean
        self.noise: dict[int, torch.Tensor] = {}

    def __call__(self, step: Step) -> torch.Tensor:
        return self.at(step.i)

    def at(self, i: int) -> torch.Tensor:
        """Latents at the level of step i; after the last step the clean ones."""
        if i == self.run.n:
            return self.clean
        if i not in self.noise:
            # Two levels are asked for again and again: the step's and the next.
            self.noise = {k: noise for k, noise in self.noise.items() if k >= i - 1}
            self.noise[i] = self.run.noise(self.name, self.clean.shape)
        return self.run.scheduler.add_noise(self.clean, self.noise[i], self.run.timesteps[i].reshape(1))


@dataclass
class _Memory:
    """What a run knows: the pictures' levels, masks or None, the input of the step's prediction."""

    structure: _Levels
    appearance: _Levels
    mask: RunMask | None
    appearance_mask: torch.Tensor | None
    sample: torch.Tensor | None = field(default=None)


@dataclass
class _Seen:
    """One attention layer in one pass: what a branch asks with, and what it is answered.

    Attributes:
        source: branch whose keys and values answer.
        contrast: factor on the contrast of the probabilities.
        scale: share of that answer; the rest is the branch's own.
        mask: [rows, 1, tokens, 1] where they do, or None; elsewhere the branch's own.
    """

    source: str
    contrast: float
    scale: float
    mask: torch.Tensor | None
    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    own: torch.Tensor | None = None

    def queries(self, x: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        """[rows, heads, tokens, width], kept."""
        self.q = x
        return x

    def keys(self, x: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        """The branch's own, and the source's, kept."""
        self.own, self.k = x, lookup(self.source)
        return x

    def values(self, x: torch.Tensor, lookup: Lookup) -> torch.Tensor:
        """The answer [rows, heads, tokens, width]."""
        assert self.q is not None and self.k is not None and self.own is not None
        answer = contrasted(self.q, self.k, lookup(self.source), self.contrast)
        if self.mask is None and self.scale == 1:
            return answer
        alone = F.scaled_dot_product_attention(self.q, self.own, x).float()
        share = torch.as_tensor(self.scale) if self.mask is None else self.scale * self.mask
        return torch.lerp(alone, answer, share.to(answer))


def contrasted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, contrast: float) -> torch.Tensor:
    """Attention [rows, heads, queries, width] whose probabilities stand out from their mean; float32.

    They no longer add up to 1: small ones fall to 0, and no one exceeds 1.
    """
    k, v = k.float(), v.float()
    mean, found = 1 / k.shape[-2], []
    for part in q.float().split(_QUERIES, dim=-2):
        p = (part @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        found.append((contrast * (p - mean) + mean).clamp(0, 1) @ v)
    return torch.cat(found, dim=-2)


def _tokens(mask: torch.Tensor, hw: tuple[int, int]) -> torch.Tensor:
    """[rows, 1, H, W] -> [rows, 1, tokens, 1]."""
    return F.interpolate(mask.float(), size=hw, mode="area").flatten(2)[..., None]
