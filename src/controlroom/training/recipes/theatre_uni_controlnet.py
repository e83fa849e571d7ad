"""The theatre's Uni-ControlNet (Zhao et al., arXiv 2305.16322): its local and its global adapter, each for itself.

The local adapter reads all eight conditions of a scene, the global one the content of the scene's own picture as CLIP
sees it; the UNet is frozen. As published, all conditions of a sample are kept in one of ten, all left out (zeros) in
one of ten, and else each is left out with probability 1/2; the words are left out of every second sample. Deviations:
a narrower extractor of features; the loss is weighted by min(SNR, 5) / SNR (arXiv 2303.09556).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from controlroom.backbones.uni_controlnet import KINDS
from controlroom.core.errors import InputError
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_scenes import EMPTY_SHARE, SceneBatch, Scenes, condition_maps
from controlroom.training.side_networks import DROP_ALL, DROP_EACH, KEEP_ALL
from controlroom.training.uni_adapters import (
    content_features,
    dropped,
    explicit_attention,
    load_into,
    new_adapter,
    only,
    save_part,
)

_FIRST, _WIDTHS = (16, 24, 32, 48), (48, 64, 64, 64)


class TheatreUniControlNet:
    """Recipe: one of the two adapters on single scenes.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of scenes are kept; the UNet's are used if they are as many.
        part: ``local`` or ``global``.
        scenes: number of training scenes.
        kinds: conditions that the local adapter shall know.

    Exported is the folder of that adapter, with the image encoder in that of the global one.

    Raises:
        InputError: no such part or kind.
    """

    name = "theatre_uni_controlnet"

    def __init__(
        self,
        unet_folder: Path,
        vae_folder: Path,
        clip_folder: Path,
        cache_folder: Path,
        part: Literal["local", "global"] = "local",
        scenes: int = 25_600,
        kinds: Sequence[str] = KINDS,
    ) -> None:
        if part not in ("local", "global") or any(kind not in KINDS for kind in kinds) or not kinds:
            raise InputError(f"Expected the part local or global, and kinds of {', '.join(KINDS)}.")
        self.part, self.kinds = part, tuple(kinds)
        self.dataset_size: int | None = scenes
        self.scenes = Scenes(unet_folder, vae_folder, clip_folder, cache_folder, scenes)
        unet, halvings = self.scenes.unet, self.scenes.halvings
        self.encoder: Any = image_encoder_of(clip_folder) if part == "global" else None
        torch.manual_seed(8)
        self.adapter: Any = new_adapter(unet, self.kinds, self.encoder, halvings, _FIRST, _WIDTHS)
        explicit_attention(self.adapter)

    def modules(self) -> dict[str, nn.Module]:
        return {"adapter": self.adapter}

    def frozen(self) -> dict[str, nn.Module]:
        encoder = {} if self.encoder is None else {"image_encoder": self.encoder}
        return {**self.scenes.frozen(), **encoder}

    def fingerprint(self) -> str:
        dropout = (KEEP_ALL, DROP_ALL, DROP_EACH)
        return (
            f"{WORLD_VERSION} part={self.part} kinds={self.kinds} scenes={self.dataset_size} empty={EMPTY_SHARE} "
            f"dropout={dropout}"
        )

    def map(self, scene: Scene) -> Tensor:
        """What the adapter reads of a scene: conditions [3 * kinds, 128, 128], or its picture's feature [width]."""
        if self.encoder is None:
            return condition_maps(scene, self.kinds)
        return content_features(self.encoder, [render(scene)])[0]

    def batch(self, indices: Sequence[int], step: int) -> SceneBatch:
        return self.scenes.batch(indices, step, self.map, "uni_controlnet")

    def predict(self, batch: SceneBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise in the latents, seen with the conditions, or with the content's tokens behind the words."""
        tokens = self.scenes.conditioner(batch.ids)
        if self.part == "global":
            context = torch.cat([tokens, self.adapter(batch.maps)], dim=1)
            return self.scenes.unet(noisy, t, context).sample
        down, mid = self.adapter(noisy, t, tokens, batch.maps)
        unet: Any = self.scenes.unet
        return unet(noisy, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid).sample

    def dropped(self, batch: SceneBatch, rng: StepRandom) -> SceneBatch:
        """Conditions left out as published: their channels are zero."""
        return replace(batch, maps=dropped(batch.maps, rng, 1 if self.part == "global" else len(self.kinds)))

    def loss(self, batch: SceneBatch, step: int, rng: StepRandom) -> Losses:
        objective = self.scenes.objective
        drawn = objective.draw(batch.latents, rng)
        each = objective.errors(self.predict(self.dropped(batch, rng), drawn.latents, drawn.t), drawn)
        return Losses((each * drawn.weight).mean(), {"mse": each.detach().mean()})

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out scenes without words: with everything, with each condition alone, with the UNet alone."""
        scenes, found = self.scenes, {"held_out": self.scenes.held_out(self.predict, self.map)}
        for number, kind in enumerate(self.kinds) if self.part == "local" else ():

            def alone(batch: SceneBatch, noisy: Tensor, t: Tensor, number: int = number) -> Tensor:
                return self.predict(replace(batch, maps=only(batch.maps, number, len(self.kinds))), noisy, t)

            found[f"held_out_{kind}"] = scenes.held_out(alone, self.map)
        return {**found, "unet_alone": scenes.held_out(scenes.alone, self.map)}

    def export(self, folder: Path) -> None:
        save_part(self.adapter, self.encoder, folder)

    def load(self, folder: Path) -> None:
        load_into(self.adapter, folder, self.scenes.unet)
