"""The recipe of T2I-Adapters on tiny networks: what it learns from, how it draws timesteps, that the export acts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import T2IAdapter as Net
from diffusers import UNet2DConditionModel

from controlroom.controls.spatial.t2i_adapter import T2IAdapter
from controlroom.core.errors import InputError
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.scene import sample_scene
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_t2i_adapter import TheatreT2IAdapter
from controlroom.training.settings import TrainSettings
from controlroom.training.side_networks import cubic_timesteps
from controlroom.training.theatre import STAGES
from tests.training.theatre_parts import pipeline


def make(parts: Path, kind: str = "pose") -> TheatreT2IAdapter:
    return TheatreT2IAdapter(parts / "unet", parts / "vae", parts / "clip", parts / "cache", kind, scenes=4)


def test_training_predicts_what_a_run_predicts(parts: Path) -> None:
    """One step without guidance: the recipe's prediction is the engine's, on the condition's picture and the words."""
    recipe = make(parts, "depth")
    seen, batch = [], recipe.batch([1], 0)
    handle = recipe.scenes.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    words = recipe.scenes.conditioner.tokenizer.decode(batch.ids[0], skip_special_tokens=True)
    control = T2IAdapter(recipe.adapter, condition(sample_scene(1), "depth").picture)
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    pipeline(parts, recipe.scenes.unet)(words, controls=[control], **settings)
    handle.remove()
    given, t, expected = seen
    with torch.no_grad():
        found = recipe.predict(batch, given, t.expand(1))
        without = recipe.scenes.alone(batch, given, t.expand(1))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - without).abs().max() > 1e-3


def test_loss_is_the_plain_error_at_cubic_timesteps(parts: Path) -> None:
    recipe, rng = make(parts), StepRandom(0, 0, range(2))
    batch = recipe.batch([0, 1], 0)
    noise, uniform = rng.normal("noise", (4, 16, 16)), rng.uniform("timestep")
    bar, expected = recipe.scenes.objective.alpha_bar, 0.0
    with torch.no_grad():
        for row in range(2):
            t = int((1 - float(uniform[row]) ** 3) * 1000)
            noisy = bar[t] ** 0.5 * batch.latents[row] + (1 - bar[t]) ** 0.5 * noise[row]
            features = list(recipe.adapter(batch.maps[row : row + 1]))
            tokens = recipe.scenes.conditioner(batch.ids[row : row + 1])
            unet = recipe.scenes.unet
            predicted = unet(noisy[None], t, tokens, down_intrablock_additional_residuals=features).sample[0]
            expected += float((predicted - noise[row]).square().mean()) / 2
        assert float(recipe.loss(batch, 0, rng).total) == pytest.approx(expected, rel=1e-5)
    many = cubic_timesteps(torch.arange(10_000) / 10_000)
    assert (int(many.min()), int(many.max())) == (0, 999)
    # P(t > 500) = P(u^3 < 0.5)
    assert (many > 500).float().mean() == pytest.approx(0.5 ** (1 / 3), abs=0.002)


def test_training_moves_the_adapter_alone_and_the_export_acts(parts: Path, tmp_path: Path) -> None:
    recipe = make(parts)
    before = {k: p.detach().clone() for k, p in recipe.adapter.named_parameters()}
    _, values = STAGES["t2i_adapter_pose"]
    short = {**values, "total_steps": 2, "batch_size": 2, "validate_every": 1, "warmup_steps": 0}
    short.pop("total_samples")
    result = train(recipe, TrainSettings(output_dir=tmp_path / "run", **short))
    assert [k for k, p in recipe.adapter.named_parameters() if torch.equal(before[k], p)] == []
    assert not any(p.requires_grad for module in recipe.frozen().values() for p in module.parameters())
    log = (tmp_path / "run/log.jsonl").read_text()
    assert all(name in log for name in ("held_out", "unet_alone"))
    again = make(parts)
    again.load(result.weights)
    for a, b in zip(again.adapter.parameters(), Net.from_pretrained(result.weights).parameters(), strict=True):
        assert torch.equal(a, b)
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    settings = {"num_inference_steps": 2, "output_type": "latent", "seed": 3}
    pictures = [condition(sample_scene(index), "pose").picture for index in (0, 1)]
    drawn = [pipe("", controls=[T2IAdapter(str(result.weights), picture)], **settings).images for picture in pictures]
    assert torch.isfinite(drawn[0]).all() and not torch.equal(drawn[0], drawn[1])


def test_unknown_kind_is_refused(parts: Path) -> None:
    with pytest.raises(InputError, match="canny, soft_edge"):
        make(parts, "hed")
