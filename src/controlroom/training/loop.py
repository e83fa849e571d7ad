"""The training loop: one for every recipe, exact across interruption.

Order of data and noise are functions of (seed, slot), where a slot is the number of a sample since training began; the
learning rate is a function of the step. What is left to save is weights, averages, moments and the step, so a run
that was stopped or killed and resumed is bit-equal to an unbroken one on the same machine with as many threads.

A single process for now. The seam for several is `slots_of`: each takes its share of the slots of a step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlroom.core.errors import ControlRoomError, ModelError
from controlroom.training.checkpoint import (
    ResumeError,
    checkpoints,
    load_checkpoint,
    modules_hash,
    newest_whole,
    optimizer_tensors,
    prune,
    remove_unfinished,
    restore_optimizer,
    save_checkpoint,
)
from controlroom.training.ema import Ema
from controlroom.training.export import export_weights, samples_seen
from controlroom.training.hardware import fast_bfloat16, moved, usable_device
from controlroom.training.identity import identity_of, refuse_other_run, trained_parameters
from controlroom.training.optimizers import new_optimizer
from controlroom.training.prefetch import batches_ahead
from controlroom.training.progress import Progress
from controlroom.training.randomness import DataOrder, StepRandom, seed_of, slots_of
from controlroom.training.recipe import AfterStep, FiniteData, Recipe, Reloads, Validates
from controlroom.training.settings import TrainSettings, learning_rate_at
from controlroom.training.stop import Clock, StopRequest, only_run_in


class DivergedError(ControlRoomError):
    """A loss or gradient that is not finite. The step was not taken; the last checkpoint is good."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How a call of `train` ended. `reason` is `finished`, `time box`, `SIGTERM` or `SIGINT`."""

    step: int
    samples: int
    reason: str
    checkpoint: Path
    weights: Path
    losses: dict[str, float]

    @property
    def finished(self) -> bool:
        return self.reason == "finished"

    @property
    def resumable(self) -> bool:
        return not self.finished


def train(recipe: Recipe[Any], settings: TrainSettings, *, resume: bool = True) -> TrainResult:
    """Train until the total is reached, the time box ends, or SIGTERM or SIGINT arrives; then save and export.

    Writes to `settings.output_dir`: `step-N/` checkpoints, `weights/` (exported, averaged weights, with the number of
    samples in their metadata), `log.jsonl`. Call again with the same arguments to continue.

    Raises:
        ResumeError: the checkpoint was made with other settings, another recipe or other frozen weights, or there are
            checkpoints and `resume` is false.
        DivergedError: a loss or gradient was not finite; nothing was stepped or saved with it.
        InputError: the device is unknown or not on this machine.
        ModelError: nothing to train, a master weight that is not float32, or a frozen module that moved.
        OutputError: a checkpoint or export could not be written, or another process trains in the folder.
    """
    stop = StopRequest(settings.stop_after_seconds)
    with ExitStack() as stack:
        stack.enter_context(only_run_in(settings.output_dir))
        stack.enter_context(stop.listening())
        stack.enter_context(_torch_state_kept(settings.threads))
        return _Run(recipe, settings, resume, stack).go(stop)


