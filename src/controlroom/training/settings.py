"""Settings of a training run, and the learning rate as a pure function of the step.

Nothing here loads torch. Fields that change the course of training are part of the fingerprint a checkpoint carries;
fields that only say where, how long and how often to write are not, so they may change between a run and its resume.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

# Changing one of these between a run and its resume would give a run that neither settings describe.
TRAJECTORY_FIELDS = (
    "seed",
    "batch_size",
    "optimizer",
    "learning_rate",
    "matrix_learning_rate",
    "schedule",
    "warmup_steps",
    "final_fraction",
    "weight_decay",
    "betas",
    "epsilon",
    "clip_grad_norm",
    "ema_decay",
    "mixed_precision",
)
# The same, but younger than the first checkpoints: left out of the fingerprint at their defaults, so that a run which
# began before they existed goes on.
LATER_TRAJECTORY_FIELDS = ("schedule_cycles", "schedule_power")


class TrainSettings(BaseModel):
    """What the loop does, apart from what is learned (that is the recipe).

    Exactly one of `total_steps` (optimizer steps of this run) and `total_samples` (samples the weights have seen in
    all, those before `start_from` included) is given.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    output_dir: Path
    seed: int = Field(default=0, ge=0, lt=2**63)
    total_steps: PositiveInt | None = None
    total_samples: PositiveInt | None = None
    batch_size: PositiveInt = Field(default=32, description="samples of one optimizer step, over all processes")
    accumulate: PositiveInt = Field(
        default=1, description="parts in which each process shows its share of a step: less memory, the same step"
    )

    optimizer: Literal["adamw", "muon", "adafactor", "prodigy", "adamw8bit"] = "adamw"
    matrix_learning_rate: PositiveFloat = Field(default=0.02, description="of the weight matrices that Muon moves")
    learning_rate: PositiveFloat = 1e-4
    schedule: Literal["constant", "cosine", "linear", "cosine_restarts", "polynomial"] = "constant"
    schedule_cycles: PositiveInt = Field(default=1, description="half waves of cosine_restarts")
    schedule_power: PositiveFloat = Field(default=1.0, description="exponent of polynomial; 1 is linear")
    warmup_steps: int = Field(default=0, ge=0)
    final_fraction: float = Field(default=0.0, ge=0.0, le=1.0, description="learning rate at the end / peak")
    weight_decay: float = Field(default=0.01, ge=0.0)
    betas: tuple[float, float] = (0.9, 0.999)
    epsilon: PositiveFloat = 1e-8
    clip_grad_norm: PositiveFloat | None = 1.0
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0)
    mixed_precision: Literal["no", "bf16", "auto"] = Field(
        default="no", description="auto: bfloat16 where the machine is faster in it"
    )

    channels_last: bool = Field(
        default=False, description="keep images and convolutions as [B, h, w, C], which a CPU convolves faster"
    )

    gradient_checkpointing: bool = Field(
        default=False, description="compute activations again in the backward pass instead of keeping them"
    )

    start_from: Path | None = Field(default=None, description="folder of exported weights to continue from")
    checkpoint_every_seconds: PositiveFloat | None = 180.0
    checkpoint_every_steps: PositiveInt | None = None
    keep_checkpoints: PositiveInt = 2
    export_with_checkpoint: bool = Field(default=False, description="refresh the exported weights at each checkpoint")
    log_every: PositiveInt = 50
    log_to: tuple[Literal["jsonl", "tensorboard"], ...] = ("jsonl",)
    validate_every: PositiveInt | None = Field(
        default=None, description="steps between validations; the recipe must have something to measure itself on"
    )
    preview_every: PositiveInt | None = Field(default=None, description="steps between previews, if the recipe draws")
    device: str = Field(default="cpu", description="where it trains: cpu, cuda, cuda:1, mps")
    threads: PositiveInt | None = None
    prefetch: bool = Field(default=False, description="make the next batch in a thread while this one trains")
    stop_after_seconds: PositiveFloat | None = None

    @model_validator(mode="after")
    def _one_total(self) -> Self:
        if (self.total_steps is None) == (self.total_samples is None):
            raise ValueError("give exactly one of total_steps and total_samples")
        if not all(0.0 <= beta < 1.0 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must be at least 0 and below 1")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is no multiple of accumulate, {self.accumulate}")
        if self.optimizer == "prodigy" and self.learning_rate < 0.01:
            raise ValueError(
                f"prodigy finds the rate itself and learning_rate multiplies it; {self.learning_rate} would not move "
                "anything. Give 1.0"
            )
        return self

    def steps_from(self, start_samples: int) -> int:
        """Optimizer steps of a run whose weights had already seen `start_samples` samples."""
        if self.total_steps is not None:
            return self.total_steps
        assert self.total_samples is not None
        return max(0, math.ceil((self.total_samples - start_samples) / self.batch_size))

    def trajectory(self, start_samples: int) -> dict[str, Any]:
        """The settings a resumed run must share with the broken one, as JSON values."""
        values = self.model_dump(mode="json", include=set(TRAJECTORY_FIELDS))
        later = self.model_dump(mode="json", include=set(LATER_TRAJECTORY_FIELDS), exclude_defaults=True)
        values.update(later)
        if self.schedule != "constant":  # a constant rate does not know how long the run is, so it may be extended
            values["steps"] = self.steps_from(start_samples)
        return values


def learning_rate_at(step: int, total_steps: int, settings: TrainSettings) -> float:
    """Learning rate of optimizer step `step` (counted from 0): linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    span = max(1, total_steps - settings.warmup_steps)
    progress = min(1.0, (step - settings.warmup_steps) / span)
    match settings.schedule:
        case "linear":
            shape = 1.0 - progress
        case "polynomial":
            shape = (1.0 - progress) ** settings.schedule_power
        case "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        case "cosine_restarts":
            place = (settings.schedule_cycles * progress) % 1.0 if progress < 1.0 else 1.0
            shape = 0.5 * (1.0 + math.cos(math.pi * place))
    return settings.learning_rate * (settings.final_fraction + (1.0 - settings.final_fraction) * shape)
