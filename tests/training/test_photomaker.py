"""PhotoMaker's recipe: what moves, what is shown, exact resume, and files that the control draws with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import controlroom as cr
from controlroom.backbones.photomaker import FILE, PhotoMakerModel
from controlroom.core.errors import InputError, ModelError
from controlroom.data.pictures import Picture
from controlroom.training.base_model import BaseModel
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.photomaker import PhotoMakerRecipe, PhotoMakerSettings
from controlroom.training.shown import Shown
from tests.controls.nets import tiny_image_encoder
from tests.tiny import BACKBONES, tiny_sd1
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes, loop

DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}
COLOURS = {"anna": (200, 30, 30), "ben": (30, 60, 210)}
SETTINGS = PhotoMakerSettings(rank=2, class_words=("cat",), pictures=2)


def picture_of(name: str, number: int) -> Picture:
    def read() -> Image.Image:
        noise = np.random.default_rng(number).integers(0, 60, (4, 4, 3))
        pixels = np.clip(np.asarray(COLOURS[name]) + noise, 0, 255).astype(np.uint8)
        return Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC)

    return Picture(f"{name}_{number}.png", f"{name}{number}", (32, 32), read, "a cat on the beach", subject=name)


def people(count: int = 4) -> tuple[Picture, ...]:
    return tuple(picture_of(name, number) for name in COLOURS for number in range(count))


@pytest.fixture(scope="module")
def seer() -> Any:
    return tiny_image_encoder()


def maker(seer: Any, kind: str = "sd1", pictures: Any = None, **changes: Any) -> Callable[[], PhotoMakerRecipe]:
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    settings = SETTINGS.model_copy(update=changes)

    def make() -> PhotoMakerRecipe:
        base = BaseModel(pipe)
        return PhotoMakerRecipe(base, Shown(base, pictures or people()), settings, seer)

    return make


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_projections_fusion_and_lora_move_and_nothing_else(kind: str, seer: Any, tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(seer, kind), tmp_path, total_steps=3)
    assert set(recipe.modules()) - {"visual_projection_2"} == {"lora", "fuse_module", "visual_projection"}
    assert ("visual_projection_2" in recipe.modules()) is (kind == "sdxl")


def test_it_learns_and_continues(seer: Any, tmp_path: Path) -> None:
    check_learns(maker(seer), tmp_path / "run", steps=24, learning_rate=3e-3)
    check_resumes(maker(seer), tmp_path)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_training_predicts_what_a_run_predicts(kind: str, seer: Any) -> None:
    recipe = maker(seer, kind)()
    with torch.no_grad():
        for up in recipe.adapter.up:
            up.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    batch = recipe.batch([0], 1)
    looks = [recipe.shown.pictures[number].read() for number in recipe.references_of(0, 1)]
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    settings = {**DRAW, "num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}
    pipe(batch.shown.prompts[0], controls=[cr.PhotoMaker(_exported(recipe), looks, word="cat")], seed=3, **settings)
    handle.remove()
    noisy, t, expected = seen
    with torch.no_grad():
        found = recipe.predict(noisy, t.reshape(1), recipe.condition(batch.shown.prompts, batch.seen))
        plain = recipe.base.predict(noisy, t.reshape(1), recipe.base.condition(batch.shown.prompts, (32, 32)))
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (plain - expected).abs().max() > 1e-2 * expected.std()


def _exported(recipe: PhotoMakerRecipe) -> PhotoMakerModel:
    import tempfile

    from controlroom.backbones.photomaker import load_photomaker

    with tempfile.TemporaryDirectory() as folder:
        recipe.export(Path(folder))
        return load_photomaker(Path(folder) / FILE)


def test_what_it_writes_is_read_again_and_draws(seer: Any, tmp_path: Path) -> None:
    recipe = maker(seer)()
    weights = train(recipe, loop(tmp_path, total_steps=3)).weights
    again = maker(seer)()
    again.load(weights)
    for name, module in again.modules().items():
        mine = recipe.modules()[name].state_dict()
        assert all(torch.equal(v, mine[k]) for k, v in module.state_dict().items()), name
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    settings = {**DRAW, "seed": 3}
    plain = pipe("a cat", **settings).images
    drawn = pipe("a cat img", controls=[cr.PhotoMaker(str(weights), people()[0].read())], **settings).images
    assert torch.isfinite(drawn).all() and (drawn - plain).abs().max() > 1e-2 * plain.std()


def test_references_are_one_to_some_other_pictures_of_the_person(seer: Any) -> None:
    recipe = maker(seer)()
    sets = [recipe.references_of(5, step) for step in range(30)]
    assert {len(one) for one in sets} == {1, 2} and {n for one in sets for n in one} == {4, 6, 7}
    assert recipe.references_of(5, 7) == recipe.references_of(5, 7)
    batch = recipe.batch([5], 7)
    assert torch.equal(batch.seen[0], recipe._seen[recipe.references_of(5, 7)])


def test_words_and_masks_are_left_out_by_shares(seer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = Image.new("L", (32, 32))
    mask.paste(255, (0, 0, 16, 32))
    pictures = tuple(replace(picture, read_mask=lambda: mask) for picture in people())
    recipe = maker(seer, pictures=pictures)()
    told: list[Any] = []
    real, condition = recipe.objective.loss, recipe.condition
    monkeypatch.setattr(recipe, "condition", lambda p, s: told.append(p) or condition(p, s))
    monkeypatch.setattr(recipe.objective, "loss", lambda f, x, r, m: told.append(m) or real(f, x, r, m))
    shares = {"words": torch.tensor([0.05, 0.5]), "masked": torch.tensor([0.4, 0.6])}
    drawn = StepRandom.uniform
    monkeypatch.setattr(StepRandom, "uniform", lambda self, n, *a, **k: shares.get(n, drawn(self, n, *a, **k)))
    with torch.no_grad():
        recipe.loss(recipe.batch([0, 1], 0), 0, StepRandom(0, 0, range(2)))
    assert told[0] == ("", "a cat on the beach")
    assert told[1][0].mean() == 0.5 and told[1][1].mean() == 1.0


def test_settings_build_and_bad_input(seer: Any, tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    with pytest.raises(ModelError, match="image_encoder="):
        PhotoMakerSettings().build(pipe, people(), tmp_path)
    seer.save_pretrained(tmp_path / "seer")
    settings = PhotoMakerSettings(image_encoder=str(tmp_path / "seer"), class_words=("cat",), rank=1)
    assert settings.build(pipe, people(), tmp_path).names([0]) == ("anna_0.png",)
    with pytest.raises(InputError, match="who is meant"):
        maker(seer, class_words=("dog",))()
    with pytest.raises(InputError, match="one picture"):
        maker(seer, pictures=people(1))()


def test_theatre_recipe_learns_from_people(parts: Path, tmp_path: Path) -> None:
    from controlroom.training.recipes.theatre_faces import theatre_photomaker
    from controlroom.training.recipes.theatre_ip_adapter_multi import theatre_pipeline

    pipe = theatre_pipeline(parts / "unet", parts / "vae", parts / "clip")
    recipe = theatre_photomaker(pipe, parts / "clip", 2, 2, PhotoMakerSettings(rank=2))
    assert {picture.subject for picture in recipe.shown.pictures} == {"train-0000", "train-0001"}
    result = train(recipe, loop(tmp_path, total_steps=1))
    assert (result.weights / FILE).is_file()
