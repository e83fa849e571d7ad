"""Training as a task and as a command: resolving, estimating, running, continuing, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from controlroom.app.cli import main
from controlroom.core.errors import InputError
from controlroom.sampling.pipeline import Pipeline
from controlroom.tasks.train import parse_change, plan_training
from controlroom.training.memory import estimate_memory
from controlroom.training.randomness import StepRandom
from controlroom.training.recipe import Losses
from controlroom.training.recompute import recomputing
from controlroom.training.settings import TrainSettings
from controlroom.training.step import loss_of, order_of

TINY = {"total_steps": 2, "batch_size": 2, "threads": 1, "checkpoint_every_seconds": 60}


def config(path: Path, **more: Any) -> Path:
    """A TOML file of a tiny LoRA training."""
    lines = ['recipe = "lora"', *(f"{k} = {json.dumps(v)}" for k, v in more.items())]
    lines += ["[settings]", "rank = 2", "[train]", *(f"{k} = {v}" for k, v in TINY.items())]
    path.write_text("\n".join(lines))
    return path


def test_file_then_command_line_decide(tmp_path: Path) -> None:
    file = config(tmp_path / "run.toml", data="here", model="there")
    plan = plan_training(None, file, changes=["rank=8", "train.total_steps=5", "objective.min_snr_gamma=5"])
    assert (plan.entry.name, plan.model, plan.data) == ("lora", "there", "here")
    resolved = plan.resolved()
    assert resolved["settings"]["rank"] == 8 and resolved["settings"]["objective"]["min_snr_gamma"] == 5
    assert resolved["train"]["total_steps"] == 5 and resolved["train"]["batch_size"] == 2
    other = plan_training("lora", file, data="elsewhere", model="theatre", out=tmp_path / "out")
    assert (other.data, other.model, other.loop.output_dir) == ("elsewhere", "theatre", tmp_path / "out")
    counted = plan_training("lora", data="x", changes=["train.total_samples=64"])
    assert counted.loop.total_samples == 64 and counted.loop.total_steps is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"recipe": "lorra", "data": "x"}, "Did you mean lora"),
        ({"recipe": "lora"}, "Which pictures"),
        ({"recipe": None, "data": "x"}, "Which recipe"),
        ({"recipe": "lora", "data": "x", "changes": ["ranc=4"]}, "ranc"),
        ({"recipe": "lora", "data": "x", "changes": ["train.batch_size=0"]}, "batch_size"),
        ({"recipe": "lora", "data": "x", "changes": ["rank"]}, "NAME=VALUE"),
        ({"recipe": "lora", "data": "x", "changes": ["train=3"]}, "names no setting"),
        ({"recipe": "lora", "data": "x", "changes": ["rank=8", "rank.x=1"]}, "within 'rank', which is 8"),
        ({"recipe": "lora", "data": "x", "config": "missing.toml"}, "missing.toml"),
    ],
)
def test_what_does_not_fit_is_named(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        plan_training(**arguments)


@pytest.mark.parametrize(
    ("text", "said"),
    [("rank =", "not TOML"), ("unknown = 3", "unknown"), ("settings = 3", "a table"), ("[recipe]\nx = 1", "text")],
)
def test_broken_files_are_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(InputError, match=said):
        plan_training("lora", tmp_path / "run.toml", data="x")
    with pytest.raises(InputError, match="is for 'lora'"):
        plan_training("dreambooth", config(tmp_path / "other.toml"), data="x")


def test_names_of_recipes_are_the_same_with_lines(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('recipe = "dreambooth_lora"')
    assert plan_training("dreambooth-lora", tmp_path / "run.toml", data="x").entry.name == "dreambooth_lora"
    (tmp_path / "run.toml").write_text('recipe = "dreambooth-lora"')
    assert plan_training("dreambooth_lora", tmp_path / "run.toml", data="x").entry.name == "dreambooth_lora"


def test_changes_are_toml_or_text() -> None:
    assert parse_change("train.betas=[0.9, 0.99]") == (["train", "betas"], [0.9, 0.99])
    assert parse_change("prompt=a red cat") == (["prompt"], "a red cat")
    assert parse_change("dora=true") == (["dora"], True)


def test_memory_counts_what_moves(tmp_path: Path, model: str, photos: str) -> None:
    plan = plan_training("lora", config(tmp_path / "run.toml"), photos, model, tmp_path / "run")
    _, recipe = plan.prepare()
    found = estimate_memory(recipe, plan.loop)
    moving = sum(p.numel() for p in recipe.modules()["lora"].parameters())
    assert found.trained == moving and found.gradients == 4 * moving and found.optimizer == 8 * moving
    every = sum(p.numel() for m in recipe.frozen().values() for p in m.parameters())
    assert found.frozen == every and found.weights == 4 * (every + moving)
    assert found.activations > 100_000 and found.total > found.weights + found.activations
    twice = estimate_memory(recipe, plan.loop.model_copy(update={"batch_size": 4}))
    assert twice.activations == 2 * found.activations


def test_memory_counts_what_is_computed_again(tmp_path: Path, model: str, photos: str) -> None:
    """Less than without, more than what torch's own checkpointing keeps besides its parts and their inputs."""
    plan = plan_training("lora", config(tmp_path / "run.toml"), photos, model, tmp_path / "run")
    _, recipe = plan.prepare()
    loop = plan.loop.model_copy(update={"batch_size": 2})
    whole = estimate_memory(recipe, loop)
    found = estimate_memory(recipe, loop.model_copy(update={"gradient_checkpointing": True}))
    held: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    models = (*recipe.modules().values(), *recipe.frozen().values())
    known = {p.untyped_storage().data_ptr() for m in models for p in m.parameters()}
    order = order_of(recipe, 2, loop.seed)
    batch = recipe.batch(order.indices(range(2)), 0)
    with recomputing(models) as count, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss_of(recipe, batch, 0, range(2), loop.seed, torch.device("cpu"), False)
    outside = sum(storage.nbytes() for place, storage in held.items() if place not in known)
    assert count > 0 and outside < found.activations < 0.8 * whole.activations
    assert found.weights == whole.weights
    assert estimate_memory(recipe, loop) == whole, "nothing recomputes any more"


