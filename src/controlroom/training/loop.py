"""The training loop: one for every recipe, exact across interruption, in one process or several.

Order of data and noise are functions of (seed, slot), where a slot is the number of a sample since training began; the
learning rate is a function of the step. What is left to save is weights, averages, moments and the step, so a run
that was stopped or killed and resumed is bit-equal to an unbroken one on the same machine with as many processes and
threads. Several processes (`processes.py`) share the slots of a step; the main one writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlroom.core.errors import InputError, ModelError
from controlroom.training.checkpoint import (
    Checkpoint,
    ResumeError,
    checkpoints,
    load_checkpoint,
    modules_hash,
    newest_whole,
    optimizer_numbers,
    optimizer_tensors,
    prune,
    remove_unfinished,
    restore_optimizer,
    save_checkpoint,
)
from controlroom.training.divergence import DivergedError as DivergedError
from controlroom.training.ema import Ema
from controlroom.training.export import export_weights, samples_seen
from controlroom.training.hardware import usable_device
from controlroom.training.held_out import check_measures_itself
from controlroom.training.identity import identity_of, refuse_other_run, trained_parameters
from controlroom.training.optimizers import new_optimizer
from controlroom.training.prefetch import batches_ahead
from controlroom.training.previews import isolated_randomness, write_previews
from controlroom.training.processes import Processes
from controlroom.training.progress import Progress
from controlroom.training.randomness import seed_of
from controlroom.training.recipe import Previews, Recipe, Reloads, Validates
from controlroom.training.recompute import recomputing
from controlroom.training.settings import TrainSettings, learning_rate_at
from controlroom.training.step import Stepper, computes_in_bfloat16, place_modules
from controlroom.training.stop import Clock, StopRequest, agreed, only_run_in


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
    samples in their metadata), `log.jsonl`, `previews/`. Call again with the same arguments to continue.

    Started by torchrun, `accelerate launch` or MPI, the processes train together: each calls this with the same
    arguments and its own recipe, shows its share of every batch, and gets the same result.

    Raises:
        ResumeError: the checkpoint was made with other settings, another recipe or other frozen weights, or there are
            checkpoints and `resume` is false.
        DivergedError: a loss or gradient was not finite; nothing was stepped or saved with it.
        InputError: the device is unknown or not on this machine, a library of the settings is not installed, or the
            batch cannot be split among the processes, or `validate_every` is set for a recipe that cannot measure
            itself or was given nothing to measure on.
        ModelError: nothing to train, a master weight that is not float32, a frozen module that moved, or processes
            whose frozen modules differ.
        OutputError: a checkpoint or export could not be written, or another process trains in the folder.
    """
    stop = StopRequest(settings.stop_after_seconds)
    with ExitStack() as stack:
        processes = Processes.joined(settings.device)
        if settings.batch_size % (processes.world * settings.accumulate):
            raise InputError(
                f"batch_size {settings.batch_size} cannot be shared equally by {processes.world} processes in "
                f"{settings.accumulate} parts each. Give a multiple of {processes.world * settings.accumulate}."
            )
        check_measures_itself(recipe, settings.validate_every)
        processes.by_main(lambda: stack.enter_context(only_run_in(settings.output_dir)))
        stack.enter_context(stop.listening())
        stack.enter_context(_torch_state_kept(settings.threads))
        return _Run(recipe, settings, processes, resume, stack).go(stop)


