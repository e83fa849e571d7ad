"""The tool that kills trainings: a few kills of one process and of two, and that it would see a difference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tools.kill_training import Summary, contents, finish, run, same, start


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_killed_trainings_end_like_one_that_was_not(tmp_path: Path, world: int) -> None:
    total = run(3, world, steps=12, folder=tmp_path)
    assert total.kills == 3 and total.good and total.trainings >= 1 and total.tensors_each > 30
    assert not list(tmp_path.iterdir())  # nothing is left where all was equal


@pytest.mark.slow
def test_a_difference_is_seen(tmp_path: Path) -> None:
    finish(start(tmp_path / "a", 2, 0.0, 1))
    finish(start(tmp_path / "b", 3, 0.0, 1))
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a.keys() == b.keys() and not same(a["numbers"], b["numbers"])
    assert not all(same(a[key], b[key]) for key in a if key != "numbers")
    assert not same(torch.zeros(2), torch.zeros(2, dtype=torch.float64))
    assert not Summary(1, trainings=2, equal=1).good and not Summary(1).good
