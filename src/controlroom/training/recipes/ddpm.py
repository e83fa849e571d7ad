"""DDPM (Ho et al., arXiv 2006.11239): a network of its own learns to draw what a folder of pictures shows.

The smallest example of diffusion: a UNet with random weights learns the noise in pixels, from pictures without words.
The defaults are the published ones for CIFAR10 (32 pixels, 36 million parameters). Deviation: the published runs
mirror half of the pictures; here that is a setting, off by default.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from diffusers import DDPMScheduler, UNet2DModel
from PIL import Image
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from controlroom.core.errors import ModelError
from controlroom.data.pictures import Picture
from controlroom.sampling.ddpm import DDPM
from controlroom.training.held_out import mean_over, spread_over
from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recipe_settings import ValidatedSettings, check_levels
from controlroom.training.shown_pixels import ShownPixels

if TYPE_CHECKING:
    from controlroom.sampling.pipeline import Pipeline

_PREVIEWS = 4


class DDPMSettings(ValidatedSettings):
    """How large the network is, and what its noise schedule."""

    needs_model: ClassVar[bool] = False
    loop: ClassVar[dict[str, Any]] = {
        "total_steps": 800_000,
        "batch_size": 128,
        "learning_rate": 2e-4,
        "warmup_steps": 5000,
        "weight_decay": 0.0,
        "ema_decay": 0.9999,
    }

    size: PositiveInt | tuple[PositiveInt, PositiveInt] | None = 32
    channels: tuple[PositiveInt, ...] = Field(default=(128, 256, 256, 256), min_length=1)
    """Of each level; each has half the side of the one before."""
    layers: PositiveInt = 2
    """Residual blocks of a level."""
    attention: tuple[PositiveInt, ...] = (16,)
    """Levels of these (shorter) sides also have self-attention."""
    norm_groups: PositiveInt = 32
    dropout: float = Field(default=0.1, ge=0.0, lt=1.0)
    timesteps: PositiveInt = 1000
    schedule: Literal["linear", "squaredcos_cap_v2"] = "linear"
    """Noise of the steps: linear from 1e-4 to 0.02, or the cosine one (arXiv 2102.09672)."""
    variance: Literal["fixed_small", "fixed_large"] = "fixed_large"
    """Of the steps back, when it draws: the posterior's, or that of the step forth."""
    flip: bool = False
    """Also show each picture mirrored."""
    seed: int = Field(default=0, ge=0)
    """Of the weights that it starts from."""

    def build(self, pipe: Pipeline | None, pictures: Sequence[Picture], folder: Path) -> DDPMRecipe:
        learned, held_out = self.sides(pictures)
        return DDPMRecipe(learned, self, held_out)

    def network(self) -> UNet2DModel:
        """The UNet, with random weights that depend on ``seed`` alone.

        Raises:
            InputError: sides that cannot be halved as often, or channels that do not fit the groups.
        """
        height, width = self.hw or (32, 32)
        check_levels(self.channels, self.norm_groups, (height, width))
        attends = [min(height, width) // 2**i in self.attention for i in range(len(self.channels))]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return UNet2DModel(
                sample_size=height if height == width else (height, width),
                block_out_channels=self.channels,
                layers_per_block=self.layers,
                down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
                up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
                norm_num_groups=self.norm_groups,
                dropout=self.dropout,
                # As the published networks: one head, sines before cosines, padding on one side.
                attention_head_dim=None,
                flip_sin_to_cos=False,
                freq_shift=1,
                downsample_padding=0,
                norm_eps=1e-6,
            )

    def scheduler(self, **more: Any) -> DDPMScheduler:
        """The noise schedule."""
        return DDPMScheduler(
            num_train_timesteps=self.timesteps,
            beta_schedule=self.schedule,
            variance_type=self.variance,
            prediction_type=self.objective.prediction or "epsilon",
            **more,
        )


class DDPMRecipe:
    """Recipe: a network of pixels, from nothing.

    Args:
        pictures: cropped around their centre to the size of the settings; words and masks are not used.
        settings: see `DDPMSettings`.
        held_out: other pictures, for the error on the way.

    Exported is a folder of diffusers' ``DDPMPipeline``: ``model_index.json``, ``unet`` and ``scheduler``.

    Raises:
        InputError: no picture, one that cannot be read, or settings that do not fit each other.
    """

    name = "ddpm"

    def __init__(self, pictures: Sequence[Picture], settings: DDPMSettings, held_out: Sequence[Picture] = ()) -> None:
        self.settings = settings
        self.shown = ShownPixels(pictures, settings.hw or (32, 32), settings.flip)
        few = spread_over(held_out, settings.validation_pictures)
        self._held_out = ShownPixels(few, self.shown.size).parts() if few else []
        self.unet: Any = settings.network()
        self.dataset_size: int | None = len(self.shown)
        self.objective = Objective(settings.scheduler(), settings.objective)

    def modules(self) -> dict[str, nn.Module]:
        return {"unet": self.unet}

    def frozen(self) -> dict[str, nn.Module]:
        return {}

    def fingerprint(self) -> str:
        return f"{self.shown.fingerprint()} {self.settings.fingerprint()}"

    def names(self, indices: Sequence[int]) -> tuple[str, ...]:
        """Names of pictures, for messages."""
        return self.shown.names(indices)

    def batch(self, indices: Sequence[int], step: int) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1]."""
        return self.shown.batch(indices)

    def predict(self, noisy: Tensor, t: Tensor) -> Tensor:
        """What the network says of noisy pictures at timesteps [B]."""
        return self.unet(noisy, t).sample

    def loss(self, batch: Tensor, step: int, rng: StepRandom) -> Losses:
        return Losses(self.objective.loss(self.predict, batch, rng).mean())

    @property
    def has_held_out(self) -> bool:
        """Whether there are pictures to measure on."""
        return bool(self._held_out)

    def validate(self, step: int) -> dict[str, float]:
        """Error on the held-out pictures, at fixed timesteps with the same noise every time."""
        parts = (part.to(self.unet.device) for part in self._held_out)
        return mean_over((len(part), {"held_out": self.objective.held_out(self.predict, part)}) for part in parts)

    def model(self) -> DDPM:
        """The network with its schedule, to draw with."""
        ends_in_noise = self.settings.objective.zero_terminal_snr
        return DDPM(self.unet, self.settings.scheduler(rescale_betas_zero_snr=ends_in_noise))

    def preview(self, step: int) -> list[tuple[str, Image.Image]]:
        """A few pictures, always from the same noise."""
        return [(f"seed-{i}", one) for i, one in enumerate(self.model()(_PREVIEWS, solver="ddim"))]

    def export(self, folder: Path) -> None:
        self.model().save(folder)

    def load(self, folder: Path) -> None:
        weights = DDPM.from_pretrained(folder).unet.state_dict()
        if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in self.unet.state_dict().items()}:
            raise ModelError(f"{str(folder)!r} holds a network of another size than the settings say.")
        self.unet.load_state_dict(weights)
