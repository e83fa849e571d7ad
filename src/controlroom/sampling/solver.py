"""Schedulers: made anew for each run, one for each set of latents, so that no state leaks and histories never mix."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch

from controlroom.core.branch import IMAGE
from controlroom.core.errors import InputError
from controlroom.core.random import clone, draw
from controlroom.core.run import Run

SCHEDULERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "unipc": ("UniPCMultistepScheduler", {}),
}
"""Name in a run -> diffusers' class and what is set beside the model's own configuration."""


def make_scheduler(base: Any, name: str | None) -> Any:
    """A scheduler for one run: a copy of the model's own, or the named one with the model's configuration.

    Raises:
        InputError: no scheduler has that name.
    """
    if name is None:
        return copy.deepcopy(base)
    if name not in SCHEDULERS:
        raise InputError(f"Unknown scheduler {name!r}. Choose one of {', '.join(SCHEDULERS)}.")
    import diffusers

    kind, settings = SCHEDULERS[name]
    return getattr(diffusers, kind).from_config(base.config, **settings)


def timesteps_for(scheduler: Any, steps: int, device: torch.device, strength: float | None) -> torch.Tensor:
    """Set a scheduler's timesteps: all of them, or the share at the end that ``strength`` asks for (as diffusers)."""
    scheduler.set_timesteps(steps, device=device)
    order = getattr(scheduler, "order", 1)
    begin = 0 if strength is None else max(steps - min(int(steps * strength), steps), 0) * order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    return scheduler.timesteps[begin:]


def alpha_bars(scheduler: Any, timesteps: torch.Tensor) -> list[float]:
    """Cumulative product ᾱ at each timestep, and 1 after the last.

    Solvers that work with noise levels σ give ᾱ = 1/(1 + σ²) of the network's (scaled) input.
    """
    count = len(timesteps)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is not None and len(sigmas) >= count:
        begin = len(scheduler.timesteps) - count
        return [1.0 / (1.0 + float(sigmas[begin + i]) ** 2) for i in range(count)] + [1.0]
    table = scheduler.alphas_cumprod
    last = getattr(scheduler, "final_alpha_cumprod", 1.0)
    return [float(table[int(t)]) for t in timesteps] + [float(last)]


def initial_latents(run: Run, given: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Latents of every solver state before the first step, as the solver has them.

    Raises:
        InputError: ``latents`` of another shape than the run's.
    """
    found: dict[str, torch.Tensor] = {}
    noises: dict[str, torch.Tensor] = {}
    for name, state in run.plan.states.items():
        if state.advance != "solver":
            continue
        if name in run.initial:
            found[name] = run.initial[name].to(device=run.device, dtype=run.dtype)
            continue
        shape = run.latent_shape(name)
        if state.noise_from in run.initial and state.noise_from in found:
            # A state that shares the picture's noise starts where the picture starts (image to image).
            found[name] = found[state.noise_from][: shape[0]].expand(shape)
            continue
        if name == IMAGE and given is not None:
            if tuple(given.shape) != shape:
                raise InputError(f"latents has the shape {tuple(given.shape)}; this run needs {shape}.")
            noises[name] = given.to(device=run.device, dtype=run.dtype)
        elif state.noise_from is not None and state.noise_from in noises:
            noises[name] = noises[state.noise_from][: shape[0]].expand(shape)
        else:
            source = run.streams.main if name == IMAGE else run.streams.stream(name)[: shape[0]]
            noises[name] = draw(source, shape, run.device, run.dtype)
        found[name] = noises[name] * run.schedulers[name].init_noise_sigma
    return found


def advance(run: Run, predictions: dict[str, torch.Tensor], t: torch.Tensor, latents: dict[str, torch.Tensor]) -> None:
    """One solver step over all states that have a prediction; ``latents`` is updated."""
    shared = [name for name in predictions if run.plan.states[name].noise_from is not None]
    kept = {run.plan.states[name].noise_from: _copy(run, run.plan.states[name].noise_from) for name in shared}
    for name, prediction in predictions.items():
        state, scheduler = run.plan.states[name], run.schedulers[name]
        if state.noise_from is not None:
            generator = _copy_of(kept[state.noise_from])
        else:
            generator = _source(run, name)
        rows = prediction.shape[0]
        if isinstance(generator, list):
            generator = generator[:rows]
        extra = step_arguments(scheduler, generator, run.eta)
        latents[name] = scheduler.step(prediction, t, latents[name], **extra, return_dict=False)[0]


def step_arguments(scheduler: Any, generator: Any, eta: float) -> dict[str, Any]:
    """What a scheduler's step takes beside prediction, timestep and latents."""
    known = inspect.signature(scheduler.step).parameters
    arguments: dict[str, Any] = {}
    if "eta" in known:
        arguments["eta"] = eta
    if "generator" in known:
        arguments["generator"] = generator
    return arguments


def _source(run: Run, name: str) -> torch.Generator | list[torch.Generator]:
    return run.streams.main if name == IMAGE else run.streams.stream(name)


def _copy(run: Run, name: str | None) -> torch.Generator | list[torch.Generator]:
    return _copy_of(_source(run, name or IMAGE))


def _copy_of(generator: torch.Generator | list[torch.Generator]) -> torch.Generator | list[torch.Generator]:
    return [clone(g) for g in generator] if isinstance(generator, list) else clone(generator)
