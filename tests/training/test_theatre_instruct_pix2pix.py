"""The recipe of InstructPix2Pix on tiny networks: how it starts, what it learns from, and that the export edits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel

from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.core.errors import ModelError
from controlroom.data.theatre.edits import sample_edit
from controlroom.data.theatre.render import render
from controlroom.training.assemble import PARTS, assemble
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_instruct_pix2pix import DROPOUT, TheatreInstructPix2Pix, widened
from controlroom.training.recipes.theatre_unet import noise_schedule
from controlroom.training.settings import TrainSettings
from controlroom.training.theatre import STAGES
from tests.training.theatre_parts import pipeline

EDITS = 6


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def make(parts: Path, cache: Path) -> TheatreInstructPix2Pix:
    return TheatreInstructPix2Pix(parts / "unet", parts / "vae", parts / "clip", cache, edits=EDITS)


def draw(parts: Path, unet: Any, controls: list[Any], prompt: str, **settings: Any) -> torch.Tensor:
    pipe = pipeline(parts, unet)
    return pipe(
        prompt, controls=controls, **{"num_inference_steps": 2, "output_type": "latent", "seed": 3, **settings}
    ).images


def test_starts_as_the_unet_it_came_from_and_blind_to_the_picture(parts: Path, cache: Path) -> None:
    recipe, plain = make(parts, cache), UNet2DConditionModel.from_pretrained(parts / "unet")
    batch = recipe.batch([0, 1], 0)
    noisy, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    with torch.no_grad():
        found = recipe.predict(batch, noisy, t)
        expected = plain(noisy, t, recipe.conditioner(batch.ids)).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert recipe.unet.conv_in.weight.shape == (16, 8, 3, 3)
    assert torch.equal(recipe.unet.conv_in.weight[:, :4], plain.conv_in.weight)
    assert torch.equal(recipe.unet.conv_in.bias, plain.conv_in.bias) and bool(plain.conv_in.bias.any())
    with pytest.raises(ModelError, match="8 channels already"):
        widened(recipe.unet, 4)


def test_batches_are_before_instruction_after(parts: Path, cache: Path) -> None:
    recipe = make(parts, cache)
    batch = recipe.batch([4, 2], 0)
    for row, index in enumerate((4, 2)):
        edit = sample_edit(index)
        before, after = recipe.encode([edit.before]), recipe.encode([edit.after])
        factor = recipe.vae.config.scaling_factor
        # The cache keeps half precision.
        torch.testing.assert_close(batch.before[row], before[0] / factor, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(batch.after[row], after[0], atol=2e-3, rtol=2e-3)
        assert torch.equal(batch.ids[row], recipe.conditioner.ids([edit.instruction])[0])
    assert not torch.equal(batch.before[0], batch.after[0] / factor)


def test_training_moves_everything_and_the_export_edits(parts: Path, cache: Path, tmp_path: Path) -> None:
    recipe = make(parts, cache)
    before = {k: p.detach().clone() for k, p in recipe.unet.named_parameters()}
    _, values = STAGES["instruct_pix2pix"]
    short = {**values, "total_steps": 3, "batch_size": 2, "validate_every": 2, "warmup_steps": 0}
    short.pop("total_samples")
    result = train(recipe, TrainSettings(output_dir=tmp_path / "instruct_pix2pix", **short))
    still = [k for k, p in recipe.unet.named_parameters() if torch.equal(before[k], p)]
    assert still == []
    assert not any(p.requires_grad for module in recipe.frozen().values() for p in module.parameters())
    log = (tmp_path / "instruct_pix2pix/log.jsonl").read_text()
    assert all(name in log for name in ("held_out", "without_picture", "without_words"))

    again = make(parts, cache)
    again.load(result.weights)
    trained = UNet2DConditionModel.from_pretrained(result.weights)
    for a, b in zip(again.unet.parameters(), trained.parameters(), strict=True):
        assert torch.equal(a, b)
    edit = sample_edit(0)
    pictures = [render(edit.before), render(sample_edit(1).before)]
    drawn = [draw(parts, trained, [InstructPix2Pix(image)], edit.instruction) for image in pictures]
    assert torch.isfinite(drawn[0]).all()
    assert not torch.equal(drawn[0], drawn[1])

    assert PARTS["instruct_pix2pix"] == "instruct_pix2pix"
    assemble(tmp_path, tmp_path / "assets", "instruct_pix2pix")
    shipped = UNet2DConditionModel.from_pretrained(tmp_path / "assets/instruct_pix2pix")
    assert shipped.config.in_channels == 8


def test_training_predicts_what_a_run_predicts(parts: Path, cache: Path) -> None:
    """One step without guidance: the recipe's prediction is the engine's, on the picture and the words."""
    recipe = make(parts, cache)
    with torch.no_grad():
        recipe.unet.conv_in.weight[:, 4:].normal_(generator=torch.Generator().manual_seed(1))
    batch, edit, seen = recipe.batch([0], 0), sample_edit(0), []
    handle = recipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    control = InstructPix2Pix(render(edit.before))
    draw(parts, recipe.unet, [control], edit.instruction, num_inference_steps=1, guidance_scale=1.0)
    handle.remove()
    given, t, expected = seen
    with torch.no_grad():
        found = recipe.predict(batch, given[:, :4], t.expand(1))
        other = recipe.predict(recipe.batch([1], 0), given[:, :4], t.expand(1))
    assert (found - expected).abs().max() < 0.02 * expected.std()
    assert (found - other).abs().max() > 5 * (found - expected).abs().max()


def test_loss_drops_picture_words_and_both_as_published(parts: Path, cache: Path) -> None:
    recipe = make(parts, cache)
    with torch.no_grad():
        recipe.unet.conv_in.weight[:, 4:].normal_(generator=torch.Generator().manual_seed(1))
    shares = StepRandom(0, 0, range(20_000)).choice("left out", DROPOUT).bincount() / 20_000
    torch.testing.assert_close(shares, torch.tensor([0.85, 0.05, 0.05, 0.05]), atol=0.006, rtol=0)
    outcomes = StepRandom(0, 0, range(200)).choice("left out", DROPOUT).tolist()
    slots = [outcomes.index(outcome) for outcome in range(4)]
    batch, rng = recipe.batch([0, 1, 2, 3], 0), StepRandom(0, 0, slots)
    assert rng.choice("left out", DROPOUT).tolist() == [0, 1, 2, 3]
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bar = noise_schedule().alphas_cumprod[t].reshape(4, 1, 1, 1)
    empty, expected = recipe.conditioner.ids([""])[0], 0.0
    with torch.no_grad():
        for row in range(4):
            before = batch.before[row] if row in (0, 2) else torch.zeros(4, 16, 16)
            ids = batch.ids[row] if row in (0, 1) else empty
            noisy = bar[row] ** 0.5 * batch.after[row] + (1 - bar[row]) ** 0.5 * noise[row]
            tokens = recipe.conditioner(ids[None])
            predicted = recipe.unet(torch.cat([noisy, before])[None], t[row : row + 1], tokens).sample[0]
            snr = (bar[row] / (1 - bar[row])).flatten()
            weight = torch.minimum(snr, torch.tensor(5.0)) / snr
            expected = expected + weight * ((predicted - noise[row]) ** 2).mean() / 4
        torch.testing.assert_close(recipe.loss(batch, 0, rng).total, expected[0])


def test_stage_is_registered() -> None:
    _, values = STAGES["instruct_pix2pix"]
    settings = TrainSettings(output_dir=Path("nowhere"), **values)
    assert settings.optimizer == "muon" and settings.matrix_learning_rate == 0.003