class _Run:
    """The state of one call of `train`."""

    def __init__(self, recipe: Recipe[Any], settings: TrainSettings, resume: bool, stack: ExitStack) -> None:
        self.recipe, self.settings = recipe, settings
        self.folder = settings.output_dir
        self.weights_folder = self.folder / "weights"

        # -- what trains, and what must not --
        self.modules, self.frozen = recipe.modules(), recipe.frozen()
        self.device = usable_device(settings.device)
        for module in (*self.modules.values(), *self.frozen.values()):
            module.to(self.device)
        self._order_channels(last=True)
        for module in self.frozen.values():
            module.requires_grad_(False).eval()
        for module in self.modules.values():
            module.train()
        self.parameters = trained_parameters(self.modules, self.frozen)
        self.bfloat16 = settings.mixed_precision == "bf16" or (
            settings.mixed_precision == "auto" and fast_bfloat16(self.device)
        )
        self.frozen_hash = modules_hash(self.frozen)

        # -- where it starts: a checkpoint, exported weights, or the recipe's own initial weights --
        remove_unfinished(self.folder)
        if not resume and checkpoints(self.folder):
            raise ResumeError(
                f"{self.folder} holds checkpoints and resume is off. Delete it or give another output_dir."
            )
        found, notes = newest_whole(self.folder)
        checkpoint = None if found is None else load_checkpoint(found)
        self.step, self.start_samples = 0, 0
        if checkpoint is not None:
            self.step, self.start_samples = checkpoint.state["step"], checkpoint.state["start_samples"]
        elif settings.start_from is not None:
            if not isinstance(recipe, Reloads):
                raise ResumeError(f"start_from is {settings.start_from}, but recipe {recipe.name!r} has no load().")
            self.start_samples = samples_seen(settings.start_from)
            recipe.load(settings.start_from)
        self.total_steps = settings.steps_from(self.start_samples)
        self.identity = identity_of(recipe, settings.trajectory(self.start_samples), self.parameters, self.frozen_hash)

        # -- optimizer, average, and what a checkpoint says of them --
        self.optimizer = new_optimizer(settings, self.parameters, self.modules)
        if checkpoint is not None:
            refuse_other_run(checkpoint.path, checkpoint.state["identity"], self.identity)
            for name, module in self.modules.items():
                module.load_state_dict(checkpoint.weights[name])
            restore_optimizer(self.optimizer, self.parameters, checkpoint.optimizer)
        self.ema = None if settings.ema_decay is None else Ema(self.parameters, settings.ema_decay)
        if checkpoint is not None and self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(checkpoint.ema[name])

        # -- data, log, clocks --
        size = recipe.dataset_size if isinstance(recipe, FiniteData) else None
        self.order = DataOrder(settings.seed, size)
        self.clock = Clock(settings.checkpoint_every_seconds, settings.checkpoint_every_steps)
        self.progress = Progress(self.folder / "log.jsonl", self.total_steps, settings.batch_size)
        stack.callback(self.progress.close)
        self.losses: dict[str, float] = {}
        for note in notes:
            self.progress.event("broken checkpoint", note, note=note)
        start = "resume" if checkpoint is not None else "start"
        count = sum(p.numel() for p in self.parameters.values())
        text = f"{recipe.name} at step {self.step}/{self.total_steps}, sample {self.samples}, {count} parameters train"
        self.progress.event(start, text, step=self.step, samples=self.samples, parameters=count)
        if checkpoint is not None and checkpoint.state["threads"] != torch.get_num_threads():
            text = (
                f"{checkpoint.state['threads']} threads before, {torch.get_num_threads()} now: equal only to rounding"
            )
            self.progress.event("threads", text, threads=torch.get_num_threads())

    @property
    def samples(self) -> int:
        """Samples the weights have seen, those before `start_from` included; also the next slot."""
        return self.start_samples + self.step * self.settings.batch_size

    def go(self, stop: StopRequest) -> TrainResult:
        settings = self.settings
        reason = stop.reason
        with batches_ahead(self._batch, range(self.step, self.total_steps), settings.prefetch) as batches:
            while self.step < self.total_steps and reason is None:
                # -- one optimizer step --
                batch = moved(next(batches), self.device)
                rate = learning_rate_at(self.step, self.total_steps, settings)
                self.progress.add(self._take_step(batch, rate))
                self.step += 1

                # -- tell --
                if self.step % settings.log_every == 0 or self.step == self.total_steps:
                    self.losses = self.progress.report(self.step, self.samples, rate)
                if settings.validate_every is not None and self.step % settings.validate_every == 0:
                    self._validate()

                # -- keep --
                reason = stop.reason
                if reason is None and self.step < self.total_steps and self.clock.due(self.step):
                    self._save()
                    if settings.export_with_checkpoint:
                        self._export()

        # -- end: the same whether finished or stopped --
        self._check_frozen()
        path = self._save()
        self._export()
        reason = "finished" if self.step >= self.total_steps else str(reason)
        text = (
            f"{reason} at step {self.step}/{self.total_steps}, sample {self.samples}; weights in {self.weights_folder}"
        )
        if reason != "finished":
            text += "; run again with the same settings to resume"
        self.progress.event("end", text, reason=reason, step=self.step, samples=self.samples)
        return TrainResult(self.step, self.samples, reason, path, self.weights_folder, self.losses)

    # -- one step -----------------------------------------------------------------------------------------------------

    def _batch(self, step: int) -> Any:
        slots = slots_of(step, self.settings.batch_size, self.start_samples)
        with torch.no_grad():
            return self.recipe.batch(self.order.indices(slots), step)

    def _take_step(self, batch: Any, rate: float) -> dict[str, float]:
        settings, step = self.settings, self.step
        slots = slots_of(step, settings.batch_size, self.start_samples)

        # -- loss: random numbers by slot; layers with randomness of their own (dropout) get the step's seed --
        torch.manual_seed(seed_of(settings.seed, slots[0], "layers"))
        rng = StepRandom(settings.seed, step, slots, self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bfloat16):
            losses = self.recipe.loss(batch, step, rng)
        self._finite(float(losses.total.detach()), "loss")

        # -- gradient --
        self.optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        if not gradients:
            raise ModelError(f"The loss of recipe {self.recipe.name!r} depends on no parameter in modules().")
        norm = torch.nn.utils.get_total_norm(gradients)
        self._finite(float(norm), "gradient norm")
        if settings.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(list(self.parameters.values()), settings.clip_grad_norm, norm)

        # -- step and average --
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get("rate_factor", 1.0)
        self.optimizer.step()
        if isinstance(self.recipe, AfterStep):
            with torch.no_grad():
                self.recipe.after_step(step)
        if self.ema is not None:
            self.ema.update(step)
        parts = {name: float(value) for name, value in losses.parts.items()}
        return {"loss": float(losses.total.detach()), **parts, "gradient_norm": float(norm)}

    def _finite(self, value: float, what: str) -> None:
        if math.isfinite(value):
            return
        slots = slots_of(self.step, self.settings.batch_size, self.start_samples)
        indices = self.order.indices(slots)
        kept = checkpoints(self.folder)
        last = f"the last good checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        text = (
            f"The {what} is {value} at step {self.step} (slots {slots[0]} to {slots[-1]}, data {indices[:8]}"
            f"{' ...' if len(indices) > 8 else ''}). The step was not taken and nothing was saved; {last}. Look at "
            f"these samples, lower the learning rate, or train in float32."
        )
        self.progress.event("diverged", text, step=self.step, first_slot=slots[0], last_slot=slots[-1])
        raise DivergedError(text)

    # -- saving, exporting, validating --------------------------------------------------------------------------------

    def _save(self) -> Path:
        state = {
            "step": self.step,
            "samples": self.samples,
            "start_samples": self.start_samples,
            "identity": self.identity,
            "settings": self.settings.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }
        ema: Mapping[str, Tensor] = {} if self.ema is None else self.ema.averages
        moments = optimizer_tensors(self.optimizer, self.parameters)
        path = save_checkpoint(self.folder, self.step, state, self.modules, ema, moments)
        prune(self.folder, self.settings.keep_checkpoints)
        self.clock.reset()
        self.progress.event("checkpoint", str(path), step=self.step, samples=self.samples)
        return path

    def _export(self) -> None:
        metadata = {"samples": str(self.samples), "recipe": self.recipe.name, "seed": str(self.settings.seed)}
        with self._averaged():
            self._order_channels(last=False)  # files hold contiguous tensors
            export_weights(self.recipe, self.weights_folder, metadata)
            self._order_channels(last=True)

    def _validate(self) -> None:
        if isinstance(self.recipe, Validates):
            with self._averaged():
                values = self.recipe.validate(self.step)
            numbers = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
            self.progress.event("validation", f"step {self.step}  {numbers}", step=self.step, **values)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place, modules in eval mode, no gradients; all as before afterwards."""
        modes = {m: m.training for module in self.modules.values() for m in module.modules()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.ema is not None:
                stack.enter_context(self.ema.in_place())
            for module in self.modules.values():
                module.eval()
            try:
                yield
            finally:
                for module, mode in modes.items():
                    module.training = mode

    def _order_channels(self, *, last: bool) -> None:
        """With `channels_last`: weights of convolutions as [out, h, w, in] in memory, or contiguous; values stay."""
        if not self.settings.channels_last:
            return
        order = torch.channels_last if last else torch.contiguous_format
        for module in (*self.modules.values(), *self.frozen.values()):
            module.to(memory_format=order)

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_frozen(self) -> None:
        if modules_hash(self.frozen) != self.frozen_hash:
            names = ", ".join(self.frozen)
            raise ModelError(f"A frozen module ({names}) of recipe {self.recipe.name!r} moved; this run was not saved.")


@contextmanager
def _torch_state_kept(threads: int | None) -> Iterator[None]:
    """Put the global random state and the number of threads back afterwards."""
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng():
            if threads is not None:
                torch.set_num_threads(threads)
            yield
    finally:
        torch.set_num_threads(before)
