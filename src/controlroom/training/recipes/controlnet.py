"""ControlNet (Zhang et al., arXiv 2302.05543) on pictures of one's own: edges, depth, poses, or whatever is given.

A copy of the frozen UNet's encoder learns to read a condition map of each picture, and adds to the UNet through
convolutions that start at zero; half of the samples are without words, as published. Conditions are found by the
project's signals, or read from the files that ``metadata.jsonl`` names (``conditioning_image``).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from controlroom.backbones.controlnet import load_controlnet
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.branch import Condition
from controlroom.core.control import Control, Residuals
from controlroom.core.errors import InputError
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.conditioned_recipe import SideRecipe, SideSettings
from controlroom.training.conditions import ConditionMaps, Row
from controlroom.training.shown import Shown
from controlroom.training.side_networks import PUBLISHED_WIDTHS, new_controlnet


class ControlNetSettings(SideSettings):
    """How a ControlNet is trained. The authors' rate; 15 000 steps of 4 pictures are what diffusers' examples take."""

    loop: ClassVar[dict[str, Any]] = {"total_steps": 15_000, "batch_size": 4, "learning_rate": 1e-5}

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> ControlNetRecipe:
        base, shown, held_out = self.sources(pipe, pictures)
        return ControlNetRecipe(base, shown, self, self.conditions(folder), held_out)


class ControlNetRecipe(SideRecipe[ControlNetSettings]):
    """Recipe: one condition of each picture into the frozen UNet.

    Args:
        base: the model, all of it frozen.
        shown: the pictures.
        settings: see `ControlNetSettings`.
        conditions: of the pictures.
        held_out: pictures that the error is measured on, on the way; None: none.

    Exported is a folder in diffusers' layout, for `cr.ControlNet`.

    Raises:
        InputError: it is to go on from a network for several kinds.
        ModelError: it is to go on from one for another base model.
    """

    name = "controlnet"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: ControlNetSettings,
        conditions: ConditionMaps,
        held_out: Shown | None = None,
    ) -> None:
        start = settings.found("ControlNet")
        with torch.random.fork_rng():
            torch.manual_seed(settings.seed)
            if start is None:
                halvings = base.backbone.pixels_per_latent.bit_length() - 1
                net: Any = new_controlnet(base.unet, halvings, widths=PUBLISHED_WIDTHS)
            else:
                net = load_controlnet(start, base.unet)
        if net.config.conditioning_channels != 3:
            raise InputError(
                f"{settings.start_from} reads {net.config.conditioning_channels} channels: it is for several kinds of "
                "condition. Go on from one for a single kind."
            )
        super().__init__(base, shown, settings, conditions, net, held_out)
        if base.device.type == "cpu":
            from diffusers.models.attention_processor import AttnProcessor

            # Explicit softmax attention trains faster than SDPA on a CPU.
            self.net.set_attn_processor(AttnProcessor())

    def residuals(self, noisy: Tensor, t: Tensor, condition: Condition, maps: Tensor) -> Residuals:
        xl = self.net.config.addition_embed_type is not None
        down, mid = self.net(
            noisy,
            t,
            encoder_hidden_states=condition.tokens.float(),
            controlnet_cond=maps,
            added_cond_kwargs=self.base.backbone.added_conditions(condition) if xl else None,
            return_dict=False,
        )
        return Residuals(("cond",), tuple(down), mid)

    def controls(self, row: Row) -> list[Control]:
        return [ControlNet(self.net, self.maps(self.shown, [row], 0)[0])]

    def export(self, folder: Path) -> None:
        self.net.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.take(load_controlnet(folder, self.base.unet), folder)
