"""AppearanceControl: MagicPose's appearance module (Chang et al., arXiv 2311.12052).

A trained copy of the UNet reads a clean picture of somebody; what its self-attentions are given joins the tokens that
the main network's self-attentions project to keys and values, so that every place of the new picture can look up how
the person looks. Only the conditional branches look, so classifier-free guidance pushes towards the person.

Deviations: the reference is read once, at t = 0, with an empty prompt (as in BootComp, arXiv 2411.16801), where
MagicPose reads it anew at each step's t (``time="match"``). Its unconditional branch keeps the negative prompt, where
MagicPose gives it the prompt. Several references, masks and ``scale`` are additions; a reference keeps its proportions.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from pydantic import Field

from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.backbones.reference import Bank, ReferenceWriter, check_writer, load_writer
from controlroom.controls.condition_map import rows_of, tiled
from controlroom.controls.reference_images import count, reference_masks, reference_pixels, token_bias
from controlroom.controls.run_mask import RunMask, joined_sites, mask_sites, run_mask
from controlroom.controls.word_mask import MaskInput, PictureMask
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import Condition
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ModelError
from controlroom.core.run import Run
from controlroom.core.sites import Site
from controlroom.core.step import Step

SHARED = "shared"
"""Name of the main UNet as its own writer."""


@dataclass
class _Memory:
    """What a run knows of its references.

    Attributes:
        writer: the network that reads them.
        latents: for each reference [1 or images, C, h, w], clean.
        conditions: what the writer is told about each.
        mask: of the picture, or None.
        masks: of the references, each [1 or images, 1, H, W], or None.
        biases: layer and branch -> [rows, 1, queries or 1, tokens or 1], logarithm of both masks.
        bank: layer -> [1 or images, joined tokens, channels].
        noises: noise of each reference where it is noised.
    """

    writer: ReferenceWriter
    latents: list[torch.Tensor]
    conditions: list[Condition]
    mask: RunMask | None
    masks: list[torch.Tensor] | None
    biases: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)
    bank: Bank = field(default_factory=dict)
    noises: list[torch.Tensor] | None = None


class AppearanceControl(Control):
    """Keep the person (or garment, or thing) of a reference picture.

    Args:
        image: the reference: path, PIL picture, array or tensor. A list: several references, all looked at; a list of
            lists: references of each prompt.
        model: writer of the reference: folder of a UNet in diffusers' layout, ``.safetensors`` file, downloaded hub id,
            ``theatre/appearance``, a loaded `UNet2DConditionModel`, or ``shared``: the main network itself.
        scale: 0 is the reference's absence, 1 what the writer was trained with, linearly between; beyond, a factor on
            the attention it gets.
        start, end: share of the steps between which it acts.
        mask: white where the picture may look at the reference. A picture, a list with one for each prompt, or words of
            the prompt (``"words: red hat"``), which are looked up from the second step on.
        reference_mask: white where the reference may be looked at: the person without the background. A list: one for
            each reference.
        text: what the writer is told.
        ref_noise: ``clean``: the reference as it is; ``match``: noised to each step's level.
        time: ``zero``: the writer runs at t = 0; ``match``: at the step's t (MagicPose's published weights). Unless
            both are the first, the writer runs at every step instead of once.
        uncond: unconditional branches see no reference (``absent``), or as many zero tokens (``zeros``: IDM-VTON,
            BootComp), which take their share of the attention.
        layers: self-attention layers that look: ``all``, or ``midup``: middle block and decoder.

    Raises:
        InputError: at the start of a run: a picture or mask that cannot be read or does not fit.
        ModelError: at the start of a run: no such writer, or one for another base model.
    """

    type: Literal["appearance_control"] = Field(default="appearance_control", kw_only=True)
    image: Any
    model: Any = "theatre/appearance"
    scale: float = Field(default=1.0, ge=0.0)
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    reference_mask: PictureMask = None
    text: str = ""
    ref_noise: Literal["clean", "match"] = "clean"
    time: Literal["zero", "match"] = "zero"
    uncond: Literal["absent", "zeros"] = "absent"
    layers: Literal["all", "midup"] = "all"

    @property
    def once(self) -> bool:
        """Whether the bank depends on nothing that changes during a run."""
        return self.ref_noise == "clean" and self.time == "zero"

    def declare(self, outline: Outline) -> Declaration:
        count(self.image)
        sites = self._sites(outline)
        names = frozenset(site.name for site in sites)
        return Declaration(
            claims=(Claim("k", "extend", names), Claim("v", "extend", names)),
            attention=joined_sites(sites, mask_sites(outline, self.mask)),
        )

    def _sites(self, outline: Outline) -> tuple[Site, ...]:
        return outline.sites("self", places=("down", "mid", "up") if self.layers == "all" else ("mid", "up"))

    def prepare(self, run: Run) -> _Memory:
        writer = ReferenceWriter(self._network(run), [site.name for site in self._sites(run.plan.outline)])
        pixels = reference_pixels(self.image, run, "own")
        latents = [run.backbone.encode_picture(picture) for picture in pixels]
        conditions = [
            run.backbone.encode_text([self.text], size=(picture.shape[2], picture.shape[3])).expand(picture.shape[0])
            for picture in pixels
        ]
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        masks = None if self.reference_mask is None else reference_masks(self.reference_mask, run, pixels)
        memory = _Memory(writer, latents, conditions, mask, masks)
        if self.ref_noise == "match":
            # Noise differs between images, so that each is what it would be alone.
            memory.latents = [x.expand(run.images, -1, -1, -1) for x in latents]
            memory.conditions = [condition.expand(run.images) for condition in conditions]
            memory.noises = [run.noise(f"appearance:{i}", x.shape) for i, x in enumerate(memory.latents)]
        if self.once:
            memory.bank = self._read(run, memory, None)
        return memory

    def _network(self, run: Run) -> Any:
        unet = run.backbone.unet
        if isinstance(self.model, str | os.PathLike):
            if self.model == SHARED:
                return unet
            path = find_model(self.model, "writer of references")
            return keep(run.backbone, ("reference writer",), path, lambda: load_writer(path, unet)).to(run.device)
        if not isinstance(self.model, torch.nn.Module):
            raise ModelError(
                f"A writer of references cannot be made from a {type(self.model).__name__}; give a path or a UNet."
            )
        check_writer(self.model, unet, "The given writer")
        check_device(self.model, run.device, "writer")
        return self.model

    def before(self, step: Step) -> None:
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.biases.clear()
        if not self.once:
            memory.bank = self._read(step.run, memory, step)

    def _read(self, run: Run, memory: _Memory, step: Step | None) -> Bank:
        """Run the writer over every reference; joined along the tokens."""
        t = step.t if step is not None and self.time == "match" else torch.zeros((), device=run.device)
        banks = []
        for number, (latents, condition) in enumerate(zip(memory.latents, memory.conditions, strict=True)):
            if memory.noises is not None and step is not None:
                latents = step.scaled(step.noised(latents, memory.noises[number]))
            added, dtype = run.backbone.added_conditions(condition), memory.writer.unet.dtype
            tokens = condition.tokens.to(dtype)
            banks.append(memory.writer.encode(latents.to(dtype), tokens, t, added, condition.mask))
            run.cost.side_rows += latents.shape[0]
            run.cost.side_passes += 1
        return {name: _joined([bank[name] for bank in banks]).to(run.dtype) for name in memory.writer.layers}

    def attention(self, call: AttentionCall) -> None:
        memory: _Memory = call.step.memory(self)
        if call.site.kind == "cross":
            if memory.mask is not None:
                memory.mask.attention(call)
            return
        run, name = call.step.run, call.site.name
        tokens = memory.bank[name]
        for branch in call.reached(self):
            conditional = run.plan.branches[branch].role != "uncond"
            if not conditional and self.uncond == "absent":
                continue
            rows = call.layout.size(branch)
            given = tokens if conditional else torch.zeros_like(tokens)
            bias = self._bias(call, memory, branch)
            weight, share = max(self.scale, 1.0), min(self.scale, 1.0)
            call.extend(branch, tokens=tiled(given, rows, branch), bias=bias, weight=weight, share=share)

    def _bias(self, call: AttentionCall, memory: _Memory, branch: str) -> torch.Tensor | None:
        """[rows or 1, 1, queries or 1, tokens or 1] out of both masks."""
        if memory.masks is None and memory.mask is None:
            return None
        run, name = call.step.run, call.site.name
        if (name, branch) not in memory.biases:
            bias = torch.zeros(1, 1, 1, 1, device=run.device)
            if memory.masks is not None:
                sizes = [_tokens(run, (x.shape[2], x.shape[3]), name) for x in memory.latents]
                parts = [token_bias(m, hw)[:, None] for m, hw in zip(memory.masks, sizes, strict=True)]
                bias = bias + tiled(_joined(parts, dim=2), call.layout.size(branch), branch)[:, None]
            if memory.mask is not None:
                size = _tokens(run, run.plan.hw_of(branch), name)
                bias = bias + token_bias(rows_of(memory.mask.pixels, run, branch), size)[:, None, :, None]
            memory.biases[name, branch] = bias
        return memory.biases[name, branch]


def _tokens(run: Run, hw: tuple[int, int], layer: str) -> tuple[int, int]:
    """Height and width of a layer's tokens for latents of that size."""
    return next(site.hw for site in run.backbone.attention_sites(hw) if site.name == layer)


def _joined(parts: list[torch.Tensor], dim: int = 1) -> torch.Tensor:
    rows = max(part.shape[0] for part in parts)
    return torch.cat([part.expand(rows, -1, -1) for part in parts], dim=dim)
