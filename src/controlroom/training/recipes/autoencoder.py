"""The autoencoder of latent diffusion (Rombach et al., arXiv 2112.10752), from nothing, on a folder of pictures.

Pictures to a small grid of latents and back: absolute and perceptual error, scaled by a learned variance, a very light
KL term, and, after some steps, a patch discriminator (arXiv 1611.07004) whose say is brought to that of the
reconstruction by the ratio of both gradients at the last layer (arXiv 2012.09841). Defaults are the published ones.
Deviations: one optimizer moves both networks in one step, each by its own loss (the published code has two optimizers
that take turns); the perceptual features are the user's LPIPS or the theatre's reader, and none by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from diffusers import AutoencoderKL
from PIL import Image
from pydantic import Field, PositiveInt
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.backbones.patch_discriminator import PatchDiscriminator
from controlroom.core.errors import InputError, ModelError
from controlroom.core.files import atomic_path
from controlroom.data.pictures import Picture
from controlroom.training.held_out import spread_over
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Distance, Losses
from controlroom.training.recipe_settings import ValidatedSettings, check_levels
from controlroom.training.shown_pixels import ShownPixels

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

CRITIC = "discriminator.safetensors"
_WATCHED = 16
"""Pictures of the set whose reconstruction is measured where none are held out."""


class AutoencoderSettings(ValidatedSettings):
    """How large the network is, and what counts."""

    needs_model: ClassVar[bool] = False
    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 250_000,
        "batch_size": 12,
        "learning_rate": 5.4e-5,  # 4.5e-6 for each picture of the batch
        "betas": (0.5, 0.9),
        "weight_decay": 0.0,
        "clip_grad_norm": None,
    }

    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = 256
    channels: tuple[PositiveInt, ...] = Field(default=(128, 256, 512, 512), min_length=1)
    """Of each level; each has half the side of the one before, so that four give latents of an eighth."""
    layers: PositiveInt = 2
    latent_channels: PositiveInt = 4
    norm_groups: PositiveInt = 32
    mid_attention: bool = True
    kl_weight: float = Field(default=1e-6, ge=0.0)
    """Of the KL term, summed over a picture's latents, beside errors summed over its pixels."""
    perceptual: str | None = None
    """``theatre``, or ``lpips-vgg=TRUNK.pth,HEADS.pth`` (also lpips-alex, lpips-squeeze); None: pixels alone."""
    perceptual_weight: float = Field(default=1.0, ge=0.0)
    adversarial_weight: float = Field(default=0.5, ge=0.0)
    """Of the discriminator's say; 0: none."""
    adversarial_from: int = Field(default=50_001, ge=0)
    """Step from which it has one."""
    patch_channels: PositiveInt = 64
    patch_layers: PositiveInt = 3
    flip: bool = False
    """Also show each picture mirrored."""
    seed: int = Field(default=0, ge=0)
    """Of the weights that it starts from."""

    def build(self, pipe: Pipeline | None, pictures: Sequence[Picture], folder: Path) -> AutoencoderRecipe:
        learned, held_out = self.sides(pictures)
        return AutoencoderRecipe(learned, self, held_out)

    def networks(self) -> tuple[AutoencoderKL, PatchDiscriminator]:
        """Autoencoder and discriminator, with random weights that depend on ``seed`` alone.

        Raises:
            InputError: sides that cannot be halved as often, or channels that do not fit the groups.
        """
        height, width = self.hw or (256, 256)
        check_levels(self.channels, self.norm_groups, (height, width))
        levels = len(self.channels)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * levels,  # type: ignore[arg-type]
                up_block_types=("UpDecoderBlock2D",) * levels,  # type: ignore[arg-type]
                block_out_channels=self.channels,  # type: ignore[arg-type]
                layers_per_block=self.layers,
                latent_channels=self.latent_channels,
                norm_num_groups=self.norm_groups,
                sample_size=max(height, width),
                mid_block_add_attention=self.mid_attention,
            )
            return vae, PatchDiscriminator(self.patch_channels, self.patch_layers)


class _Spread(nn.Module):
    """The learned variance of a pixel's error, as in the published loss."""

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))


