"""The theatre's depth model: five input channels, as Stable Diffusion 2's (arXiv 2112.10752).

The theatre's UNet gets one further channel (`theatre_channels`): the true depth of the scene, brought to the latents'
size and to -1 to 1 exactly as `DepthToImage` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from controlroom.controls.spatial.depth_to_image import depth_channel
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.scene import Scene, sample_scene
from controlroom.training.recipes.theatre_channels import ChannelRecipe


class TheatreDepth2Img(ChannelRecipe):
    """Recipe: the scene out of its words and its depth."""

    name = "theatre_depth2img"

    def __init__(
        self, unet_folder: Path, vae_folder: Path, clip_folder: Path, cache_folder: Path, scenes: int = 25_600
    ) -> None:
        super().__init__(unet_folder, vae_folder, clip_folder, cache_folder, scenes, channels=1)

    def channels(self, indices: Sequence[int]) -> Tensor:
        return self.channels_of([sample_scene(index) for index in indices])

    def channels_of(self, scenes: Sequence[Scene]) -> Tensor:
        depths = torch.stack([torch.tensor(condition(scene, "depth").values)[None] for scene in scenes])
        height, width = self.cache.shape[-2:]
        return depth_channel(depths.float(), (height, width))
