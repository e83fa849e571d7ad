"""Inpainting and depth on one's own pictures: what moves, what the channels show, exact resume, what exports draw."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionInpaintPipeline, UNet2DConditionModel
from PIL import Image

import controlroom as cr
from controlroom.core.errors import InputError, ModelError
from controlroom.data.holes import random_hole
from controlroom.tasks.train import plan_training
from controlroom.training.recipes.depth2img import Depth2ImgRecipe, Depth2ImgSettings
from controlroom.training.recipes.inpaint import InpaintRecipe, InpaintSettings
from tests.saved import tiny_folder
from tests.tiny import BACKBONES, tiny_sd1
from tests.training.recipe_checks import check_learns, check_moves_only_what_trains, check_resumes
from tests.training.scenery import conditioned, drawn, ramp, written

SETTINGS: dict[str, Any] = {"inpaint": InpaintSettings(), "depth2img": Depth2ImgSettings()}
CHANNELS = {"inpaint": 9, "depth2img": 5}
DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 4.0}


def maker(name: str, folder: Path, backbone: str = "sd1", **changes: Any) -> Callable[[], Any]:
    pipe = cr.Pipeline.from_diffusers(BACKBONES[backbone]())
    settings = SETTINGS[name].model_copy(update=changes)
    return lambda: settings.build(pipe, conditioned(), folder)


def with_unet(unet: Any) -> Any:
    plain = tiny_sd1()
    plain.unet = unet.eval()
    return plain


@pytest.mark.parametrize(("name", "kind"), [("inpaint", "sd1"), ("inpaint", "sdxl"), ("depth2img", "sd2")])
def test_the_whole_unet_moves_and_nothing_else(name: str, kind: str, tmp_path: Path) -> None:
    fresh, plain = maker(name, tmp_path / "maps", kind)(), BACKBONES[kind]().unet
    first = fresh.base.unet.conv_in
    assert torch.equal(first.weight[:, :4], plain.conv_in.weight) and not first.weight[:, 4:].any()
    assert torch.equal(first.bias, plain.conv_in.bias) and first.weight.shape[1] == CHANNELS[name]
    recipe = check_moves_only_what_trains(maker(name, tmp_path / "maps", kind), tmp_path / "run", learning_rate=1e-3)
    assert set(recipe.modules()) == {"unet"} and recipe.modules()["unet"].conv_in.weight[:, 4:].any()  # type: ignore[union-attr]


@pytest.mark.parametrize("name", SETTINGS)
def test_it_learns_and_continues(name: str, tmp_path: Path) -> None:
    check_learns(maker(name, tmp_path), tmp_path / "run", learning_rate=1e-3, batch_size=3)
    check_resumes(maker(name, tmp_path), tmp_path / "resumed", learning_rate=1e-3)


def test_holes_are_the_mask_and_what_is_known(tmp_path: Path) -> None:
    recipe: InpaintRecipe = maker("inpaint", tmp_path, flip=True)()
    channels = recipe.batch([1, 4], 7).maps
    assert channels.shape == (2, 5, 16, 16)
    vae = tiny_sd1().vae
    for row, mirrored in zip(channels, (False, True), strict=True):
        hole = recipe.hole(recipe.shown, (1, mirrored), 7)
        pixels = np.asarray(drawn(1), np.float32).transpose(2, 0, 1) / 127.5 - 1
        seen = torch.tensor((pixels[:, :, ::-1] if mirrored else pixels) * ~hole)[None]
        with torch.no_grad():
            known = vae.encode(seen.float()).latent_dist.mean[0] * vae.config.scaling_factor
        torch.testing.assert_close(row[1:], known, atol=1e-5, rtol=1e-4)
        assert torch.equal(row[0], F.interpolate(torch.tensor(hole).float()[None, None], size=(16, 16))[0, 0])
    assert torch.equal(recipe.batch([1, 4], 7).maps, channels)
    assert not torch.equal(recipe.batch([1, 4], 8).maps, channels)


def test_holes_of_any_size() -> None:
    shares = [random_hole((24, 40), "try", number).mean() for number in range(400)]
    assert min(shares) > 0 and 0.2 < np.mean([share == 1 for share in shares]) < 0.3
    assert random_hole((24, 40), 1).shape == (24, 40)
    assert np.array_equal(random_hole((24, 40), 1), random_hole((24, 40), 1))
    covered = np.mean([random_hole((24, 40), "where", number) for number in range(400)], axis=0)
    assert covered.min() > 0.25  # no corner is always known


def test_depths_are_what_a_run_shows(tmp_path: Path) -> None:
    recipe: Depth2ImgRecipe = maker("depth2img", tmp_path)()
    batch = recipe.batch([1], 0)
    assert batch.maps.shape == (1, 1, 16, 16) and batch.maps.min() == -1 and batch.maps.max() == 1
    pipe = cr.Pipeline.from_diffusers(with_unet(recipe.base.unet))
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    pipe("a cat", controls=[cr.DepthToImage(drawn(1), ramp(1))], seed=3, height=32, width=32, **DRAW)
    handle.remove()
    torch.testing.assert_close(seen[0][:1, 4:], batch.maps, atol=2e-2, rtol=0)


def test_exports_fill_holes_in_diffusers_and_here_alike(tmp_path: Path) -> None:
    recipe = check_moves_only_what_trains(maker("inpaint", tmp_path), tmp_path / "run", learning_rate=1e-3)
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "run/weights/unet")
    again = maker("inpaint", tmp_path)()
    again.load(tmp_path / "run/weights")
    for key, value in recipe.modules()["unet"].state_dict().items():
        assert torch.equal(value, unet.state_dict()[key]) and torch.equal(value, again.base.unet.state_dict()[key])
    theirs: Any = StableDiffusionInpaintPipeline(**with_unet(unet).components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    mask = Image.new("L", (32, 32))
    mask.paste(255, (4, 4, 20, 24))
    more: dict[str, Any] = {**DRAW, "height": 32, "width": 32}
    generator = torch.Generator().manual_seed(4)
    expected = theirs("a cat", image=drawn(0), mask_image=mask, strength=1.0, generator=generator, **more).images
    pipe = cr.Pipeline.from_diffusers(with_unet(unet))
    found = pipe("a cat", controls=[cr.Inpaint(drawn(0), mask)], seed=4, **more).images
    assert (found - expected).abs().max() <= 1e-4 * expected.std()


def test_the_export_of_a_depth_model_draws(tmp_path: Path) -> None:
    check_moves_only_what_trains(maker("depth2img", tmp_path), tmp_path / "run", learning_rate=1e-3)
    unet: Any = UNet2DConditionModel.from_pretrained(tmp_path / "run/weights/unet")
    pipe = cr.Pipeline.from_diffusers(with_unet(unet))
    near, far = (
        pipe("a cat", controls=[cr.DepthToImage(drawn(0), ramp(n))], seed=4, height=32, width=32, **DRAW).images
        for n in (0, 2)
    )
    assert torch.isfinite(near).all() and not torch.equal(near, far)


@pytest.mark.parametrize("name", SETTINGS)
def test_the_command_trains_on_a_folder_and_draws_on_the_way(name: str, tmp_path: Path) -> None:
    folder, run = written(tmp_path / "photos"), tmp_path / "run"
    changes = ["train.total_steps=2", "train.batch_size=2", "train.threads=1", f"validation={folder}"]
    changes += ["train.validate_every=2", 'previews=["a cat"]', "preview_steps=1"]
    plan_training(name, None, str(folder), str(tiny_folder()), run, changes).run()
    assert (run / "weights/unet/config.json").is_file() and len(list((run / "previews").iterdir())) == 2
    assert "held_out" in (run / "log.jsonl").read_text()


def test_models_that_read_more_already_are_refused(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1(in_channels=9))
    with pytest.raises(ModelError, match="reads 9 channels"):
        InpaintSettings().build(pipe, conditioned(), tmp_path)
    with pytest.raises(InputError, match="empty_prompts"):
        InpaintSettings(empty_prompts=2)
    mixed = (*conditioned(1), conditioned(2)[1].condition)
    with pytest.raises(InputError, match="has no c"):
        Depth2ImgSettings(prompt="a cat").build(cr.Pipeline.from_diffusers(tiny_sd1()), mixed, tmp_path)
