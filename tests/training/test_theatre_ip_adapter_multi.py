"""The theatre's IP-Adapters for several pictures, on tiny networks of its shapes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open

from controlroom.backbones.image_aggregator import Aggregate, AggregatorSettings
from controlroom.backbones.image_projection import LinearProjection
from controlroom.backbones.ip_adapter import IPAdapterModel, save_ip_adapter
from controlroom.data.theatre.people import people
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.image_prompts import ENCODER, FILE
from controlroom.training.loop import train
from controlroom.training.recipes.ip_adapter_multi import IPAdapterMultiRecipe
from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_ip_adapter_multi
from tests.training.recipe_checks import loop


@pytest.fixture(scope="module")
def start(parts: Path) -> Path:
    """What the stage ``ip_adapter`` would have left."""
    folder = parts / "ip_adapter"
    folder.mkdir()
    torch.manual_seed(1)
    unet: Any = UNet2DConditionModel.from_pretrained(parts / "unet")
    save_ip_adapter(IPAdapterModel.for_unet(unet, LinearProjection(24, 32, 4)), folder / FILE)
    image_encoder_of(parts / "clip").save_pretrained(folder / ENCODER)
    return folder


def recipe_of(parts: Path, start: Path, aggregate: Aggregate) -> IPAdapterMultiRecipe:
    folders = (parts / "unet", parts / "vae", parts / "clip")
    return theatre_ip_adapter_multi(*folders, start, aggregate, people=2, pictures=4)


def test_it_trains_on_people_and_says_how_its_file_is_used(parts: Path, start: Path, tmp_path: Path) -> None:
    recipe = recipe_of(parts, start, "attention")
    assert recipe.count == 3 and len(recipe.shown.pictures) == 8
    persons = people("train", 2, 4)
    for number, others in recipe.others.items():
        own = recipe.shown.pictures[number].subject
        assert len(others) == 3 and {recipe.shown.pictures[other].subject for other in others} == {own}
    # Captions leave the looks to the pictures.
    colours = {person.identity.top.colour for person in persons}
    assert not any(colours & set(prompt.split()) for prompt in recipe.shown.prompts)
    result = train(recipe, loop(tmp_path, total_steps=2, validate_every=2))
    assert all(np.isfinite(value) for value in result.losses.values())
    with safe_open(str(result.weights / FILE), "pt") as file:
        assert AggregatorSettings.from_metadata(file.metadata(), "") == AggregatorSettings(pictures=3)
    assert (result.weights / ENCODER / "config.json").is_file()


@pytest.mark.parametrize(("aggregate", "count"), [("tokens", 1), ("max", 3)])
def test_the_others_have_the_same_training(parts: Path, start: Path, aggregate: Aggregate, count: int) -> None:
    recipe, ours = recipe_of(parts, start, aggregate), recipe_of(parts, start, "attention")
    assert recipe.count == count and recipe.adapter.aggregator is None
    assert recipe.shown.prompts == ours.shown.prompts
    everything = range(len(ours.shown))
    assert torch.equal(recipe.shown.batch(everything).latents, ours.shown.batch(everything).latents)
    assert set(recipe.adapter.state_dict()) < set(ours.adapter.state_dict())
