"""The recipe of the theatre's ControlNets on tiny networks: what it sees, what learns, and that exports draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel

from controlroom.backbones import loading
from controlroom.backbones.controlnet import CONDITION_KINDS, MULTI_CHANNELS, with_kind
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.scene import sample_scene
from controlroom.signals.signal import KINDS
from controlroom.training.assemble import PARTS, copy_half
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_controlnet import TheatreControlNet
from controlroom.training.recipes.theatre_unet import noise_schedule
from controlroom.training.settings import TrainSettings
from controlroom.training.side_networks import picture_pixels
from controlroom.training.theatre import STAGES
from tests.training.theatre_parts import pipeline

SCENES = 4
DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 3}


def recipe_of(parts: Path, kind: str) -> TheatreControlNet:
    return TheatreControlNet(parts / "unet", parts / "vae", parts / "clip", parts / "cache", kind, SCENES)


@pytest.mark.parametrize("kind", ["multi", "depth"])
def test_trains_and_its_export_draws(parts: Path, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(parts, kind)
    before = {key: value.clone() for key, value in recipe.controlnet.named_parameters()}
    frozen = {name: [p.clone() for p in module.parameters()] for name, module in recipe.frozen().items()}
    settings = TrainSettings(
        output_dir=tmp_path / "run", total_steps=3, batch_size=2, learning_rate=1e-3, validate_every=3
    )
    weights = train(recipe, settings).weights
    assert [key for key, value in recipe.controlnet.named_parameters() if torch.equal(before[key], value)] == []
    for name, module in recipe.frozen().items():
        assert all(torch.equal(a, b) for a, b in zip(frozen[name], module.parameters(), strict=True)), name
    again = recipe_of(parts, kind)
    again.load(weights)
    for a, b in zip(recipe.controlnet.parameters(), again.controlnet.parameters(), strict=True):
        assert torch.equal(a, b)
    # As the installation has it: halved, under its short name.
    copy_half(weights, tmp_path / "theatre" / PARTS["controlnet_multi"])
    monkeypatch.setattr(loading, "theatre_folder", lambda: tmp_path / "theatre")
    stored: Any = ControlNetModel.from_pretrained(tmp_path / "theatre/multi")
    assert stored.config.conditioning_channels == (MULTI_CHANNELS if kind == "multi" else 3)
    picture = condition(sample_scene(0), "depth").picture
    control = ControlNet("theatre/multi", picture, kind="depth" if kind == "multi" else None)
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    drawn, without = (pipe("a woman", controls=controls, **DRAW).images for controls in ([control], []))
    assert torch.isfinite(drawn).all() and (drawn - without).abs().max() > 1e-4


def test_the_network_for_all_kinds_starts_from_one_for_a_kind(parts: Path, tmp_path: Path) -> None:
    """Whatever the planes say, it draws at first what the one for a kind draws."""
    one, every = recipe_of(parts, "depth"), recipe_of(parts, "multi")
    with torch.no_grad():
        for parameter in one.controlnet.parameters():
            parameter.add_(0.02)
    one.export(tmp_path / "depth")
    every.load(tmp_path / "depth")
    picture = picture_pixels(condition(sample_scene(0), "depth").picture)[None]
    text = one.conditioner(one.conditioner.ids(["a woman"]))
    given = (torch.zeros(1, 4, 16, 16), torch.tensor(10), text)
    alone, *others = (
        recipe.controlnet(*given, controlnet_cond=seen, return_dict=False)[1]
        for recipe, seen in (
            (one, picture),
            (every, with_kind(picture[0], "depth")[None]),
            (every, with_kind(picture[0], "pose")[None]),
        )
    )
    assert alone.abs().max() > 0
    assert all(torch.allclose(alone, other, atol=1e-6) for other in others)


def test_batches_hold_the_conditions_of_their_scenes(parts: Path) -> None:
    recipe, seen, empty = recipe_of(parts, "multi"), set(), 0
    none = recipe.conditioner.ids([""])[0]
    for step in range(12):
        batch = recipe.batch(range(SCENES), step)
        assert batch.condition.shape == (SCENES, MULTI_CHANNELS, 128, 128)
        empty += int((batch.ids == none).all(dim=1).sum())
        for index, row in enumerate(batch.condition):
            planes = row[3:].flatten(1)
            assert torch.equal(planes, planes[:, :1].expand_as(planes)) and planes[:, 0].sum() == 1
            kind = CONDITION_KINDS[int(planes[:, 0].argmax())]
            assert torch.equal(row[:3], picture_pixels(condition(sample_scene(index), kind).picture))
            seen.add(kind)
    assert seen == set(CONDITION_KINDS) and 0.25 < empty / 48 < 0.75
    first, second = (recipe.batch([0, 1], 7) for _ in range(2))
    assert torch.equal(first.condition, second.condition) and torch.equal(first.ids, second.ids)
    alone = recipe_of(parts, "canny").batch([0], 0).condition
    assert alone.shape == (1, 3, 128, 128)


def test_starts_as_the_unet_alone_and_loses_as_published(parts: Path) -> None:
    recipe = recipe_of(parts, "normal")
    measured = recipe.validate(0)
    assert set(measured) == {"held_out", "unet_alone"} and measured["held_out"] == pytest.approx(measured["unet_alone"])
    batch, rng = recipe.batch([2, 3], 0), StepRandom(0, 0, [0, 1])
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bar = noise_schedule().alphas_cumprod[t].reshape(2, 1, 1, 1)
    with torch.no_grad():
        predicted = recipe.predict(batch, bar**0.5 * batch.latents + (1 - bar) ** 0.5 * noise, t)
        each = ((predicted - noise) ** 2).flatten(1).mean(1)
        snr = (bar / (1 - bar)).flatten()
        expected = (each * torch.minimum(snr, torch.tensor(5.0)) / snr).mean()
        torch.testing.assert_close(recipe.loss(batch, 0, rng).total, expected)


def test_kinds_and_stages() -> None:
    assert CONDITION_KINDS == KINDS
    for kind in ("multi", *KINDS):
        _, values = STAGES[f"controlnet_{kind}"]
        TrainSettings(output_dir=Path("nowhere"), **values)
    with pytest.raises(InputError, match="There are: canny"):
        TheatreControlNet(Path("u"), Path("v"), Path("c"), Path("l"), "edges")
