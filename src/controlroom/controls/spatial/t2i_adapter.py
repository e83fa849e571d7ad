"""T2I-Adapter (Mou et al., "T2I-Adapter: Learning Adapters to Dig out More Controllable Ability for Text-to-Image
Diffusion Models", arXiv 2302.08453).

A small network reads a condition map alone, neither the noise nor the words, and adds one feature to each block of the
UNet's encoder. Since it sees nothing that changes, it runs once for a whole run.

Several adapters are several controls; their features add up, as in diffusers' MultiAdapter. Deviations from diffusers:
``mask``; the window may also begin late; features that fit no block are an error (the UNet there passes them by).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.backbones.t2i_adapter import check_fit, check_kind, load_t2i_adapter
from controlroom.controls.condition_map import rows_of, storable
from controlroom.controls.run_mask import RunMask, mask_sites, run_mask
from controlroom.controls.side_maps import side_map
from controlroom.controls.side_passes import masked
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import IMAGE
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Residuals
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step


@dataclass
class _Memory:
    """What a run knows of one adapter.

    Attributes:
        net: the network.
        condition: [images, C, H, W].
        mask: where it acts, or None.
        features: of the rows that branches of one kind and size show, for the views of a plan.
        joined: features for the branches of a pass, scaled and masked.
    """

    net: Any
    condition: torch.Tensor
    mask: RunMask | None
    features: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = field(default_factory=dict)
    joined: dict[tuple[tuple[str, ...], int], tuple[torch.Tensor, ...]] = field(default_factory=dict)


class T2IAdapter(Control):
    """Draw along a condition map with a network a twentieth of the UNet's size, which runs once.

    Args:
        model: folder in diffusers' layout, ``.safetensors`` file (diffusers' or the published keys), downloaded hub id,
            name of the theatre, or a loaded `diffusers.T2IAdapter` (used as it is).
        image: condition map as picture (stretched to the size of the run), float tensor ``[C, H, W]`` of that size
            (used as it is), or a `Pose` or OpenPose JSON, which is drawn. A list: one for each prompt. A network that
            reads one channel takes grey pictures.
        scale: factor of the features. 0 is the absence of the control.
        start, end: share of the steps between which it acts; ``end`` is diffusers' ``adapter_conditioning_factor``.
        mask: white where it may act; multiplies the features at each resolution. A picture, a list with one for each
            prompt, or words of the prompt (``"words: red hat"``), which are looked up from the second step on.

    Raises:
        InputError: at the start of a run: a condition or mask that cannot be read or does not fit the images.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["t2i_adapter"] = Field(default="t2i_adapter", kw_only=True)
    model: Any
    image: Any
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None

    @field_validator("image", mode="after")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        return storable(value)

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(claims=(Claim("skip", "add"),), attention=mask_sites(outline, self.mask))

    def prepare(self, run: Run) -> _Memory:
        net, plan, step = self._network(run), run.plan, run.backbone.pixels_per_latent
        factor = int(net.config.downscale_factor)
        for hw in {plan.hw_of(name) for name in plan.branches if run.reaches(self, name)}:
            size = (hw[0] * step, hw[1] * step)
            if size[0] % factor or size[1] % factor:
                raise InputError(
                    f"{self.label}: this adapter needs a height and width that are multiples of {factor}, got "
                    f"{size[0]} x {size[1]}."
                )
            check_fit(net, run.backbone.unet, size, step, self._name)
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        return _Memory(net, side_map(self.image, run, int(net.config.in_channels)), mask)

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.joined.clear()

    def attention(self, call: AttentionCall) -> None:
        """Read where the words of the mask are."""
        mask: RunMask | None = call.step.memory(self).mask
        if mask is not None:
            mask.attention(call)

    def side(self, step: Step) -> tuple[Residuals, ...]:
        memory: _Memory = step.memory(self)
        # Branches of other sizes run in passes of their own.
        groups: dict[tuple[int, int], list[str]] = {}
        for name in step.reached(self):
            groups.setdefault(step.run.plan.hw_of(name), []).append(name)
        return tuple(
            Residuals(tuple(names), intrablock=self._joined(step, memory, tuple(names))) for names in groups.values()
        )

    def _joined(self, step: Step, memory: _Memory, names: tuple[str, ...]) -> tuple[torch.Tensor, ...]:
        """Features for branches of one size, row by row, scaled and masked; the same at every step."""
        run, key = step.run, (names, id(step.run.plan))
        if key not in memory.joined:
            each = [self._features(step, memory, name) for name in names]
            levels = [self.scale * torch.cat(level) for level in zip(*each, strict=True)]
            mask = None if memory.mask is None else memory.mask.rows(names)
            memory.joined[key] = tuple(x.to(run.dtype) for x in masked(levels, mask))
        return memory.joined[key]

    def _features(self, step: Step, memory: _Memory, name: str) -> tuple[torch.Tensor, ...]:
        """Features of what a branch shows; branches that show the same share the only pass of the run."""
        plan = step.run.plan
        viewed = plan.views is not None and plan.branches[name].state == IMAGE
        key = (id(plan), viewed, plan.rows_of(name), plan.hw_of(name))
        if key not in memory.features:
            condition = rows_of(memory.condition, step.run, name)
            # Kept from pass to pass, so no pass's graph may hang on them.
            with torch.no_grad():
                memory.features[key] = tuple(memory.net(condition.to(memory.net.dtype)))
            step.count_side(condition.shape[0])
        return memory.features[key]

    @property
    def _name(self) -> str:
        return str(self.model) if isinstance(self.model, str | os.PathLike) else "given"

    def _network(self, run: Run) -> Any:
        unet, backbone = run.backbone.unet, run.backbone
        if isinstance(self.model, str | os.PathLike):
            path, factor = find_model(self.model, "T2I-Adapter"), backbone.pixels_per_latent
            return keep(backbone, ("t2i_adapter",), path, lambda: load_t2i_adapter(path, unet, factor)).to(run.device)
        check_kind(self.model)
        check_device(self.model, run.device, "T2I-Adapter")
        return self.model
