"""The recipes of inpainting and depth on tiny networks: how they start, what they learn from, that the exports draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel

from controlroom.controls.editing.inpaint import Inpaint
from controlroom.controls.spatial.depth_to_image import DepthToImage
from controlroom.data.theatre.conditions import condition
from controlroom.data.theatre.holes import GARMENTS, KINDS, garment_hole, grown, hole
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import sample_scene
from controlroom.data.theatre.truth import maps
from controlroom.training.assemble import PARTS
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_depth2img import TheatreDepth2Img
from controlroom.training.recipes.theatre_inpaint import TheatreInpaint
from controlroom.training.settings import TrainSettings
from controlroom.training.theatre import STAGES
from tests.training.theatre_parts import pipeline

RECIPES: dict[str, tuple[Any, int]] = {"inpaint": (TheatreInpaint, 5), "depth2img": (TheatreDepth2Img, 1)}
SCENES = 6


def make(kind: str, parts: Path) -> Any:
    recipe, _ = RECIPES[kind]
    return recipe(parts / "unet", parts / "vae", parts / "clip", parts / "latents", scenes=SCENES)


def control(kind: str, index: int) -> Any:
    scene = sample_scene(index)
    if kind == "inpaint":
        return Inpaint(render(scene), hole(scene, "train", index))
    return DepthToImage(render(scene), condition(scene, "depth"), 1.0)


@pytest.mark.parametrize("kind", RECIPES)
def test_starts_as_the_unet_it_came_from(kind: str, parts: Path) -> None:
    recipe, plain = make(kind, parts), UNet2DConditionModel.from_pretrained(parts / "unet")
    batch = recipe.batch([0, 1], 0)
    noisy, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    with torch.no_grad():
        found = recipe.predict(batch, noisy, t)
        expected = plain(noisy, t, recipe.conditioner(batch.ids)).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert recipe.unet.config.in_channels == 4 + RECIPES[kind][1] == 4 + batch.channels.shape[1]


def test_channels_of_inpainting_are_mask_and_what_is_outside(parts: Path) -> None:
    recipe = make("inpaint", parts)
    batch = recipe.batch([4, 2], 0)
    for row, index in enumerate((4, 2)):
        scene = sample_scene(index)
        mask = torch.from_numpy(hole(scene, "train", index)).float()[None, None]
        torch.testing.assert_close(batch.channels[row, :1], F.interpolate(mask, size=(16, 16))[0])
        pixels = to_pixels([render(scene)])
        with torch.no_grad():
            known = recipe.vae.encode(torch.where(mask > 0.5, 0.0, pixels)).latent_dist.mean * recipe.scale
            clean = recipe.vae.encode(pixels).latent_dist.mean * recipe.scale
        # The caches keep half precision.
        torch.testing.assert_close(batch.channels[row, 1:], known[0], atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(batch.latents[row], clean[0], atol=2e-3, rtol=2e-3)


def test_channel_of_depth_is_the_truth(parts: Path) -> None:
    batch = make("depth2img", parts).batch([3], 0)
    depth = torch.from_numpy(maps(sample_scene(3)).depth.astype(np.float32))[None, None]
    small = F.interpolate(depth, size=(16, 16), mode="bicubic", align_corners=False)
    expected = (small - small.min()) / (small.max() - small.min()) * 2 - 1
    torch.testing.assert_close(batch.channels, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", RECIPES)
def test_training_predicts_what_a_run_predicts(kind: str, parts: Path) -> None:
    """One step without guidance: the recipe's prediction is the engine's, on the same channels and words."""
    recipe, seen = make(kind, parts), []
    with torch.no_grad():
        recipe.unet.conv_in.weight[:, 4:].normal_(generator=torch.Generator().manual_seed(1))
    batch = recipe.batch([0], 0)
    text = recipe.conditioner.tokenizer.decode(batch.ids[0], skip_special_tokens=True)
    handle = recipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    settings = {"num_inference_steps": 1, "guidance_scale": 1.0, "output_type": "latent", "seed": 3}
    pipeline(parts, recipe.unet)(text, controls=[control(kind, 0)], **settings)
    handle.remove()
    sample, t, output = seen
    # Runs draw samples of the encoder's posterior, and the cache keeps half precision: compare on what the run saw.
    inner = batch.channels.shape[1] - 4 if kind == "inpaint" else 1
    torch.testing.assert_close(sample[:, 4 : 4 + inner], batch.channels[:, :inner], atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        same = recipe.predict(type(batch)(batch.latents, sample[:, 4:], batch.ids), sample[:, :4], t.reshape(1))
    torch.testing.assert_close(same, output, atol=1e-4, rtol=1e-4)


def test_loss_is_the_weighted_error(parts: Path) -> None:
    recipe = make("depth2img", parts)
    batch, rng = recipe.batch([0, 1, 2], 0), StepRandom(7, 0, [0, 1, 2])
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    expected = 0.0
    with torch.no_grad():
        for row in range(3):
            bar = float(recipe.objective.alpha_bar[t[row]])
            noisy = bar**0.5 * batch.latents[row] + (1 - bar) ** 0.5 * noise[row]
            joined = torch.cat([noisy, batch.channels[row]])[None]
            found = recipe.unet(joined, t[row : row + 1], recipe.conditioner(batch.ids[row : row + 1])).sample[0]
            snr = bar / (1 - bar)
            expected += min(snr, 5.0) / snr * float(((found - noise[row]) ** 2).mean()) / 3
        assert float(recipe.loss(batch, 0, rng).total) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("kind", RECIPES)
def test_training_moves_everything_and_the_export_draws(kind: str, parts: Path, tmp_path: Path) -> None:
    recipe = make(kind, parts)
    before = {k: p.detach().clone() for k, p in recipe.unet.named_parameters()}
    short = {**STAGES[kind][1], "total_steps": 3, "batch_size": 2, "validate_every": 2, "warmup_steps": 0}
    short.pop("total_samples")
    result = train(recipe, TrainSettings(output_dir=tmp_path / kind, **short))
    assert [k for k, p in recipe.unet.named_parameters() if torch.equal(before[k], p)] == []
    log = (tmp_path / kind / "log.jsonl").read_text()
    assert "held_out" in log and "other_channels" in log
    again = make(kind, parts)
    again.load(result.weights)
    trained = UNet2DConditionModel.from_pretrained(result.weights)
    assert all(torch.equal(a, b) for a, b in zip(again.unet.parameters(), trained.parameters(), strict=True))
    pipe = pipeline(parts, trained)
    settings = {"num_inference_steps": 2, "output_type": "latent", "seed": 3}
    first, second = (pipe("a red hat", controls=[control(kind, index)], **settings).images for index in (0, 1))
    assert torch.isfinite(first).all() and not torch.equal(first, second)
    assert PARTS[kind] == kind


# Holes.


def test_holes_are_never_empty_and_stay_the_same() -> None:
    shares = []
    for index in range(60):
        scene = sample_scene(index)
        found = hole(scene, "train", index)
        assert found.shape == (128, 128) and found.any()
        assert np.array_equal(found, hole(scene, "train", index))
        shares.append(found.mean())
    whole = np.mean(np.array(shares) == 1.0)
    assert abs(whole - KINDS["all"]) < 0.12
    assert np.median(shares) < 0.5


def test_a_garments_hole_holds_the_garment_and_little_else() -> None:
    scene = next(s for s in map(sample_scene, range(50)) if len(s.actors) == 1 and s.puppets)
    labels = maps(scene)
    for garment, wanted in GARMENTS.items():
        found = garment_hole(scene, 0, garment, grow=2)
        own = np.isin(labels.part, [int(part) for part in wanted]) & (labels.actor == 1)
        assert found[own].all()
        # The same by hand: a pixel belongs to it if one of the 25 around it is the garment's.
        padded = np.pad(own, 2)
        around = [padded[dy : dy + 128, dx : dx + 128] for dy in range(5) for dx in range(5)]
        assert np.array_equal(found, np.any(around, axis=0))
    assert np.array_equal(grown(own, 0), own)
