"""Null-text optimisation: a run with guidance that draws a given picture (arXiv 2211.09794).

The idea: DDIM inversion without guidance knows the way from a picture to its noise, but guidance leads a run away from
that way. So at each step the embedding of the branch without the prompt is optimised (Adam, a few iterations) until the
step with guidance arrives where the inversion had been. The network and the prompt stay as they are.

Deviations from the published code: pictures of a batch are optimised each on its own, and each stops when it is good
enough; the learning rate, published as 0.01 · (1 − i/100), stays positive beyond 100 steps (at 50 steps or fewer it is
the published one). Without further branches in the run the prediction with the prompt, which does not depend on the
embedding, is made once for each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from controlroom.core.branch import IMAGE, Condition
from controlroom.core.errors import InputError
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.inverted import NullText
from controlroom.sampling.loop import frozen
from controlroom.sampling.predict import combine
from controlroom.sampling.solver import advance

ALONE = ("uncond", "cond")


def optimise_null_text(
    run: Run,
    latents: list[torch.Tensor],
    step_at: Callable[[int, torch.Tensor], Step],
    settings: NullText,
    done: Callable[[int, torch.Tensor], bool],
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Find the embeddings of every step.

    Args:
        run: with guidance, ready for `predict`; its scheduler is DDIM.
        latents: n + 1 of [B, C, h, w], from the picture to its noise, made without guidance.
        step_at: step i with the given latents, states and conditions in place.
        settings: of the optimiser.
        done: called after each step with its number and its latents; True stops.

    Returns:
        [B, length, width] for each step that was run, and the latents after the last.

    Raises:
        InputError: a run without guidance, or one whose embedding without a prompt changes from step to step.
    """
    told = run.conditions.get("uncond")
    if told is None:
        raise InputError(
            f"Null-text optimisation needs guidance, but guidance_scale is {run.guidance.scale:g}. Give one above 1, "
            'or use method="ddim": without guidance no embeddings are needed.'
        )
    if not isinstance(told, Condition):
        raise InputError(
            "Null-text optimisation starts from one embedding without a prompt, but a control of this inversion "
            "changes it from step to step. Leave that control out."
        )
    current, found = latents[-1], []
    tokens = told.expand(run.images).tokens
    with frozen(run.backbone.unet):
        for i in range(run.n):
            step = step_at(i, current)
            tokens = _optimised(step, replace(told, tokens=tokens), latents[run.n - 1 - i], settings)
            run.set_condition("uncond", replace(told, tokens=tokens))
            prediction = _predicted(step, step.eps)
            found.append(tokens)
            # The solver replaces what it is given.
            step.latents = dict(step.latents)
            advance(run, {IMAGE: prediction}, step.t, step.latents)
            current = step.latents[IMAGE]
            if done(i, current):
                break
    return found, current


def _optimised(step: Step, told: Condition, wanted: torch.Tensor, settings: NullText) -> torch.Tensor:
    """[B, length, width]: embeddings with which this step comes nearer to ``wanted``."""
    run, i = step.run, step.i
    wide = torch.promote_types(told.tokens.dtype, torch.float32)
    rows = [row.detach().to(wide).clone().requires_grad_(True) for row in told.tokens]
    rate = settings.learning_rate * (1 - i / max(100, 2 * run.n))
    optimisers = [torch.optim.Adam([row], lr=rate) for row in rows]
    bound = settings.tolerance + i * settings.tolerance_growth
    assert run.forward is not None
    step.eps = {"cond": run.forward(step, ("cond",), "main")["cond"]} if step.running == ALONE else {}
    active = list(range(len(rows)))
    for _ in range(settings.iterations):
        with torch.enable_grad():
            tokens = torch.stack(rows).to(told.tokens.dtype)
            run.set_condition("uncond", replace(told, tokens=tokens))
            prediction = _predicted(step, step.eps)
            arrived = run.scheduler.step(prediction, step.t, step.latents[IMAGE], eta=0.0, return_dict=False)[0]
            losses = ((arrived.to(wide) - wanted.to(arrived.device, wide)) ** 2).flatten(1).mean(1)
            gradients = torch.autograd.grad(losses[active].sum(), [rows[index] for index in active])
        for index, gradient in zip(active, gradients, strict=True):
            rows[index].grad = gradient
            optimisers[index].step()
        # As published: the loss is looked at after the move that it led to.
        active = [index for index in active if float(losses[index]) >= bound]
        if not active:
            break
    return torch.stack(rows).detach().to(told.tokens.dtype)


def _predicted(step: Step, known: dict[str, torch.Tensor]) -> torch.Tensor:
    """The combined prediction of the main pass; ``known`` has what need not be run again."""
    run = step.run
    assert run.forward is not None
    kept = {name: known[name].detach() for name in ("cond",) if name in known and step.running == ALONE}
    step.eps = {**kept, **run.forward(step, tuple(name for name in step.running if name not in kept), "main")}
    return combine(step)[IMAGE]
