"""What a diffusion model is trained on: noised latents, what to predict of them, and how errors count.

Targets follow the scheduler: noise (DDPM, arXiv 2006.11239), v (arXiv 2202.00512) or the sample. Options: min-SNR
weights (arXiv 2303.09556), an offset of the noise by channel (Guttenberg, 2023), a schedule whose end is pure noise
(arXiv 2305.08891), and a mask of what counts. Every random number comes from the loop's `StepRandom`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat
from torch import Tensor

from controlroom.core.errors import InputError, ModelError
from controlroom.training.randomness import StepRandom

Prediction = Literal["epsilon", "v_prediction", "sample"]
Predict = Callable[[Tensor, Tensor], Tensor]
"""Noisy latents [B, C, h, w] and timesteps [B] -> what the network predicts [B, C, h, w]."""


class ObjectiveSettings(BaseModel):
    """How errors of the prediction are made and weighted; the defaults are DDPM's."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prediction: Prediction | None = None
    """What the network predicts; None: as the model's scheduler says."""
    min_snr_gamma: PositiveFloat | None = None
    """Signal-to-noise ratio above which low noise levels count less; 5 is usual. None: all count the same."""
    noise_offset: float = Field(default=0.0, ge=0.0, le=1.0)
    """Share of noise that is the same over the whole picture, so that very dark and bright ones are learned; 0.1."""
    zero_terminal_snr: bool = False
    """Whether the last timestep is noise alone; needs v or sample prediction."""
    first_timestep: int = Field(default=0, ge=0)
    last_timestep: int | None = Field(default=None, ge=0)
    """Timesteps that are drawn, both included; None: up to the schedule's last."""


@dataclass(frozen=True)
class Noised:
    """Latents at drawn noise levels.

    Attributes:
        latents: [B, C, h, w], what the network sees.
        t: [B] timesteps.
        alpha_bar: [B], share of the signal's variance.
        target: [B, C, h, w], what it should predict.
        weight: [B], how much the error of each sample counts.
    """

    latents: Tensor
    t: Tensor
    alpha_bar: Tensor
    target: Tensor
    weight: Tensor


