"""The loss of a subject with its class beside it: DreamBooth's prior preservation (arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from controlroom.training.objective import Objective
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.shown import ShownBatch

PredictWords = Callable[[Tensor, Tensor, Sequence[str]], Tensor]
"""Noisy latents [B, C, h, w], timesteps [B] and B prompts -> what the network predicts."""


def subject_loss(
    objective: Objective,
    predict: PredictWords,
    subject: ShownBatch,
    beside: ShownBatch | None,
    rng: StepRandom,
    weight: float = 1.0,
) -> Losses:
    """Error on the subject, plus ``weight`` times the error on its class; both in one pass of the network."""
    drawn = objective.draw(subject.latents, rng)
    if beside is None:
        predicted = predict(drawn.latents, drawn.t, subject.prompts)
        each = objective.errors(predicted, drawn, subject.mask)
        return Losses((each * drawn.weight).mean(), {"subject": each.detach().mean()})
    other = objective.draw(beside.latents, rng, "class ")
    noisy, t = torch.cat((drawn.latents, other.latents)), torch.cat((drawn.t, other.t))
    predicted = predict(noisy, t, (*subject.prompts, *beside.prompts))
    mine, its = predicted[: len(subject.latents)], predicted[len(subject.latents) :]
    each, prior = objective.errors(mine, drawn, subject.mask), objective.errors(its, other, beside.mask)
    total = (each * drawn.weight).mean() + weight * (prior * other.weight).mean()
    return Losses(total, {"subject": each.detach().mean(), "class": prior.detach().mean()})
