"""The theatre's IP-Adapter on tiny networks: what learns, what its encoder reads, and that the export is a published
file that the control and diffusers read alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, CLIPTokenizer, CLIPVisionConfig

from controlroom.backbones import loading
from controlroom.backbones.image_encoder import clip_pixels
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.data.theatre.render import render
from controlroom.data.theatre.tokenizer import LENGTH, write_tokenizer
from controlroom.sampling.pipeline import Pipeline
from controlroom.training.assemble import PARTS, copy_half
from controlroom.training.clip_vision import image_encoder_of
from controlroom.training.loop import train
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.theatre_autoencoder import to_pixels
from controlroom.training.recipes.theatre_ip_adapter import DROPOUT, FILE, TheatreIPAdapter
from controlroom.training.recipes.theatre_pairs import pair_of
from controlroom.training.recipes.theatre_unet import noise_schedule
from controlroom.training.settings import TrainSettings
from controlroom.training.theatre import STAGES
from tests.tiny import tiny_unet

PAIRS = 4


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny networks of the theatre's shapes: ``unet``, ``vae``, ``clip`` (both towers)."""
    folder = tmp_path_factory.mktemp("parts")
    torch.manual_seed(0)
    size = write_tokenizer(folder / "clip/tokenizer")
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    text = CLIPTextConfig(vocab_size=size, max_position_embeddings=LENGTH, **shape, **ends)
    vision = CLIPVisionConfig(image_size=128, patch_size=32, **{**shape, "hidden_size": 24})
    towers = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    CLIPModel(CLIPConfig(projection_dim=20, **towers)).save_pretrained(folder / "clip")
    AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=128,
    ).save_pretrained(folder / "vae")
    tiny_unet(0).save_pretrained(folder / "unet")
    return folder


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def recipe_of(parts: Path, cache: Path) -> TheatreIPAdapter:
    return TheatreIPAdapter(parts / "unet", parts / "vae", parts / "clip", cache, pairs=PAIRS)


