"""Uni-ControlNet on one's own pictures: both adapters, what is left out, exact resume, and that exports draw."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import ImageOps

import controlroom as cr
from controlroom.app.cli import main
from controlroom.core.errors import InputError, ModelError
from controlroom.signals.canny import Canny
from controlroom.signals.scribble import Scribble
from controlroom.tasks.train import plan_training
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.uni_controlnet import UniControlNetRecipe, UniControlNetSettings
from controlroom.training.uni_adapters import PUBLISHED_FEATURES, PUBLISHED_FIRST, new_adapter
from tests.controls.nets import tiny_image_encoder
from tests.saved import tiny_folder
from tests.tiny import BACKBONES, tiny_sd1
from tests.training import side_checks
from tests.training.recipe_checks import check_moves_only_what_trains, check_resumes, loop
from tests.training.scenery import drawn, scenery, written
from tests.training.side_checks import check_draws, check_goes_on, check_predicts_as_a_run

TWO = ("canny", "scribble")
PARTS = ("local", "global")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny image encoder."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_image_encoder().save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features of the published widths are far wider than the miniatures."""
    monkeypatch.setattr("controlroom.training.recipes.uni_controlnet.PUBLISHED_FEATURES", (8, 16))


def test_a_new_adapter_has_the_published_widths() -> None:
    """Those that the authors' network for Stable Diffusion 1 has; the last again where there are more levels."""
    unet = tiny_sd1().unet
    net = new_adapter(unet, TWO, None, 1, PUBLISHED_FIRST, PUBLISHED_FEATURES)
    assert net.settings["first"] == [32] and net.settings["widths"] == [192, 256]
    assert new_adapter(unet, TWO, None, 4, (8, 16), (4,)).settings == {
        "kinds": list(TWO),
        "first": [8, 16, 16, 16],
        "widths": [4, 4],
        "halvings": 4,
        "latent_channels": 4,
    }


def settings_of(part: str, encoder: str) -> UniControlNetSettings:
    if part == "global":
        return UniControlNetSettings(part="global", image_encoder=encoder)
    return UniControlNetSettings(kinds=TWO)


def maker(part: str, encoder: str, folder: Path, backbone: str = "sd1", **more: Any) -> Callable[[], Any]:
    return side_checks.maker(settings_of(part, encoder), folder, backbone, **more)


def stirred(recipe: UniControlNetRecipe) -> UniControlNetRecipe:
    """With convolutions that do something."""
    with torch.no_grad():
        for name, parameter in recipe.net.named_parameters():
            if "zero" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(len(name)))
    return recipe


def control_of(model: Any, part: str, number: int, **more: Any) -> cr.UniControlNet:
    """Draws along both conditions of a picture, or after its content."""
    if part == "global":
        return cr.UniControlNet(model, content=drawn(number), **more)
    maps = cr.LocalConditions(canny=Canny()(drawn(number)).picture, scribble=Scribble()(drawn(number)).picture)
    return cr.UniControlNet(model, maps)


@pytest.mark.parametrize("kind", BACKBONES)
@pytest.mark.parametrize("part", PARTS)
def test_one_adapter_moves_in_all_its_parameters_and_nothing_else(
    part: str, kind: str, tmp_path: Path, encoder: str
) -> None:
    make = maker(part, encoder, tmp_path / "maps", kind, empty_prompts=0.0)
    before = {key: value.clone() for key, value in make().net.named_parameters()}
    recipe: Any = check_moves_only_what_trains(make, tmp_path / "run", batch_size=3)
    assert set(recipe.modules()) == {"uni_controlnet"}
    assert ("image_encoder" in recipe.frozen()) is (part == "global")
    assert [key for key, value in recipe.net.named_parameters() if torch.equal(value, before[key])] == []
    if part == "local":
        unet, own = make().base.unet.state_dict(), make().net.state_dict()
        copied = [key for key in unet if key in own]
        assert len(copied) > 20 and all(torch.equal(own[key], unet[key]) for key in copied)


@pytest.mark.parametrize("part", PARTS)
def test_it_learns_and_continues(part: str, tmp_path: Path, encoder: str) -> None:
    # Measured with the same noise before and after: what a content gives to a random network is little beside it.
    same = str(written(tmp_path / "same", conditions=False))
    recipe = maker(part, encoder, tmp_path, validation=same)()
    before = recipe.validate(0)
    train(recipe, loop(tmp_path / "run", total_steps=10, batch_size=2, learning_rate=4e-3))
    after = recipe.validate(10)
    assert after["held_out"] < 0.98 * before["held_out"] and after["unet_alone"] == before["unet_alone"]
    check_resumes(maker(part, encoder, tmp_path), tmp_path / "resumed")


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("part", PARTS)
def test_training_predicts_what_a_run_predicts(part: str, kind: str, tmp_path: Path, encoder: str) -> None:
    recipe = stirred(maker(part, encoder, tmp_path, kind)())
    recipe.net.eval()
    more = {"image_encoder": recipe.encoder} if part == "global" else {}
    # The branch without words sees the same maps, and the tokens of no content.
    without = 0.0 if part == "global" else 1.0
    check_predicts_as_a_run(recipe, control_of({part: recipe.net}, part, 0, **more), kind, 1e-3, without)


