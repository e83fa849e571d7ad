"""Kill a training at random moments, resume it until it ends, and compare it bit for bit with an unbroken one.

``python -m tools.kill_training --kills 50 --processes 2``. A small net trains with a checkpoint after every step. It is
sent SIGKILL after a random time, every other time not before it writes a checkpoint; with several processes all are
killed at once, or one before the others. After every kill the newest checkpoint must match its hashes. When a training
reaches its end, every tensor and number of its last checkpoint and of the exported weights is compared with those of a
training that nobody killed, and the next one begins, until all kills are spent. The exit code is 0 if all were equal.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path

import accelerate  # noqa: F401  loaded once, before the processes are forked
import torch
import torch._dynamo  # as this, which optimizers load when they are made
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.training.checkpoint import checkpoints, problem_of
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.settings import TrainSettings

PATIENCE_S = 120.0


class Victim:
    """Undoes noise: dropout, running statistics, a finite dataset, a frozen net; a checkpoint of about a megabyte."""

    name = "victim"
    dataset_size: int | None = 50

    def __init__(self, pause: float) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.net = nn.Sequential(
                nn.Linear(64, 512), nn.BatchNorm1d(512), nn.SiLU(), nn.Dropout(0.2), nn.Linear(512, 64)
            )
            self.fixed = nn.Linear(64, 64)
        self.pause = pause

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def frozen(self) -> dict[str, nn.Module]:
        return {"fixed": self.fixed}

    def batch(self, indices: Sequence[int], step: int) -> Tensor:
        return torch.stack([torch.sin(torch.arange(64) * (1.0 + i)) for i in indices])

    def loss(self, batch: Tensor, step: int, rng: StepRandom) -> Losses:
        time.sleep(self.pause)
        return Losses((self.net(self.fixed(batch + rng.normal("noise", (64,)))) - batch).square().mean())

    def export(self, folder: Path) -> None:
        save_file(self.net.state_dict(), folder / "net.safetensors")


@dataclass
class Summary:
    """What happened. `during_write` counts kills that left a half-written checkpoint behind."""

    processes: int
    kills: int = 0
    during_write: int = 0
    one_before_the_others: int = 0
    before_any_checkpoint: int = 0
    resumed: int = 0
    broken_checkpoints: int = 0
    set_aside: int = 0
    trainings: int = 0
    equal: int = 0
    tensors_each: int = 0
    steps_each: int = 0
    seconds: float = 0.0

    @property
    def good(self) -> bool:
        return self.trainings > 0 and self.equal == self.trainings and not self.broken_checkpoints


def _train(folder: Path, steps: int, pause: float, rank: int, world: int, port: int) -> None:
    """The body of a process that is killed."""
    os.environ.update(OMP_NUM_THREADS="1")
    if world > 1:  # what torchrun sets
        local = {"LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": world}
        values = {"RANK": rank, "WORLD_SIZE": world, **local, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in values.items()})
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # progress, and what gloo says of a process that was killed
    settings = TrainSettings(
        output_dir=folder,
        seed=7,
        total_steps=steps,
        batch_size=8,
        accumulate=2,
        learning_rate=1e-3,
        schedule="cosine",
        ema_decay=0.99,
        checkpoint_every_seconds=None,
        checkpoint_every_steps=1,
        export_with_checkpoint=True,
        threads=1,
    )
    train(Victim(pause), settings)


def start(folder: Path, steps: int, pause: float, world: int) -> list[BaseProcess]:
    """Start a training; its processes are forked from one that has everything imported, so that this is quick."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = []
    for rank in range(world):
        process = context.Process(target=_train, args=(folder, steps, pause, rank, world, port), daemon=True)
        process.start()
        started.append(process)
    return started


def finish(processes: Sequence[BaseProcess]) -> None:
    """Wait until all have ended well; raise RuntimeError if one did not."""
    for process in processes:
        process.join(PATIENCE_S)
    codes = [process.exitcode for process in processes]
    if any(codes):
        raise RuntimeError(f"The training ended with {codes}.")
    if None in codes:
        raise RuntimeError(f"The training did not end within {PATIENCE_S:.0f} s.")