def test_memory_of_one_picture_and_of_several_shapes(tmp_path: Path, model: str) -> None:
    """The estimate shows what the training would show: fewer pictures than a batch, and batches of one shape."""
    Image.new("RGB", (64, 32), "red").save(tmp_path / "wide.png")
    (tmp_path / "wide.txt").write_text("a red cat")
    for _ in range(2):
        plan = plan_training(
            "lora", data=str(tmp_path), model=model, out=tmp_path / "run", changes=["train.batch_size=2"]
        )
        assert estimate_memory(plan.prepare()[1], plan.loop).activations > 0
        Image.new("RGB", (32, 32), "blue").save(tmp_path / "square.png")
        (tmp_path / "square.txt").write_text("a blue cat")


class SeenDevices:
    """A recipe that notes where its networks, its batch and its random numbers are when a loss is asked for."""

    name = "seen"

    def __init__(self) -> None:
        self.net, self.fixed, self.seen = nn.Linear(2, 2), nn.Linear(2, 2), set[str]()

    def modules(self) -> dict[str, nn.Module]:
        return {"net": self.net}

    def frozen(self) -> dict[str, nn.Module]:
        return {"fixed": self.fixed}

    def batch(self, indices: Sequence[int], step: int) -> torch.Tensor:
        return torch.zeros(len(indices), 2)

    def loss(self, batch: torch.Tensor, step: int, rng: StepRandom) -> Losses:
        self.seen |= {x.device.type for x in (batch, self.net.weight, self.fixed.weight)} | {str(rng.device)}
        return Losses(self.net(self.fixed(batch)).sum(), {})

    def export(self, folder: Path) -> None:
        raise AssertionError("nothing is trained")


def test_memory_is_counted_where_the_training_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = SeenDevices()
    monkeypatch.setattr(torch, "autocast", lambda *given, **named: nullcontext())  # which this device has not
    estimate_memory(recipe, TrainSettings(output_dir=tmp_path, total_steps=1, batch_size=2, device="meta"))
    assert recipe.seen == {"meta"}
    with pytest.raises(InputError, match="nowhere"):
        estimate_memory(recipe, TrainSettings(output_dir=tmp_path, total_steps=1, device="nowhere"))


@pytest.mark.parametrize("recipe", ["dreambooth", "dreambooth_lora"])
def test_dry_runs_draw_and_write_nothing(
    recipe: str,
    tmp_path: Path,
    model: str,
    photos: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def drawn(*given: Any, **named: Any) -> None:
        raise AssertionError("a picture was drawn")

    monkeypatch.setattr(Pipeline, "__call__", drawn)
    line = ["train", recipe, "-d", photos, "--model", model, "-o", str(tmp_path / "r"), "--dry-run", "--json"]
    line += ["--set", "prompt=a sks cat", "--set", "train.batch_size=2"]
    assert main(line) == 0
    alone = json.loads(capsys.readouterr().out)["estimate"]
    assert main([*line, "--set", "class_prompt=a cat"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["class_count"] == 200
    assert told["estimate"]["activations"] > 1.5 * alone["activations"], "the class is shown beside"
    assert not (tmp_path / "r").exists()


def test_command_trains_continues_and_tells(
    tmp_path: Path, model: str, photos: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [
        "train",
        "-c",
        str(config(tmp_path / "run.toml")),
        "-d",
        photos,
        "--model",
        model,
        "-o",
        str(tmp_path / "r"),
    ]
    assert main([*line, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert "rank = 2" in told and "# parameters: " in told and "# memory: " in told
    assert not (tmp_path / "r").exists()
    (tmp_path / "again.toml").write_text(told)  # what it prints is a configuration
    assert plan_training(None, tmp_path / "again.toml").resolved()["settings"]["rank"] == 2
    assert main(line) == 0
    folder = Path(capsys.readouterr().out.strip())
    assert (folder / "lora.safetensors").is_file()
    assert main([*line, "--json", "--set", "train.total_steps=3"]) == 0
    assert json.loads(capsys.readouterr().out)["step"] == 3
    assert main([*line, "--set", "rank=4"]) == 2
    assert "error: " in capsys.readouterr().err


def test_command_lists_recipes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--list", "--json"]) == 0
    listed = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {"lora", "dreambooth", "dreambooth_lora"} <= listed
    assert main(["train", "--list"]) == 0
    assert "lora.safetensors" in capsys.readouterr().out


def test_every_recipe_has_settings_with_defaults() -> None:
    from controlroom.training.catalog import RECIPES
    from controlroom.training.settings import TrainSettings

    for entry in RECIPES:
        kind = entry.load()
        kind()  # nothing is required that only a file could give
        TrainSettings.model_validate({"output_dir": "x", **kind.loop})


def test_previews_are_drawn_ten_times(tmp_path: Path) -> None:
    changes = ['previews=["a cat"]', "train.total_steps=50"]
    assert plan_training("lora", data="x", changes=changes).loop.preview_every == 5
    assert plan_training("lora", data="x", changes=[*changes, "train.preview_every=7"]).loop.preview_every == 7
    assert plan_training("lora", data="x", changes=changes[1:]).loop.preview_every is None