class Objective:
    """The loss of a model with this scheduler.

    Args:
        scheduler: the model's; its ``alphas_cumprod`` and ``prediction_type`` count.
        settings: None: DDPM's.

    Raises:
        InputError: settings that contradict each other or the schedule.
        ModelError: a scheduler without noise levels, or with an unknown prediction type.
    """

    def __init__(self, scheduler: Any, settings: ObjectiveSettings | None = None) -> None:
        self.settings = settings = settings or ObjectiveSettings()
        levels = getattr(scheduler, "alphas_cumprod", None)
        if levels is None:
            raise ModelError(f"{type(scheduler).__name__} has no alphas_cumprod; train with a DDPM or DDIM scheduler.")
        self.alpha_bar: Tensor = levels.detach().float().cpu()
        told = settings.prediction or scheduler.config.get("prediction_type", "epsilon")
        if told not in ("epsilon", "v_prediction", "sample"):
            raise ModelError(f"The scheduler predicts {told!r}; epsilon, v_prediction and sample are known.")
        self.prediction: Prediction = told
        if settings.zero_terminal_snr:
            if told == "epsilon":
                raise InputError(
                    "zero_terminal_snr needs v or sample prediction: at the last timestep noise is all there is, and "
                    'predicting it teaches nothing. Set prediction="v_prediction".'
                )
            self.alpha_bar = without_signal_at_the_end(self.alpha_bar)
        self.last = len(self.alpha_bar) - 1 if settings.last_timestep is None else settings.last_timestep
        if not settings.first_timestep <= self.last < len(self.alpha_bar):
            raise InputError(
                f"Timesteps {settings.first_timestep} to {self.last} are asked for; the schedule has 0 to "
                f"{len(self.alpha_bar) - 1}."
            )

    def draw(self, latents: Tensor, rng: StepRandom, stream: str = "") -> Noised:
        """Noise latents [B, C, h, w] at a drawn timestep each; ``stream`` separates several draws of a step."""
        t = rng.integers(f"{stream}timestep", self.settings.first_timestep, self.last + 1)
        return self.at(latents, t, self.noise(latents, rng, stream))

    def noise(self, latents: Tensor, rng: StepRandom, stream: str = "") -> Tensor:
        """Standard normal noise like the latents, with the offset that the settings ask for."""
        noise = rng.normal(f"{stream}noise", latents.shape[1:])
        if self.settings.noise_offset:
            noise = noise + self.settings.noise_offset * rng.normal(f"{stream}offset", (latents.shape[1], 1, 1))
        return noise

    def at(self, latents: Tensor, t: Tensor, noise: Tensor) -> Noised:
        """Latents with this noise at these timesteps [B]."""
        alpha_bar = self.alpha_bar.to(t.device)[t]
        level = alpha_bar[:, None, None, None]
        if self.prediction == "epsilon":
            target = noise
        elif self.prediction == "sample":
            target = latents
        else:
            target = level.sqrt() * noise - (1.0 - level).sqrt() * latents
        weight = snr_weight(alpha_bar, self.prediction, self.settings.min_snr_gamma)
        return Noised(noised(latents, noise, alpha_bar), t, alpha_bar, target, weight)

    def errors(self, predicted: Tensor, drawn: Noised, mask: Tensor | None = None) -> Tensor:
        """[B]: mean squared error of each sample, unweighted.

        Args:
            predicted: [B, C, h, w].
            drawn: what was predicted from.
            mask: [B, 1, H, W] in [0, 1], what counts; stretched to the latents. Small masks count as much as large.
        """
        square = (predicted.float() - drawn.target.float()).square()
        if mask is None:
            return square.mean(dim=(1, 2, 3))
        seen = F.interpolate(mask.to(square), size=square.shape[-2:], mode="area")
        return (square * seen).sum(dim=(1, 2, 3)) / (seen.sum(dim=(1, 2, 3)) * square.shape[1]).clamp_min(1e-6)

    def loss(self, predict: Predict, latents: Tensor, rng: StepRandom, mask: Tensor | None = None) -> Tensor:
        """[B]: weighted error of each sample. The mean of it is the loss."""
        drawn = self.draw(latents, rng)
        return self.errors(predict(drawn.latents, drawn.t), drawn, mask) * drawn.weight

    @torch.no_grad()
    def held_out(self, predict: Predict, latents: Tensor, mask: Tensor | None = None) -> float:
        """Unweighted error at fixed timesteps, with the same noise every time.

        The timesteps are 100, 300, 500 and 700 of 1000, or the same shares of those that are trained.
        """
        first, errors = self.settings.first_timestep, []
        for tenths in (1, 3, 5, 7):
            level = first + (self.last + 1 - first) * tenths // 10
            noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(level)).to(latents)
            t = torch.full((len(latents),), level, device=latents.device)
            drawn = self.at(latents, t, noise)
            errors.append(self.errors(predict(drawn.latents, drawn.t), drawn, mask).mean())
        return float(torch.stack(errors).mean())


def noised(clean: Tensor, noise: Tensor, alpha_bar: Tensor) -> Tensor:
    """Latents [B, C, h, w] at the noise levels alpha_bar [B]."""
    level = alpha_bar[:, None, None, None]
    return level.sqrt() * clean + (1.0 - level).sqrt() * noise


def snr_weight(alpha_bar: Tensor, prediction: Prediction, gamma: float | None) -> Tensor:
    """[B]: min(SNR, gamma) as the weight of the sample's error, said in what the network predicts; None: 1."""
    if gamma is None:
        return torch.ones_like(alpha_bar)
    # Written with the capped ratio so that nothing divides by the noise or the signal where there is none.
    snr = alpha_bar / (1.0 - alpha_bar).clamp_min(1e-12)
    capped = snr.clamp(max=gamma)
    if prediction == "epsilon":
        return capped / snr.clamp_min(1e-12)
    return capped / (snr + 1.0) if prediction == "v_prediction" else capped


def min_snr_weight(alpha_bar: Tensor, gamma: float = 5.0) -> Tensor:
    """min(SNR, gamma) / SNR for noise prediction, by sample."""
    return snr_weight(alpha_bar, "epsilon", gamma)


def without_signal_at_the_end(alpha_bar: Tensor) -> Tensor:
    """Noise levels [T], shifted and scaled in their square roots so that the last is 0 and the first stays."""
    root = alpha_bar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))).square()