def kill_once(processes: Sequence[BaseProcess], folder: Path, span: float, dice: random.Random, total: Summary) -> bool:
    """Kill the training within `span` seconds, or let it end first; says whether it was killed."""
    moment = time.monotonic() + dice.uniform(0.0, span)
    in_write, alone = dice.random() < 0.5, len(processes) > 1 and dice.random() < 0.5
    while any(p.is_alive() for p in processes):
        time.sleep(0.0002)
        if time.monotonic() < moment or (in_write and not list(folder.glob("step-*.tmp"))):
            continue
        time.sleep(dice.uniform(0.0, 0.004) if in_write else 0.0)
        order = list(processes) if in_write else dice.sample(list(processes), len(processes))  # the first one writes
        if any(p.exitcode is not None for p in processes):
            break  # it is about to end by itself
        order[0].kill()
        if alone:
            time.sleep(dice.uniform(0.0, 0.05))
        for process in order[1:]:
            process.kill()
        for process in processes:
            process.join()
        total.kills += 1
        total.one_before_the_others += alone
        total.during_write += bool(list(folder.glob("step-*.tmp")))
        kept = checkpoints(folder)
        total.before_any_checkpoint += not kept
        total.broken_checkpoints += bool(kept) and problem_of(kept[-1]) is not None
        return True
    finish(processes)
    return False


def contents(folder: Path) -> dict[str, Tensor | str]:
    """Every tensor of the last checkpoint and of the exported weights, and the optimizer's numbers."""
    last = checkpoints(folder)[-1]
    files = [*sorted(last.glob("*.safetensors")), *sorted((folder / "weights").glob("*.safetensors"))]
    found: dict[str, Tensor | str] = {f"{f.name}:{k}": v for f in files for k, v in load_file(f).items()}
    state = json.loads((last / "state.json").read_text())
    found["numbers"] = json.dumps([state["step"], state["samples"], state["optimizer_numbers"]])
    return found


def same(left: Tensor | str, right: Tensor | str) -> bool:
    """Whether two entries of `contents` are equal, bit for bit."""
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    return isinstance(left, str) and isinstance(right, str) and left == right


def run(
    kills: int, world: int = 1, steps: int = 60, pause: float = 0.005, folder: Path | None = None, seed: int = 0
) -> Summary:
    """Spend the kills on as many trainings as it takes; `folder` is made anew and removed if all were equal."""
    place = Path(tempfile.mkdtemp(prefix="kills-")) if folder is None else folder / f"{world}-processes"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    dice, total, began = random.Random(seed), Summary(world, steps_each=steps), time.monotonic()
    finish(start(place / "unbroken", 1, 0.0, world))  # the first start also imports everything; it does not count
    shutil.rmtree(place / "unbroken")
    since = time.monotonic()
    finish(start(place / "unbroken", steps, pause, world))
    span = 0.35 * (time.monotonic() - since)
    expected = contents(place / "unbroken")
    total.tensors_each = sum(isinstance(value, Tensor) for value in expected.values())
    while total.kills < kills:
        victim = place / f"killed-{total.trainings}"
        while total.kills < kills and kill_once(start(victim, steps, pause, world), victim, span, dice, total):
            print(f"\r{total.kills} of {kills} kills, {total.during_write} in a write", end="", file=sys.stderr)
        if total.kills >= kills:
            finish(start(victim, steps, pause, world))
        made = contents(victim)
        total.trainings += 1
        equal = made.keys() == expected.keys() and all(same(made[key], expected[key]) for key in expected)
        total.equal += equal
        lines = (victim / "log.jsonl").read_text(errors="replace").splitlines()
        total.resumed += sum('"event": "resume"' in line for line in lines)
        total.set_aside += len(list(victim.glob("*.broken")))
        if equal:
            shutil.rmtree(victim)
    total.seconds = round(time.monotonic() - began, 1)
    print(file=sys.stderr)
    if total.good:
        shutil.rmtree(place)
    return total


def main() -> None:
    """Kill as the command line says, and print what happened as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=None, help="folder to work in; else a temporary one")
    arguments = parser.parse_args()
    os.environ["PYTHONWARNINGS"] = "ignore"  # runpy finds it odd that forked processes have this module already
    total = run(arguments.kills, arguments.processes, arguments.steps, folder=arguments.out, seed=arguments.seed)
    print(json.dumps(asdict(total), indent=1))
    sys.exit(0 if total.good else 1)


if __name__ == "__main__":
    from tools import kill_training  # under its own name, so that the processes find what they run

    kill_training.main()
