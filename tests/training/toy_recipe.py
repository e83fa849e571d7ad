"""A recipe of a few hundred parameters, with dropout, a frozen net, a finite dataset and noise; also a program to kill.

`python toy_recipe.py OUTPUT STEPS PAUSE` trains it, PAUSE seconds a step, saving every two steps.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.settings import TrainSettings


class ToyRecipe:
    """Learns to undo noise; dataset of 10 points unless endless."""

    name = "toy"

    def __init__(self, pause: float = 0.0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.SiLU(), nn.Linear(8, 6))
            self.fixed = nn.Linear(6, 6)
        self.dataset_size: int | None = 10
        self.pause = pause
        self.seen: list[list[int]] = []
        self.noise: list[Tensor] = []

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def frozen(self) -> dict[str, nn.Module]:
        return {"fixed": self.fixed}

    def batch(self, indices: Sequence[int], step: int) -> Tensor:
        self.seen.append(list(indices))
        return torch.stack([torch.sin(torch.arange(6) * (1.0 + i)) for i in indices])

    def loss(self, batch: Tensor, step: int, rng: StepRandom) -> Losses:
        time.sleep(self.pause)
        noise = rng.normal("noise", (6,))
        self.noise.append(noise)
        error = (self.net(self.fixed(batch + noise)) - batch).float().square().mean()
        return Losses(error, {"error": error.detach()})

    def export(self, folder: Path) -> None:
        save_file(self.net.state_dict(), folder / "net.safetensors")

    def load(self, folder: Path) -> None:
        self.net.load_state_dict(load_file(folder / "net.safetensors"))


def toy_settings(output_dir: Path, **changes: object) -> TrainSettings:
    values = {
        "output_dir": output_dir,
        "seed": 5,
        "total_steps": 10,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "schedule": "cosine",
        "warmup_steps": 2,
        "ema_decay": 0.99,
        "checkpoint_every_seconds": None,
        "log_every": 4,
        "threads": 1,
    }
    return TrainSettings.model_validate({**values, **changes})


if __name__ == "__main__":
    folder, steps, pause = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    print("ready", flush=True)
    result = train(ToyRecipe(pause), toy_settings(folder, total_steps=steps, checkpoint_every_steps=2))
    print(result.reason, result.step, result.resumable, flush=True)
