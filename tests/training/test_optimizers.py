"""Muon: orthogonal directions, AdamW for the rest; and of every optimizer, moments that a checkpoint finds."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from controlroom.core.errors import InputError
from controlroom.training.checkpoint import load_checkpoint
from controlroom.training.loop import train
from controlroom.training.optimizers import Muon, embeddings, is_matrix, orthogonalised
from controlroom.training.randomness import DataOrder, StepRandom, slots_of
from controlroom.training.settings import TrainSettings
from tests.training.toy_recipe import ToyRecipe, toy_settings


def test_singular_values_are_brought_near_one() -> None:
    for shape in ((24, 80), (80, 24)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        left, _, right = torch.linalg.svd(matrix, full_matrices=False)
        made = orthogonalised(matrix)
        values = torch.linalg.svdvals(made)
        assert values.min() > 0.5 and values.max() < 1.3
        # The singular vectors stay: the result is close to U V^T, not just to any orthogonal matrix.
        assert (made * (left @ right)).sum() / (made.norm() * (left @ right).norm()) > 0.97


def test_which_parameters_are_matrices() -> None:
    net = nn.ModuleDict(
        {
            "words": nn.Embedding(30, 16),
            "first": nn.Conv2d(4, 16, 3),
            "inner": nn.Conv2d(16, 16, 3),
            "out": nn.Linear(16, 3),
        }
    )
    skipped = embeddings({"net": net})
    moved = [name for name, p in net.named_parameters() if is_matrix(p) and id(p) not in skipped]
    assert moved == ["inner.weight"]


def test_a_step_is_the_published_update() -> None:
    weight = nn.Parameter(torch.randn(8, 12, generator=torch.Generator().manual_seed(1)))
    bias = nn.Parameter(torch.zeros(8))
    optimizer = Muon([weight, bias], 1e-3, 0.02, 0.0, (0.9, 0.99), 1e-8)
    before = weight.detach().clone()
    gradients = [torch.randn(8, 12, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    momentum = torch.zeros(8, 12)
    expected = before.clone()
    for gradient in gradients:
        weight.grad, bias.grad = gradient.clone(), torch.ones(8)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * group["rate_factor"]
        optimizer.step()
        momentum = 0.95 * momentum + 0.05 * gradient
        expected = expected - 0.02 * orthogonalised(0.05 * gradient + 0.95 * momentum)
    torch.testing.assert_close(weight.detach(), expected)
    torch.testing.assert_close(bias.detach(), torch.full((8,), -2e-3), atol=1e-5, rtol=1e-3)


def test_resume_with_muon_is_bit_equal(tmp_path: Path) -> None:
    def settings(name: str, **more: object) -> TrainSettings:
        values = {"total_steps": 8, "batch_size": 4, "optimizer": "muon", "matrix_learning_rate": 0.01, "seed": 3}
        return TrainSettings(output_dir=tmp_path / name, **{**values, **more})  # type: ignore[arg-type]

    whole, broken = ToyRecipe(), ToyRecipe()
    train(whole, settings("whole"))
    train(broken, settings("broken", total_steps=5))
    again = ToyRecipe()
    train(again, settings("broken"))
    for name, value in whole.modules()["net"].state_dict().items():
        assert torch.equal(value, again.modules()["net"].state_dict()[name]), name


class EightBit(torch.optim.Optimizer):
    """Stands in for bitsandbytes: moments in bytes shaped as the weights, a table that all share, a counter."""

    TABLE = torch.linspace(-1.0, 1.0, 256)

    def __init__(self, params, lr, betas, eps, weight_decay) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(step=0, qmap1=self.TABLE, absmax1=torch.zeros(1))
                    state["state1"] = torch.full(p.shape, 127, dtype=torch.uint8)
                state["step"] += 1
                momentum = state["qmap1"][state["state1"].long()] * state["absmax1"] * 0.9 + p.grad
                state["absmax1"] = momentum.abs().max().reshape(1)
                state["state1"] = torch.bucketize(momentum / state["absmax1"], state["qmap1"][1:]).to(torch.uint8)
                p -= group["lr"] / state["step"] * momentum


@pytest.mark.parametrize(
    ("optimizer", "rate"), [("adafactor", 1e-2), ("prodigy", 1.0), ("adamw8bit", 1e-2), ("adamw", 1e-2)]
)
def test_every_optimizer_survives_a_resume(
    tmp_path: Path, optimizer: str, rate: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(AdamW8bit=EightBit)))
    changes = {"optimizer": optimizer, "learning_rate": rate, "schedule": "constant", "total_steps": 14}
    recipe = ToyRecipe()
    before = {name: value.clone() for name, value in recipe.net.named_parameters()}
    whole = train(recipe, toy_settings(tmp_path / "whole", **changes))
    assert any(not torch.equal(before[name], value) for name, value in recipe.net.named_parameters())
    train(ToyRecipe(), toy_settings(tmp_path / "broken", **{**changes, "total_steps": 6}))
    resumed = train(ToyRecipe(), toy_settings(tmp_path / "broken", **changes))
    left, right = load_checkpoint(whole.checkpoint), load_checkpoint(resumed.checkpoint)
    assert left.state["optimizer_numbers"] == right.state["optimizer_numbers"]
    for kind in ("weights", "ema", "optimizer"):
        a, b = getattr(left, kind), getattr(right, kind)
        a, b = (a["net"], b["net"]) if kind == "weights" else (a, b)
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a), kind
    assert left.optimizer


def test_prodigy_finds_a_rate_and_keeps_it(tmp_path: Path) -> None:
    settings = toy_settings(tmp_path, optimizer="prodigy", learning_rate=1.0, schedule="constant", total_steps=30)
    kept = load_checkpoint(train(ToyRecipe(), settings).checkpoint).state["optimizer_numbers"]
    assert kept["groups"]["0"]["d"] > 1e-6 and kept["groups"]["0"]["k"] == 30
    assert set(kept["parameters"]["net.0.weight"].values()) == {30}
    with pytest.raises(ValidationError, match=r"Give 1\.0"):
        toy_settings(tmp_path, optimizer="prodigy", learning_rate=1e-4)


def test_prodigy_is_that_of_its_library(tmp_path: Path) -> None:
    """The loop's weights equal those of the library's optimizer driven by hand."""
    from prodigyopt import Prodigy

    class Still(ToyRecipe):
        def __init__(self) -> None:
            super().__init__()
            self.net[1], self.net[2] = nn.Identity(), nn.Identity()

    changes = {"optimizer": "prodigy", "learning_rate": 1.0, "warmup_steps": 0, "schedule": "constant"}
    settings = toy_settings(tmp_path, total_steps=5, clip_grad_norm=None, **changes)
    recipe, twin = Still(), Still()
    train(recipe, settings)
    optimizer = Prodigy(twin.net.parameters(), weight_decay=0.01, use_bias_correction=True)
    order = DataOrder(settings.seed, 10)
    for step in range(5):
        slots = slots_of(step, 4)
        optimizer.zero_grad()
        twin.loss(twin.batch(order.indices(slots), step), step, StepRandom(settings.seed, step, slots)).total.backward()
        optimizer.step()
    for ours, theirs in zip(recipe.net.parameters(), twin.net.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("optimizer", "library"), [("prodigy", "prodigyopt"), ("adamw8bit", "bitsandbytes")])
def test_a_missing_library_is_named(
    tmp_path: Path, optimizer: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InputError, match=f"needs the package {library}.*pip install {library}"):
        train(ToyRecipe(), toy_settings(tmp_path, optimizer=optimizer, learning_rate=1.0))
