"""The theatre's ControlNets (arXiv 2302.05543): one for each kind of condition, or one for all of them.

A copy of the frozen UNet's encoder learns to read a condition of single scenes, half of the time without words, as
published. The network for all kinds sees one kind a sample; which one stands in one plane for each kind beside the
three of the picture (`with_kind`). Planes, because the words stay those of the UNet, and because diffusers then loads
and runs the network as an ordinary ControlNet of eleven channels. Deviations: a narrower embedding of the condition;
the loss is weighted by min(SNR, 5) / SNR (arXiv 2303.09556).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from controlroom.backbones.controlnet import CONDITION_KINDS, with_kind
from controlroom.core.errors import InputError
from controlroom.data.theatre.captions import training_caption
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Dice, Scene, sample_scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_unet import Conditioner, latents_of_scenes, theatre_objective
from controlroom.training.side_networks import new_controlnet, picture_pixels

MULTI = "multi"
"""In the place of a kind: all of them."""
EMPTY_SHARE = 0.5
"""Samples without words."""
HELD_OUT_SCENES = 16


def condition_pixels(scene: Scene, kind: str) -> Tensor:
    """[3, 128, 128] in [0, 1]: a condition of a scene, as `ControlNet` reads its picture."""
    return picture_pixels(condition(scene, kind, CANVAS).picture)


@dataclass(frozen=True)
class ConditionBatch:
    """``latents`` [B, 4, 16, 16], scaled; ``ids`` [B, 77]; ``condition`` [B, 3 or 11, 128, 128] in [0, 1]."""

    latents: Tensor
    ids: Tensor
    condition: Tensor


class TheatreControlNet:
    """Recipe: conditions of single scenes into the frozen UNet.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of scenes are kept; the UNet's are used if they are as many.
        kind: one of `CONDITION_KINDS`, or `MULTI` for all of them.
        scenes: number of training scenes.

    Raises:
        InputError: no such kind.
    """

    name = "theatre_controlnet"

    def __init__(
        self,
        unet_folder: Path,
        vae_folder: Path,
        clip_folder: Path,
        cache_folder: Path,
        kind: str = MULTI,
        scenes: int = 25_600,
    ) -> None:
        if kind not in (*CONDITION_KINDS, MULTI):
            raise InputError(f"There is no condition {kind!r}. There are: {', '.join((*CONDITION_KINDS, MULTI))}.")
        self.kind = kind
        self.kinds: tuple[str, ...] = CONDITION_KINDS if kind == MULTI else (kind,)
        self.dataset_size: int | None = scenes
        self.vae: Any = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
        self.conditioner = Conditioner(clip_folder)
        self.objective = theatre_objective()
        self.cache = latents_of_scenes(self.vae, cache_folder, scenes)
        self.unet: Any = UNet2DConditionModel.from_pretrained(unet_folder).eval().requires_grad_(False)
        channels = 3 + (len(CONDITION_KINDS) if kind == MULTI else 0)
        self.controlnet: Any = new_controlnet(self.unet, len(self.vae.config.block_out_channels) - 1, channels)
        self.controlnet.requires_grad_(True)
        for net in (self.unet, self.controlnet):
            # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
            net.set_attn_processor(AttnProcessor())
        self._held_out: dict[str, ConditionBatch] = {}

    def modules(self) -> dict[str, nn.Module]:
        return {"controlnet": self.controlnet}

    def frozen(self) -> dict[str, nn.Module]:
        return {"unet": self.unet, "text_encoder": self.conditioner.encoder, "vae": self.vae}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} condition={self.kind} scenes={self.dataset_size} empty={EMPTY_SHARE}"

    def batch(self, indices: Sequence[int], step: int) -> ConditionBatch:
        texts: list[str] = []
        maps: list[Tensor] = []
        for index in indices:
            scene, dice = sample_scene(index), Dice("controlnet", index, step)
            texts.append("" if dice.chance(EMPTY_SHARE) else training_caption(scene, dice))
            maps.append(self.map(scene, dice.pick(self.kinds)))
        return ConditionBatch(self.cache.read(list(indices)), self.conditioner.ids(texts), torch.stack(maps))

    def map(self, scene: Scene, kind: str) -> Tensor:
        """What the network reads of a scene: [3 or 11, 128, 128]."""
        pixels = condition_pixels(scene, kind)
        return with_kind(pixels, kind) if self.kind == MULTI else pixels

    def predict(self, batch: ConditionBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise in the latents, seen with the condition."""
        tokens = self.conditioner(batch.ids)
        down, mid = self.controlnet(noisy, t, tokens, controlnet_cond=batch.condition, return_dict=False)
        return self.unet(
            noisy, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid
        ).sample

    def loss(self, batch: ConditionBatch, step: int, rng: StepRandom) -> Losses:
        drawn = self.objective.draw(batch.latents, rng)
        each = self.objective.errors(self.predict(batch, drawn.latents, drawn.t), drawn)
        return Losses((each * drawn.weight).mean(), {"mse": each.detach().mean()})

    def validate(self, step: int) -> dict[str, float]:
        """Unweighted error on held-out scenes without words, by kind, and that of the frozen UNet alone."""
        found = {f"held_out_{kind}": self._measured(kind) for kind in self.kinds}
        total = sum(found.values()) / len(found)
        by_kind = found if self.kind == MULTI else {}
        return {"held_out": total, **by_kind, "unet_alone": self._measured(self.kinds[0], controlled=False)}

    @torch.no_grad()
    def _measured(self, kind: str, controlled: bool = True) -> float:
        """Mean over four noise levels, with the same noise every time."""
        batch = self._held_out_batch(kind)

        def predict(noisy: Tensor, t: Tensor) -> Tensor:
            if controlled:
                return self.predict(batch, noisy, t)
            return self.unet(noisy, t, self.conditioner(batch.ids)).sample

        return self.objective.held_out(predict, batch.latents)

    def _held_out_batch(self, kind: str) -> ConditionBatch:
        if kind not in self._held_out:
            device = self.controlnet.device
            scenes = [sample_scene(index, "held_out") for index in range(HELD_OUT_SCENES)]
            pixels = to_pixels([render(scene) for scene in scenes]).to(self.vae.device)
            latents = self.vae.encode(pixels).latent_dist.mean * self.vae.config.scaling_factor
            maps = torch.stack([self.map(scene, kind) for scene in scenes])
            ids = self.conditioner.ids([""] * len(scenes))
            self._held_out[kind] = ConditionBatch(latents.to(device), ids, maps.to(device))
        return self._held_out[kind]

    def export(self, folder: Path) -> None:
        self.controlnet.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        """Weights to go on from. Those for one kind serve the network for all: its planes of kinds start at nothing."""
        state = ControlNetModel.from_pretrained(folder).state_dict()
        key = "controlnet_cond_embedding.conv_in.weight"
        missing = self.controlnet.state_dict()[key].shape[1] - state[key].shape[1]
        if self.kind == MULTI and missing == len(CONDITION_KINDS):
            state[key] = nn.functional.pad(state[key], (0, 0, 0, 0, 0, missing))
        self.controlnet.load_state_dict(state)
