"""A step of a run, as controls see it."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from controlroom.core.branch import IMAGE, Condition, Layout
from controlroom.core.control import Control
from controlroom.core.run import Run


@dataclass(frozen=True)
class NetworkInput:
    """What the UNet or an auxiliary network gets for some branches.

    Attributes:
        layout: which rows belong to which branch.
        sample: [rows, channels, h, w], scaled as the solver asks; without a control's further channels.
        timestep: scalar tensor, or [rows] where branches have timesteps of their own.
        condition: joined row by row.
    """

    layout: Layout
    sample: torch.Tensor
    timestep: torch.Tensor
    condition: Condition


class Step:
    """One step.

    Attributes:
        run: what lives as long as the run.
        i: number of the step, from 0; n: number of steps.
        t: timestep (scalar tensor); t_next: the next one, None at the last.
        alpha_bar: cumulative product ᾱ at t, as a float; alpha_bar_next: after the step (1 at the end).
        sigma: sqrt((1 − ᾱ)/ᾱ).
        phase: ``main``, ``energy`` or ``probe``: the pass under way.
        latents: state -> [rows, C, h, w] as the solver has them. A control may replace an entry in ``before`` and
            ``finish``.
        eps: branch -> raw prediction of the network, in the parameterisation it was trained in (noise or v). Filled by
            the main pass.
        combined: state -> combined prediction, while ``guide`` runs and after.
        offsets: branch -> [images, C, h, w] added to the latents that this branch sees, in this step only, in the units
            of the solver. A control that moves one branch apart from the others of its state sets it.
        present: branches of the pass under way (outside a pass: all that run at this step).
    """

    def __init__(
        self,
        run: Run,
        i: int,
        t: torch.Tensor,
        latents: dict[str, torch.Tensor],
        alpha_bar: float,
        alpha_bar_next: float,
        t_next: torch.Tensor | None = None,
    ) -> None:
        self.run, self.i, self.n, self.t, self.t_next = run, i, run.n, t, t_next
        self.alpha_bar, self.alpha_bar_next = alpha_bar, alpha_bar_next
        self.sigma = ((1 - alpha_bar) / alpha_bar) ** 0.5 if alpha_bar > 0 else float("inf")
        self.latents = latents
        self.phase = "main"
        self.eps: dict[str, torch.Tensor] = {}
        self.combined: dict[str, torch.Tensor] = {}
        self.additions: dict[str, torch.Tensor] = {}
        self.offsets: dict[str, torch.Tensor] = {}
        self.present: tuple[str, ...] = self.running

    # Who is there.

    def memory(self, control: Control) -> Any:
        """What the control's ``prepare`` returned."""
        return self.run.memory(control)

    def active(self, control: Control) -> bool:
        """Whether the step lies in the control's window."""
        return self.i in self.run.plan.controls[self.run.plan.indices[id(control)]].steps

    @property
    def running(self) -> tuple[str, ...]:
        """Branches of this step, in the order of their rows."""
        return self.run.plan.running(self.i)

    def reached(self, control: Control) -> tuple[str, ...]:
        """Branches of the pass under way that a spatial or image-prompt control acts on."""
        return tuple(name for name in self.present if self.run.reaches(control, name))

    def role(self, state: str, role: str) -> str | None:
        """Name of the running branch with a role (``cond``, ``uncond``) for a state, or None."""
        for name in self.running:
            branch = self.run.plan.branches[name]
            if branch.state == state and branch.role == role:
                return name
        return None

    # What the network gets.

    def condition(self, branch: str) -> Condition:
        """Condition of a branch at this step, with all its rows."""
        source = self.run.conditions.get(branch)
        if source is None:
            raise RuntimeError(f"no control gave branch {branch!r} a condition (run.set_condition in prepare)")
        condition = source if isinstance(source, Condition) else source(self)
        if self.run.filling is not None:
            condition = self.run.filling(branch, condition)
        return condition.expand(self.run.plan.rows_of(branch))

    def sample(self, branch: str) -> torch.Tensor:
        """[rows, C, h, w] input of a branch: its latents seen through the views, scaled as the solver asks."""
        entry = self.run.plan.branches[branch]
        latents = self.latents[entry.state]
        if branch in self.offsets:
            latents = latents + self.offsets[branch]
        views = self.run.plan.views
        if views is not None and entry.state == IMAGE:
            latents = views.split(latents)
        # A branch with a timestep of its own (a clean reference) is not at the solver's noise level.
        return latents if entry.timestep is not None else self.scaled(latents, entry.state)

    def scaled(self, latents: torch.Tensor, state: str = IMAGE) -> torch.Tensor:
        """Latents as the network wants them, out of latents as the solver has them."""
        return self.run.schedulers.get(state, self.run.scheduler).scale_model_input(latents, self.t)

    def inputs(self, branches: tuple[str, ...]) -> NetworkInput:
        """Joined input of branches of one size, for an auxiliary network. Sum up its cost with `count_side`."""
        layout = Layout((name, self.run.plan.rows_of(name)) for name in branches)
        shared: dict[tuple[str, float | None, str | None], torch.Tensor] = {}
        samples = []
        for name in branches:
            branch = self.run.plan.branches[name]
            key = (branch.state, branch.timestep, name if name in self.offsets else None)
            if key not in shared:
                shared[key] = self.sample(name)
            samples.append(shared[key])
        sample = samples[0] if len(samples) == 1 else torch.cat(samples)
        return NetworkInput(layout, sample, self.timestep(layout), self.run.packed(self, layout))

    def timestep(self, layout: Layout) -> torch.Tensor:
        """Scalar where all rows share the step's timestep, else [rows]."""
        fixed = [self.run.plan.branches[name].timestep for name in layout.names]
        if all(value is None for value in fixed):
            return self.t
        parts = [
            torch.full((layout.size(name),), float(self.t if value is None else value), device=self.run.device)
            for name, value in zip(layout.names, fixed, strict=True)
        ]
        return torch.cat(parts)

    def forward(
        self, branches: tuple[str, ...], latents: dict[str, torch.Tensor] | None = None, grad: bool = False
    ) -> dict[str, torch.Tensor]:
        """Another pass (phase ``probe``) over some branches and what they need: branch -> raw prediction.

        Args:
            branches: branches to run.
            latents: state -> latents to use instead of the present ones in this pass.
            grad: keep the graph.
        """
        if self.run.forward is None:
            raise RuntimeError("the run has no network bound")
        kept = self.latents
        self.latents = {**kept, **(latents or {})}
        try:
            with torch.enable_grad() if grad else nullcontext():
                return self.run.forward(self, self.run.plan.closure(branches), "probe")
        finally:
            self.latents = kept

    def count_side(self, rows: int, passes: int = 1) -> None:
        """Add forward passes of an auxiliary network to the cost of the run."""
        self.run.cost.side_rows += rows
        self.run.cost.side_passes += passes

    # Noise levels. The network's input is always x = √ᾱ·x₀ + √(1−ᾱ)·ε, whatever the solver keeps.

    def noise_of(self, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """ε out of a raw prediction and the scaled input it was made from."""
        a, b = self.alpha_bar**0.5, (1 - self.alpha_bar) ** 0.5
        kind = self.run.scheduler.config.prediction_type
        if kind == "epsilon":
            return prediction
        if kind == "v_prediction":
            return a * prediction + b * sample
        return (sample - a * prediction) / b

    def clean_of(self, prediction: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """x̂₀ out of a raw prediction and the scaled input it was made from."""
        a, b = self.alpha_bar**0.5, (1 - self.alpha_bar) ** 0.5
        kind = self.run.scheduler.config.prediction_type
        if kind == "epsilon":
            return (sample - b * prediction) / a
        if kind == "v_prediction":
            return a * sample - b * prediction
        return prediction

    def noised(self, clean: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Clean latents brought to this step's noise level, as the solver keeps them."""
        scheduler = self.run.scheduler
        t = self.t.reshape(1).expand(clean.shape[0])
        return scheduler.add_noise(clean, noise, t)
