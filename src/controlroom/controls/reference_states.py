"""Pictures that run beside the run's to be looked at: their latents at each step, and what their branches are told."""

from __future__ import annotations

from dataclasses import replace

import torch

from controlroom.core.branch import Condition, ConditionSource
from controlroom.core.run import Run, StateSource
from controlroom.core.step import Step

_EPSILON = 1e-5


def noised_anew(name: str, clean: torch.Tensor) -> StateSource:
    """Clean latents at a step's level, with new noise at each step, from the stream of that name."""
    return lambda step: step.noised(clean, step.run.noise(name, clean.shape))


def told_as(run: Run, branch: str, row: int | None = None) -> ConditionSource:
    """What another branch is told, also where a control sets it later or step by step; of one row, if that is asked."""

    def told(step: Step) -> Condition:
        source = run.conditions[branch]
        condition = source if isinstance(source, Condition) else source(step)
        return condition if row is None or condition.tokens.shape[0] == 1 else condition.take([row])

    return told


def told_text(run: Run, prompts: list[str]) -> Condition:
    """What these prompts say; a model that is told sizes is told the run's."""
    condition, cond = run.encode_text(prompts), run.conditions["cond"]
    if isinstance(cond, Condition) and cond.time_ids is not None:
        condition = replace(condition, time_ids=cond.time_ids[:1].expand(len(prompts), -1))
    return condition


def adain(
    x: torch.Tensor,
    like: torch.Tensor,
    dim: int | tuple[int, ...],
    mask: torch.Tensor | None = None,
    like_mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """AdaIN (arXiv 1703.06868): x with the mean and the deviation that ``like`` has along ``dim``; float32.

    Args:
        x: what is changed.
        like: what it shall be like; its other dimensions fit those of x.
        dim: tokens, or rows and columns.
        mask: weights, broadcastable to x, of the places of x that its statistics are taken of; None: all.
        like_mask: the same for ``like``.
    """
    mean, deviation = moments(x.float(), dim, mask)
    wanted_mean, wanted = moments(like.float(), dim, like_mask)
    return (x.float() - mean) / deviation * wanted + wanted_mean


def moments(
    x: torch.Tensor, dim: int | tuple[int, ...], mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation (unbiased, with a little added to the variance) along ``dim``, of the places of a mask."""
    if mask is None:
        variance, mean = torch.var_mean(x, dim=dim, keepdim=True)
        return mean, (variance + _EPSILON).sqrt()
    mask = mask.float().expand_as(x)
    total = mask.sum(dim, keepdim=True)
    mean = (mask * x).sum(dim, keepdim=True) / total
    variance = (mask * (x - mean) ** 2).sum(dim, keepdim=True) / (total - 1).clamp(min=1)
    return mean, (variance + _EPSILON).sqrt()
