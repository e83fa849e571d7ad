"""Upscale: enlarged as written plainly, and finished as diffusers' image to image finishes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image
from pydantic import Field

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.upscale import Upscale
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ConflictError, InputError
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES, PIXELS, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "height": 48, "width": 64}
TOLERANCE = 1e-4


def picture(seed: int = 0, size: tuple[int, int] = (PIXELS, 24)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def noise(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def finished(plain: Any, latents: torch.Tensor, strength: float) -> torch.Tensor:
    """diffusers' image to image from latents of the large size."""
    if hasattr(plain, "text_encoder_2"):
        pipe: Any = StableDiffusionXLImg2ImgPipeline(**plain.components, add_watermarker=False)
    else:
        pipe = StableDiffusionImg2ImgPipeline(**plain.components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 5, "output_type": "latent", "guidance_scale": 7.5, "strength": strength}
    return pipe(prompt="a cat", image=latents, generator=torch.Generator().manual_seed(5), **settings).images


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


@pytest.fixture(scope="module")
def plain() -> Any:
    return tiny_sd1()


@pytest.fixture(scope="module")
def pipe(plain: Any) -> Pipeline:
    return Pipeline.from_diffusers(plain)


@pytest.mark.parametrize("kind", BACKBONES)
def test_latents_are_enlarged_and_finished(kind: str) -> None:
    plain, small = BACKBONES[kind](), noise(1, 4, 12, 16)
    expected = finished(plain, F.interpolate(small, size=(24, 32), mode="bicubic"), 0.6)
    found = Pipeline.from_diffusers(plain)("a cat", controls=[Upscale(small, 0.6, "latents")], seed=5, **DRAW)
    close(found.images, expected)
    assert found.manifest["cost"]["unet_passes"] == 3


@torch.no_grad()
def test_pictures_are_enlarged_encoded_and_finished(plain: Any, pipe: Pipeline) -> None:
    small = picture()
    large = small.resize((64, 48), Image.Resampling.LANCZOS)
    pixels = torch.from_numpy(np.asarray(large, np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    latents = plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor
    close(pipe("a cat", controls=[Upscale(small, 0.6)], seed=5, **DRAW).images, finished(plain, latents, 0.6))


@torch.no_grad()
def test_the_other_way_round_goes_through_the_autoencoder(plain: Any, pipe: Pipeline) -> None:
    scale = plain.vae.config.scaling_factor
    small = noise(1, 4, 12, 16)
    pixels = plain.vae.decode(small / scale).sample.clamp(-1, 1)
    large = F.interpolate(pixels, size=(48, 64), mode="bicubic", antialias=True).clamp(-1, 1)
    expected = finished(plain, plain.vae.encode(large).latent_dist.mode() * scale, 0.6)
    close(pipe("a cat", controls=[Upscale(small, 0.6, "pixels")], seed=5, **DRAW).images, expected)
    pixels = torch.from_numpy(np.asarray(picture(), np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    latents = plain.vae.encode(pixels).latent_dist.mode() * scale
    expected = finished(plain, F.interpolate(latents, size=(24, 32), mode="bicubic"), 0.6)
    close(pipe("a cat", controls=[Upscale(picture(), 0.6, "latents")], seed=5, **DRAW).images, expected)


@pytest.mark.parametrize("mode", ["pixels", "latents"])
def test_draw_small_then_large(mode: Any, pipe: Pipeline) -> None:
    """What is drawn keeps the layout of the small picture, where a run without it has another."""
    small = pipe(["a cat", "a dog"], seed=5, **{**DRAW, "height": 24, "width": 32, "guidance_scale": 1.0})
    settings = {**DRAW, "num_inference_steps": 20, "guidance_scale": 1.0}
    large = pipe(["a cat", "a dog"], controls=[Upscale(small.images, 0.1, mode)], seed=5, **settings).images
    enlarged = F.interpolate(small.images, size=(24, 32), mode="bicubic")

    def similarity(x: torch.Tensor) -> float:
        return float(F.cosine_similarity(x.flatten(1), enlarged.flatten(1)).min())

    if mode == "latents":  # the miniature's autoencoder is random, and does not come back to where it was
        assert similarity(large) > 0.8
    assert similarity(pipe(["a cat", "a dog"], seed=5, **settings).images) < 0.5
    for i, prompt in enumerate(("a cat", "a dog")):
        alone = pipe(prompt, controls=[Upscale(small.images[i : i + 1], 0.1, mode)], seed=5 + i, **settings).images
        assert (large[i] - alone[0]).abs().max() < 1e-3 * alone.std()


@dataclass(frozen=True)
class Halves:
    """The canvas seen as a left and a right half."""

    hw: tuple[int, int]
    count: int = 2

    def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return torch.cat(canvas.chunk(2, dim=3))

    def merge(self, predictions: torch.Tensor) -> torch.Tensor:
        return torch.cat(predictions.chunk(2), dim=3)


class Seen(Control):
    """Shows the network one half after the other."""

    type: Literal["seen"] = Field(default="seen", kw_only=True)

    def declare(self, outline: Outline) -> Declaration:
        height, width = outline.latent[1:]
        return Declaration(views=Halves((height, width // 2)))


def test_tiles_are_halves_finished_alone(pipe: Pipeline) -> None:
    """Beside a control with views each tile is denoised for itself: as the halves of the enlarged latents are."""
    small = noise(1, 4, 12, 16)
    settings = {**DRAW, "eta": 0.0, "seed": 5}
    tiled = pipe("a cat", controls=[Upscale(small, 0.6, "latents"), Seen()], **settings)
    assert tiled.manifest["cost"]["unet_rows"] == 3 * 2 * 2
    whole = pipe("a cat", controls=[Upscale(small, 0.6, "latents")], **settings).images
    assert (tiled.images - whole).abs().max() > 1e-2
    other = small.clone()
    other[..., 12:] += 1.0
    moved = pipe("a cat", controls=[Upscale(other, 0.6, "latents"), Seen()], **settings).images
    assert (moved - tiled.images)[..., :16].abs().max() < 1e-5
    assert (moved - tiled.images)[..., 16:].abs().max() > 0.1


def test_one_small_picture_for_several_images(pipe: Pipeline) -> None:
    found = pipe("a cat", controls=[Upscale(picture())], num_images_per_prompt=2, seed=5, **DRAW).images
    assert (found[0] - found[1]).abs().max() > 1e-2
    again = pipe("a cat", controls=[Upscale([picture(), picture()])], num_images_per_prompt=2, seed=5, **DRAW).images
    assert torch.equal(found, again)


def test_bad_input_is_told(pipe: Pipeline) -> None:
    for settings in ({"strength": 0.0}, {"strength": 2.0}, {"mode": "words"}):
        with pytest.raises(InputError, match=next(iter(settings))):
            Upscale(picture(), **settings)
    with pytest.raises(InputError, match="small picture"):
        Upscale(None)
    for image, said in (
        (picture(size=(65, 30)), "30 x 65.*the run 48 x 64"),
        (torch.zeros(1, 4, 40, 16), "80 x 32.*the run 48 x 64"),
        (torch.zeros(2, 4, 8, 8), "2 latents for 1 images"),
        ([picture()] * 3, "3 images for 1"),
        ("nowhere.png", "nowhere.png"),
    ):
        with pytest.raises(InputError, match=said):
            pipe("a cat", controls=[Upscale(image)], **DRAW)
    with pytest.raises(ConflictError, match="Upscale and ImageToImage"):
        pipe("a cat", controls=[Upscale(picture()), ImageToImage(picture())], **DRAW)
