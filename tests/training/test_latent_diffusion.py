"""A new UNet in a model's latents: random at first, everything of it moves, nothing else does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import controlroom as cr
from controlroom.core.errors import InputError, ModelError
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.latent_diffusion import LatentDiffusionSettings
from controlroom.training.shown_recipe import without_words
from tests.tiny import tiny_sd1, tiny_sdxl
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, painted


def maker(folder: Path, make: Any = tiny_sd1, **settings: Any) -> Any:
    return lambda: LatentDiffusionSettings(**settings).build(cr.Pipeline.from_diffusers(make()), painted(), folder)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_a_new_network_learns_all_of_it(tmp_path: Path, make: Any) -> None:
    recipe = check_moves_only_what_trains(maker(tmp_path, make), tmp_path / "run", learning_rate=1e-3)
    assert recipe.frozen().keys() >= {"vae", "text_encoder"} and "unet" not in recipe.frozen()
    loaded: Any = UNet2DConditionModel.from_pretrained(tmp_path / "run/weights/unet")
    own: Any = recipe.modules()["unet"]
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in own.state_dict().items())
    # It draws in the place of the model's own.
    source = make()
    source.unet = loaded
    drawn = cr.Pipeline.from_diffusers(source)("a red cat", seed=1, num_inference_steps=2, output_type="latent")
    assert torch.isfinite(drawn.images).all()


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(tmp_path), tmp_path / "run", steps=40, learning_rate=3e-3)
    check_resumes(maker(tmp_path, without_words=0.5), tmp_path, ema_decay=0.9, learning_rate=1e-3)


def test_its_shape_is_the_models_or_a_smaller_one(tmp_path: Path) -> None:
    model = tiny_sd1()
    first, second = (LatentDiffusionSettings(seed=seed).network(model.unet) for seed in (7, 8))
    same = LatentDiffusionSettings(seed=7).network(model.unet)
    theirs = model.unet.state_dict()
    assert {k: v.shape for k, v in first.state_dict().items()} == {k: v.shape for k, v in theirs.items()}
    assert not any(torch.equal(first.state_dict()[k], theirs[k]) for k in theirs if k.endswith("conv1.weight"))
    assert all(torch.equal(v, same.state_dict()[k]) for k, v in first.state_dict().items())
    assert any(not torch.equal(v, second.state_dict()[k]) for k, v in first.state_dict().items())
    levels = len(model.unet.config.block_out_channels)
    small = LatentDiffusionSettings(channels=(32,) * levels, layers=1).network(model.unet)
    assert tuple(small.config["block_out_channels"]) == (32,) * levels and small.config["layers_per_block"] == 1
    with pytest.raises(InputError, match="levels"):
        LatentDiffusionSettings(channels=(32,) * (levels + 1)).network(model.unet)
    other = maker(tmp_path, channels=(64,) * levels)()
    other.export(tmp_path / "other")
    with pytest.raises(ModelError, match="another size"):
        maker(tmp_path)().load(tmp_path / "other")


def test_a_share_has_no_words(tmp_path: Path) -> None:
    batch = maker(tmp_path)().batch([0, 1, 2], 0)[0]
    rngs = [StepRandom(1, 0, [k, k + 1, k + 2]) for k in range(0, 90, 3)]
    empty = sum(text == "" for rng in rngs for text in without_words(batch, 0.5, rng).prompts)
    assert 25 < empty < 65
    assert without_words(batch, 0.0, rngs[0]) is batch
