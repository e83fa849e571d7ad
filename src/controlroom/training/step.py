"""One optimizer step: the batch in parts, gradients of all processes, the checks before anything moves, the average."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from controlroom.core.errors import ModelError
from controlroom.training.divergence import refuse_step
from controlroom.training.ema import Ema
from controlroom.training.hardware import fast_bfloat16, moved
from controlroom.training.processes import Processes
from controlroom.training.randomness import DataOrder, StepRandom, parts_of, seed_of, slots_of
from controlroom.training.recipe import AfterStep, FiniteData, Losses, Order, Ordered, Recipe
from controlroom.training.settings import TrainSettings


def order_of(recipe: Recipe[Any], batch_size: int, seed: int, first_slot: int = 0) -> Order:
    """Which datum each sample shows: the recipe's own order, else a shuffle each epoch, else the sample's number."""
    if isinstance(recipe, Ordered):
        return recipe.batch_order(batch_size, seed, first_slot)
    return DataOrder(seed, recipe.dataset_size if isinstance(recipe, FiniteData) else None)


def place_modules(modules: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module], device: torch.device) -> None:
    """Bring everything to the device; what trains is in training mode, what does not is frozen."""
    for module in frozen.values():
        module.to(device).requires_grad_(False).eval()
    for module in modules.values():
        module.to(device).train()


def computes_in_bfloat16(settings: TrainSettings, device: torch.device) -> bool:
    """Whether passes run in bfloat16: asked for, or left open and faster here."""
    return settings.mixed_precision == "bf16" or (settings.mixed_precision == "auto" and fast_bfloat16(device))


def loss_of(
    recipe: Recipe[Any], batch: Any, step: int, slots: range, seed: int, device: torch.device, bfloat16: bool
) -> Losses:
    """The loss of one pass on the device.

    Random numbers go by slot; layers with randomness of their own (dropout) get the seed of the first slot.
    """
    torch.manual_seed(seed_of(seed, slots[0], "layers"))
    rng = StepRandom(seed, step, slots, device)
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        return recipe.loss(moved(batch, device), step, rng)


class Stepper:
    """Takes the steps of a run. It keeps nothing between them besides what a checkpoint holds."""

    def __init__(
        self,
        recipe: Recipe[Any],
        settings: TrainSettings,
        processes: Processes,
        device: torch.device,
        bfloat16: bool,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        ema: Ema | None,
        start_samples: int,
    ) -> None:
        self.recipe, self.settings, self.processes = recipe, settings, processes
        self.device, self.bfloat16 = device, bfloat16
        self.parameters, self.optimizer, self.ema = list(parameters.values()), optimizer, ema
        self.start_samples = start_samples
        self._size = recipe.dataset_size if isinstance(recipe, FiniteData) else None
        # Used by the thread that makes batches, if there is one.
        self._order = order_of(recipe, settings.batch_size, settings.seed, start_samples)
        # -- what the processes must have in common and gradients do not give them: running statistics --
        modules = recipe.modules().values()
        self._statistics = [b for m in modules for b in m.buffers() if b.is_floating_point()]

    def parts(self, step: int, rank: int) -> list[range]:
        """The slots that a process shows at a step, pass by pass."""
        settings = self.settings
        slots = slots_of(step, settings.batch_size, self.start_samples, rank, self.processes.world)
        return parts_of(slots, settings.accumulate)

    def batch(self, number: int) -> Any:
        """The data of one pass; passes are counted over all steps, `accumulate` to a step."""
        step, part = divmod(number, self.settings.accumulate)
        with torch.no_grad():
            return self.recipe.batch(self._order.indices(self.parts(step, self.processes.rank)[part]), step)

    def take(self, step: int, batches: Iterator[Any], rate: float) -> dict[str, float]:
        """Take one step at learning rate `rate`; gives the numbers for the log.

        Raises:
            DivergedError: in all processes, before anything moved.
            ModelError: the loss depends on nothing that trains.
        """
        settings = self.settings

        # -- loss and gradient, part by part; a loss that is not finite has no gradient worth having --
        self.optimizer.zero_grad(set_to_none=True)
        values: list[float] = []
        logged: dict[str, float] = {}
        for slots in self.parts(step, self.processes.rank):
            batch = next(batches)
            losses = loss_of(self.recipe, batch, step, slots, settings.seed, self.device, self.bfloat16)
            values.append(float(losses.total.detach()))
            for name, value in losses.parts.items():
                logged[name] = logged.get(name, 0.0) + float(value) / settings.accumulate
            if math.isfinite(values[-1]):
                (losses.total if settings.accumulate == 1 else losses.total / settings.accumulate).backward()

        # -- all together; of the parts of losses, those of the main process are logged --
        table = self.processes.table(values)
        self._finite_losses(step, table)
        self.processes.average_gradients(self.parameters)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if not gradients:
            raise ModelError(f"The loss of recipe {self.recipe.name!r} depends on no parameter in modules().")
        norm = torch.nn.utils.get_total_norm(gradients)
        if not math.isfinite(float(norm)):
            whole = slots_of(step, settings.batch_size, self.start_samples)
            self._refuse("gradient norm", float(norm), step, [whole])
        if settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters, settings.clip_grad_norm, norm)

        # -- step and average --
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        self.optimizer.step()
        if isinstance(self.recipe, AfterStep):
            with torch.no_grad():
                self.recipe.after_step(step)
        self.processes.follow_main(self._statistics)
        if self.ema is not None:
            self.ema.update(step)
        every = [value for row in table for value in row]
        return {"loss": sum(every) / len(every), **logged, "gradient_norm": float(norm)}

    def _finite_losses(self, step: int, table: list[list[float]]) -> None:
        """Raise DivergedError for the parts, of whichever process, whose loss is not finite."""
        bad = [(rank, part) for rank, row in enumerate(table) for part, v in enumerate(row) if not math.isfinite(v)]
        if bad:
            rank, part = bad[0]
            self._refuse("loss", table[rank][part], step, [self.parts(step, rank)[part] for rank, part in bad])

    def _refuse(self, what: str, value: float, step: int, slots: list[range]) -> None:
        order = DataOrder(self.settings.seed, self._size)  # one of its own, since a thread may be using the other
        folder = self.settings.output_dir
        self.processes.by_main(lambda: refuse_step(what, value, step, slots, order, self.recipe, folder))
