"""Optimizers: AdamW, and Muon, momentum whose every matrix is made orthogonal (Jordan et al., 2024).

With Muon, steps in all directions of a weight matrix become equally long, by five Newton-Schulz iterations on the
momentum. On a narrow variant of the theatre's autoencoder it was 1.1 dB ahead of AdamW after 400 steps from nothing,
for a tenth more time a step. Convolutions count as matrices [out, in * k * k]; embeddings, vectors, and the first and
last layers (four channels or fewer on one side) stay with AdamW, as the authors advise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from controlroom.training.settings import TrainSettings

# Coefficients of the quintic iteration that pushes singular values towards 1 fastest (Jordan's choice).
_A, _B, _C = 3.4445, -4.7750, 2.0315


def orthogonalised(matrix: Tensor, iterations: int = 5) -> Tensor:
    """A matrix [m, n] with the singular vectors of ``matrix`` and singular values between about 0.7 and 1.2."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    if tall:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = _A * x + (_B * gram + _C * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def is_matrix(parameter: Tensor) -> bool:
    """Whether Muon moves a parameter: a linear or convolution weight between layers of more than four channels."""
    return parameter.ndim in (2, 4) and min(parameter.shape[:2]) > 4


def embeddings(modules: Mapping[str, nn.Module]) -> set[int]:
    """Ids of the weights of embedding tables: their rows are words, not directions."""
    return {id(m.weight) for module in modules.values() for m in module.modules() if isinstance(m, nn.Embedding)}


class Muon(torch.optim.Optimizer):
    """Muon for the matrices, AdamW for everything else, as one optimizer.

    The learning rate of each group is set by the loop: its rate times the group's ``rate_factor``.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        learning_rate: float,
        matrix_learning_rate: float,
        weight_decay: float,
        betas: tuple[float, float],
        epsilon: float,
        momentum: float = 0.95,
        plain: set[int] | None = None,
    ) -> None:
        every = list(parameters)
        skipped = plain or set()
        matrices = [p for p in every if is_matrix(p) and id(p) not in skipped]
        chosen = {id(p) for p in matrices}
        rest = [p for p in every if id(p) not in chosen]
        groups = [
            {"params": matrices, "rate_factor": matrix_learning_rate / learning_rate, "matrix": True},
            {"params": rest, "rate_factor": 1.0, "matrix": False},
        ]
        super().__init__([g for g in groups if g["params"]], {"lr": learning_rate, "weight_decay": weight_decay})
        self.momentum = momentum
        self._adamw = None
        if rest:
            self._adamw = torch.optim.AdamW(
                rest, lr=learning_rate, betas=betas, eps=epsilon, weight_decay=weight_decay, fused=True
            )
            self._adamw.state = self.state  # one place for all moments, so that a checkpoint finds them

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            if not group["matrix"]:
                assert self._adamw is not None
                self._adamw.param_groups[0]["lr"] = group["lr"]
                self._adamw.step()
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"], group["weight_decay"])

    def _move(self, parameter: Tensor, rate: float, decay: float) -> None:
        state = self.state[parameter]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - self.momentum)  # type: ignore[arg-type]
        ahead = torch.lerp(parameter.grad, state["momentum"], self.momentum)  # type: ignore[arg-type]
        direction = orthogonalised(ahead.reshape(ahead.shape[0], -1))
        stretch = max(1.0, direction.shape[0] / direction.shape[1]) ** 0.5
        parameter.mul_(1 - rate * decay).add_(direction.view_as(parameter), alpha=-rate * stretch)


def new_optimizer(
    settings: TrainSettings, parameters: Mapping[str, nn.Parameter], modules: Mapping[str, nn.Module]
) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for, over the parameters that train."""
    trained = list(parameters.values())
    if settings.optimizer == "muon":
        return Muon(
            trained,
            settings.learning_rate,
            settings.matrix_learning_rate,
            settings.weight_decay,
            settings.betas,
            settings.epsilon,
            plain=embeddings(modules),
        )
    return torch.optim.AdamW(
        trained,
        lr=settings.learning_rate,
        betas=settings.betas,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        fused=True,
    )
