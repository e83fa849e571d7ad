"""DDPM (Ho et al., arXiv 2006.11239) in pixels: a network that predicts noise, and the two ways to draw with it.

A picture is noised in small steps, x_t = √ᾱ_t x_0 + √(1 − ᾱ_t) ε; the network tells ε, and the chain is walked back:
by drawing from each posterior (ancestral sampling), or by the same marginals without new noise in fewer steps (DDIM,
arXiv 2010.02502). The smallest example of what everything else here controls: no words, no autoencoder.
"""

from __future__ import annotations

import os
from typing import Any, Literal, Self

import torch
from PIL import Image
from torch import Tensor

from controlroom.backbones.loading import find_model
from controlroom.core.errors import InputError, ModelError
from controlroom.core.random import draw
from controlroom.sampling.solver import make_scheduler, step_arguments

Solver = Literal["ddpm", "ddim"]


class DDPM:
    """A network of pixels with its noise schedule.

    Args:
        unet: diffusers' ``UNet2DModel``, or anything called as it is; its pictures are in [-1, 1].
        scheduler: diffusers' ``DDPMScheduler``.
    """

    def __init__(self, unet: Any, scheduler: Any) -> None:
        self.unet, self.scheduler = unet, scheduler

    @classmethod
    def from_pretrained(cls, model: str | os.PathLike[str]) -> Self:
        """Load a folder (or a downloaded hub id) of diffusers' ``DDPMPipeline``: ``unet/`` and ``scheduler/``.

        Raises:
            ModelError: there is none, it is not whole, or it is another kind of model.
        """
        from diffusers import DDPMScheduler, UNet2DModel

        folder = find_model(model, "DDPM")
        try:
            unet: Any = UNet2DModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
            scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{str(folder)!r} does not hold a DDPM (unet/ and scheduler/ in diffusers' layout): {reason}"
            ) from error
        return cls(unet.eval(), scheduler)

    def to(self, device: torch.device | str) -> Self:
        """Move the network."""
        self.unet.to(device)
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of its pictures."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return int(self.unet.config.in_channels), int(height), int(width)

    @torch.no_grad()
    def pixels(
        self,
        count: int = 1,
        *,
        seed: int = 0,
        steps: int | None = None,
        solver: Solver = "ddpm",
        eta: float = 0.0,
    ) -> Tensor:
        """Draw pictures, as a tensor.

        Args:
            count: how many; all are drawn at once.
            seed: picture i is that of ``seed`` + i, whatever is drawn with it.
            steps: None: every step of the schedule for ``ddpm``, 50 for ``ddim``.
            solver: ``ddpm`` draws from the posterior of each step, ``ddim`` walks without new noise.
            eta: new noise of ``ddim``, 0 to 1; 1 is ancestral sampling of its steps.

        Returns:
            [count, C, H, W] in [-1, 1], as far as the network keeps to it.

        Raises:
            InputError: a number outside of its range, or an unknown solver.
        """
        trained = int(self.scheduler.config.num_train_timesteps)
        if solver not in ("ddpm", "ddim"):
            raise InputError(f"Unknown solver {solver!r}; choose ddpm or ddim.")
        if steps is None:
            steps = trained if solver == "ddpm" else min(50, trained)
        if not 1 <= steps <= trained:
            raise InputError(f"steps is {steps}; the schedule has 1 to {trained}.")
        if count < 1 or seed < 0:
            raise InputError(f"count is {count} and seed {seed}; draw at least one picture, of a seed of 0 or more.")
        if not 0 <= eta <= 1 or (eta and solver == "ddpm"):
            raise InputError(f"eta is {eta} with {solver}; it lies between 0 and 1 and is for ddim.")
        weight = next(self.unet.parameters())
        scheduler = make_scheduler(self.scheduler, solver)
        scheduler.set_timesteps(steps, device=weight.device)
        generators = [torch.Generator("cpu").manual_seed(seed + i) for i in range(count)]
        x = draw(generators, (count, *self.shape), weight.device, weight.dtype)
        extra = step_arguments(scheduler, generators, eta)
        for t in scheduler.timesteps:
            x = scheduler.step(self.unet(x, t).sample, t, x, **extra, return_dict=False)[0]
        return x

    def __call__(
        self,
        count: int = 1,
        *,
        seed: int = 0,
        steps: int | None = None,
        solver: Solver = "ddpm",
        eta: float = 0.0,
    ) -> list[Image.Image]:
        """Draw pictures; see `pixels`."""
        x = self.pixels(count, seed=seed, steps=steps, solver=solver, eta=eta)
        values = ((x / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(one[..., 0] if one.shape[-1] == 1 else one) for one in values]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write it as diffusers' ``DDPMPipeline`` loads it."""
        from diffusers import DDPMPipeline

        DDPMPipeline(self.unet, self.scheduler).save_pretrained(folder)
