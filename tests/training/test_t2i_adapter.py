"""T2I-Adapter's recipe on one's own pictures: what moves, its timesteps, exact resume, and that its export draws."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionAdapterPipeline
from diffusers import T2IAdapter as DiffusersAdapter

import controlroom as cr
from controlroom.core.errors import InputError, ModelError
from controlroom.signals.canny import Canny
from controlroom.tasks.train import plan_training
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.t2i_adapter import T2IAdapterRecipe, T2IAdapterSettings
from tests.saved import tiny_folder
from tests.tiny import BACKBONES, tiny_sd1
from tests.training import side_checks
from tests.training.recipe_checks import check_moves_only_what_trains, check_resumes, loop
from tests.training.scenery import conditioned, drawn, scenery, written
from tests.training.side_checks import DRAW, check_draws, check_goes_on, check_predicts_as_a_run

CANNY = T2IAdapterSettings(kind="canny")


maker = partial(side_checks.maker, CANNY)


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_adapter_moves_and_nothing_else(kind: str, tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(tmp_path / "maps", kind), tmp_path / "run")
    assert isinstance(recipe, T2IAdapterRecipe) and set(recipe.modules()) == {"t2i_adapter"}
    assert recipe.net.config.adapter_type == ("full_adapter_xl" if kind == "sdxl" else "full_adapter")


def test_it_learns_and_continues(tmp_path: Path) -> None:
    # Measured with the same noise before and after: what an adapter gives to a random network is little beside it.
    recipe = maker(tmp_path, validation=str(written(tmp_path / "same", conditions=False)))()
    before = recipe.validate(0)
    train(recipe, loop(tmp_path / "run", total_steps=30, batch_size=3))
    after = recipe.validate(30)
    assert after["held_out"] < 0.99 * before["held_out"] and after["unet_alone"] == before["unet_alone"]
    check_resumes(maker(tmp_path), tmp_path / "resumed")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_training_predicts_what_a_run_predicts(kind: str, tmp_path: Path) -> None:
    recipe = maker(tmp_path, kind)()
    check_predicts_as_a_run(recipe, cr.T2IAdapter(recipe.net, Canny()(drawn(0)).picture), kind, 1e-3)


def test_noise_is_strong_most_of_the_time(tmp_path: Path) -> None:
    """t = (1 - u^3) T; and the loss is the plain error of the noise at that t."""
    recipe, rng = maker(tmp_path, empty_prompts=0.0)(), StepRandom(0, 0, [0, 1])
    batch = recipe.batch([0, 1], 0)
    t = ((1 - rng.uniform("timestep") ** 3) * 1000).long()
    noise, bar = rng.normal("noise", (4, 16, 16)), tiny_sd1().scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    with torch.no_grad():
        told = recipe.base.condition(batch.shown.prompts)
        noisy = bar**0.5 * batch.shown.latents + (1 - bar) ** 0.5 * noise
        expected = ((recipe.predict(noisy, t, told, batch.maps) - noise) ** 2).mean()
        torch.testing.assert_close(recipe.loss(batch, 0, rng).total, expected)
    many = recipe.draw(torch.zeros(4000, 4, 1, 1), StepRandom(0, 0, range(4000))).t
    assert 0.76 < float((many >= 500).float().mean()) < 0.83  # 0.5 ** (1 / 3) = 0.794


def test_its_export_draws_in_diffusers_and_here_alike(tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(tmp_path), tmp_path / "run")
    assert isinstance(recipe, T2IAdapterRecipe)
    weights, map_ = tmp_path / "run/weights", Canny()(drawn(1)).picture
    net: Any = DiffusersAdapter.from_pretrained(weights)
    parts = {name: part for name, part in tiny_sd1().components.items() if name != "image_encoder"}
    theirs: Any = StableDiffusionAdapterPipeline(**parts, adapter=net, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    expected = theirs("a cat", image=map_, generator=generator, height=32, width=32, **DRAW).images
    found = check_draws(cr.T2IAdapter(str(weights), map_))
    assert (found - expected).abs().max() <= 1e-4 * expected.std()
    check_goes_on(recipe, partial(maker, tmp_path), weights)


def test_the_command_trains_on_a_folder_and_draws_on_the_way(tmp_path: Path) -> None:
    folder = written(tmp_path / "photos")
    changes = ["train.total_steps=2", "train.batch_size=2", "train.threads=1", f"validation={folder}"]
    changes += ["train.validate_every=2", 'previews=["a cat"]', "preview_steps=1"]
    run = tmp_path / "run"
    plan_training("t2i_adapter", None, str(folder), str(tiny_folder()), run, changes).run()
    assert (run / "weights/config.json").is_file() and len(list((run / "previews").iterdir())) == 2
    assert "unet_alone" in (run / "log.jsonl").read_text()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    grey: Any = DiffusersAdapter(in_channels=1, channels=[16, 32], downscale_factor=2, adapter_type="full_adapter")
    other: Any = DiffusersAdapter(in_channels=3, channels=[24, 32], downscale_factor=2, adapter_type="full_adapter")
    far: Any = DiffusersAdapter(in_channels=3, channels=[16, 32], downscale_factor=12, adapter_type="full_adapter")
    for name, net, error, said in (
        ("grey", grey, InputError, "reads 1 channel"),
        ("other", other, ModelError, "another base model"),
        ("far", far, InputError, "shrinks pictures 12 times"),
    ):
        net.save_pretrained(tmp_path / name)
        with pytest.raises(error, match=said):
            maker(tmp_path, start_from=str(tmp_path / name))()
    with pytest.raises(InputError, match="no condition"):
        T2IAdapterSettings().build(pipe, scenery(), tmp_path)
    assert T2IAdapterSettings().build(pipe, conditioned(), tmp_path).batch([0], 0).maps.any()
