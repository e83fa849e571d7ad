"""The denoising loop: one step after another, in one fixed order, for every control.

states given anew -> ``before`` -> energies (one shared backward pass) -> auxiliary networks and the main pack -> base
combination, additions, rescaling, merge of views -> one solver step -> ``finish`` -> the caller's callback.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from controlroom.core.branch import IMAGE
from controlroom.core.control import EnergyNeed, implements
from controlroom.core.plan import PlannedControl
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.predict import predict
from controlroom.sampling.solver import advance, alpha_bars

MAX_ROUNDS = 256
"""Energy passes, or repetitions, of one step; a control that asks for more has lost count."""

OnStep = Callable[[int, torch.Tensor, Step], None]


@dataclass
class Progress:
    """How far a run came."""

    latents: dict[str, torch.Tensor]
    steps: int = 0
    cancelled: bool = False


def denoise(
    run: Run,
    latents: dict[str, torch.Tensor],
    on_step: OnStep | None = None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Progress:
    """Run all steps.

    Args:
        run: with conditions, states and ``forward`` in place.
        latents: solver states before the first step.
        on_step: called after each step; may replace ``step.latents``.
        cancelled: asked before each step.
    """
    progress = Progress(dict(latents))
    levels = alpha_bars(run.scheduler, run.timesteps)
    repeats = any(entry.declaration.repeats for entry in run.plan.controls)
    for i, t in enumerate(run.timesteps):
        if cancelled():
            progress.cancelled = True
            break
        following = run.timesteps[i + 1] if i + 1 < len(run.timesteps) else None
        for _ in range(MAX_ROUNDS):
            kept = copy.deepcopy(run.schedulers) if repeats else None
            step = Step(run, i, t, progress.latents, levels[i], levels[i + 1], following)
            again = take_step(step)
            progress.latents = step.latents
            if not again or kept is None:
                break
            run.schedulers.update(kept)
        else:
            raise RuntimeError(f"a control asked to run step {i} more than {MAX_ROUNDS} times")
        progress.steps = i + 1
        if on_step is not None:
            on_step(i, t, step)
            progress.latents = step.latents
    return progress


def take_step(step: Step) -> bool:
    """One step; whether a control asks for it to be run again."""
    run = step.run
    active = run.plan.active(step.i)
    step.latents = dict(step.latents)
    give_states(step, ("pinned", "derived"))
    for entry in active:
        if implements(entry.control, "before"):
            entry.control.before(step)
    if descend(step, active):
        give_states(step, ("derived",))
    predictions = predict(step)
    advance(run, predictions, step.t, step.latents)
    again = False
    for entry in active:
        if implements(entry.control, "finish"):
            asked = bool(entry.control.finish(step))
            if asked and not entry.declaration.repeats:
                raise RuntimeError(f"{entry.label} asks to repeat a step without having declared repeats")
            again = asked or again
    return again


def give_states(step: Step, kinds: tuple[str, ...]) -> None:
    """Set the states that are not solved but given."""
    for name, state in step.run.plan.states.items():
        if state.advance in kinds and name in step.run.sources:
            step.latents[name] = step.run.sources[name](step)


def descend(step: Step, active: tuple[PlannedControl, ...]) -> bool:
    """Energy passes of a step: all controls that need a gradient share each pass and its backward."""
    needs = {
        index: (entry, entry.declaration.energy)
        for index, entry in enumerate(active)
        if entry.declaration.energy is not None and _due(step, entry.declaration.energy)
    }
    moved = False
    for round in range(MAX_ROUNDS):
        if not needs:
            return moved
        moved = True
        again = _descend_once(step, list(needs.values()), round)
        needs = {index: pair for index, pair in needs.items() if pair[0].label in again}
    raise RuntimeError(f"controls asked for more than {MAX_ROUNDS} energy passes in step {step.i}")


def _due(step: Step, need: EnergyNeed) -> bool:
    return need.steps is None or step.i in need.steps


def _descend_once(step: Step, needs: list[tuple[PlannedControl, Any]], round: int) -> set[str]:
    run = step.run
    assert run.forward is not None
    names = run.plan.closure(tuple(dict.fromkeys(name for _, need in needs for name in need.branches)))
    leaves = {need.state: step.latents[need.state].detach().clone().requires_grad_(True) for _, need in needs}
    kept = step.latents
    again: set[str] = set()
    losses: dict[tuple[str, str], torch.Tensor] = {}
    with torch.enable_grad(), frozen(run.backbone.unet):
        step.latents = {**kept, **leaves}
        try:
            run.forward(step, names, "energy")
            for entry, need in needs:
                answer = entry.control.energy(step, round)
                if answer.again:
                    again.add(entry.label)
                if answer.loss is not None:
                    key = (need.state, answer.into)
                    losses[key] = losses.get(key, torch.zeros((), device=run.device)) + answer.loss.sum()
        finally:
            step.latents = kept
        for number, ((state, into), loss) in enumerate(losses.items()):
            if not loss.requires_grad:
                continue
            last = number == len(losses) - 1
            (gradient,) = torch.autograd.grad(loss, leaves[state], retain_graph=not last)
            if into == "latents":
                step.latents[state] = step.latents[state] - gradient
            else:
                step.additions[state] = step.additions.get(state, torch.zeros_like(gradient)) + gradient
    return again


@contextmanager
def frozen(module: Any) -> Iterator[None]:
    """Keep parameters out of the graph, so that a gradient for the latents costs no memory for the weights'."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    try:
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def picture(progress: Progress) -> torch.Tensor:
    """Latents of the picture."""
    return progress.latents[IMAGE]
