"""Randomness and order depend on (seed, slot, name) and nothing else."""

from __future__ import annotations

import torch

from controlroom.training.randomness import DataOrder, StepRandom, seed_of
from controlroom.training.settings import TrainSettings, learning_rate_at


def test_a_split_batch_has_the_same_numbers() -> None:
    whole = StepRandom(1, 0, range(8))
    halves = [StepRandom(1, 5, range(0, 3)), StepRandom(1, 9, range(3, 8))]
    for draw in (
        lambda r: r.normal("noise", (4, 3, 3)),
        lambda r: r.uniform("u", (2,)),
        lambda r: r.integers("t", 0, 1000),
        lambda r: r.choice("drop", [0.5, 0.3, 0.2]),
    ):
        assert torch.equal(draw(whole), torch.cat([draw(half) for half in halves]))


def test_streams_slots_and_seeds_differ_and_repeat() -> None:
    rng = StepRandom(1, 0, [0, 1])
    noise = rng.normal("noise", (64,))
    assert torch.equal(noise, rng.normal("noise", (64,)))
    others = [rng.normal("other", (64,)), StepRandom(2, 0, [0, 1]).normal("noise", (64,)), noise.flip(0)]
    assert all(not torch.isclose(noise, other).any() for other in others)
    assert torch.equal(rng.generator("noise", 1).get_state(), rng.generator("noise", 1).get_state())


def test_the_seed_of_a_stream_is_the_same_on_every_machine() -> None:
    assert seed_of(7, 123, "noise") == 15782854502708204051


def test_distributions() -> None:
    rng = StepRandom(0, 0, range(4000))
    noise = rng.normal("noise", (4,))
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    times = rng.integers("t", 5, 10)
    assert set(times.tolist()) == {5, 6, 7, 8, 9} and times.dtype == torch.int64
    shares = torch.bincount(rng.choice("drop", [8, 0, 1, 1]), minlength=4) / 4000
    assert torch.allclose(shares, torch.tensor([0.8, 0.0, 0.1, 0.1]), atol=0.03) and shares[1] == 0
    uniform = rng.uniform("u", low=-2, high=3)
    assert uniform.min() >= -2 and uniform.max() < 3 and abs(uniform.mean() - 0.5) < 0.1


def test_order_is_a_permutation_of_each_epoch() -> None:
    order = DataOrder(3, 7)
    first, second = order.indices(range(7)), order.indices(range(7, 14))
    assert sorted(first) == sorted(second) == list(range(7)) and first != second
    assert DataOrder(3, 7).indices([9, 2, 11]) == [second[2], first[2], second[4]]
    assert DataOrder(4, 7).indices(range(7)) != first
    assert DataOrder(3, None).indices([5, 900]) == [5, 900]


def test_learning_rate_is_a_function_of_the_step(tmp_path) -> None:
    def rates(**changes) -> list[float]:
        settings = TrainSettings(output_dir=tmp_path, total_steps=12, learning_rate=1.0, warmup_steps=2, **changes)
        return [learning_rate_at(step, 12, settings) for step in (0, 1, 2, 7, 12)]

    assert rates() == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert torch.allclose(torch.tensor(rates(schedule="linear", final_fraction=0.2))[2:], torch.tensor([1.0, 0.6, 0.2]))
    assert torch.allclose(torch.tensor(rates(schedule="cosine"))[2:], torch.tensor([1.0, 0.5, 0.0]), atol=1e-6)
    powers = rates(schedule="polynomial", schedule_power=2.0)[2:]
    assert torch.allclose(torch.tensor(powers), torch.tensor([1.0, 0.25, 0.0]))
    assert rates(schedule="cosine_restarts") == rates(schedule="cosine")
    waves = rates(schedule="cosine_restarts", schedule_cycles=2)[2:]  # at the half it begins again
    assert torch.allclose(torch.tensor(waves), torch.tensor([1.0, 1.0, 0.0]), atol=1e-6)
