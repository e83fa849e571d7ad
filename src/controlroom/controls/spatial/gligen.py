"""GLIGEN (Li et al., "GLIGEN: Open-Set Grounded Text-to-Image Generation", arXiv 2301.07093): phrases in boxes.

A UNet trained for it has a further, gated self-attention between the self- and the cross-attention of each transformer
block, in which the picture sees one token for each phrase with its box. It acts in the first steps only.

Deviations from diffusers: ``scale``, ``mask``, ``start`` and ``end``; more than thirty boxes are an error; with views
of a canvas each view has the boxes as they lie in it; Stable Diffusion XL shapes read the pooled states of both text
encoders, as there are no public weights to follow. GLIGEN's inpainting and its pictures in boxes are not here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator

from controlroom.controls.run_mask import RunMask, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall, FeatureCall
from controlroom.core.backbone import Backbone
from controlroom.core.branch import IMAGE
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ModelError
from controlroom.core.run import Run
from controlroom.core.step import Step

MAX_BOXES = 30
"""Tokens that the network was trained with; those without a phrase are a learned one."""
Box = tuple[float, float, float, float]


@dataclass
class _Memory:
    """What a run knows.

    Attributes:
        phrases: [30, width] features of the phrases, zero where there is none.
        fusers: module path of a transformer block -> its gated self-attention.
        mask: where it acts, or None.
        objects: tokens of the boxes, for branches with and without words and for the views of a plan.
        inputs: of the transformer blocks of the pass under way.
    """

    phrases: torch.Tensor
    fusers: dict[str, Any]
    mask: RunMask | None
    objects: dict[tuple[bool, bool, int], torch.Tensor] = field(default_factory=dict)
    inputs: dict[str, torch.Tensor] = field(default_factory=dict)


class Gligen(Control):
    """Put what phrases say into boxes, with a checkpoint that was trained for it (GLIGEN).

    Args:
        phrases: what stands in each box.
        boxes: for each phrase left, top, right and bottom, from 0 to 1 of the picture.
        scheduled_sampling_beta: share of the steps, from the first on, in which it acts. 0 is its absence.
        scale: of what the gated layers add. 0 is the absence of the control.
        mask: white where it may act: a picture, a list of one for each prompt, or words of the prompt.
        start, end: share of the steps between which it acts, within ``scheduled_sampling_beta``.

    Raises:
        InputError: phrases and boxes that do not belong together, boxes without an area or outside of the picture.
        ModelError: at the start of a run: the checkpoint has no gated layers.
    """

    by_views: ClassVar[bool] = True
    type: Literal["gligen"] = Field(default="gligen", kw_only=True)
    phrases: list[str]
    boxes: list[Box]
    scheduled_sampling_beta: float = Field(default=0.3, ge=0.0, le=1.0)
    scale: float = 1.0
    mask: MaskInput = None
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)

    @model_validator(mode="after")
    def _together(self) -> Gligen:
        if len(self.phrases) != len(self.boxes) or not 1 <= len(self.phrases) <= MAX_BOXES:
            raise ValueError(
                f"{len(self.phrases)} phrases for {len(self.boxes)} boxes; expected as many, 1 to {MAX_BOXES}"
            )
        for phrase, (left, top, right, bottom) in zip(self.phrases, self.boxes, strict=True):
            if not phrase.strip():
                raise ValueError("expected phrases, none of them empty")
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise ValueError(
                    f"the box of {phrase!r} is {left, top, right, bottom}; expected left < right and top < bottom, "
                    "from 0 to 1 of the picture"
                )
        return self

    def window(self, n: int) -> frozenset[int]:
        return super().window(n) & frozenset(range(int(self.scheduled_sampling_beta * n)))

    def declare(self, outline: Outline) -> Declaration:
        blocks = [site for site in outline.sites("self") if site.name.endswith(".attn1")]
        # What goes into a block is what its first norm reads; what its self-attention gives is changed.
        features = [
            replace(site, name=site.name.removesuffix("attn1") + part, kind="transformer")
            for site in blocks
            for part in ("norm1", "attn1")
        ]
        names = frozenset(site.name for site in blocks)
        return Declaration(
            attention=mask_sites(outline, self.mask), features=tuple(features), claims=(Claim("feature", "add", names),)
        )

    @contextmanager
    def attach(self, backbone: Backbone) -> Iterator[None]:
        """diffusers' pipeline leaves the gated layers switched off."""
        fusers = [module for name, module in backbone.unet.named_modules() if name.endswith(".fuser")]
        before = [fuser.enabled for fuser in fusers]
        try:
            for fuser in fusers:
                fuser.enabled = True
            yield
        finally:
            for fuser, enabled in zip(fusers, before, strict=True):
                fuser.enabled = enabled

    def prepare(self, run: Run) -> _Memory:
        unet = run.backbone.unet
        net = getattr(unet, "position_net", None)
        if net is None or not hasattr(net, "null_positive_feature"):
            kind = "no gated layers" if net is None else "gated layers for pictures in boxes"
            raise ModelError(
                f"{self.label}: this checkpoint has {kind}. Load one of GLIGEN for text, such as "
                "masterful/gligen-1-4-generation-text-box."
            )
        features = self._phrases(run)
        if features.shape[1] != net.positive_len:
            raise ModelError(f"The phrases' features are {features.shape[1]} wide, the boxes' {net.positive_len}.")
        rows = torch.zeros(MAX_BOXES, net.positive_len, device=run.device, dtype=run.dtype)
        rows[: len(features)] = features.to(rows)
        fusers = {name.removesuffix("fuser"): m for name, m in unet.named_modules() if name.endswith(".fuser")}
        return _Memory(rows, fusers, None if self.mask is None else run_mask(self.mask, run, self))

    @torch.no_grad()
    def _phrases(self, run: Run) -> torch.Tensor:
        """[phrases, width]: the pooled states of the text encoders."""
        backbone: Any = run.backbone
        found = []
        for tokenizer, encoder in (
            (backbone.tokenizer, backbone.text_encoder),
            (backbone.tokenizer_2, backbone.text_encoder_2),
        ):
            if encoder is not None:
                tokens = tokenizer(self.phrases, padding=True, truncation=True, return_tensors="pt").to(run.device)
                states = encoder(**tokens)
                found.append(states.text_embeds if hasattr(states, "text_embeds") else states.pooler_output)
        return torch.cat(found, dim=-1)

    # A step.

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        mask: RunMask | None = step.memory(self).mask
        if mask is not None:
            mask.update()

    def attention(self, call: AttentionCall) -> None:
        """Read where the words of the mask are."""
        mask: RunMask | None = call.step.memory(self).mask
        if mask is not None:
            mask.attention(call)

    def feature(self, call: FeatureCall) -> torch.Tensor | None:
        """Between self- and cross-attention, the gated layer sees the block's features and the boxes."""
        memory: _Memory = call.step.memory(self)
        block, _, part = call.site.name.rpartition(".")
        block += "."
        if part == "norm1":
            memory.inputs[block] = call.input
            return None
        names, given = call.reached(self), memory.inputs.pop(block)
        if not names:
            return None
        # All rows in one pass: the layer is small, and a pass for each branch takes longer than its numbers.
        rows = torch.cat([torch.arange(*call.rows(name).indices(call.layout.total)) for name in names]).to(given.device)
        every = len(rows) == call.layout.total
        change = call.hidden if every else call.hidden[rows]
        x = change + (given if every else given[rows])
        added = self.scale * (memory.fusers[block](x, self._all_objects(call, memory, names).to(x)) - x)
        if memory.mask is not None:
            seen = torch.cat([memory.mask.tokens(name, x.shape[1]) for name in names])
            added = added * seen[..., None].to(x)
        found = change + added
        return found if every else call.hidden.index_copy(0, rows, found)

    def _all_objects(self, call: FeatureCall, memory: _Memory, names: tuple[str, ...]) -> torch.Tensor:
        """[rows, 30, width]: tokens of the boxes for the rows of these branches."""
        found = [self._objects(call.step, memory, name) for name in names]
        return torch.cat(
            [tokens.repeat(call.layout.size(n) // len(tokens), 1, 1) for n, tokens in zip(names, found, strict=True)]
        )

    def _objects(self, step: Step, memory: _Memory, name: str) -> torch.Tensor:
        """[1, or a row for each of the branch's views and images, 30, width]: tokens of the boxes, or of none."""
        plan, net = step.run.plan, step.run.backbone.unet.position_net
        branch = plan.branches[name]
        absent, viewed = branch.role == "uncond", plan.views is not None and branch.state == IMAGE
        key = (absent, viewed, id(plan))
        if key not in memory.objects:
            boxes, seen = self._boxes(step.run, viewed)
            boxes, seen = boxes.to(memory.phrases), seen.to(memory.phrases)
            # Kept from pass to pass, so no pass's graph may hang on them.
            with torch.no_grad():
                tokens = net(
                    boxes=boxes,
                    masks=torch.zeros_like(seen) if absent else seen,
                    positive_embeddings=memory.phrases.expand(len(boxes), -1, -1),
                )
            memory.objects[key] = tokens.repeat_interleave(step.run.images, dim=0) if viewed else tokens
        return memory.objects[key]

    def _boxes(self, run: Run, viewed: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes [views or 1, 30, 4] as they lie in each view, and which of them are seen [views or 1, 30]."""
        boxes, seen = torch.zeros(MAX_BOXES, 4), torch.zeros(MAX_BOXES)
        boxes[: len(self.boxes)] = torch.tensor(self.boxes)
        seen[: len(self.boxes)] = 1
        views = run.plan.views
        if not viewed or views is None:
            return boxes[None], seen[None]
        height, width = run.plan.outline.latent[1:]
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        corners = views.split(torch.stack([columns, rows])[None].float())[:, :, 0, 0]
        size = torch.tensor([views.hw[1], views.hw[0]]).float()
        found = [_cropped(boxes, seen, corner, size, torch.tensor([width, height]).float()) for corner in corners]
        return torch.stack([b for b, _ in found]), torch.stack([s for _, s in found])


def _cropped(
    boxes: torch.Tensor, seen: torch.Tensor, corner: torch.Tensor, size: torch.Tensor, canvas: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes [n, 4] of a canvas in a view of it at ``corner``; a seamless canvas goes on at its other edge."""
    best, area = boxes, torch.full_like(seen, -1.0)
    for turns in (0.0, 1.0):
        low = (boxes[:, :2] * canvas + torch.tensor([turns, 0.0]) * canvas - corner).clamp(min=0).minimum(size)
        high = (boxes[:, 2:] * canvas + torch.tensor([turns, 0.0]) * canvas - corner).clamp(min=0).minimum(size)
        found = (high - low).prod(-1)
        best = torch.where((found > area)[:, None], torch.cat([low / size, high / size], dim=-1), best)
        area = torch.maximum(area, found)
    return best, seen * (area > 0)
