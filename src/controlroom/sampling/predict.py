"""`predict`: from latents to the prediction a solver gets, for sampling, inversion, training and distillation.

A forward pass goes: conditions and inputs of the branches -> auxiliary networks -> one UNet batch for each pair of
weights and size -> raw predictions by branch. `predict` then combines them: base combination, additions in the order of
the list, rescaling, merge of the views.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack

import torch

from controlroom.backbones.attention import Binding, Dispatcher
from controlroom.core.branch import IMAGE, Layout
from controlroom.core.control import Control, Residuals, implements
from controlroom.core.plan import Plan
from controlroom.core.run import Run
from controlroom.core.step import Step
from controlroom.sampling.guidance import classifier_free, rescaled

RowsOf = Callable[[str], int]


class Forward:
    """Runs the UNet for some branches of a step; installed in a run as ``run.forward``."""

    def __init__(self, run: Run, dispatcher: Dispatcher) -> None:
        self.run, self.dispatcher = run, dispatcher
        self._acting: dict[tuple[tuple[int, ...], str], tuple[dict, dict]] = {}

    def __call__(self, step: Step, names: tuple[str, ...], phase: str) -> dict[str, torch.Tensor]:
        plan = self.run.plan
        if len(plan.parts) == 1:
            return self._whole(step, names, phase)
        # Views in turns: each part is a plan of its own, so that everything cuts what it gives along with them.
        seen = tuple(name for name in names if plan.branches[name].state == IMAGE)
        rest = tuple(name for name in names if name not in seen)
        found = self._whole(step, rest, phase) if rest else {}
        pieces: list[dict[str, torch.Tensor]] = []
        try:
            for part in plan.parts if seen else ():
                self.run.plan = part
                pieces.append(self._whole(step, seen, phase))
        finally:
            self.run.plan = plan
        return found | {name: torch.cat([piece[name] for piece in pieces]) for name in (seen if pieces else ())}

    def _whole(self, step: Step, names: tuple[str, ...], phase: str) -> dict[str, torch.Tensor]:
        """Passes over some branches with all rows that the plan gives them."""
        outer = step.present, step.phase
        step.present, step.phase = names, phase
        try:
            residuals = self._residuals(step, phase)
            found: dict[str, torch.Tensor] = {}
            for layout in self.run.plan.layouts(names):
                for part in self._by_length(step, layout):
                    prediction = self._pass(step, part, phase, residuals)
                    found.update({name: prediction[rows] for name, rows in part.slices.items()})
            return found
        finally:
            step.present, step.phase = outer

    def _by_length(self, step: Step, layout: Layout) -> list[Layout]:
        """Texts of different lengths cannot share a batch."""
        lengths: dict[int, list[str]] = {}
        for name in layout.names:
            lengths.setdefault(step.condition(name).tokens.shape[1], []).append(name)
        if len(lengths) == 1:
            return [layout]
        return [Layout((name, layout.size(name)) for name in names) for names in lengths.values()]

    def _pass(self, step: Step, layout: Layout, phase: str, residuals: list[Residuals]) -> torch.Tensor:
        run = self.run
        net = step.inputs(layout.names)
        sample = net.sample
        if run.plan.channels:
            sample = torch.cat([sample, torch.cat([self._channels(name).to(sample) for name in layout.names])], dim=1)
        attention, features = self._controls(step, phase)
        binding = Binding(step, layout, phase, attention, features)
        with ExitStack() as stack:
            self._enter_weights(stack, layout)
            stack.enter_context(self.dispatcher.bound(binding))
            prediction = run.backbone.predict(
                sample, net.timestep, net.condition, merge_residuals(residuals, layout, run.plan.rows_of), layout
            )
        run.cost.unet_rows += layout.total
        run.cost.unet_passes += 1
        run.cost.energy_passes += phase == "energy"
        return prediction

    def _channels(self, branch: str) -> torch.Tensor:
        """Further input channels of a branch, seen through the views as its latents are: [rows, c, h, w]."""
        plan, channels = self.run.plan, self.run.channels.get(branch)
        if channels is None:
            raise RuntimeError(f"no control gave branch {branch!r} its input channels (run.set_channels in prepare)")
        if plan.views is not None and plan.branches[branch].state == IMAGE:
            channels = plan.views.split(channels.expand(self.run.images, -1, -1, -1))
        return channels.expand(plan.rows_of(branch), -1, -1, -1)

    def _enter_weights(self, stack: ExitStack, layout: Layout) -> None:
        plan = self.run.plan
        owner, tag = plan.network_of(layout.names[0])
        if owner is not None:
            context = plan.controls[owner].control.weights(tag, self.run.backbone)
            if context is None:
                raise RuntimeError(f"{plan.controls[owner].label} has a branch with the weights {tag!r} but gives none")
            stack.enter_context(context)

    def _residuals(self, step: Step, phase: str) -> list[Residuals]:
        found = []
        for entry in self.run.plan.active(step.i):
            if implements(entry.control, "side") and phase in entry.declaration.phases:
                result = entry.control.side(step)
                if result is not None:
                    found.extend(result if isinstance(result, tuple) else (result,))
        return found

    def _controls(self, step: Step, phase: str) -> tuple[dict[str, list[Control]], dict[str, list[Control]]]:
        """Site -> controls that act there in this phase of this step, in the caller's order."""
        plan = self.run.plan
        active = plan.active(step.i)
        key = (tuple(plan.indices[id(entry.control)] for entry in active), phase)
        if key not in self._acting:
            attention: dict[str, list[Control]] = {}
            features: dict[str, list[Control]] = {}
            for entry in active:
                if phase not in entry.declaration.phases:
                    continue
                for site in entry.declaration.attention:
                    attention.setdefault(site.name, []).append(entry.control)
                for site in entry.declaration.features:
                    features.setdefault(site.name, []).append(entry.control)
            self._acting[key] = attention, features
        return self._acting[key]


