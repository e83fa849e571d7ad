"""The theatre's InstructPix2Pix (arXiv 2211.09800): learns to follow instructions from before, instruction, after.

The theatre's UNet gets four further input channels, whose weights start at zero, and is tuned whole to denoise the
scene after an instruction from the instruction and the latents of the scene before. Instruction, picture, or both are
left out of a sample in twenty each, as published; the picture's latents are not scaled by the autoencoder's factor.
Deviations: the theatre draws both scenes itself, so they differ in what the instruction asks for and in nothing else
(the paper's are drawn by Prompt-to-Prompt and filtered); the loss is weighted by min(SNR, 5) / SNR.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from controlroom.data.theatre.edits import sample_edit
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Scene
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.instructed import DROPOUT, left_out, widened
from controlroom.training.latent_cache import LatentCache, cache_key
from controlroom.training.objective import min_snr_weight, noised
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_unet import Conditioner, noise_schedule

HELD_OUT_EDITS = 16
# Timesteps at which held-out edits are measured.
_LEVELS = (100, 300, 500, 700)


@dataclass(frozen=True)
class EditBatch:
    """``before`` (unscaled) and ``after`` (scaled) [B, 4, 16, 16]; ``ids`` [B, 77] of the instructions."""

    before: Tensor
    after: Tensor
    ids: Tensor


class TheatreInstructPix2Pix:
    """Recipe: editing by instructions, on triples of the theatre.

    Args:
        unet_folder, vae_folder, clip_folder: the theatre's trained parts.
        cache_folder: where latents of edits are kept.
        edits: number of training triples; two latents each.
    """

    name = "theatre_instruct_pix2pix"

    def __init__(
        self, unet_folder: Path, vae_folder: Path, clip_folder: Path, cache_folder: Path, edits: int = 30_000
    ) -> None:
        self.dataset_size: int | None = edits
        self.vae: Any = AutoencoderKL.from_pretrained(vae_folder).eval().requires_grad_(False)
        self.scale = float(self.vae.config.scaling_factor)
        self.conditioner = Conditioner(clip_folder)
        self.alpha_bar = noise_schedule().alphas_cumprod
        channels = int(self.vae.config.latent_channels)
        self.unet: Any = widened(UNet2DConditionModel.from_pretrained(unet_folder), channels)
        # Explicit softmax attention trains faster than SDPA on a CPU at these sizes.
        self.unet.set_attn_processor(AttnProcessor())
        side = CANVAS // 2 ** (len(self.vae.config.block_out_channels) - 1)
        key = cache_key({"vae": self.vae}, WORLD_VERSION, "edits")
        self.cache = LatentCache(cache_folder, key, 2 * edits, (channels, side, side))
        self.cache.build(self._encode_slots, report=_report)
        self.empty = self.conditioner.ids([""])
        self._held_out: EditBatch | None = None

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def frozen(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.conditioner.encoder, "vae": self.vae}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} edits={self.dataset_size} dropout={DROPOUT}"

    @torch.no_grad()
    def encode(self, scenes: Sequence[Scene]) -> Tensor:
        """Scaled latents (posterior means) of scenes."""
        pixels = to_pixels([render(scene) for scene in scenes]).to(self.vae.device)
        return self.vae.encode(pixels).latent_dist.mean * self.scale

    def _encode_slots(self, slots: Sequence[int]) -> Tensor:
        """Slot 2i is edit i before, slot 2i + 1 after."""
        edits = {index: sample_edit(index) for index in {slot // 2 for slot in slots}}
        return self.encode([edits[s // 2].after if s % 2 else edits[s // 2].before for s in slots])

    def batch(self, indices: Sequence[int], step: int) -> EditBatch:
        before, after = (self.cache.read([2 * index + side for index in indices]) for side in (0, 1))
        instructions = [sample_edit(index).instruction for index in indices]
        return EditBatch(before / self.scale, after, self.conditioner.ids(instructions))

    def predict(self, batch: EditBatch, noisy: Tensor, t: Tensor) -> Tensor:
        """The noise in the scene after, seen with the scene before and the instruction."""
        return self.unet(torch.cat([noisy, batch.before], dim=1), t, self.conditioner(batch.ids)).sample

    def loss(self, batch: EditBatch, step: int, rng: StepRandom) -> Losses:
        no_picture, no_words = left_out(rng)
        before = batch.before.masked_fill(no_picture[:, None, None, None], 0.0)
        ids = torch.where(no_words[:, None], self.empty.to(batch.ids.device), batch.ids)
        noise, t = rng.normal("noise", batch.after.shape[1:]), rng.integers("timestep", 0, 1000)
        each = self._error(replace(batch, before=before, ids=ids), noise, t)
        weighted = each * min_snr_weight(self.alpha_bar.to(t.device)[t])
        return Losses(weighted.mean(), {"mse": each.detach().mean()})

    def _error(self, batch: EditBatch, noise: Tensor, t: Tensor) -> Tensor:
        noisy = noised(batch.after, noise, self.alpha_bar.to(t.device)[t])
        return (self.predict(batch, noisy, t).float() - noise).square().mean(dim=(1, 2, 3))

    def validate(self, step: int) -> dict[str, float]:
        """Error on held-out edits, at four noise levels, with the same noise every time: with all, and without each."""
        if self._held_out is None:
            edits = [sample_edit(index, "held_out") for index in range(HELD_OUT_EDITS)]
            before, after = self.encode([e.before for e in edits]), self.encode([e.after for e in edits])
            ids = self.conditioner.ids([edit.instruction for edit in edits]).to(before.device)
            self._held_out = EditBatch(before / self.scale, after, ids)
        batch = self._held_out
        return {
            "held_out": self._measured(batch),
            "without_picture": self._measured(replace(batch, before=torch.zeros_like(batch.before))),
            "without_words": self._measured(replace(batch, ids=self.empty.to(batch.ids.device).expand_as(batch.ids))),
        }

    @torch.no_grad()
    def _measured(self, batch: EditBatch) -> float:
        errors = []
        for level in _LEVELS:
            noise = torch.randn(batch.after.shape, generator=torch.Generator().manual_seed(level)).to(batch.after)
            errors.append(self._error(batch, noise, torch.full((len(noise),), level, device=noise.device)).mean())
        return float(torch.stack(errors).mean())

    def export(self, folder: Path) -> None:
        self.unet.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.unet.load_state_dict(UNet2DConditionModel.from_pretrained(folder).state_dict())


def _report(done: int, total: int) -> None:
    if done % 6400 < 64:
        print(f"latents of edits: {done} of {total}", flush=True)
