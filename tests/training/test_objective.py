"""The diffusion loss: against diffusers' schedulers and training utilities, and closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.schedulers.scheduling_ddim import rescale_zero_terminal_snr
from diffusers.training_utils import compute_snr

from controlroom.core.errors import InputError, ModelError
from controlroom.training.objective import Objective, ObjectiveSettings, without_signal_at_the_end
from controlroom.training.randomness import StepRandom
from tests.tiny import tiny_scheduler

LATENTS = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def random(step: int = 0) -> StepRandom:
    return StepRandom(5, step, range(3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_noised_latents_and_targets_are_the_schedulers(prediction: str) -> None:
    scheduler: Any = DDPMScheduler.from_config({"beta_schedule": "scaled_linear", "prediction_type": prediction})
    drawn = Objective(scheduler).draw(LATENTS, random())
    noise = random().normal("noise", (4, 8, 8))
    assert torch.allclose(drawn.latents, scheduler.add_noise(LATENTS, noise, drawn.t), atol=1e-6)
    expected = {"epsilon": noise, "sample": LATENTS, "v_prediction": scheduler.get_velocity(LATENTS, noise, drawn.t)}
    assert torch.allclose(drawn.target, expected[prediction], atol=1e-6)
    assert torch.equal(drawn.weight, torch.ones(3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction: str) -> None:
    scheduler = tiny_scheduler(prediction_type=prediction)
    objective = Objective(scheduler, ObjectiveSettings(min_snr_gamma=5.0))
    t = torch.tensor([0, 200, 700, 999])
    drawn = objective.at(torch.zeros(4, 1, 2, 2), t, torch.zeros(4, 1, 2, 2))
    snr = compute_snr(scheduler, t)
    expected = snr.clamp(max=5.0) / (snr if prediction == "epsilon" else snr + 1)
    assert torch.allclose(drawn.weight, expected, rtol=1e-4)


def test_schedule_that_ends_in_noise_is_diffusers() -> None:
    scheduler = DDIMScheduler(prediction_type="v_prediction")
    ours = Objective(scheduler, ObjectiveSettings(zero_terminal_snr=True)).alpha_bar
    theirs = (1 - rescale_zero_terminal_snr(scheduler.betas)).cumprod(0)
    assert torch.allclose(ours, theirs, atol=1e-5) and float(ours[-1]) == 0.0
    assert torch.allclose(ours[0], scheduler.alphas_cumprod[0])
    weights = Objective(scheduler, ObjectiveSettings(zero_terminal_snr=True, min_snr_gamma=5)).at(
        LATENTS, torch.tensor([0, 500, 999]), LATENTS
    )
    assert torch.isfinite(weights.weight).all() and torch.isfinite(weights.target).all()
    assert torch.equal(without_signal_at_the_end(ours), ours)


def test_offset_is_the_same_over_the_picture() -> None:
    plain = Objective(tiny_scheduler()).noise(LATENTS, random())
    moved = Objective(tiny_scheduler(), ObjectiveSettings(noise_offset=0.1)).noise(LATENTS, random())
    offset = moved - plain
    assert torch.allclose(offset, offset[..., :1, :1].expand_as(offset), atol=1e-6)
    assert torch.allclose(offset[..., 0, 0], 0.1 * random().normal("offset", (4, 1, 1))[..., 0, 0], atol=1e-6)


def test_mask_says_what_counts_however_small() -> None:
    objective = Objective(tiny_scheduler())
    drawn = objective.draw(LATENTS, random())
    wrong = drawn.target.clone()
    wrong[:, :, :4] += 1.0
    top = torch.zeros(3, 1, 16, 16)
    top[:, :, :8] = 1.0
    assert torch.allclose(objective.errors(wrong, drawn, top), torch.ones(3), atol=1e-5)
    assert torch.allclose(objective.errors(wrong, drawn, 1 - top), torch.zeros(3), atol=1e-5)
    assert torch.allclose(objective.errors(wrong, drawn), torch.full((3,), 0.5), atol=1e-5)
    assert torch.allclose(objective.errors(wrong, drawn, torch.ones(3, 1, 16, 16)), torch.full((3,), 0.5), atol=1e-5)


def test_draws_depend_on_nothing_but_seed_and_slot() -> None:
    objective = Objective(tiny_scheduler())
    first, again = objective.draw(LATENTS, random()), objective.draw(LATENTS, random())
    assert torch.equal(first.latents, again.latents) and torch.equal(first.t, again.t)
    other = objective.draw(LATENTS, random(), "class ")
    assert not torch.equal(first.latents, other.latents)


def test_held_out_error_is_the_same_every_time() -> None:
    objective = Objective(tiny_scheduler())

    def zeros(noisy: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(noisy)

    first = objective.held_out(zeros, LATENTS)
    torch.rand(3)
    assert first == objective.held_out(zeros, LATENTS)
    assert first == pytest.approx(1.0, abs=0.1)  # the variance of the noise


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"zero_terminal_snr": True}, "v or sample"),
        ({"first_timestep": 900, "last_timestep": 800}, "900 to 800"),
        ({"last_timestep": 1000}, "0 to 999"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Objective(tiny_scheduler(), ObjectiveSettings.model_validate(settings))


def test_scheduler_without_levels_is_refused() -> None:
    with pytest.raises(ModelError, match="alphas_cumprod"):
        Objective(object())