class _Run:
    """The state of one call of `train`."""

    def __init__(
        self, recipe: Recipe[Any], settings: TrainSettings, processes: Processes, resume: bool, stack: ExitStack
    ) -> None:
        self.recipe, self.settings, self.processes = recipe, settings, processes
        self.folder = settings.output_dir
        self.weights_folder = self.folder / "weights"

        # -- what trains, and what must not --
        self.modules, self.frozen = recipe.modules(), recipe.frozen()
        self.device = usable_device(processes.device_name(settings.device))
        place_modules(self.modules, self.frozen, self.device)
        self._order_channels(last=True)
        self.parameters = trained_parameters(self.modules, self.frozen)
        recomputed = 0
        if settings.gradient_checkpointing:
            recomputed = stack.enter_context(recomputing((*self.modules.values(), *self.frozen.values())))
        self.bfloat16 = computes_in_bfloat16(settings, self.device)
        self.frozen_hash = modules_hash(self.frozen)
        if len(set(processes.all_say(self.frozen_hash))) > 1:
            raise ModelError(f"The frozen modules of recipe {recipe.name!r} differ from process to process.")

        # -- where it starts: a checkpoint, exported weights, or the recipe's own initial weights --
        found, notes = processes.by_main(lambda: _found(self.folder, resume))
        checkpoint = None if found is None else load_checkpoint(found)
        self.step, self.start_samples = 0, 0
        if checkpoint is not None:
            self.step, self.start_samples = checkpoint.state["step"], checkpoint.state["start_samples"]
        elif settings.start_from is not None:
            if not isinstance(recipe, Reloads):
                raise ResumeError(f"start_from is {settings.start_from}, but recipe {recipe.name!r} has no load().")
            self.start_samples = samples_seen(settings.start_from)
            recipe.load(settings.start_from)
            if set(processes.all_say(modules_hash(self.frozen))) != {self.frozen_hash}:
                raise ModelError(
                    f"start_from={settings.start_from} changed a frozen module ({', '.join(self.frozen)}) of recipe "
                    f"{recipe.name!r}, which a resumed run would not have. Make the recipe with that module's weights."
                )
        self.total_steps = settings.steps_from(self.start_samples)
        self.identity = identity_of(recipe, settings.trajectory(self.start_samples), self.parameters, self.frozen_hash)

        # -- optimizer, average, and what a checkpoint says of them --
        self.optimizer = new_optimizer(settings, self.parameters, self.modules)
        if checkpoint is not None:
            refuse_other_run(checkpoint.path, checkpoint.state["identity"], self.identity)
            for name, module in self.modules.items():
                module.load_state_dict(checkpoint.weights[name])
            numbers = checkpoint.state.get("optimizer_numbers")
            restore_optimizer(self.optimizer, self.parameters, checkpoint.optimizer, numbers)
        processes.follow_main(tensor for module in self.modules.values() for tensor in module.state_dict().values())
        self.ema = None if settings.ema_decay is None else Ema(self.parameters, settings.ema_decay)
        if checkpoint is not None and self.ema is not None:
            for name, average in self.ema.averages.items():
                average.copy_(checkpoint.ema[name])

        # -- steps, log, clocks --
        self.stepper = Stepper(
            recipe,
            settings,
            processes,
            self.device,
            self.bfloat16,
            self.parameters,
            self.optimizer,
            self.ema,
            self.start_samples,
        )
        self.clock = Clock(settings.checkpoint_every_seconds, settings.checkpoint_every_steps)
        self.losses: dict[str, float] = {}
        place = self.folder if processes.main else None
        self.progress = Progress(place, self.total_steps, settings.batch_size, settings.log_to, self.step)
        stack.callback(self.progress.close)
        self._tell_start(checkpoint, notes, recomputed)

    @property
    def samples(self) -> int:
        """Samples the weights have seen, those before `start_from` included; also the next slot."""
        return self.start_samples + self.step * self.settings.batch_size

    def _tell_start(self, checkpoint: Checkpoint | None, notes: list[str], recomputed: int) -> None:
        for note in notes:
            self.progress.event("broken checkpoint", note, note=note)
        start = "resume" if checkpoint is not None else "start"
        count = sum(p.numel() for p in self.parameters.values())
        place = f"step {self.step}/{self.total_steps}, sample {self.samples}"
        text = f"{self.recipe.name} at {place}, {count} parameters train"
        if self.processes.world > 1:
            text += f", {self.processes.world} processes"
        if self.settings.gradient_checkpointing:
            text += f", {recomputed} modules recompute" if recomputed else ", no module can recompute"
        self.progress.event(start, text, step=self.step, samples=self.samples, parameters=count)
        if checkpoint is None:
            return
        before = checkpoint.state
        counts = {
            "threads": (before["threads"], torch.get_num_threads()),
            "processes": (before.get("processes", 1), self.processes.world),
            "accumulate": (before["settings"].get("accumulate", 1), self.settings.accumulate),
        }
        for name, (then, now) in counts.items():
            if then != now:
                text = f"{name}: {then} before, {now} now: equal only to rounding"
                self.progress.event(name, text, **{name: now})

    def go(self, stop: StopRequest) -> TrainResult:
        settings = self.settings
        parts = settings.accumulate
        reason, _ = agreed(self.processes, stop.reason, due=False)
        with batches_ahead(
            self.stepper.batch, range(self.step * parts, self.total_steps * parts), settings.prefetch
        ) as batches:
            while self.step < self.total_steps and reason is None:
                # -- one optimizer step --
                rate = learning_rate_at(self.step, self.total_steps, settings)
                try:
                    self.progress.add(self.stepper.take(self.step, batches, rate))
                except DivergedError as error:
                    self.progress.event("diverged", str(error), step=self.step)
                    raise
                self.step += 1

                # -- tell --
                if self.step % settings.log_every == 0 or self.step == self.total_steps:
                    self.losses = self.progress.report(self.step, self.samples, rate)
                if settings.validate_every is not None and self.step % settings.validate_every == 0:
                    self.processes.by_main(self._validate)
                if settings.preview_every is not None and self.step % settings.preview_every == 0:
                    self.processes.by_main(self._preview)

                # -- keep --
                reason, due = agreed(self.processes, stop.reason, due=self.clock.due(self.step))
                if reason is None and self.step < self.total_steps and due:
                    self._save()
                    if settings.export_with_checkpoint:
                        self.processes.by_main(self._export)

        # -- end: the same whether finished or stopped --
        self._check_frozen()
        path = self._save()
        self.processes.by_main(self._export)
        reason = "finished" if self.step >= self.total_steps else str(reason)
        text = (
            f"{reason} at step {self.step}/{self.total_steps}, sample {self.samples}; weights in {self.weights_folder}"
        )
        if reason != "finished":
            text += "; run again with the same settings to resume"
        self.progress.event("end", text, reason=reason, step=self.step, samples=self.samples)
        return TrainResult(self.step, self.samples, reason, path, self.weights_folder, self.losses)

    # -- saving, exporting, validating --------------------------------------------------------------------------------

    def _save(self) -> Path:
        path = self.processes.by_main(self._write)
        self.clock.reset()
        self.progress.event("checkpoint", str(path), step=self.step, samples=self.samples)
        return path

    def _write(self) -> Path:
        state = {
            "step": self.step,
            "samples": self.samples,
            "start_samples": self.start_samples,
            "identity": self.identity,
            "settings": self.settings.model_dump(mode="json"),
            "threads": torch.get_num_threads(),
            "processes": self.processes.world,
            "optimizer_numbers": optimizer_numbers(self.optimizer, self.parameters),
            "torch": torch.__version__,
        }
        ema: Mapping[str, Tensor] = {} if self.ema is None else self.ema.averages
        moments = optimizer_tensors(self.optimizer, self.parameters)
        path = save_checkpoint(self.folder, self.step, state, self.modules, ema, moments)
        prune(self.folder, self.settings.keep_checkpoints)
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
            self.progress.validation(self.step, values)

    def _preview(self) -> None:
        if isinstance(self.recipe, Previews):
            with isolated_randomness(seed_of(self.settings.seed, 0, "previews")), self._averaged():
                pictures = self.recipe.preview(self.step)
            paths = write_previews(pictures, self.folder / "previews", self.step)
            self.progress.previews(self.step, pictures, paths)

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
            module.to(memory_format=order)  # type: ignore[call-overload]  torch types it for tensors only

    # -- checks -------------------------------------------------------------------------------------------------------

    def _check_frozen(self) -> None:
        if set(self.processes.all_say(modules_hash(self.frozen))) != {self.frozen_hash}:
            names = ", ".join(self.frozen)
            raise ModelError(f"A frozen module ({names}) of recipe {self.recipe.name!r} moved; this run was not saved.")


def _found(folder: Path, resume: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, if any, and what is wrong with later ones; leftovers of a kill are removed."""
    remove_unfinished(folder)
    if not resume and checkpoints(folder):
        raise ResumeError(f"{folder} holds checkpoints and resume is off. Delete it or give another output_dir.")
    return newest_whole(folder)


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
