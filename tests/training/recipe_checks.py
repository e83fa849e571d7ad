"""What every recipe must show: only what it declares moves, it learns, and a broken run continues bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file

from controlroom.data.pictures import Picture
from controlroom.training.checkpoint import modules_hash
from controlroom.training.loop import train
from controlroom.training.recipe import Recipe
from controlroom.training.settings import TrainSettings


def painted(colours: tuple[str, ...] = ("red", "blue", "green"), **more: Any) -> tuple[Picture, ...]:
    """A flat picture of each colour, captioned "a COLOUR cat"."""

    def one(colour: str) -> Picture:
        plain = {"size": (32, 32), "read": lambda: Image.new("RGB", (32, 32), colour), "caption": f"a {colour} cat"}
        return Picture(f"{colour}.png", colour, **{**plain, **more})

    return tuple(one(colour) for colour in colours)


def loop(folder: Path, **changes: Any) -> TrainSettings:
    """Settings of a run of a few steps."""
    values = {
        "output_dir": folder,
        "seed": 3,
        "total_steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "checkpoint_every_seconds": None,
        "log_every": 1,
        "threads": 1,
    }
    return TrainSettings.model_validate({**values, **changes})


def check_moves_only_what_trains(make: Callable[[], Recipe[Any]], folder: Path, **changes: Any) -> Recipe[Any]:
    """Every trained module moves in every parameter that it declares, nothing frozen does. Returns the trained one."""
    recipe = make()
    before = {name: {k: v.clone() for k, v in m.state_dict().items()} for name, m in recipe.modules().items()}
    frozen = modules_hash(recipe.frozen())
    declared = {f"{n}.{k}" for n, m in recipe.modules().items() for k, p in m.named_parameters() if p.requires_grad}
    assert train(recipe, loop(folder, **changes)).finished
    moved = {
        f"{name}.{key}"
        for name, module in recipe.modules().items()
        for key, value in module.state_dict().items()
        if not torch.equal(value, before[name][key])
    }
    assert moved <= declared, sorted(moved - declared)[:5]
    assert len(moved) > 0.8 * len(declared), sorted(declared - moved)[:5]
    assert modules_hash(recipe.frozen()) == frozen
    return recipe


def check_learns(make: Callable[[], Recipe[Any]], folder: Path, steps: int = 30, **changes: Any) -> None:
    """The loss of the last steps is below that of the first."""
    import json

    train(make(), loop(folder, total_steps=steps, **changes))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    third = len(losses) // 3
    assert len(losses) == steps and sum(losses[-third:]) < 0.95 * sum(losses[:third]), losses


def check_resumes(make: Callable[[], Recipe[Any]], folder: Path, **changes: Any) -> None:
    """Broken off after two steps and continued equals unbroken, bit for bit."""
    whole = train(make(), loop(folder / "whole", **changes))
    train(make(), loop(folder / "broken", total_steps=2, **changes))
    rest = train(make(), loop(folder / "broken", **changes))
    assert whole.finished and rest.finished and rest.step == whole.step
    left, right = _tensors(whole.checkpoint), _tensors(rest.checkpoint)
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def _tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {f"{p.name}:{k}": v for p in checkpoint.glob("*.safetensors") for k, v in load_file(p).items()}
