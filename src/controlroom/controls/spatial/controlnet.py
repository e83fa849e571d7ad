"""ControlNet (Zhang et al., "Adding Conditional Control to Text-to-Image Diffusion Models", arXiv 2302.05543).

A trained copy of the UNet's encoder reads the noisy latents, the words and a condition map, and adds its features,
through convolutions that start at zero, to the UNet's skip connections and its middle block.

Several ControlNets are several controls of one run; their residuals add up. Deviations from diffusers: ``mask`` (there
is none there); poses are drawn here; branches that only supply a reference receive nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator

from controlroom.backbones.controlnet import (
    CONDITION_KINDS,
    MULTI_CHANNELS,
    check_controlnet,
    load_controlnet,
    with_kind,
)
from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.controls.condition_map import condition_map, storable
from controlroom.controls.run_mask import RunMask, mask_sites, run_mask
from controlroom.controls.side_passes import SideRows, masked_residuals, shared_passes
from controlroom.controls.word_mask import MaskInput
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import Branch
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline, Residuals
from controlroom.core.errors import InputError, ModelError
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.signals.signal import Kind


@dataclass
class _Memory:
    """What a run knows of one ControlNet.

    Attributes:
        net: the network.
        dtype: its precision; asking the network walks through all its modules.
        rows: of the condition and the mask.
        mask: where it acts, or None.
        guess: only branches with words are controlled, and coarse residuals weigh more.
    """

    net: Any
    dtype: torch.dtype
    rows: SideRows
    mask: RunMask | None
    guess: bool


class ControlNet(Control):
    """Draw along a condition map: a pose, edges, depth, a segmentation, whatever the network was trained on.

    Args:
        model: folder in diffusers' layout, ``.safetensors`` file, downloaded hub id, name of the theatre
            (``theatre/pose``), or a loaded `diffusers.ControlNetModel` (used as it is).
        image: condition map as picture (stretched to the size of the run) or tensor ``[C, H, W]``, whose values are
            used as they are (in another size than the run's, those of the nearest pixels); for a pose net also a
            `Pose` or OpenPose JSON, which is drawn. A list: one for each prompt.
        scale: factor of all residuals. 0 is the absence of the control.
        start, end: share of the steps between which it acts.
        mask: white where it may act; multiplies the residuals at each resolution. A picture, a list with one for each
            prompt, or words of the prompt (``"words: red hat"``), which are looked up from the second step on.
        guess_mode: the branch without words gets no residuals, and residual k of n of the other ones is weighted from
            0.1 (finest) to 1 (coarsest), evenly in the logarithm. For prompts left empty; guidance of 3 to 5.
        kind: what ``image`` is, for networks for several kinds of condition (``theatre/multi``): canny, soft_edge,
            lines, scribble, depth, normal, segmentation or pose. Networks for one kind do not read it. None: they know
            one kind, or ``image`` is a tensor with the planes that say so.

    Raises:
        InputError: at the start of a run: a condition or mask that cannot be read or does not fit the images.
        ModelError: at the start of a run: no such model, or one for another base model.
    """

    by_views: ClassVar[bool] = True
    type: Literal["controlnet"] = Field(default="controlnet", kw_only=True)
    model: Any
    image: Any
    scale: float = 1.0
    start: float = Field(default=0.0, ge=0.0, le=1.0)
    end: float = Field(default=1.0, ge=0.0, le=1.0)
    mask: MaskInput = None
    guess_mode: bool = False
    kind: Kind | None = None

    @field_validator("image", mode="after")
    @classmethod
    def _storable(cls, value: Any) -> Any:
        return storable(value)

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(claims=(Claim("skip", "add"),), attention=mask_sites(outline, self.mask))

    def reaches(self, branch: Branch) -> bool:
        return super().reaches(branch) and not (self.guess_mode and branch.role == "uncond")

    def prepare(self, run: Run) -> _Memory:
        net = self._network(run)
        condition = self._condition(run, int(net.config.conditioning_channels))
        mask = None if self.mask is None else run_mask(self.mask, run, self)
        if mask is not None and net.config.global_pool_conditions:
            raise InputError("This ControlNet pools its condition over the whole picture; leave mask out.")
        guess = self.guess_mode or bool(net.config.global_pool_conditions)
        return _Memory(net, net.dtype, SideRows(condition, mask), mask, guess)

    def _condition(self, run: Run, channels: int) -> torch.Tensor:
        """[images, channels, H, W]: the map, and the planes that say of which kind it is where the network asks."""
        if channels != MULTI_CHANNELS or _has_planes(self.image):
            return condition_map(self.image, run, channels)
        if self.kind is None:
            raise InputError(
                f"{self.label}: this ControlNet reads several kinds of condition. Say which one the image is: kind= "
                f"{', '.join(CONDITION_KINDS)}."
            )
        return with_kind(condition_map(self.image, run), self.kind)

    def _network(self, run: Run) -> Any:
        unet, backbone = run.backbone.unet, run.backbone
        net: Any
        if isinstance(self.model, str | os.PathLike):
            path = find_model(self.model, "ControlNet")
            net = keep(backbone, ("controlnet",), path, lambda: load_controlnet(path, unet)).to(run.device)
        else:
            net = self.model
            if not hasattr(net, "config"):
                raise ModelError(f"A ControlNet cannot be made from a {type(net).__name__}; give a path or a module.")
            check_controlnet(net, unet, "given")
            check_device(net, run.device, "ControlNet")
        halvings = 2 ** (len(net.config.conditioning_embedding_out_channels) - 1)
        if halvings != backbone.pixels_per_latent:
            raise ModelError(
                f"This ControlNet shrinks its condition {halvings} times, this model's latents are "
                f"{backbone.pixels_per_latent} times smaller than its pictures. Use the one for this model."
            )
        return net

    def before(self, step: Step) -> None:
        """A mask by words moves on."""
        memory: _Memory = step.memory(self)
        if memory.mask is not None and memory.mask.update():
            memory.rows.joined.clear()

    def attention(self, call: AttentionCall) -> None:
        """Read where the words of the mask are."""
        mask: RunMask | None = call.step.memory(self).mask
        if mask is not None:
            mask.attention(call)

    def side(self, step: Step) -> tuple[Residuals, ...]:
        memory: _Memory = step.memory(self)
        plan = step.run.plan
        reached = (n for n in step.reached(self) if not (memory.guess and plan.branches[n].role == "uncond"))
        return tuple(self._pass(step, memory, names) for names in shared_passes(step, reached))

    def _pass(self, step: Step, memory: _Memory, names: tuple[str, ...]) -> Residuals:
        """One forward of the ControlNet over some branches."""
        run, given, dtype = step.run, step.inputs(names), memory.dtype
        condition, mask = memory.rows.of(run, names)
        added = run.backbone.added_conditions(given.condition) if memory.net.config.addition_embed_type else None
        down, mid = memory.net(
            given.sample.to(dtype),
            given.timestep,
            encoder_hidden_states=given.condition.tokens.to(dtype),
            controlnet_cond=condition.to(dtype),
            conditioning_scale=self.scale,
            guess_mode=memory.guess,
            added_cond_kwargs=added,
            return_dict=False,
        )
        step.count_side(given.layout.total)
        return masked_residuals(names, (*down, mid), mask, run.dtype)


def _has_planes(source: Any) -> bool:
    """Whether a condition is a tensor (or a list of them) with the planes of its kind."""
    items = source if isinstance(source, list | tuple) else [source]
    return all(isinstance(x, torch.Tensor) and x.ndim >= 3 and x.shape[-3] == MULTI_CHANNELS for x in items)
