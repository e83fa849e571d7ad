"""A run that somebody looks into: after each step, with all that the step knows."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.execute import run_spec

if TYPE_CHECKING:
    from controlroom.core.result import RunResult
    from controlroom.core.run import Run
    from controlroom.sampling.loop import OnStep
    from controlroom.sampling.pipeline import Pipeline


def draw_observed(pipe: Pipeline, spec: RunSpec, look: Callable[[Step], bool]) -> RunResult:
    """Execute a run as `Pipeline.run` does, and call ``look`` after each step; True ends the run there.

    The step's run holds what controls remember: ``step.memory(control)``.
    """
    enough = False

    def on_step(run: Run) -> OnStep:
        def called(i: int, t: torch.Tensor, step: Step) -> None:
            nonlocal enough
            enough = look(step)

        return called

    with pipe._lock:
        pipe._interrupt = False
        try:
            return run_spec(pipe.backbone, spec, on_step=on_step, cancelled=lambda: enough or pipe._interrupt)
        finally:
            if pipe._offload_hooks:
                pipe._offload_hooks[-1].offload()
