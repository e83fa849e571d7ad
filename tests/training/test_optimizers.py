"""Muon: orthogonal directions, AdamW for the rest, and moments that a checkpoint finds."""

from pathlib import Path

import torch
from torch import nn

from controlroom.training.loop import train
from controlroom.training.optimizers import Muon, embeddings, is_matrix, orthogonalised
from controlroom.training.settings import TrainSettings
from tests.training.toy_recipe import ToyRecipe


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
