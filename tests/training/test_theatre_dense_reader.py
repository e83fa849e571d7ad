"""The dense reader's recipe: it learns, what it exports loads, and the stage and the checkpoint know it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.scene import sample_scene
from controlroom.data.theatre.truth import maps
from controlroom.signals.dense_reader import DenseReader
from controlroom.training.assemble import PARTS
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_dense_reader import DENSE_MIX, TheatreDenseReader, dense_truth
from controlroom.training.settings import TrainSettings
from controlroom.training.theatre import STAGES


def test_a_batch_is_the_truth_of_its_pictures() -> None:
    batch = TheatreDenseReader().batch([3, 4], 0)
    truth = maps(sample_scene(4, "train", DENSE_MIX))
    assert batch.pixels.shape == (2, 3, 128, 128) and -1 <= batch.pixels.min() and batch.pixels.max() <= 1
    assert np.array_equal(batch.parts[1].numpy(), truth.part)
    assert np.allclose(batch.depth[1].numpy() * 255, truth.depth, atol=1e-3)
    assert batch.edges.shape == batch.depth.shape and dense_truth([sample_scene(0, "train")]).parts.max() < len(Part)


def test_one_step_is_trained_exported_and_assembled(tmp_path: Path) -> None:
    recipe = TheatreDenseReader()
    before = [p.detach().clone() for p in recipe.reader.parameters()]
    settings = TrainSettings(
        output_dir=tmp_path / "dense_reader", total_steps=1, batch_size=2, learning_rate=1e-3, optimizer="muon"
    )
    result = train(recipe, settings)
    assert set(result.losses) >= {"parts", "depth", "edges"} and np.isfinite(list(result.losses.values())).all()
    moved = [not torch.equal(a, b) for a, b in zip(before, recipe.reader.parameters(), strict=True)]
    assert sum(moved) / len(moved) > 0.8
    reader = DenseReader.load(result.weights)
    assert reader.classes == tuple(part.name.lower() for part in Part)
    recipe.load(result.weights)
    assert PARTS["dense_reader"] == "readers/dense" and "dense_reader" in STAGES


def test_the_loss_falls_on_one_batch() -> None:
    recipe = TheatreDenseReader()
    batch = recipe.batch([0, 1], 0)
    optimizer = torch.optim.Adam(recipe.reader.parameters(), 3e-3)
    losses = []
    for _ in range(6):
        found = recipe.loss(batch, 0, StepRandom(0, 0, [0, 1]))
        optimizer.zero_grad()
        found.total.backward()
        optimizer.step()
        losses.append(float(found.total.detach()))
    assert losses[-1] < 0.8 * losses[0]
