"""ControlNet's recipe on one's own pictures: what moves, what is shown, exact resume, and that its export draws."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import ImageOps

import controlroom as cr
from controlroom.core.errors import InputError, ModelError
from controlroom.data.image_folder import image_folder
from controlroom.data.pictures import ConditionedPicture
from controlroom.signals.canny import Canny
from controlroom.tasks.train import plan_training
from controlroom.training.catalog import recipe_entry
from controlroom.training.conditions import ConditionMaps
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.controlnet import ControlNetRecipe, ControlNetSettings
from tests.saved import tiny_folder
from tests.tiny import BACKBONES, tiny_sd1
from tests.training import side_checks
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes
from tests.training.scenery import conditioned, drawn, ramp, scenery, written
from tests.training.side_checks import DRAW, check_draws, check_goes_on, check_predicts_as_a_run

CANNY = ControlNetSettings(kind="canny")


maker = partial(side_checks.maker, CANNY)


def stirred(recipe: ControlNetRecipe) -> ControlNetRecipe:
    """With convolutions that do something."""
    with torch.no_grad():
        for name, parameter in recipe.net.named_parameters():
            if name.startswith(("controlnet_down", "controlnet_mid", "controlnet_cond_embedding.conv_out")):
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
    return recipe


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_copy_moves_and_nothing_else(kind: str, tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(tmp_path / "maps", kind), tmp_path / "run")
    assert isinstance(recipe, ControlNetRecipe) and set(recipe.modules()) == {"controlnet"}
    fresh = maker(tmp_path / "maps", kind)()
    unet, own = fresh.base.unet.state_dict(), fresh.net.state_dict()
    shared = [key for key in own if key in unet]
    assert len(shared) > 20 and all(torch.equal(own[key], unet[key]) for key in shared)
    zero = [key for key in own if key.startswith(("controlnet_down", "controlnet_mid"))]
    assert zero and not any(own[key].any() for key in zero)
    rest = [key for key in own if key not in unet and key not in zero]
    assert rest and all(key.startswith("controlnet_cond_embedding") for key in rest)


def test_it_learns_and_continues(tmp_path: Path) -> None:
    check_learns(maker(tmp_path), tmp_path / "run", steps=24, learning_rate=2e-3, batch_size=3)
    check_resumes(maker(tmp_path), tmp_path / "resumed")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_training_predicts_what_a_run_predicts(kind: str, tmp_path: Path) -> None:
    recipe = stirred(maker(tmp_path, kind)())
    check_predicts_as_a_run(recipe, cr.ControlNet(recipe.net, Canny()(drawn(0)).picture), kind)


def test_half_of_the_samples_are_without_words(tmp_path: Path) -> None:
    recipe = stirred(maker(tmp_path)())
    assert CANNY.empty_prompts == 0.5
    empty = (StepRandom(0, 0, range(400)).uniform("words") < 0.5).tolist()
    assert 0.4 < sum(empty) / 400 < 0.6
    rng = StepRandom(0, 0, [empty.index(True), empty.index(False)])
    batch = recipe.batch([0, 1], 0)
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bar = tiny_sd1().scheduler.alphas_cumprod[t].reshape(2, 1, 1, 1)
    noisy = bar**0.5 * batch.shown.latents + (1 - bar) ** 0.5 * noise
    with torch.no_grad():
        told = recipe.base.condition(["", batch.shown.prompts[1]])
        expected = ((recipe.predict(noisy, t, told, batch.maps) - noise) ** 2).mean()
        torch.testing.assert_close(recipe.loss(batch, 0, rng).total, expected)


def test_conditions_are_found_in_what_is_shown(tmp_path: Path) -> None:
    """Cropped as the picture is; of the mirrored one where it is mirrored; kept on disk and made again if broken."""
    recipe = maker(tmp_path, pictures=scenery(2, (48, 32)), flip=True, buckets=False)()
    assert len(recipe.shown) == 4
    batch = recipe.batch([1, 3], 0)
    cropped = drawn(1, (48, 32)).crop((8, 0, 40, 32))
    for row, seen in zip(batch.maps, (cropped, ImageOps.mirror(cropped)), strict=True):
        expected = np.asarray(Canny()(seen).picture, np.float32).transpose(2, 0, 1) / 255
        assert np.array_equal(row.numpy(), expected) and expected.any()
    kept = sorted((tmp_path / "maps").rglob("*.safetensors"))
    assert len(kept) == 4
    for file in kept:
        file.write_bytes(b"broken")
    assert torch.equal(recipe.batch([1, 3], 0).maps, batch.maps)
    wide = maker(tmp_path, pictures=scenery(2, (48, 32)))().batch([0, 1], 0)
    assert wide.maps.shape[-2:] == wide.shown.size and wide.shown.size[0] < wide.shown.size[1]


def test_conditions_that_are_given_are_read(tmp_path: Path) -> None:
    recipe = maker(tmp_path, pictures=conditioned(2), flip=True)()
    rows = recipe.batch([1, 3], 0).maps
    for row, seen in zip(rows, (ramp(1), ImageOps.mirror(ramp(1))), strict=True):
        assert np.array_equal(row.numpy(), np.asarray(seen, np.float32).transpose(2, 0, 1) / 255)
    for kind in (None, "pose", "normal"):
        with pytest.raises(InputError, match="mirrored pose or normal"):
            maker(tmp_path, pictures=conditioned(2), flip=True, kind=kind)()
    with pytest.raises(InputError, match=r"0.png has no conditioning_image, 1.png has one"):
        maker(tmp_path, pictures=(scenery(1)[0], conditioned(2)[1]))()
    with pytest.raises(InputError, match=r"0.png has no condition. Give a kind"):
        maker(tmp_path, kind=None)()


def test_a_picture_with_nothing_to_find_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(image: Any) -> Any:
        raise InputError("There is nobody in the picture.")

    monkeypatch.setattr("controlroom.training.conditions.choose_signal", lambda *a: nobody)
    recipe = maker(tmp_path, pictures=conditioned())()
    with pytest.raises(InputError, match=r"^0.png: There is nobody .* conditioning_image"):
        maker(tmp_path)()
    assert not ConditionMaps(None, "pose", given=False, absent=True).rows(recipe.shown, [(0, False)]).any()


def test_its_export_draws_in_diffusers_and_here_alike(tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker(tmp_path), tmp_path / "run")
    assert isinstance(recipe, ControlNetRecipe)
    weights, map_ = tmp_path / "run/weights", Canny()(drawn(1)).picture
    net: Any = ControlNetModel.from_pretrained(weights)
    theirs: Any = StableDiffusionControlNetPipeline(
        **tiny_sd1().components, controlnet=net, requires_safety_checker=False
    )
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(4)
    expected = theirs("a cat", image=map_, generator=generator, height=32, width=32, **DRAW).images
    found = check_draws(cr.ControlNet(str(weights), map_))
    assert (found - expected).abs().max() <= 1e-4 * expected.std()
    check_goes_on(recipe, partial(maker, tmp_path), weights)
    narrow: Any = ControlNetModel.from_unet(tiny_sd1().unet, conditioning_embedding_out_channels=(8, 16))
    narrow.save_pretrained(tmp_path / "narrow")
    with pytest.raises(ModelError, match="start_from of the recipe"):
        maker(tmp_path)().load(tmp_path / "narrow")
    went_on = maker(tmp_path, start_from=str(tmp_path / "narrow"))()
    assert tuple(went_on.net.config.conditioning_embedding_out_channels) == (8, 16)


def test_previews_are_drawn_along_conditions(tmp_path: Path) -> None:
    recipe = stirred(maker(tmp_path, previews=("a cat", "a dog"), preview_steps=2)())
    pictures = recipe.preview(0)
    assert [name for name, _ in pictures] == ["a cat", "a dog"]
    control = cr.ControlNet(recipe.net, Canny()(drawn(1)).picture)
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    expected = pipe("a dog", controls=[control], seed=1, num_inference_steps=2, height=32, width=32).images[0]
    assert np.abs(np.asarray(expected, int) - np.asarray(pictures[1][1], int)).max() <= 1
    assert maker(tmp_path)().preview(0) == []


@pytest.mark.parametrize("given", [True, False])
def test_the_command_trains_on_a_folder(tmp_path: Path, given: bool) -> None:
    folder = written(tmp_path / "photos", conditions=given)
    changes = ["train.total_steps=1", "train.batch_size=2", "train.threads=1", *([] if given else ["kind=lines"])]
    plan = plan_training("controlnet", None, str(folder), str(tiny_folder()), tmp_path / "run", changes)
    assert plan.loop.learning_rate == 1e-5
    plan.prepare(rehearsal=True)
    assert not (tmp_path / "run").exists()
    assert (plan.run().weights / "config.json").is_file()


def test_it_measures_itself_on_other_pictures(tmp_path: Path) -> None:
    folder = written(tmp_path / "others", 2)
    recipe = maker(tmp_path, pictures=conditioned(), validation=str(folder))()
    before = recipe.validate(0)
    assert before["held_out"] == pytest.approx(before["unet_alone"], rel=1e-5)
    after = stirred(recipe).validate(0)
    assert after["unet_alone"] == before["unet_alone"] and abs(after["held_out"] - before["held_out"]) > 1e-4
    assert not maker(tmp_path)().has_held_out and maker(tmp_path)().validate(0) == {}


def test_a_table_names_conditions(tmp_path: Path) -> None:
    folder = written(tmp_path / "photos")
    found = image_folder(folder)
    assert all(isinstance(picture, ConditionedPicture) for picture in found)
    one = found[1]
    assert isinstance(one, ConditionedPicture)
    assert (one.name, one.caption, one.condition.name) == ("1.png", "a blue cat", "maps/1.png")
    assert one.condition.read().getpixel((31, 31)) == (220, 220, 220)
    ramp(2).save(folder / "maps/1.png")
    assert image_folder(folder)[1].content != one.content
    ramp(0, (32, 16)).save(folder / "maps/wide.png")
    for named, said in (
        ("gone.png", r"line 1.*conditioning_image 'gone.png', which is not in"),
        ("../x.png", "inside of"),
        (3, "expected text"),
        ("maps/wide.png", r"condition .*wide.png' is 32 x 16, its picture .* 32 x 32"),
    ):
        (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "0.png", "conditioning_image": named}))
        with pytest.raises(InputError, match=said):
            image_folder(folder)


def test_methods_that_need_more_than_a_folder_say_so() -> None:
    with pytest.raises(InputError, match="not trained from the command line.*fit_imagic"):
        recipe_entry("imagic")


def test_networks_for_several_kinds_or_other_models_are_refused(tmp_path: Path) -> None:
    several: Any = ControlNetModel.from_unet(
        tiny_sd1().unet, conditioning_embedding_out_channels=(8, 16), conditioning_channels=11
    )
    several.save_pretrained(tmp_path / "several")
    with pytest.raises(InputError, match="several kinds"):
        maker(tmp_path, start_from=str(tmp_path / "several"))()
    with pytest.raises(ModelError, match="another base model"):
        maker(tmp_path, "sdxl", start_from=str(tmp_path / "several"))()
    with pytest.raises(InputError, match="kind"):
        ControlNetSettings(kind="edges")  # type: ignore[arg-type]