@pytest.fixture(scope="module")
def weights(parts: Path, cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export after a few steps, in which every declared parameter moved and nothing else."""
    recipe = recipe_of(parts, cache)
    before = {k: p.detach().clone() for k, p in recipe.adapter.named_parameters()}
    frozen = {n: [p.detach().clone() for p in m.parameters()] for n, m in recipe.frozen().items()}
    folder = tmp_path_factory.mktemp("run")
    settings = {"total_steps": 3, "batch_size": 2, "learning_rate": 1e-2, "validate_every": 2}
    result = train(recipe, TrainSettings(output_dir=folder, mixed_precision="bf16", **settings))
    assert all(np.isfinite(value) for value in result.losses.values())
    assert [k for k, p in recipe.adapter.named_parameters() if torch.equal(before[k], p)] == []
    for name, module in recipe.frozen().items():
        assert all(torch.equal(a, b) for a, b in zip(frozen[name], module.parameters(), strict=True)), name
    again = recipe_of(parts, cache)
    again.load(result.weights)
    # What is exported is the average, which the recipe no longer holds: compare with the file.
    with safe_open(str(result.weights / FILE), "pt") as file:
        assert file.metadata()["samples"] == "6"
        for key, value in again.adapter.state_dict().items():
            assert torch.equal(file.get_tensor(key), value)
    return result.weights


def diffusers_pipeline(parts: Path) -> StableDiffusionPipeline:
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(parts / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(parts / "clip"),
        tokenizer=CLIPTokenizer.from_pretrained(parts / "clip/tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(parts / "unet"),
        scheduler=noise_schedule(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


DRAW: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 4.0, "output_type": "latent"}


def test_the_file_has_the_published_keys(weights: Path) -> None:
    with safe_open(str(weights / FILE), "pt") as file:
        keys = set(file.keys())
    layers = {f"ip_adapter.{n}.to_{part}_ip.weight" for n in (1, 3, 5, 7, 9, 11) for part in "kv"}
    image = {f"image_proj.{name}" for name in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")}
    assert keys == layers | image


def test_the_export_draws_the_same_in_the_control_and_in_diffusers(parts: Path, weights: Path) -> None:
    source = render(pair_of(0).source)
    theirs = diffusers_pipeline(parts)
    plain = theirs("a woman", generator=torch.Generator().manual_seed(3), **DRAW).images
    theirs.load_ip_adapter(str(weights), subfolder="", weight_name=FILE, local_files_only=True)
    theirs.set_ip_adapter_scale(0.8)
    expected = theirs("a woman", ip_adapter_image=source, generator=torch.Generator().manual_seed(3), **DRAW).images
    pipe = Pipeline.from_diffusers(diffusers_pipeline(parts))
    control = IPAdapter(model=str(weights), image=source, scale=0.8)
    ours = pipe("a woman", controls=[control], generator=torch.Generator().manual_seed(3), **DRAW).images
    assert (ours - expected).abs().max() <= 1e-4 * expected.std()
    assert (ours - plain).abs().max() > 1e-2 * expected.std()


def test_a_theatre_name_finds_adapter_and_encoder(
    parts: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assets = tmp_path / "theatre"
    copy_half(weights, assets / PARTS["ip_adapter"])
    monkeypatch.setattr(loading, "theatre_folder", lambda: assets)
    pipe = Pipeline.from_diffusers(diffusers_pipeline(parts))
    source = render(pair_of(0).source)
    named, direct = (
        pipe("", controls=[IPAdapter(model, source)], seed=1, **DRAW).images
        for model in ("theatre/ip_adapter", str(weights))
    )
    # Weights that ship are halved.
    assert 0 < (named - direct).abs().max() < 2e-2 * direct.std()


def test_training_predicts_what_a_run_predicts(parts: Path, cache: Path) -> None:
    recipe = recipe_of(parts, cache)
    batch = recipe.batch([0], 0)
    pipe = Pipeline.from_diffusers(diffusers_pipeline(parts))
    seen: list[torch.Tensor] = []
    handle = pipe.unet.register_forward_hook(lambda m, a, o: seen.extend([a[0], a[1], o[0]]))
    words = recipe.pairs.conditioner.tokenizer.decode(batch.pairs.ids[0], skip_special_tokens=True)
    control = IPAdapter(recipe.adapter, render(pair_of(0).source), image_encoder=recipe.encoder)
    pipe(words, controls=[control], seed=3, **{**DRAW, "num_inference_steps": 1, "guidance_scale": 1.0})
    handle.remove()
    noisy, t, expected = seen
    with torch.no_grad():
        found = recipe.predict(batch.pairs, noisy, t.expand(1), batch.features)
        other = recipe.predict(batch.pairs, noisy, t.expand(1), recipe.batch([1], 0).features)
    assert (found - expected).abs().max() < 2e-3 * expected.std()  # features are kept in half precision
    assert (other - expected).abs().max() > 2 * (found - expected).abs().max()


def test_left_out_are_the_picture_the_words_or_both(parts: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(parts, cache)
    batch, given = recipe.batch([0, 1, 2, 3], 0), []
    real = recipe.predict
    monkeypatch.setattr(recipe, "predict", lambda b, noisy, t, f: given.append((b.ids, f)) or real(b, noisy, t, f))
    monkeypatch.setattr(StepRandom, "choice", lambda self, name, weights: torch.arange(4))
    with torch.no_grad():
        recipe.loss(batch, 0, StepRandom(0, 0, range(4)))
    (ids, features), empty = given[0], recipe.empty[0]
    assert sum(DROPOUT) == pytest.approx(1.0)
    assert [bool((row == 0).all()) for row in features] == [False, True, False, True]
    assert torch.equal(ids[:2], batch.pairs.ids[:2])
    assert all(torch.equal(row, empty) for row in ids[2:])


def test_the_encoder_reads_clips_normalisation_as_the_clip_reads_its_own(parts: Path) -> None:
    clip, encoder = CLIPModel.from_pretrained(parts / "clip"), image_encoder_of(parts / "clip")
    pictures = [render(pair_of(index).source) for index in range(3)]
    with torch.no_grad():
        vision = clip.vision_model(pixel_values=to_pixels(pictures))
        expected = clip.visual_projection(vision.pooler_output)
        found = encoder(clip_pixels(pictures, 128)).image_embeds
        raw = encoder(to_pixels(pictures)).image_embeds
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (raw - expected).abs().max() > 1e-3


def test_stage_is_registered() -> None:
    _, values = STAGES["ip_adapter"]
    TrainSettings(output_dir=Path("nowhere"), **values)
