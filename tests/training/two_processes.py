"""What each process of `torchrun` does in the test of several processes: `two_processes.py OUTPUT`.

Trains under several conditions and writes down what this process saw, as `OUTPUT/rank-N.json`.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from controlroom.core.errors import ControlRoomError
from controlroom.training.checkpoint import modules_hash
from controlroom.training.loop import TrainResult, train
from controlroom.training.recipe import Losses
from tests.training.toy_recipe import ToyRecipe, toy_settings


class Plain(ToyRecipe):
    """Nothing that depends on the size of a batch: for comparison with one process."""

    def __init__(self, pause: float = 0.0) -> None:
        super().__init__(pause)
        self.net[1], self.net[2] = torch.nn.Identity(), torch.nn.Identity()


class Stopping(ToyRecipe):
    """One process alone gets a signal."""

    def loss(self, batch, step, rng):
        if step == 4 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().loss(batch, step, rng)


class Diverging(ToyRecipe):
    """One process alone has a loss that is not finite, in the second part of its share."""

    def names(self, indices):
        return [f"point {index}" for index in indices]

    def loss(self, batch, step, rng):
        losses = super().loss(batch, step, rng)
        return Losses(losses.total * float("inf")) if 31 in rng.slots else losses


class Partly(Plain):
    """A parameter that only the data of one process reach, and one that none do."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(torch.nn.Linear(6, 6))
        self.net.append(torch.nn.Linear(6, 6))

    def loss(self, batch, step, rng):
        shown = self.net[:5](self.fixed(batch + rng.normal("noise", (6,))))
        total = (shown - batch).square().mean()
        return Losses(total + self.net[5](shown).square().mean() * 2 if step % 2 == 0 and RANK == 1 else total)


class Drifting(ToyRecipe):
    """Frozen weights that are not the same everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fixed.bias.data += RANK


def ended(recipe: ToyRecipe, result: TrainResult) -> dict[str, object]:
    return {
        "reason": result.reason,
        "step": result.step,
        "checkpoint": str(result.checkpoint),
        "exists": result.checkpoint.is_dir() and result.weights.is_dir(),
        "hash": modules_hash(recipe.modules()),
        "seen": recipe.seen,
    }


def attempt(recipe: ToyRecipe, folder: Path, **changes: object) -> dict[str, object]:
    try:
        return ended(recipe, train(recipe, toy_settings(folder, **changes)))
    except ControlRoomError as error:
        return {"error": type(error).__name__, "text": str(error), "indices": getattr(error, "indices", None)}


RANK = int(os.environ.get("RANK", 0))

if __name__ == "__main__":
    out = Path(sys.argv[1])
    (out / "file").write_text("not a folder") if RANK == 0 else time.sleep(0.1)
    found = {
        "plain": attempt(Plain(), out / "plain"),
        "prefetched": attempt(Plain(), out / "prefetched", prefetch=True, accumulate=2),
        "whole": attempt(ToyRecipe(), out / "whole"),
        "stopped": attempt(Stopping(), out / "broken"),
        "resumed": attempt(ToyRecipe(), out / "broken"),
        "time box": attempt(ToyRecipe(0.02), out / "box", total_steps=10_000, stop_after_seconds=0.2 + RANK * 100),
        "diverged": attempt(Diverging(), out / "diverged", batch_size=8, accumulate=2, checkpoint_every_steps=1),
        "partly": attempt(Partly(), out / "partly", weight_decay=0.1),
        "not a folder": attempt(ToyRecipe(), out / "file"),
        "unequal": attempt(ToyRecipe(), out / "unequal", batch_size=5),
        "drifting": attempt(Drifting(), out / "drifting"),
    }
    (out / f"rank-{RANK}.json").write_text(json.dumps(found))
