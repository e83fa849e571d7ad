"""The theatre's T2I-Adapters (Mou et al., arXiv 2302.08453): one for each kind of condition.

A small network of its own, which reads neither noise nor words, learns to add one feature to each block of the frozen
UNet's encoder. Timesteps are drawn as published, t = (1 - u^3) T with u uniform: layout is decided early, where the
noise is strong. Deviation: half of the samples are without words, so that the adapter also acts where there are none.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import T2IAdapter
from torch import Tensor, nn

from controlroom.core.errors import InputError
from controlroom.data.theatre.conditions import KINDS
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_scenes import EMPTY_SHARE, SceneBatch, Scenes, condition_maps
from controlroom.training.side_networks import cubic_timesteps, new_t2i_adapter


class TheatreT2IAdapter:
    """Recipe: one kind of condition of single scenes into the frozen UNet, through an adapter.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of scenes are kept; the UNet's are used if they are as many.
        kind: one of `KINDS`.
        scenes: number of training scenes.

    Raises:
        InputError: no such kind.
    """

    name = "theatre_t2i_adapter"

    def __init__(
        self,
        unet_folder: Path,
        vae_folder: Path,
        clip_folder: Path,
        cache_folder: Path,
        kind: str = "pose",
        scenes: int = 25_600,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"There is no condition {kind!r}. There are: {', '.join(KINDS)}.")
        self.kind = kind
        self.dataset_size: int | None = scenes
        self.scenes = Scenes(unet_folder, vae_folder, clip_folder, cache_folder, scenes)
        torch.manual_seed(7)
        self.adapter: Any = new_t2i_adapter(self.scenes.unet, self.scenes.halvings)

    def modules(self) -> dict[str, nn.Module]:
        return {"adapter": self.adapter}

    def frozen(self) -> dict[str, nn.Module]:
        return self.scenes.frozen()

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} condition={self.kind} scenes={self.dataset_size} empty={EMPTY_SHARE} cubic"

    def map(self, scene: Scene) -> Tensor:
        """[3, 128, 128]: what the adapter reads of a scene."""
        return condition_maps(scene, (self.kind,))

    def batch(self, indices: Sequence[int], step: int) -> SceneBatch:
        return self.scenes.batch(indices, step, self.map, "t2i_adapter")

    def predict(self, batch: SceneBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise in the latents, seen with the condition."""
        features = list(self.adapter(batch.maps))
        tokens = self.scenes.conditioner(batch.ids)
        return self.scenes.unet(noisy, t, tokens, down_intrablock_additional_residuals=features).sample

    def loss(self, batch: SceneBatch, step: int, rng: StepRandom) -> Losses:
        noise, t = rng.normal("noise", batch.latents.shape[1:]), cubic_timesteps(rng.uniform("timestep"))
        error = self.scenes.error(batch, noise, t, self.predict).mean()
        return Losses(error, {"mse": error.detach()})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out scenes without words, with their conditions and with the frozen UNet alone."""
        scenes = self.scenes
        return {
            "held_out": scenes.held_out(self.predict, self.map),
            "unet_alone": scenes.held_out(scenes.alone, self.map),
        }

    def export(self, folder: Path) -> None:
        self.adapter.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.adapter.load_state_dict(T2IAdapter.from_pretrained(folder).state_dict())