class AutoencoderRecipe:
    """Recipe: `AutoencoderKL` with a patch discriminator.

    Args:
        pictures: cropped around their centre to the size of the settings; words and masks are not used.
        settings: see `AutoencoderSettings`.
        held_out: other pictures, whose reconstruction is measured on the way; none: the set's own first ones.

    Exported are diffusers' folder of the autoencoder, with the scaling factor that gives these pictures' latents unit
    variance, and in it ``discriminator.safetensors``, which only a later training reads.

    Raises:
        InputError: no picture, one that cannot be read, or settings that do not fit each other.
    """

    name = "autoencoder"

    def __init__(
        self, pictures: Sequence[Picture], settings: AutoencoderSettings, held_out: Sequence[Picture] = ()
    ) -> None:
        self.settings = settings
        self.shown = ShownPixels(pictures, settings.hw or (256, 256), settings.flip)
        few = spread_over(held_out, settings.validation_pictures) or self.shown.pictures[:_WATCHED]
        self._watched = torch.cat(ShownPixels(few, self.shown.size).parts())
        self.dataset_size: int | None = len(self.shown)
        vae, self.critic = settings.networks()
        self.vae: Any = vae
        self.distance: Distance | None = None
        self.spread = _Spread()

    def modules(self) -> dict[str, nn.Module]:
        found: dict[str, nn.Module] = {"vae": self.vae, "spread": self.spread}
        return {**found, "discriminator": self.critic} if self.settings.adversarial_weight else found

    def frozen(self) -> dict[str, nn.Module]:
        reader = getattr(self.distance, "reader", self.distance)
        return {"perceptual": reader} if isinstance(reader, nn.Module) else {}

    def fingerprint(self) -> str:
        seen = "" if self.distance is None else f" {self.distance.name}@{self.distance.hash}"
        return f"{self.shown.fingerprint()}{seen} {self.settings.fingerprint()}"

    @property
    def perceptual(self) -> str | None:
        """The distance that is asked for."""
        return self.settings.perceptual if self.settings.perceptual_weight else None

    def see_with(self, distance: Distance) -> None:
        """Take the perceptual distance, before the training begins."""
        self.distance = distance

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.names(indices)

    def batch(self, indices: Sequence[int], step: int) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]."""
        return self.shown.batch(indices)

    def likeness(self, restored: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Absolute and perceptual error of each picture [B]."""
        absolute = (restored - pixels).abs().mean(dim=(1, 2, 3))
        if self.distance is None:
            return absolute, torch.zeros_like(absolute)
        return absolute, self.distance.distance(restored.clamp(-1, 1) / 2 + 0.5, pixels / 2 + 0.5).float()

    def loss(self, batch: Tensor, step: int, rng: StepRandom) -> Losses:
        if self.perceptual is not None and self.distance is None:
            raise InputError(f"{self.perceptual!r} was not given: call see_with before the training.")
        posterior = self.vae.encode(batch).latent_dist
        noise = rng.normal("posterior", posterior.mean.shape[1:])
        mean, deviation = posterior.mean.float(), posterior.std.float()
        restored = self.vae.decode((mean + deviation * noise).to(posterior.mean.dtype)).sample.float()
        absolute, perceptual = self.likeness(restored, batch)
        values, log_variance = batch[0].numel(), self.spread.log_variance
        error = (absolute + self.settings.perceptual_weight * perceptual).mean() * values
        likelihood = error / log_variance.exp() + values * log_variance
        kl = 0.5 * (mean.square() + deviation.square() - 1.0 - posterior.logvar.float()).flatten(1).sum(1).mean()
        total = likelihood + self.settings.kl_weight * kl
        parts = {"absolute": absolute.mean(), "perceptual": perceptual.mean(), "kl": kl}
        if self.settings.adversarial_weight and step >= self.settings.adversarial_from:
            made = -self.critic.fooled(restored)
            weight = self.settings.adversarial_weight * self.balance(likelihood, made)
            judged = self.critic.hinge(batch, restored)
            total = total + weight * made + judged
            parts |= {"made": made, "judged": judged, "adversarial_weight": weight}
        return Losses(total, {name: value.detach() for name, value in parts.items()})

    def balance(self, likelihood: Tensor, made: Tensor) -> Tensor:
        """How much larger the gradient of the reconstruction is at the decoder's last layer; at most 1e4."""
        last = self.vae.decoder.conv_out.weight
        if not likelihood.requires_grad:  # a validation
            return torch.zeros(())
        first, second = (torch.autograd.grad(part, last, retain_graph=True)[0].norm() for part in (likelihood, made))
        return (first / (second + 1e-4)).clamp(0.0, 1e4).detach()

    @torch.no_grad()
    def restored(self, count: int) -> tuple[Tensor, Tensor]:
        """The first pictures that are watched, and what comes back of them from the posterior's mean; in [-1, 1]."""
        pixels = self._watched[:count].to(self.vae.device)
        back = [self.vae.decode(self.vae.encode(row[None]).latent_dist.mean).sample.float() for row in pixels]
        return pixels, torch.cat(back).clamp(-1, 1)

    def validate(self, step: int) -> dict[str, float]:
        """PSNR in dB of the held-out pictures, or of the set's first ones."""
        pixels, back = self.restored(len(self._watched))
        each = (back - pixels).square().mean(dim=(1, 2, 3)) / 4.0
        return {"psnr": float((-10.0 * torch.log10(each.clamp_min(1e-10))).mean())}

    def preview(self, step: int) -> list[tuple[str, Image.Image]]:
        """Four pictures, each beside what comes back of it."""
        pixels, back = self.restored(4)
        pairs = ((torch.cat([pixels, back], dim=3) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [(f"picture-{number}", Image.fromarray(pair)) for number, pair in enumerate(pairs)]

    def export(self, folder: Path) -> None:
        """Write the autoencoder with its scaling factor, and the discriminator."""
        pixels = self.shown.batch(range(min(64, len(self.shown.pictures)))).to(self.vae.device)
        with torch.no_grad():
            latents = torch.cat([self.vae.encode(row[None]).latent_dist.mean.float() for row in pixels])
        self.vae.register_to_config(scaling_factor=round(1.0 / max(float(latents.std()), 1e-6), 5))
        self.vae.save_pretrained(folder)
        tensors = {**self.critic.state_dict(), "log_variance": self.spread.log_variance.detach()}
        with atomic_path(folder / CRITIC) as beside:
            save_file({key: value.contiguous().clone() for key, value in tensors.items()}, str(beside))

    def load(self, folder: Path) -> None:
        found = AutoencoderKL.from_pretrained(folder).state_dict()
        if {k: v.shape for k, v in found.items()} != {k: v.shape for k, v in self.vae.state_dict().items()}:
            raise ModelError(f"{str(folder)!r} holds an autoencoder of another size than the settings say.")
        self.vae.load_state_dict(found)
        if (folder / CRITIC).is_file():
            stored = load_file(str(folder / CRITIC))
            with torch.no_grad():
                self.spread.log_variance.copy_(stored.pop("log_variance"))
            self.critic.load_state_dict(stored)
