"""The theatre's autoencoder: pictures of 128 x 128 to latents of 16 x 16 x 4 (latent diffusion, arXiv 2112.10752).

Reconstruction (squared and absolute error) plus a light KL term. Deviations: no adversarial term, since flat paper
needs none; errors on heads and garments count more, because mouths and dots are a thousandth of the picture and
everything that is judged later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import CANVAS, Mix, sample_scene
from controlroom.data.theatre.truth import maps
from controlroom.data.theatre.vocabulary import WORLD_VERSION
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses

#: What the autoencoder practises on: every style and view often, garments on white and faces too.
AUTOENCODER_MIX = Mix(
    kinds={
        "puppet": 0.5,
        "portrait": 0.1,
        "puppet_and_prop": 0.12,
        "two_puppets": 0.1,
        "prop": 0.03,
        "two_props": 0.08,
        "three": 0.03,
        "flat_lay": 0.04,
    },
    styles={"flat": 0.72, "sketch": 0.08, "watercolour": 0.08, "pixel": 0.04, "neon": 0.08},
    views={"front": 0.76, "side": 0.1, "back": 0.08, "above": 0.06},
)


@dataclass(frozen=True)
class PictureBatch:
    """``pixels`` [B, 3, 128, 128] in [-1, 1]; ``weight`` [B, 1, 128, 128], how much an error there counts."""

    pixels: Tensor
    weight: Tensor


def new_autoencoder() -> AutoencoderKL:
    """The theatre's autoencoder with fresh weights: 0.94 M parameters, fully convolutional."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,  # type: ignore[arg-type]
        up_block_types=("UpDecoderBlock2D",) * 4,  # type: ignore[arg-type]
        block_out_channels=(16, 32, 64, 64),  # type: ignore[arg-type]
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,  # more groups than this normalise colour away at 16 channels
        sample_size=CANVAS,
        mid_block_add_attention=False,
    )


def to_pixels(pictures: Sequence[object]) -> Tensor:
    """PIL pictures of one size to [B, 3, h, w] in [-1, 1]."""
    stacked = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


class TheatreAutoencoder:
    """Recipe: trains `AutoencoderKL` on endless train scenes."""

    name = "theatre_autoencoder"

    def __init__(self, kl_weight: float = 2e-5, absolute_weight: float = 0.1) -> None:
        torch.manual_seed(0)
        self.vae: Any = new_autoencoder()
        self.kl_weight, self.absolute_weight = kl_weight, absolute_weight

    def modules(self) -> dict[str, nn.Module]:
        return {"vae": self.vae}

    def frozen(self) -> dict[str, nn.Module]:
        return {}

    def fingerprint(self) -> str:
        return f"{WORLD_VERSION} kl={self.kl_weight} absolute={self.absolute_weight}"

    def batch(self, indices: Sequence[int], step: int) -> PictureBatch:
        scenes = [sample_scene(index, "train", AUTOENCODER_MIX) for index in indices]
        parts = torch.from_numpy(np.stack([maps(scene).part for scene in scenes])).unsqueeze(1)
        weight = torch.ones(parts.shape)
        weight[parts >= int(Part.HAIR)] = 2.0
        weight[parts == int(Part.HEAD)] = 3.0
        return PictureBatch(to_pixels([render(scene) for scene in scenes]), weight)

    def loss(self, batch: PictureBatch, step: int, rng: StepRandom) -> Losses:
        posterior = self.vae.encode(batch.pixels).latent_dist
        noise = rng.normal("posterior", posterior.mean.shape[1:])
        mean, spread = posterior.mean.float(), posterior.std.float()
        restored = self.vae.decode((mean + spread * noise).to(posterior.mean.dtype)).sample.float()
        error = restored - batch.pixels
        squared = error.square()
        weighted = (squared * batch.weight).mean()
        absolute = (error.abs() * batch.weight).mean()
        kl = 0.5 * (mean.square() + spread.square() - 1.0 - posterior.logvar.float()).mean()
        total = weighted + self.absolute_weight * absolute + self.kl_weight * kl
        psnr = -10.0 * torch.log10(squared.detach().mean() / 4.0)
        return Losses(total, {"psnr": psnr, "kl": kl.detach(), "absolute": absolute.detach()})

    def export(self, folder: Path) -> None:
        """Writes the diffusers folder, with the scaling factor that gives latents unit variance."""
        scenes = [sample_scene(index, "held_out") for index in range(64)]
        with torch.no_grad():
            latents = self.vae.encode(to_pixels([render(scene) for scene in scenes])).latent_dist.mean.float()
        self.vae.register_to_config(scaling_factor=round(1.0 / float(latents.std()), 5))
        self.vae.save_pretrained(folder)

    def load(self, folder: Path) -> None:
        self.vae.load_state_dict(AutoencoderKL.from_pretrained(folder).state_dict())

    def validate(self, step: int) -> dict[str, float]:
        """PSNR in dB over 64 held-out scenes of the default mix, from the posterior's mean."""
        pixels = to_pixels([render(sample_scene(index, "held_out")) for index in range(64)])
        restored = self.vae.decode(self.vae.encode(pixels).latent_dist.mean).sample.float().clamp(-1, 1)
        each = (restored - pixels).square().mean(dim=(1, 2, 3)) / 4.0
        return {"psnr": float((-10.0 * torch.log10(each)).mean())}