def merge_residuals(residuals: list[Residuals], layout: Layout, rows_of: RowsOf) -> Residuals | None:
    """Sum of what auxiliary networks give, with zeros for the branches they leave out; None if nothing."""
    down: list[torch.Tensor] = []
    intrablock: list[torch.Tensor] = []
    mid: torch.Tensor | None = None
    for part in residuals:
        if not any(name in layout for name in part.branches):
            continue
        down = _sum(down, [_scatter(x, part, layout, rows_of) for x in part.down])
        intrablock = _sum(intrablock, [_scatter(x, part, layout, rows_of) for x in part.intrablock])
        if part.mid is not None:
            placed = _scatter(part.mid, part, layout, rows_of)
            mid = placed if mid is None else mid + placed
    if not down and not intrablock and mid is None:
        return None
    if down and mid is None:
        # The UNet adds neither without the other.
        mid = down[-1].new_zeros(1, 1, 1, 1)
    return Residuals(layout.names, tuple(down), mid, tuple(intrablock))


def _sum(total: list[torch.Tensor], more: list[torch.Tensor]) -> list[torch.Tensor]:
    if not total or not more:
        return total or more
    if len(total) != len(more):
        raise ValueError(f"auxiliary networks give {len(total)} and {len(more)} residuals for one UNet")
    return [a + b for a, b in zip(total, more, strict=True)]


def _scatter(x: torch.Tensor, part: Residuals, layout: Layout, rows_of: RowsOf) -> torch.Tensor:
    """Rows of a residual put where their branches are in the pass."""
    if part.branches == layout.names:
        return x
    held = Layout((name, rows_of(name)) for name in part.branches)
    rows = [
        x[held.rows(name)] if name in held else x.new_zeros(layout.size(name), *x.shape[1:]) for name in layout.names
    ]
    return torch.cat(rows)


def predict(step: Step) -> dict[str, torch.Tensor]:
    """Run the main pass of a step and combine it: state -> prediction for its solver.

    Fills ``step.eps`` (raw, by branch) and ``step.combined`` (by state, before the merge of views).
    """
    assert step.run.forward is not None
    step.eps = step.run.forward(step, step.running, "main")
    return combine(step)


def combine(step: Step) -> dict[str, torch.Tensor]:
    """Combine the raw predictions ``step.eps`` of a main pass: state -> prediction for its solver."""
    run = step.run
    found: dict[str, torch.Tensor] = {}
    for state in solved_states(run.plan, step.i):
        combined = _combine(step, state)
        step.combined[state] = combined
        for entry in run.plan.active(step.i):
            if implements(entry.control, "guide"):
                delta = entry.control.guide(step, state)
                if delta is not None:
                    step.combined[state] = step.combined[state] + delta
        if state in step.additions:
            added = step.additions[state]
            if run.plan.views is not None and state == IMAGE:
                added = run.plan.views.split(added)
            step.combined[state] = step.combined[state] + added
        text, guided = step.role(state, "cond"), step.role(state, "uncond") is not None
        rescale = run.plan.rescale(step.i) or run.guidance.rescale
        if rescale > 0 and guided and text is not None and step.i not in run.plan.unguided:
            step.combined[state] = rescaled(step.combined[state], step.eps[text], rescale)
        merged = step.combined[state]
        if run.plan.views is not None and state == IMAGE:
            merged = run.plan.views.merge(merged)
        found[state] = merged
    return found


def solved_states(plan: Plan, i: int) -> tuple[str, ...]:
    """Solver states with a branch at step i."""
    running = {plan.branches[name].state for name in plan.running(i)}
    return tuple(name for name, state in plan.states.items() if state.advance == "solver" and name in running)


def _combine(step: Step, state: str) -> torch.Tensor:
    for entry in step.run.plan.active(step.i) if step.i not in step.run.plan.unguided else ():
        if implements(entry.control, "combine"):
            result = entry.control.combine(step, state)
            if result is not None:
                return result
    return classifier_free(step, state)
