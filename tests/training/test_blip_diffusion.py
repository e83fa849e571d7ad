"""BLIP-Diffusion's recipes: the subject encoder and the fit to one subject."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from controlroom.controls.personal.blip_diffusion import CACHE, KEY, BLIPDiffusion
from controlroom.core.errors import InputError
from controlroom.data.groups import Group
from controlroom.data.theatre.groups import theatre_subjects
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.loop import train
from controlroom.training.recipes.blip_diffusion import BLIPDiffusionRecipe, BLIPDiffusionSettings
from controlroom.training.recipes.blip_subject import BLIPSubjectRecipe, BLIPSubjectSettings
from controlroom.training.settings import TrainSettings
from tests.controls.nets import tiny_image_encoder
from tests.tiny import BACKBONES
from tests.training.theatre_parts import pipeline

SMALL = BLIPSubjectSettings(queries=3, layers=2)


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    return theatre_subjects(3)


def pipe_of(parts: Path) -> Pipeline:
    return pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))


def subject_recipe(parts: Path, groups: Any, settings: BLIPSubjectSettings = SMALL, **more: Any) -> BLIPSubjectRecipe:
    return BLIPSubjectRecipe(pipe_of(parts), image_encoder_of(parts / "clip"), groups, settings, **more)


def settings_of(folder: Path, steps: int, **more: Any) -> TrainSettings:
    return TrainSettings(
        output_dir=folder, total_steps=steps, batch_size=2, **{"learning_rate": 3e-3, "weight_decay": 0.0, **more}
    )


def moved(before: dict[str, Any], module: Any) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def copied(module: Any) -> dict[str, Any]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def same_files(left: Path, right: Path) -> bool:
    a, b = load_file(str(left)), load_file(str(right))
    return set(a) == set(b) and all(torch.equal(a[key], b[key]) for key in a)


def test_the_subject_encoder_learns_and_nothing_else_moves(parts: Path, groups: Any, tmp_path: Path) -> None:
    recipe = subject_recipe(parts, groups, held_out=theatre_subjects(1, "held_out"))
    before, encoder = copied(recipe.reader.encoder), recipe.reader.encoder
    frozen = {name: copied(module) for name, module in recipe.frozen().items()}
    batch = recipe.batch(range(3), 0)
    with torch.no_grad():
        first = recipe.error(batch)
    result = train(recipe, settings_of(tmp_path, 40, validate_every=40))
    still = set(before) - moved(before, encoder)
    # What the last layer makes of the words is read by none.
    last = f"encoder.layer.{SMALL.layers - 1}."
    assert still == {name for name in before if name.startswith((f"{last}intermediate.", f"{last}output."))}
    for name, module in recipe.frozen().items():
        assert not moved(frozen[name], module), name
    with torch.no_grad():
        assert recipe.error(batch) < 0.99 * first
        found = recipe.validate(40)
    assert found["held_out"] != found["by_words"]
    assert set(load_file(str(result.weights / "model.safetensors"))) == set(encoder.state_dict())


def test_the_control_reads_the_export_and_is_told_what_training_was(parts: Path, groups: Any, tmp_path: Path) -> None:
    recipe = subject_recipe(parts, groups)
    weights = train(recipe, settings_of(tmp_path, 2)).weights
    recipe.load(weights)
    pipe, seen = pipe_of(parts), []
    handle = pipe.unet.register_forward_hook(
        lambda m, a, k, o: seen.append(k["encoder_hidden_states"]), with_kwargs=True
    )
    group = groups[0]
    control = BLIPDiffusion(str(weights), group.subjects[0].picture.read(), group.subjects[0].word, repeat=1)
    draw: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    pipe(group.picture.caption, controls=[control], **draw)
    handle.remove()
    with torch.no_grad():
        expected = recipe.condition(recipe.batch([0], 0)).tokens
    assert (seen[0] - expected).abs().max() < 1e-4 * expected.std()
    with torch.no_grad():
        plain = recipe.base.condition([group.picture.caption]).tokens
    assert (seen[0] - plain).abs().max() > 1e-2 * expected.std()


def test_the_unet_may_learn_too_and_resumes_exactly(parts: Path, groups: Any, tmp_path: Path) -> None:
    both = BLIPSubjectSettings(queries=3, layers=1, unet=True)
    recipe = subject_recipe(parts, groups, both)
    before = copied(recipe.base.unet)
    whole = train(recipe, settings_of(tmp_path / "whole", 4)).weights
    assert moved(before, recipe.base.unet) == set(before)
    train(subject_recipe(parts, groups, both), settings_of(tmp_path / "broken", 2))
    torch.rand(3)
    again = train(subject_recipe(parts, groups, both), settings_of(tmp_path / "broken", 4)).weights
    for file in ("model.safetensors", "unet/diffusion_pytorch_model.safetensors"):
        assert same_files(whole / file, again / file)


def fit_of(parts: Path, encoder: Path, groups: Any) -> BLIPDiffusionRecipe:
    settings = BLIPDiffusionSettings(encoder=str(encoder), subject="woman")
    return settings.build(pipe_of(parts), [group.picture for group in groups], encoder)


def test_a_fit_moves_the_unet_alone_resumes_and_draws(parts: Path, groups: Any, tmp_path: Path) -> None:
    encoder = tmp_path / "encoder"
    encoder.mkdir()
    subject_recipe(parts, groups).export(encoder)
    assert BLIPDiffusionSettings.loop["total_steps"] == 80
    recipe = fit_of(parts, encoder, groups)
    before, vectors = copied(recipe.base.unet), recipe.vectors.clone()
    frozen = {name: copied(module) for name, module in recipe.frozen().items()}

    def error() -> float:
        predict = lambda x, t: recipe.base.predict(x, t, recipe.condition)  # noqa: E731
        return recipe.objective.held_out(predict, recipe.batch([0, 1, 2], 0).latents)

    held_out = recipe.shown.pictures[:2]
    watched = BLIPDiffusionRecipe(
        pipe_of(parts), subject_recipe(parts, groups).reader, held_out, recipe.settings, held_out
    )
    with torch.no_grad():
        assert watched.has_held_out and not recipe.has_held_out
        assert watched.validate(0) == watched.validate(1) != {}
    first = error()
    whole = train(recipe, settings_of(tmp_path / "whole", 8)).weights
    assert moved(before, recipe.base.unet) == set(before) and torch.equal(vectors, recipe.vectors)
    assert not any(moved(frozen[name], module) for name, module in recipe.frozen().items())
    assert error() < 0.97 * first
    train(fit_of(parts, encoder, groups), settings_of(tmp_path / "broken", 4))
    again = train(fit_of(parts, encoder, groups), settings_of(tmp_path / "broken", 8)).weights
    for file in (CACHE, "unet/diffusion_pytorch_model.safetensors"):
        assert same_files(whole / file, again / file)
    assert torch.equal(load_file(str(whole / CACHE))[KEY], vectors)
    # The control draws with it, and what it is told is what was trained on.
    pipe, told = pipe_of(parts), []
    handle = pipe.unet.register_forward_hook(
        lambda m, a, k, o: told.append((k["encoder_hidden_states"], o[0])), with_kwargs=True
    )
    draw: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    pipe("", controls=[BLIPDiffusion(str(whole), subject="woman", repeat=1)], **draw)
    handle.remove()
    assert (told[0][0] - recipe.condition.tokens).abs().max() < 1e-4
    fresh = fit_of(parts, encoder, groups)
    fresh.load(whole)
    assert not moved(copied(recipe.base.unet), fresh.base.unet)


def test_an_encoder_for_xl(groups: Any) -> None:
    recipe = BLIPSubjectRecipe(Pipeline.from_diffusers(BACKBONES["sdxl"]()), tiny_image_encoder(), groups[:2], SMALL)
    batch = recipe.batch([0, 1], 0)
    condition = recipe.condition(batch)
    assert condition.tokens.requires_grad and condition.pooled is not None and condition.pooled.requires_grad
    assert recipe.base.predict(batch.latents, torch.tensor([3, 4]), condition).shape == batch.latents.shape


def test_bad_settings(parts: Path, groups: Any) -> None:
    pictures = [group.picture for group in groups]
    reader = subject_recipe(parts, groups[:1]).reader
    with pytest.raises(InputError, match="subject"):
        BLIPDiffusionRecipe(pipe_of(parts), reader, pictures, BLIPDiffusionSettings())
    with pytest.raises(InputError, match="no picture"):
        BLIPDiffusionRecipe(pipe_of(parts), reader, [], BLIPDiffusionSettings(subject="woman"))
    with pytest.raises(InputError, match="word"):
        BLIPDiffusionSettings(word="woman")  # pyright: ignore[reportCallIssue]