def test_contents_are_what_clip_sees_of_what_is_shown(tmp_path: Path, encoder: str) -> None:
    recipe = maker("global", encoder, tmp_path, pictures=scenery(2, (48, 32)), flip=True, buckets=False)()
    found = recipe.batch([1, 3], 0).maps
    cropped = drawn(1, (48, 32)).crop((8, 0, 40, 32))
    for row, seen in zip(found, (cropped, ImageOps.mirror(cropped)), strict=True):
        mean, std = np.array((0.48145466, 0.4578275, 0.40821073)), np.array((0.26862954, 0.26130258, 0.27577711))
        pixels = torch.from_numpy((np.asarray(seen) / 255 - mean) / std).float().permute(2, 0, 1)[None]
        with torch.no_grad():
            expected = tiny_image_encoder()(pixels).image_embeds[0]
        torch.testing.assert_close(row, expected, atol=1e-4, rtol=1e-4)
    assert (found[0] - found[1]).abs().max() > 1e-4


@pytest.mark.parametrize("part", PARTS)
def test_conditions_and_words_are_left_out_as_published(part: str, tmp_path: Path, encoder: str) -> None:
    recipe = stirred(maker(part, encoder, tmp_path)())
    count = 2 if part == "local" else 1
    many = torch.ones(8000, 3 * count, *((1, 1) if part == "local" else ()))
    kept = recipe.dropped(many, StepRandom(0, 0, range(8000))).flatten(1)
    assert set(kept.unique().tolist()) == {0.0, 1.0}
    each = kept.unflatten(1, (count, 3))
    assert torch.equal(each.amin(2), each.amax(2)), "a condition's channels go together"
    shares = [float((each[:, :, 0].sum(1) == n).float().mean()) for n in range(count + 1)]
    # All 0.1, none 0.1, else each with probability 1/2.
    expected = [0.5, 0.5] if count == 1 else [0.3, 0.4, 0.3]
    assert shares == pytest.approx(expected, abs=0.02)
    slots = list(range(4))
    rng, batch = StepRandom(0, 0, slots), recipe.batch([0, 1, 2, 0], 0)
    empty = (rng.uniform("words") < 0.5).tolist()
    told = recipe.base.condition(["" if out else p for out, p in zip(empty, batch.shown.prompts, strict=True)])
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bar = tiny_sd1().scheduler.alphas_cumprod[t].reshape(4, 1, 1, 1)
    noisy = bar**0.5 * batch.shown.latents + (1 - bar) ** 0.5 * noise
    seen = recipe.dropped(batch.maps, rng)
    assert set(empty) == {True, False} and not torch.equal(seen, batch.maps)
    with torch.no_grad():
        expected_loss = ((recipe.predict(noisy, t, told, seen) - noise) ** 2).mean()
        torch.testing.assert_close(recipe.loss(batch, 0, rng).total, expected_loss)
        everything = ((recipe.predict(noisy, t, told, batch.maps) - noise) ** 2).mean()
    assert abs(float(everything - expected_loss)) > 1e-5


def test_both_exports_draw_together_and_are_gone_on_from(tmp_path: Path, encoder: str) -> None:
    latents, whole = {}, tmp_path / "whole"
    for part in PARTS:
        recipe: Any = check_moves_only_what_trains(maker(part, encoder, tmp_path), tmp_path / part)
        weights = tmp_path / part / "weights"
        latents[part] = check_draws(control_of(str(weights), part, 1))
        more = {"image_encoder": recipe.encoder} if part == "global" else {}
        same = check_draws(control_of({part: recipe.net.eval()}, part, 1, **more))
        assert (same - latents[part]).abs().max() < 1e-4 * same.std()
        check_goes_on(recipe, lambda part=part, **changes: maker(part, encoder, tmp_path, **changes), weights)
        shutil.copytree(weights / part, whole / part)
    both = check_draws(control_of(str(whole), "local", 1).model_copy(update={"content": drawn(1)}))
    assert all(not torch.equal(both, alone) for alone in latents.values())
    # Kinds and image encoder are taken over with the shape.
    start = str(whole)
    taken = side_checks.maker(UniControlNetSettings(start_from=start), tmp_path)()
    assert taken.net.kinds == TWO and taken.batch([0], 0).maps.shape[1] == 6
    side_checks.maker(UniControlNetSettings(part="global", start_from=start), tmp_path)()
    with pytest.raises(InputError, match=r"knows canny, scribble, and kinds are canny\. Leave kinds out"):
        side_checks.maker(UniControlNetSettings(kinds=("canny",), start_from=start), tmp_path)()
    with pytest.raises(ModelError, match=r"has kinds = \['canny', 'scribble'\].*\['scribble', 'canny'\].*start_from"):
        side_checks.maker(UniControlNetSettings(kinds=TWO[::-1]), tmp_path)().load(whole)
    with pytest.raises(ModelError, match="Use the one for this model"):
        side_checks.maker(UniControlNetSettings(start_from=start), tmp_path, "sdxl")()
    with pytest.raises(ModelError, match="has no global adapter"):
        side_checks.maker(UniControlNetSettings(part="global", start_from=str(tmp_path / "local/weights")), tmp_path)()


