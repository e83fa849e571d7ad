"""Regularised noise: predictions of an inversion that stay uncorrelated and normal (Pix2Pix-Zero, arXiv 2302.03027).

The idea: noise that was found by inversion is less like noise than what the model was trained on, and edits of it look
wrong. So at each step of the inversion the predicted noise is moved down the gradient of two losses: the correlation of
each channel with itself shifted by a random distance, at several scales, and the divergence of its distribution from a
standard normal one. Only the prediction is differentiated, never the network.

Deviations from diffusers' `StableDiffusionPix2PixZeroPipeline.invert`: pictures of a batch are regularised each on its
own and with its own shifts; there they share mean, variance and one generator. With guidance and a network that
predicts v the reference mistakes the two halves of its batch for two pictures; here there is one. Otherwise, for one
picture, the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from controlroom.core.branch import IMAGE
from controlroom.core.step import Step
from controlroom.sampling.inverted import Regularisation

_Loss = Callable[[torch.Tensor, int], torch.Tensor]
_SMALLEST = 8
"""Side in latent pixels at which no further, coarser scale is looked at."""


def regularised(
    step: Step, prediction: torch.Tensor, generators: list[torch.Generator], settings: Regularisation
) -> torch.Tensor:
    """The combined prediction of a step, made more like noise.

    Args:
        step: gives the noise level and the latents that the prediction was made from.
        prediction: [B, C, h, w], noise or v.
        generators: of the shifts, one for each picture.
        settings: weights and counts.

    Returns:
        [B, C, h, w], in the same parameterisation.
    """
    sample = step.scaled(step.latents[IMAGE]).detach()
    for _ in range(settings.steps):
        if settings.auto_correlation > 0:
            for _ in range(settings.rolls):
                moved = _gradient(step, prediction, sample, lambda row, i: auto_correlation(row, generators[i]))
                prediction = prediction - settings.auto_correlation / settings.rolls * moved
        if settings.divergence > 0:
            prediction = prediction - settings.divergence * _gradient(
                step, prediction, sample, lambda row, i: divergence(row)
            )
    return prediction


def _gradient(step: Step, prediction: torch.Tensor, sample: torch.Tensor, loss: _Loss) -> torch.Tensor:
    with torch.enable_grad():
        # Half precision is too coarse for squares of means.
        wide = torch.promote_types(prediction.dtype, torch.float32)
        leaf = prediction.detach().to(wide).requires_grad_(True)
        noise = step.noise_of(leaf, sample.to(wide))
        total = torch.stack([loss(row, index) for index, row in enumerate(noise)]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
    return gradient.to(prediction.dtype)


def auto_correlation(noise: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Squared correlation of each channel of [C, h, w] with itself, shifted down and aside, summed over scales."""
    total = noise.new_zeros(())
    for channel in noise:
        scale = channel[None, None]
        while True:
            shift = int(torch.randint(max(scale.shape[2] // 2, 1), (1,), generator=generator))
            total = total + (scale * scale.roll(shift, 2)).mean() ** 2 + (scale * scale.roll(shift, 3)).mean() ** 2
            if scale.shape[2] <= _SMALLEST or min(scale.shape[2:]) < 2:
                break
            scale = F.avg_pool2d(scale, 2)
    return total


def divergence(noise: torch.Tensor) -> torch.Tensor:
    """Twice the Kullback-Leibler divergence of the normal distribution with the noise's moments from N(0, 1)."""
    mean, variance = noise.mean(), noise.var()
    return variance + mean**2 - 1 - torch.log(variance + 1e-7)
