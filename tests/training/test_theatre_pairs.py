"""Recipes of retargeting on tiny networks: what learns, what does not, and that exports work in the controls."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from safetensors.torch import load_file

from controlroom.controls.pose.appearance import AppearanceControl
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.data.theatre import vocabulary as v
from controlroom.data.theatre.paint import Part
from controlroom.data.theatre.render import render
from controlroom.data.theatre.scene import Dice
from controlroom.data.theatre.truth import keypoints, maps
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_appearance import TheatreAppearance
from controlroom.training.recipes.theatre_pairs import EMPTY_SHARE, FOCUS, focus_map, pair_of, pair_words, skeleton_map
from controlroom.training.recipes.theatre_pose_controlnet import TheatrePoseControlNet
from controlroom.training.recipes.theatre_unet import noise_schedule
from controlroom.training.settings import TrainSettings
from controlroom.training.theatre import STAGES
from tests.training.theatre_parts import pipeline

PAIRS = 10


def appearance(parts: Path, cache: Path) -> TheatreAppearance:
    return TheatreAppearance(parts / "unet", parts / "vae", parts / "clip", cache, pairs=PAIRS)


def pose(parts: Path, cache: Path, **more: Any) -> TheatrePoseControlNet:
    return TheatrePoseControlNet(parts / "unet", parts / "vae", parts / "clip", cache, pairs=PAIRS, **more)


def trained(recipe: Any, folder: Path, steps: int = 3, **more: Any) -> Path:
    """Train a few steps; every declared parameter must have moved (the loop itself checks those that must not)."""
    before = {n: {k: p.detach().clone() for k, p in m.named_parameters()} for n, m in recipe.modules().items()}
    frozen = {n: [p.detach().clone() for p in m.parameters()] for n, m in recipe.frozen().items()}
    result = train(
        recipe,
        TrainSettings(output_dir=folder, total_steps=steps, batch_size=2, learning_rate=1e-3, validate_every=2, **more),
    )
    assert all(np.isfinite(value) for value in result.losses.values())
    for name, module in recipe.modules().items():
        moves = {k: p.requires_grad for k, p in module.named_parameters()}
        assert moves == {k: not torch.equal(before[name][k], p) for k, p in module.named_parameters()}, name
    for name, module in recipe.frozen().items():
        assert all(torch.equal(a, b) for a, b in zip(frozen[name], module.parameters(), strict=True)), name
        assert not any(p.requires_grad for p in module.parameters()), name
    return result.weights


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pipe(parts: Path) -> Pipeline:
    return pipeline(parts, UNet2DConditionModel.from_pretrained(parts / "unet"))


DRAW: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 3}


def test_appearance_trains_and_its_export_is_a_writer(parts: Path, cache: Path, pipe: Pipeline, tmp_path: Path) -> None:
    recipe = appearance(parts, cache)
    weights = trained(recipe, tmp_path / "run", mixed_precision="bf16")
    again = appearance(parts, cache)
    again.load(weights)
    for a, b in zip(recipe.writer.parameters(), again.writer.parameters(), strict=True):
        assert torch.equal(a, b)
    source = render(pair_of(0).source)
    ours = pipe("a woman", controls=[AppearanceControl(source, model=str(weights))], **DRAW).images
    untrained = pipe("a woman", controls=[AppearanceControl(source, model=str(parts / "unet"))], **DRAW).images
    assert torch.isfinite(ours).all()
    assert (ours - untrained).abs().max() > 1e-4


def test_training_predicts_what_a_run_predicts(parts: Path, cache: Path, pipe: Pipeline) -> None:
    """One step without guidance from a known latent: the recipe's prediction is the engine's."""
    recipe = appearance(parts, cache)
    batch = recipe.batch([0], 0)
    seen: list[torch.Tensor] = []
    handle = pipe.to_diffusers().unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    control = AppearanceControl(render(pair_of(0).source), model=recipe.writer)
    words = recipe.pairs.conditioner.tokenizer.decode(batch.ids[0], skip_special_tokens=True)
    pipe(words, controls=[control], **{**DRAW, "num_inference_steps": 1, "guidance_scale": 1.0})
    handle.remove()
    with torch.no_grad():
        noisy, t, expected = seen
        found = recipe.predict(batch, noisy, t.expand(1))
    # The cache holds latents of bf16 encoding in half precision.
    assert (found - expected).abs().max() < 0.05 * expected.std()
    other = recipe.predict(recipe.batch([1], 0), noisy, t.expand(1))
    assert (found - other).abs().max() > 2 * (found - expected).abs().max()


def test_pose_alone_then_both_together(parts: Path, cache: Path, pipe: Pipeline, tmp_path: Path) -> None:
    net = trained(pose(parts, cache), tmp_path / "pose")
    assert isinstance(ControlNetModel.from_pretrained(net), ControlNetModel)
    writer = trained(appearance(parts, cache), tmp_path / "appearance", steps=1)
    both = pose(parts, cache, controlnet_folder=net, appearance_folder=writer)
    weights = trained(both, tmp_path / "both")
    again = pose(parts, cache, controlnet_folder=net, appearance_folder=writer)
    again.load(weights)
    for a, b in zip(both.modules().values(), again.modules().values(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    pair = pair_of(0)
    controls = [
        AppearanceControl(render(pair.source), model=str(weights / "appearance")),
        ControlNet(model=str(weights / "pose"), image=skeleton_map(pair.target)),
    ]
    drawn = pipe("", controls=controls, **DRAW)
    assert torch.isfinite(drawn.images).all()
    assert drawn.manifest["cost"]["side_passes"] == 1 + 2


@pytest.mark.parametrize("learns", ["pose", "pose_blocks"])
def test_pose_learns_beside_a_writer_that_stays(
    parts: Path, cache: Path, tmp_path: Path, learns: Literal["pose", "pose_blocks"]
) -> None:
    net, writer = trained(pose(parts, cache), tmp_path / "pose"), parts / "unet"
    recipe = pose(parts, cache, controlnet_folder=net, appearance_folder=writer, learns=learns)
    moving = {k.split(".")[0] for k, p in recipe.controlnet.named_parameters() if p.requires_grad}
    ends = {"controlnet_cond_embedding", "controlnet_down_blocks", "controlnet_mid_block"}
    assert moving == ends if learns == "pose_blocks" else moving > ends
    weights = trained(recipe, tmp_path / "run")
    stays, kept = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (writer, weights / "appearance"))
    assert all(torch.equal(stays[k], kept[k]) for k in kept)
    noisy, t = torch.randn(2, 4, 16, 16), torch.tensor([300, 600])
    batch = recipe.batch([0, 1], 0)
    seen = recipe.predict(batch, noisy, t)
    recipe.reader = None
    assert seen.requires_grad and (seen - recipe.predict(batch, noisy, t)).abs().max() > 1e-3


def test_appearance_learns_beside_a_controlnet_that_stays(parts: Path, cache: Path, tmp_path: Path) -> None:
    net, writer = trained(pose(parts, cache), tmp_path / "pose"), parts / "unet"
    recipe = pose(parts, cache, controlnet_folder=net, appearance_folder=writer, learns="appearance")
    assert set(recipe.modules()) == {"writer"}
    weights = trained(recipe, tmp_path / "run")
    stays, kept = (load_file(f / "diffusion_pytorch_model.safetensors") for f in (net, weights / "pose"))
    assert all(torch.equal(stays[k], kept[k]) for k in kept)
    again = pose(parts, cache, appearance_folder=writer, learns="appearance")
    before = {k: p.clone() for k, p in again.controlnet.state_dict().items()}
    again.load(weights)  # only what learns
    assert all(torch.equal(before[k], p) for k, p in again.controlnet.state_dict().items())
    pairs = zip(again.writer.parameters(), recipe.writer.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    batch, rng = recipe.batch([0, 1], 0), StepRandom(0, 0, [0, 1])
    focused = recipe.loss(batch, 0, rng).total
    assert focused != recipe.loss(dataclasses.replace(batch, focus=None), 0, rng).total


def test_errors_count_most_at_the_head() -> None:
    scene = pair_of(0).target
    found, weight = maps(scene), focus_map(scene)[0].numpy()
    assert (weight[found.mask(0, Part.HAIR, Part.HEAD, Part.HAT)] == FOCUS["head"]).all()
    legs = weight[found.mask(0, Part.RIGHT_LEG, Part.LEFT_LEG)]
    assert np.allclose(legs, FOCUS["puppet"]) and np.isclose(weight[0, 0], FOCUS["place"])


def test_samples_without_reference_do_not_see_it(parts: Path, cache: Path, tmp_path: Path) -> None:
    writer = trained(appearance(parts, cache), tmp_path / "appearance", steps=1)
    recipe = pose(parts, cache, appearance_folder=writer)
    batch = recipe.batch([0, 1], 0)
    noisy, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([300, 600])
    with torch.no_grad():
        both, first = (recipe.predict(batch, noisy, t, keep) for keep in (None, torch.tensor([True, False])))
        recipe.reader = None
        neither = recipe.predict(batch, noisy, t)
    torch.testing.assert_close(first[0], both[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(first[1], neither[1], atol=1e-5, rtol=1e-5)
    assert (both[1] - neither[1]).abs().max() > 1e-3


def test_loss_is_the_published_one(parts: Path, cache: Path) -> None:
    recipe = appearance(parts, cache)
    batch, rng = recipe.batch([2, 3], 0), StepRandom(0, 0, [0, 1])
    noise, t = rng.normal("noise", (4, 16, 16)), rng.integers("timestep", 0, 1000)
    bar = noise_schedule().alphas_cumprod[t].reshape(2, 1, 1, 1)
    with torch.no_grad():
        predicted = recipe.predict(batch, bar**0.5 * batch.target + (1 - bar) ** 0.5 * noise, t)
        each = ((predicted - noise) ** 2).flatten(1).mean(1)
        snr = (bar / (1 - bar)).flatten()
        expected = (each * torch.minimum(snr, torch.tensor(5.0)) / snr).mean()
        torch.testing.assert_close(recipe.loss(batch, 0, rng).total, expected)


def test_words_name_the_place_of_a_moved_target_and_most_others_are_empty() -> None:
    pairs = [pair_of(index) for index in range(120)]
    texts = [pair_words(pair, Dice("test", i)) for i, pair in enumerate(pairs)]
    moved = [(p, text) for p, text in zip(pairs, texts, strict=True) if p.moved]
    still = [text for p, text in zip(pairs, texts, strict=True) if not p.moved]
    assert 0.2 < len(moved) / len(pairs) < 0.5
    assert all(v.PLACE_PHRASES[p.target.place] in text for p, text in moved)
    assert abs(sum(text == "" for text in still) / len(still) - EMPTY_SHARE) < 0.15


def test_skeleton_lies_on_the_puppet() -> None:
    scene = pair_of(1).target
    drawn = skeleton_map(scene)
    assert drawn.shape == (3, 128, 128)
    for x, y, seen in keypoints(scene):
        if seen > 0:
            assert drawn[:, int(y), int(x)].max() > 0.2


def test_stages_are_registered() -> None:
    for name in ("appearance", "pose", "retarget"):
        _, values = STAGES[name]
        TrainSettings(output_dir=Path("nowhere"), **values)