def test_the_image_encoder_may_stay_where_it_is(tmp_path: Path, encoder: str) -> None:
    recipe = maker("global", encoder, tmp_path, with_encoder=False)()
    recipe.export(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out/global").iterdir()) == ["config.json", "model.safetensors"]
    check_draws(control_of(str(tmp_path / "out"), "global", 1, image_encoder=encoder))


@pytest.mark.parametrize("part", PARTS)
def test_previews_are_drawn_along_a_picture(part: str, tmp_path: Path, encoder: str) -> None:
    recipe = stirred(maker(part, encoder, tmp_path, previews=("a cat", "a dog"), preview_steps=2)())
    recipe.net.eval()
    pictures = recipe.preview(0)
    assert [name for name, _ in pictures] == ["a cat", "a dog"]
    more = {"image_encoder": recipe.encoder} if part == "global" else {}
    control = control_of({part: recipe.net}, part, 1, **more)
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    expected = pipe("a dog", controls=[control], seed=1, num_inference_steps=2, height=32, width=32).images[0]
    assert np.abs(np.asarray(expected, int) - np.asarray(pictures[1][1], int)).max() <= 1


@pytest.mark.parametrize("part", PARTS)
def test_it_measures_itself_with_everything_and_each_alone(part: str, tmp_path: Path, encoder: str) -> None:
    others = written(tmp_path / "others", 2, conditions=False)
    recipe = maker(part, encoder, tmp_path, validation=str(others))()
    before, after = recipe.validate(0), stirred(recipe).validate(0)
    assert before["unet_alone"] == after["unet_alone"]
    if part == "global":
        assert set(before) == {"held_out", "unet_alone"} and before["held_out"] != before["unet_alone"]
        return
    assert set(before) == {"held_out", "unet_alone", "held_out_canny", "held_out_scribble"}
    assert all(value == pytest.approx(before["unet_alone"], rel=1e-5) for value in before.values())
    assert len({round(value, 6) for value in after.values()}) == 4


@pytest.mark.parametrize("part", PARTS)
def test_the_command_trains_on_a_folder(
    part: str, tmp_path: Path, encoder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, run = written(tmp_path / "photos", conditions=False), tmp_path / "run"
    own = [f"image_encoder={encoder}", "part=global"] if part == "global" else ['kinds=["canny", "soft_edge"]']
    changes = [*own, "train.total_steps=1", "train.batch_size=2", "train.threads=1"]
    line = ["train", "uni_controlnet", "-d", str(photos), "--model", str(tiny_folder()), "-o", str(run), "--dry-run"]
    assert main([*line, *(word for change in changes for word in ("--set", change)), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["settings"]["part"] == part and told["estimate"]["trained"] > 10_000 and not run.exists()
    plan = plan_training("uni_controlnet", None, str(photos), str(tiny_folder()), run, changes)
    assert plan.loop.learning_rate == 1e-5
    assert (plan.run().weights / part / "config.json").is_file()


def test_what_cannot_be_is_refused(tmp_path: Path, encoder: str) -> None:
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"part": "both"}, "part: input should be 'local' or 'global', got 'both'"),
        ({"kinds": ["edges"]}, r"kinds\.0: input should be 'canny'.*got 'edges'"),
        ({"kinds": []}, r"kinds are one or more.*got \(\)"),
        ({"kinds": ["canny", "canny"]}, "each once"),
        ({"part": "global", "kinds": ["canny"]}, "kinds is of the local adapter, and part is 'global'"),
        ({"image_encoder": encoder}, "image_encoder is of the global adapter"),
        ({"signal_models": {"edges": "x"}}, "signal_models"),
    )
    for values, said in cases:
        with pytest.raises(InputError, match=said):
            UniControlNetSettings(**values)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="empty' cannot be loaded"):
        maker("global", str(tmp_path / "empty"), tmp_path)()
    with pytest.raises(ModelError, match=r"needs an image encoder\. Name the folder"):
        side_checks.maker(UniControlNetSettings(part="global"), tmp_path)()
    maker("global", encoder, tmp_path)().export(tmp_path / "out")
    other = tiny_image_encoder().config
    other.projection_dim = 20
    type(tiny_image_encoder())(other).save_pretrained(tmp_path / "other")
    with pytest.raises(ModelError, match="20 wide, the global adapter reads 24"):
        maker("global", str(tmp_path / "other"), tmp_path, start_from=str(tmp_path / "out"))()
    with pytest.raises(InputError, match="has no network"):
        side_checks.maker(UniControlNetSettings(kinds=TWO, signal_models={"canny": "x"}), tmp_path)()
