"""The theatre's recipes: what they declare moves, what they export loads, and the whole becomes a pipeline."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from controlroom.data.theatre.attributes import ANSWERS
from controlroom.data.theatre.tokenizer import write_tokenizer
from controlroom.data.theatre.vocabulary import words
from controlroom.sampling.pipeline import Pipeline
from controlroom.signals.readers import AttributeReader, KeypointReader
from controlroom.training.assemble import assemble
from controlroom.training.loop import train
from controlroom.training.objective import min_snr_weight
from controlroom.training.recipe import Recipe
from controlroom.training.recipes.theatre_autoencoder import TheatreAutoencoder
from controlroom.training.recipes.theatre_clip import TheatreClip
from controlroom.training.recipes.theatre_readers import TheatreAttributeReader, TheatreKeypointReader
from controlroom.training.recipes.theatre_unet import TheatreUNet, noise_schedule
from controlroom.training.settings import TrainSettings
from controlroom.training.theatre import ASSETS


def one_step(recipe: Recipe[Any], folder: Path) -> Path:
    """Train one step of two samples; every declared module must have moved."""
    before = {name: [p.detach().clone() for p in module.parameters()] for name, module in recipe.modules().items()}
    settings = TrainSettings(
        output_dir=folder, total_steps=1, batch_size=2, learning_rate=1e-3, optimizer="muon", mixed_precision="bf16"
    )
    result = train(recipe, settings)
    assert all(torch.isfinite(torch.tensor(value)) for value in result.losses.values())
    for name, module in recipe.modules().items():
        moved = [not torch.equal(a, b) for a, b in zip(before[name], module.parameters(), strict=True)]
        assert sum(moved) / len(moved) > 0.8, name
    return result.weights


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage trained for one step, as `controlroom.training.theatre` lays them out."""
    folder = tmp_path_factory.mktemp("runs")
    one_step(TheatreAutoencoder(), folder / "autoencoder")
    one_step(TheatreClip(folder / "tokenizer"), folder / "clip")
    one_step(TheatreAttributeReader(folder / "autoencoder/weights"), folder / "attribute_reader")
    one_step(TheatreKeypointReader(), folder / "keypoint_reader")
    unet = TheatreUNet(folder / "autoencoder/weights", folder / "clip/weights", folder / "latents", scenes=4)
    one_step(unet, folder / "unet")
    return folder


def test_every_word_is_one_token(tmp_path: Path) -> None:
    size = write_tokenizer(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    assert len(tokenizer) == size
    assert [word for word in words() if len(tokenizer(word).input_ids) != 3] == []
    ids = tokenizer("a [V] woman, naïve", padding="max_length").input_ids
    assert len(ids) == 77 and ids[0] == size - 2 and ids[-1] == size - 1


@pytest.mark.parametrize("part", ["shipped", "assembled"])
def test_all_tokenizer_files_of_a_checkpoint_agree(part: str, runs: Path, tmp_path: Path) -> None:
    """Older readers take vocab.json and merges.txt, newer ones tokenizer.json: the same ids, those CLIP learned."""
    if part == "assembled":
        assemble(runs, tmp_path)
    checkpoint = ASSETS if part == "shipped" else tmp_path
    (tmp_path / "older").mkdir()
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(checkpoint / "tokenizer" / name, tmp_path / "older")
    text = f"{' '.join(words())} naïve [V]"
    older, newer, clips = (
        CLIPTokenizer.from_pretrained(folder)(text).input_ids
        for folder in (tmp_path / "older", checkpoint / "tokenizer", checkpoint / "clip/tokenizer")
    )
    assert older == newer == clips


def test_exports_load(runs: Path) -> None:
    vae = AutoencoderKL.from_pretrained(runs / "autoencoder/weights")
    assert vae.config.scaling_factor != 0.18215
    assert CLIPModel.from_pretrained(runs / "clip/weights").config.projection_dim == 192
    unet = UNet2DConditionModel.from_pretrained(runs / "unet/weights")
    assert sum(p.numel() for p in unet.parameters()) <= 12_300_000
    assert AttributeReader.load(runs / "attribute_reader/weights").answers == ANSWERS
    KeypointReader.load(runs / "keypoint_reader/weights")


def test_the_parts_become_a_checkpoint(runs: Path, tmp_path: Path) -> None:
    assemble(runs, tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        assert path.stat().st_size <= 25_000_000
        with safe_open(str(path), "pt") as file:
            assert file.metadata()["format"] == "pt"
            assert {file.get_tensor(name).dtype for name in file.keys()} <= {torch.float16, torch.int64}
    with safe_open(str(tmp_path / "unet/diffusion_pytorch_model.safetensors"), "pt") as file:
        assert file.metadata()["samples"] == "2"

    theirs = StableDiffusionPipeline.from_pretrained(tmp_path)
    theirs.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(3)
    expected = theirs("a red cat", num_inference_steps=2, generator=generator, output_type="latent").images
    ours = Pipeline.from_pretrained(str(tmp_path))
    found = ours("a red cat", num_inference_steps=2, generator=torch.Generator().manual_seed(3), output_type="latent")
    assert (found.images - expected).abs().max() <= 1e-5 * expected.std()


def test_the_text_encoder_is_that_of_the_clip(runs: Path, tmp_path: Path) -> None:
    assemble(runs, tmp_path)
    clip = CLIPModel.from_pretrained(tmp_path / "clip")
    encoder = CLIPTextModel.from_pretrained(tmp_path / "text_encoder")
    ids = CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")("a red cat", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(encoder(ids).last_hidden_state, clip.text_model(input_ids=ids).last_hidden_state)
    assert json.loads((tmp_path / "text_encoder/config.json").read_text())["vocab_size"] == len(
        CLIPTokenizer.from_pretrained(tmp_path / "tokenizer")
    )


def test_loss_weights_follow_the_published_formula() -> None:
    alpha_bar = noise_schedule().alphas_cumprod
    snr = alpha_bar / (1 - alpha_bar)
    weight = min_snr_weight(alpha_bar)
    torch.testing.assert_close(weight, torch.minimum(snr, torch.tensor(5.0)) / snr)
    assert weight[-1] == 1.0 and weight[0] < 0.01


def test_located_maxima_are_sub_cell() -> None:
    heat = torch.full((1, 18, 32, 32), -20.0)
    heat[0, :, 10, 7] = 5.0
    heat[0, :, 10, 8] = 5.0  # half way between two cells
    places = KeypointReader.locate(heat)
    torch.testing.assert_close(places[0, 0], torch.tensor([8.0 / 32, 10.5 / 32]), atol=1e-4, rtol=0)
