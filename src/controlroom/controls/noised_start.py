"""A run that starts from a picture: its latents, noised to the level of the first step that is run."""

from __future__ import annotations

import torch

from controlroom.controls.source_pixels import for_each_image
from controlroom.core.branch import IMAGE
from controlroom.core.random import draw
from controlroom.core.run import Run


def start_from(run: Run, latents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Start the picture from scaled latents [1 or prompts or images, C, h, w] of the run's size, in ``prepare``.

    The noise is the picture's own, drawn as diffusers draws it: once for each image, before the noise of the steps.

    Returns:
        The latents and the noise, both [images, C, h, w].
    """
    latents = for_each_image(latents.to(device=run.device, dtype=run.dtype), run)
    noise = draw(run.streams.main, latents.shape, run.device, run.dtype)
    run.set_initial(IMAGE, run.scheduler.add_noise(latents, noise, run.timesteps[:1].repeat(latents.shape[0])))
    return latents, noise


def sampled_latents(run: Run, pixels: torch.Tensor) -> torch.Tensor:
    """Scaled latents of pictures [rows, 3, H, W] in [-1, 1]: a sample of the posterior, drawn as diffusers draws it.

    One generator for the batch draws once for each picture given; one for each image draws for each image.
    """
    generator = run.streams.main
    if isinstance(generator, torch.Generator):
        return run.backbone.encode_picture(pixels, generator)
    # Row by row, since an autoencoder rounds a batch otherwise.
    rows = for_each_image(pixels, run).split(1)
    pairs = zip(rows, generator, strict=True)
    return torch.cat([run.backbone.encode_picture(row, [each]) for row, each in pairs])
