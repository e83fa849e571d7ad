"""Depth to image by a UNet of five channels, as Stable Diffusion 2's (arXiv 2112.10752), on pictures of one's own.

Beside the noisy latents stands the depth of the picture, brought to the latents' size and to -1 to 1 exactly as
`DepthToImage` does. It is found by a signal, or read from the files that ``metadata.jsonl`` names. Deviation: depths
are kept in eight bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from controlroom.backbones.lora_names import UNET
from controlroom.controls.spatial.depth_to_image import DepthToImage, depth_channel
from controlroom.core.control import Control
from controlroom.data.pictures import Picture
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.base_model import BaseModel
from controlroom.training.conditioned_channels import ChannelRecipe, ChannelSettings
from controlroom.training.conditions import ConditionMaps, Row, pixels_shown
from controlroom.training.shown import Shown

# Of red, green and blue in a picture's brightness, as PIL has it.
_BRIGHTNESS = (0.299, 0.587, 0.114)


class Depth2ImgSettings(ChannelSettings):
    """How a model learns to draw over a depth."""

    signal_model: str | None = None
    """Folder of a depth network, or ``theatre``; not needed where every picture has a ``conditioning_image``."""

    def build(self, pipe: Pipeline, pictures: Sequence[Picture], folder: Path | None) -> Depth2ImgRecipe:
        base, shown, held_out = self.sources(pipe, pictures, (UNET,))
        return Depth2ImgRecipe(base, shown, self, ConditionMaps(folder, "depth", self.signal_model), held_out)


class Depth2ImgRecipe(ChannelRecipe[Depth2ImgSettings]):
    """Recipe: pictures out of their words and their depth. Exported is ``unet`` for `cr.DepthToImage`.

    Args:
        base: the model, whose UNet trains; it gets one further channel here.
        shown: the pictures.
        settings: see `Depth2ImgSettings`.
        depths: of the pictures.
        held_out: pictures that the error is measured on, on the way; None: none.

    Raises:
        InputError: no depths of the pictures; see `ConditionMaps.fill`.
        ModelError: the UNet reads more than latents already.
    """

    name = "depth2img"

    def __init__(
        self,
        base: BaseModel,
        shown: Shown,
        settings: Depth2ImgSettings,
        depths: ConditionMaps,
        held_out: Shown | None = None,
    ) -> None:
        super().__init__(base, shown, settings, 1, held_out)
        self.depths = depths.fill(shown)
        if held_out is not None:
            depths.fill(held_out)

    def depth(self, shown: Shown, rows: Sequence[Row]) -> Tensor:
        """[B, 1, H, W]: near is large."""
        found = self.depths.rows(shown, rows)
        return (found * found.new_tensor(_BRIGHTNESS)[:, None, None]).sum(dim=1, keepdim=True)

    def maps(self, shown: Shown, rows: Sequence[Row], step: int) -> Tensor:
        depth, scale = self.depth(shown, rows), self.base.backbone.pixels_per_latent
        return depth_channel(depth, (depth.shape[-2] // scale, depth.shape[-1] // scale))

    def controls(self, row: Row) -> list[Control]:
        return [DepthToImage(pixels_shown(self.shown, row), self.depth(self.shown, [row])[0], strength=1.0)]
