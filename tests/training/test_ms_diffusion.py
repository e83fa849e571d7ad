"""MS-Diffusion's recipe: what moves, that it learns, that it resumes exactly, and that the control reads its export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from controlroom.controls.regions.ms_diffusion import MSDiffusion
from controlroom.core.errors import InputError
from controlroom.data.groups import Group, PlacedSubject
from controlroom.data.pictures import Picture
from controlroom.data.theatre.groups import name_of, sample_company, theatre_groups
from controlroom.data.theatre.scene import Prop, Puppet, is_held_out_combination
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.ms_diffusion import DROPOUT, FILE, MSDiffusionRecipe, MSDiffusionSettings
from controlroom.training.settings import TrainSettings
from tests.controls.nets import tiny_image_encoder
from tests.tiny import BACKBONES
from tests.training.theatre_parts import pipeline

SMALL = MSDiffusionSettings(tokens=3, depth=1)


@pytest.fixture(scope="module")
def groups() -> tuple[Group, ...]:
    return theatre_groups(3)


def recipe_of(parts: Path, groups: Any, **settings: Any) -> MSDiffusionRecipe:
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    return MSDiffusionRecipe(pipe, image_encoder_of(parts / "clip"), groups, SMALL, **settings)


def settings_of(folder: Path, steps: int, **settings: Any) -> TrainSettings:
    return TrainSettings(
        output_dir=folder, total_steps=steps, batch_size=2, **{"learning_rate": 3e-3, "weight_decay": 0.0, **settings}
    )


def error(recipe: MSDiffusionRecipe) -> float:
    return recipe.error(recipe.batch(range(len(recipe.shown)), 0))


def test_only_what_is_declared_moves_and_the_error_falls(parts: Path, groups: Any, tmp_path: Path) -> None:
    recipe = recipe_of(parts, groups, held_out=theatre_groups(1, "held_out"))
    before = {k: p.detach().clone() for k, p in recipe.model.named_parameters()}
    frozen = {n: [p.detach().clone() for p in m.parameters()] for n, m in recipe.frozen().items()}
    with torch.no_grad():
        first = error(recipe)
    result = train(recipe, settings_of(tmp_path, 40, validate_every=20))
    still = [k for k, p in recipe.model.named_parameters() if torch.equal(before[k], p)]
    assert still == ["dummy_image_tokens"]
    for name, module in recipe.frozen().items():
        assert all(torch.equal(a, b) for a, b in zip(frozen[name], module.parameters(), strict=True)), name
    with torch.no_grad():
        assert error(recipe) < 0.97 * first
    assert set(load_file(str(result.weights / FILE))) == set(before)
    found = recipe.validate(40)
    assert found["held_out"] != found["without_pictures"]


def test_interrupted_and_resumed_is_unbroken(parts: Path, groups: Any, tmp_path: Path) -> None:
    whole = train(recipe_of(parts, groups), settings_of(tmp_path / "whole", 4)).weights
    train(recipe_of(parts, groups), settings_of(tmp_path / "broken", 2))
    torch.rand(3)
    again = train(recipe_of(parts, groups), settings_of(tmp_path / "broken", 4)).weights
    left, right = load_file(str(whole / FILE)), load_file(str(again / FILE))
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_the_control_reads_the_export_and_sees_what_training_saw(parts: Path, groups: Any, tmp_path: Path) -> None:
    recipe = recipe_of(parts, groups, cache_folder=tmp_path / "cache")
    weights = train(recipe, settings_of(tmp_path / "run", 2)).weights
    pipe = pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    subjects = groups[0].subjects
    control = MSDiffusion(
        str(weights), [s.picture.read() for s in subjects], [s.box for s in subjects], [s.word for s in subjects], 1.0
    )
    draw: dict[str, Any] = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    pipe(groups[0].picture.caption, controls=[control], **draw)
    handle.remove()
    noisy, t, expected = seen
    recipe.load(weights)
    batch = recipe.batch([0], 0)
    with torch.no_grad():
        condition = recipe.base.condition(batch.prompts, recipe.shown.size)
        found = recipe.predict(batch, noisy, t.expand(1), condition)
        other = recipe.predict(recipe.batch([1], 0), noisy, t.expand(1), condition)
    assert (found - expected).abs().max() < 2e-3 * expected.std()  # features are kept in half precision
    assert (other - expected).abs().max() > 2 * (found - expected).abs().max()


def test_what_is_left_out(parts: Path, groups: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(parts, groups)
    batch, given, prompts = recipe.batch([0, 1, 2, 0], 0), [], []
    real, told = recipe.predict, recipe.base.condition
    monkeypatch.setattr(recipe, "predict", lambda b, x, t, c, g: given.append((b.features, g)) or real(b, x, t, c, g))
    monkeypatch.setattr(recipe.base, "condition", lambda p, s: prompts.extend(p) or told(p, s))
    order = {"left out": torch.arange(4), "grounding": torch.tensor([0, 1, 0, 1])}
    monkeypatch.setattr(StepRandom, "choice", lambda self, name, weights: order[name])
    with torch.no_grad():
        recipe.loss(batch, 0, StepRandom(0, 0, range(4)))
    features, grounded = given[0]
    assert sum(DROPOUT) == pytest.approx(1.0)
    assert prompts == [batch.prompts[0], batch.prompts[1], "", ""]
    blank = recipe.no_picture
    assert [torch.equal(row, blank.expand_as(row)) for row in features] == [False, True, False, True]
    assert grounded.tolist() == [True, False, True, False]
    with torch.no_grad():
        tokens = recipe.model.prompt(batch.features, batch.boxes, recipe.phrases(batch), grounded)
        elsewhere = recipe.model.prompt(batch.features, 1 - batch.boxes, recipe.phrases(batch) * 2, grounded)
    same = [torch.equal(a, b) for a, b in zip(tokens, elsewhere, strict=True)]
    assert same == [False, True, False, True]


def test_pictures_of_one_and_of_two_subjects_in_one_batch_for_xl(groups: Any) -> None:
    """A subject that a picture does not have is never seen, whatever stands in its place."""
    one = Group(groups[0].picture, groups[0].subjects[:1])
    pipe = Pipeline.from_diffusers(BACKBONES["sdxl"]())
    words = [PlacedSubject("cat", s.box, s.picture) for s in groups[1].subjects]
    both = Group(groups[1].picture, tuple(words))
    recipe = MSDiffusionRecipe(pipe, tiny_image_encoder(), [one, both], SMALL)
    batch, alone = recipe.batch([0, 1], 0), recipe.batch([0], 0)
    noise, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([400, 400])
    with torch.no_grad():
        found = recipe.predict(batch, noise, t, recipe.base.condition(batch.prompts, recipe.shown.size))
        expected = recipe.predict(alone, noise[:1], t[:1], recipe.base.condition(alone.prompts, recipe.shown.size))
    torch.testing.assert_close(found[:1], expected, atol=1e-5, rtol=1e-4)


def test_companies_of_the_theatre() -> None:
    for seed in range(6):
        company = sample_company(seed)
        assert len(company.scene.actors) == len(company.alone) == len(company.boxes) == 2
        assert not any(is_held_out_combination(scene) for scene in (company.scene, *company.alone))
        for actor, alone in zip(company.scene.actors, company.alone, strict=True):
            (other,) = alone.actors
            assert name_of(other) == name_of(actor)
            if isinstance(actor, Puppet) and isinstance(other, Puppet):
                assert other.identity == actor.identity and other.angles != actor.angles
            else:
                assert isinstance(actor, Prop) and isinstance(other, Prop)
                assert other.colour == actor.colour
        assert sample_company(seed) == company
    assert sample_company(0, "held_out") != sample_company(0)


def test_bad_data(parts: Path, groups: Any) -> None:
    picture, subject = groups[0].picture, groups[0].subjects[0]
    silent = Picture(picture.name, picture.content, picture.size, picture.read)
    with pytest.raises(InputError, match="no caption"):
        recipe_of(parts, [Group(silent, (subject,))])
    with pytest.raises(InputError, match="no picture"):
        recipe_of(parts, [])
    with pytest.raises(InputError, match="left < right"):
        PlacedSubject("cat", (0.5, 0.1, 0.5, 0.9), picture)
    with pytest.raises(InputError, match="names no subject"):
        Group(picture, ())
