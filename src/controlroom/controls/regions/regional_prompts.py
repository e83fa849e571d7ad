"""Complementary regional diffusion of RPG (Yang et al., "Mastering Text-to-Image Diffusion: Recaptioning, Planning, and
Generating with Multimodal LLMs", arXiv 2401.11708).

The picture is split into regions with prompts of their own, and what they say is blended with what the whole prompt
says, so that regions keep to their words and still form one picture. Two forms:

- ``attention``, that of the published code: in every cross-attention layer the regions' outputs are put together and
  mixed with the whole prompt's, base_ratio · base + (1 − base_ratio) · region. No row more goes through the network.
- ``latents``, that of the paper's equations: every region is denoised from the picture's latents with its own words,
  the latents are resized to their regions, joined, and mixed with the base prompt's. Taken at its word
  (``fit="resize"``) this shrinks the whole canvas into each region at every step; with ``fit="crop"`` each region keeps
  its own part, as the published code does in its layers.

Deviations from the published code: cells end where their ratios say (there rounding may move the last one by a pixel);
regions may also be boxes or masks; without words for the whole picture, what regions leave free is an error. Resizing
takes the nearest latent, which keeps the strength of the noise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, field_validator

from controlroom.controls.condition_map import resized_mask
from controlroom.controls.region import Overlap, Region, acting, check_covered, region_condition, region_masks
from controlroom.controls.source_pixels import for_each_image, source_pixels
from controlroom.controls.split_ratios import split_boxes
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE, Branch, State
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import InputError
from controlroom.core.random import draw
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step


@dataclass
class _Memory:
    """What a run knows of its regions.

    Attributes:
        regions: with their boxes.
        numbers: of those that act, and their steps.
        masks: number -> [images, 1, H, W] in latents: its share of each pixel.
        tokens: branch and number -> [images, L, width].
        source: latents of the picture that is edited, its noise, and the part that may change; None: none.
        layers: masks at the size of a layer.
    """

    regions: tuple[Region, ...]
    numbers: dict[int, frozenset[int]]
    masks: dict[int, torch.Tensor]
    tokens: dict[tuple[str, int], torch.Tensor]
    source: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    layers: dict[tuple[int, int, tuple[int, int]], torch.Tensor] = field(default_factory=dict)


class RegionalPrompts(Control):
    """Give parts of the picture prompts of their own, blended with the run's prompt.

    Args:
        regions: prompts that take the cells of ``ratios`` in reading order, or `Region`s with boxes or masks.
        ratios: how prompts split the picture: ``"1,1"`` two columns, ``"1;2"`` two rows, ``"1,1,1;2"`` two cells above
            one (with ``;`` the first number of a row is its height). None: one column for each.
        base_ratio: how much the run's prompt counts in a region. 1 is the absence of the control.
        form: ``attention``, as in the published code, or ``latents``, as in the paper.
        start, end: share of the steps between which it acts.
        fit: of ``latents``: ``resize`` the canvas to each region, as written, or ``crop`` its own part.
        image: a picture to edit: its regions are drawn anew, everything else is kept.
        strength: of an edit: share of the steps that is run.
        overlap: what to do where regions overlap: ``error``, or the ``mean``.

    Raises:
        InputError: ratios that cannot be read or do not fit the prompts; at the start of a run, regions that are empty
            or overlap, or that leave a part without words.
    """

    by_views: ClassVar[bool] = True
    type: Literal["regional_prompts"] = Field(default="regional_prompts", kw_only=True)
    regions: tuple[str | Region, ...]
    ratios: str | None = None
    base_ratio: float = Field(default=0.5, ge=0.0, le=1.0)
    form: Literal["attention", "latents"] = "attention"
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    fit: Literal["resize", "crop"] = "resize"
    image: Any = None
    strength: float = Field(default=0.8, gt=0, le=1)
    overlap: Overlap = "error"

    @field_validator("regions", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        if isinstance(value, str) or not isinstance(value, list | tuple) or not value:
            raise ValueError("expected a list of prompts or regions")
        return value

    def model_post_init(self, context: Any) -> None:
        self.placed  # noqa: B018  (what does not fit is said where it is written)

    @property
    def placed(self) -> tuple[Region, ...]:
        """The regions with their places."""
        words = [one for one in self.regions if isinstance(one, str)]
        if not words:
            if self.ratios is not None:
                raise InputError("ratios split the picture for prompts; these regions have places of their own.")
            return tuple(one for one in self.regions if isinstance(one, Region))
        if len(words) < len(self.regions):
            raise InputError("Give all regions as prompts (with ratios), or all with a box or mask.")
        ratios = ",".join("1" for _ in words) if self.ratios is None else self.ratios
        boxes = split_boxes(ratios)
        if len(boxes) != len(words):
            hint = " With ';' the first number of a row is its height: '1,1,1;2' has two cells above one."
            raise InputError(
                f"The ratios {ratios!r} split the picture into {len(boxes)} cells, but there are {len(words)} prompts."
                + (hint if ";" in ratios else "")
            )
        return tuple(Region(prompt, box) for prompt, box in zip(words, boxes, strict=True))

    def neutral(self, n: int) -> bool:
        silent = self.base_ratio == 1 or not acting(self.placed, n)
        return (silent and self.image is None) or not self.window(n)

    def declare(self, outline: Outline) -> Declaration:
        strength = None if self.image is None else self.strength
        regions, names = self.placed, [_branch(i) for i in acting(self.placed, outline.steps)]
        blend = (Claim("latents", "blend"),) if self.image is not None else ()
        if self.form == "attention":
            sites = outline.sites("cross")
            negative = outline.guided and any(region.negative_prompt is not None for region in regions)
            reached = frozenset({"cond", "uncond"} if negative else {"cond"})
            claim = Claim("out", "replace", frozenset(site.name for site in sites), reached)
            return Declaration(attention=sites, claims=(claim, *blend), strength=strength)
        if self.fit == "crop":
            branches = tuple(Branch(name, role="cond") for name in names)
            return Declaration(branches=branches, claims=(Claim("prediction", "add"), *blend), strength=strength)
        if outline.view is not None:
            raise InputError(
                f'{self.label}: with form="latents" regions are shrunk from the whole canvas, which is seen through '
                'windows here. Use fit="crop" or form="attention" beside MultiDiffusion.'
            )
        return Declaration(
            branches=tuple(Branch(name, state=name, role="cond") for name in names),
            states=tuple(State(name, noise_from=IMAGE) for name in names),
            claims=(Claim("latents", "blend"),),
            strength=strength,
        )

    def prepare(self, run: Run) -> _Memory:
        regions, numbers = self.placed, acting(self.placed, run.n)
        masks = region_masks(tuple(regions[i] for i in numbers), run, self.overlap) if numbers else torch.zeros(0)
        source = None if self.image is None else self._source(run, masks)
        if source is None:
            check_covered(masks, run)
        total = masks.sum(0).clamp(min=1)
        memory = _Memory(
            regions, numbers, {i: mask / total for i, mask in zip(numbers, masks, strict=True)}, {}, source
        )
        for i in numbers:
            condition = region_condition(run, regions[i].prompt)
            memory.tokens["cond", i] = condition.tokens
            if self.form == "latents":
                run.set_condition(_branch(i), condition)
            negative = regions[i].negative_prompt
            if negative is not None:
                memory.tokens["uncond", i] = region_condition(run, negative, negative=True).tokens
        return memory

    def _source(self, run: Run, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Start from the picture, noised to the level of the first step."""
        # The mean of the posterior: what is kept shall stay what it was.
        clean = for_each_image(run.backbone.encode_picture(source_pixels(self.image, run)), run)
        noise = draw(run.streams.main, clean.shape, run.device, run.dtype)
        run.set_initial(IMAGE, run.scheduler.add_noise(clean, noise, run.timesteps[:1].repeat(clean.shape[0])))
        return clean, noise, masks.sum(0).clamp(max=1)

    # As weighted streams.

    def attention(self, call: AttentionCall) -> None:
        memory: _Memory = call.step.memory(self)
        for (branch, i), tokens in memory.tokens.items():
            if branch not in call or call.step.i not in memory.numbers[i]:
                continue
            rows = call.layout.size(branch)
            tokens = tokens if tokens.shape[0] in (1, rows) else tokens.repeat(rows // tokens.shape[0], 1, 1)
            mask = self._layer_mask(memory, call.step.run, call.site, i)
            scale = (1 - self.base_ratio) * memory.regions[i].scale
            call.stream(branch, tokens=tokens, scale=scale, query_mask=mask, mode="replace")

    def _layer_mask(self, memory: _Memory, run: Run, site: Site, number: int) -> torch.Tensor:
        """[rows, queries]: a region's share of each query."""
        key = (number, id(run.plan), site.hw)
        if key not in memory.layers:
            views, box = run.plan.views, memory.regions[number].box
            if box is not None and views is None and self.overlap == "error":
                # As the published code cuts: edges of each layer's own grid, rounded down.
                mask = torch.zeros(run.images, *site.hw, device=run.device, dtype=run.dtype)
                left, right = (_floor(edge, site.hw[1]) for edge in (box[0], box[2]))
                top, bottom = (_floor(edge, site.hw[0]) for edge in (box[1], box[3]))
                mask[:, top:bottom, left:right] = 1
            else:
                mask = memory.masks[number]
                mask = resized_mask(mask if views is None else views.split(mask), site.hw)[:, 0]
            memory.layers[key] = mask.flatten(1)
        return memory.layers[key]

    # As latents.

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        memory: _Memory = step.memory(self)
        if self.form == "attention" or (state == IMAGE) != (self.fit == "crop"):
            return None
        guided = "uncond" in step.eps and step.i not in step.run.plan.unguided
        guidance = step.run.guidance.scale if guided else 1.0
        if self.fit == "resize":
            # All states start a step from the same latents, so the prediction without words is the picture's.
            return (guidance - 1) * (step.eps[state] - step.eps["uncond"]) if guided and state in step.eps else None
        total: torch.Tensor | None = None
        for i, mask in memory.masks.items():
            if _branch(i) in step.eps and step.i in memory.numbers[i]:
                weight = mask if step.run.plan.views is None else step.run.plan.views.split(mask)
                weight = (1 - self.base_ratio) * memory.regions[i].scale * guidance * weight
                moved = weight * (step.eps[_branch(i)] - step.eps["cond"])
                total = moved if total is None else total + moved
        return total

    def finish(self, step: Step) -> None:
        memory: _Memory = step.memory(self)
        if self.form == "latents" and self.fit == "resize":
            self._join(step, memory)
        if memory.source is not None:
            clean, noise, mask = memory.source
            level = clean
            if step.t_next is not None:
                level = step.run.scheduler.add_noise(clean, noise, step.t_next.reshape(1).expand(clean.shape[0]))
            step.latents[IMAGE] = mask * step.latents[IMAGE] + (1 - mask) * level

    def _join(self, step: Step, memory: _Memory) -> None:
        """Each region's latents, resized to it, take their share of the picture's."""
        picture = base = step.latents[IMAGE]
        for i, mask in memory.masks.items():
            if step.i in memory.numbers[i]:
                share = (1 - self.base_ratio) * memory.regions[i].scale * mask
                picture = picture + share * (_placed(step.latents[_branch(i)], mask) - base)
        step.latents[IMAGE] = picture
        for i in memory.masks:
            step.latents[_branch(i)] = picture


def _placed(latents: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Latents shrunk to the bounding box of each image's mask; outside it they are 0."""
    found = torch.zeros_like(latents)
    for row, (one, inside) in enumerate(zip(latents, mask[:, 0] > 0, strict=True)):
        tops, lefts = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
        top, bottom, left, right = int(tops[0]), int(tops[-1]) + 1, int(lefts[0]), int(lefts[-1]) + 1
        found[row, :, top:bottom, left:right] = F.interpolate(one[None], size=(bottom - top, right - left))[0]
    return found


def _branch(number: int) -> str:
    return f"regional:{number}"


def _floor(edge: float, side: int) -> int:
    return int(edge * side + 1e-6)
