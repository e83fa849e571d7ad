"""DreamBooth: what moves, exact resume, and that what it writes loads in diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

import controlroom as cr
from controlroom.training.loop import train
from controlroom.training.recipes.dreambooth import DreamBoothSettings
from tests.tiny import tiny_sd1, tiny_sdxl
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop, painted

SETTINGS = DreamBoothSettings(prompt="a red cat", class_prompt="a cat", class_count=2, class_steps=1)


def maker(tmp_path: Path, settings: DreamBoothSettings, make: Any = tiny_sd1) -> Any:
    pipe = cr.Pipeline.from_diffusers(make())
    return lambda: settings.build(pipe, painted(), tmp_path)


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_the_unet_moves_and_nothing_else(tmp_path: Path, make: Any) -> None:
    recipe = check_moves_only_what_trains(maker(tmp_path, SETTINGS, make), tmp_path / "run", learning_rate=1e-3)
    assert set(recipe.modules()) == {"unet"}


def test_text_encoders_move_where_asked(tmp_path: Path) -> None:
    settings = SETTINGS.model_copy(update={"text_encoders": True})
    recipe = check_moves_only_what_trains(maker(tmp_path, settings, tiny_sdxl), tmp_path / "run", learning_rate=1e-3)
    assert set(recipe.modules()) == {"unet", "text_encoder", "text_encoder_2"}


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(tmp_path, SETTINGS), tmp_path / "run", learning_rate=1e-3)
    check_resumes(maker(tmp_path, SETTINGS), tmp_path, learning_rate=1e-3)


def test_what_it_writes_is_the_trained_network(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    recipe = SETTINGS.build(pipe, painted(), tmp_path)
    result = train(recipe, loop(tmp_path / "run", learning_rate=1e-3))
    loaded = UNet2DConditionModel.from_pretrained(result.weights / "unet")
    assert all(torch.equal(v, recipe.base.unet.state_dict()[k]) for k, v in loaded.state_dict().items())
    # The model that was given is as it was.
    assert all(torch.equal(v, before[k]) for k, v in pipe.unet.state_dict().items())
    again = SETTINGS.build(pipe, painted(), tmp_path)
    again.load(result.weights)
    assert torch.equal(again.base.unet.conv_out.weight, loaded.conv_out.weight)


def test_unknown_settings_are_named() -> None:
    with pytest.raises(cr.InputError, match="rank"):
        DreamBoothSettings.model_validate({"rank": 4})
