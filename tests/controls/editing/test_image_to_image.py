"""Image to image against diffusers' pipelines, draw for draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionXLImg2ImgPipeline
from PIL import Image

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.tiny import BACKBONES, PIXELS

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
TOLERANCE = 1e-4


def picture(seed: int = 0, size: int = PIXELS) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def plains() -> dict[str, Any]:
    return {kind: make() for kind, make in BACKBONES.items()}


@pytest.fixture(scope="module")
def pipes(plains: dict[str, Any]) -> dict[str, Pipeline]:
    return {kind: Pipeline.from_diffusers(plain) for kind, plain in plains.items()}


@pytest.fixture(scope="module")
def pipe(pipes: dict[str, Pipeline]) -> Pipeline:
    return pipes["sd1"]


def reference(plain: Any, scheduler: str | None = None, **settings: Any) -> torch.Tensor:
    parts = {**plain.components, "scheduler": make_scheduler(plain.scheduler, scheduler)}
    if hasattr(plain, "text_encoder_2"):
        theirs: Any = StableDiffusionXLImg2ImgPipeline(**parts, add_watermarker=False)
    else:
        theirs = StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    return theirs(**{"guidance_scale": 7.5, **DRAW, **settings}).images


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_diffusers_pipeline(kind: str, strength: float, plains: Any, pipes: Any) -> None:
    expected = reference(
        plains[kind], prompt="a red cat", image=picture(), strength=strength, generator=generator(), eta=0.5
    )
    found = pipes[kind]("a red cat", controls=[ImageToImage(picture(), strength)], seed=5, eta=0.5, **DRAW)
    # A seed is a generator for each image, the reference had one for the batch: with one image they draw alike.
    close(found.images, expected)
    steps = int(5 * strength)
    assert found.manifest["cost"]["unet_passes"] == steps


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "heun", "dpmpp_2m", "unipc", "ddpm", "pndm", "lms"])
def test_equals_diffusers_with_every_solver(scheduler: str, plains: Any, pipe: Pipeline) -> None:
    expected = reference(plains["sd1"], scheduler, prompt="a cat", image=picture(), strength=0.6, generator=generator())
    control = ImageToImage(picture(), 0.6)
    close(pipe("a cat", controls=[control], scheduler=scheduler, generator=generator(), **DRAW).images, expected)


def test_equals_diffusers_for_batches_of_one_generator_and_of_many(plains: Any, pipe: Pipeline) -> None:
    cases: list[tuple[Any, dict[str, Any], Any]] = [
        (picture(), {"prompt": "a cat", "num_images_per_prompt": 2}, generator),
        (picture(), {"prompt": ["a cat", "a dog"]}, lambda: [generator(7), generator(9)]),
        ([picture(0), picture(1)], {"prompt": ["a cat", "a dog"]}, generator),
        ([picture(0), picture(1)], {"prompt": ["a cat", "a dog"]}, lambda: [generator(7), generator(9)]),
    ]
    for image, settings, make in cases:
        expected = reference(plains["sd1"], image=image, strength=0.6, generator=make(), **settings)
        found = pipe(controls=[ImageToImage(image, 0.6)], generator=make(), **settings, **DRAW)
        close(found.images, expected)


def test_every_image_of_a_batch_is_as_alone(pipe: Pipeline) -> None:
    pictures = [picture(0), picture(1)]
    together = pipe(["a cat", "a dog"], controls=[ImageToImage(pictures)], num_images_per_prompt=2, seed=5, **DRAW)
    for i, (prompt, image) in enumerate([("a cat", 0), ("a cat", 0), ("a dog", 1), ("a dog", 1)]):
        alone = pipe(prompt, controls=[ImageToImage(pictures[image])], seed=5 + i, **DRAW).images
        assert (together.images[i] - alone[0]).abs().max() < 1e-4 * alone.std()


def test_latents_are_taken_as_they_are(plains: Any, pipe: Pipeline) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=generator(1))
    expected = reference(plains["sd1"], prompt="a cat", image=latents, strength=0.6, generator=generator())
    close(pipe("a cat", controls=[ImageToImage(latents, 0.6)], generator=generator(), **DRAW).images, expected)


def test_less_strength_keeps_more(pipe: Pipeline) -> None:
    latents = torch.randn(1, 4, 16, 16, generator=generator(1))
    ways = []
    for strength in (0.1, 0.4, 0.8):
        settings = {**DRAW, "num_inference_steps": 10}
        found = pipe("a cat", controls=[ImageToImage(latents, strength)], seed=5, guidance_scale=1.0, **settings)
        ways.append((found.images - latents).abs().mean().item())
    assert ways == sorted(ways) and ways[0] < 0.5 * ways[-1]


def test_size_of_the_run_counts(pipe: Pipeline) -> None:
    small = picture(size=20)
    wide = small.resize((48, 32), Image.Resampling.LANCZOS)
    settings = {**DRAW, "width": 48, "height": 32}
    drawn = [pipe("a cat", controls=[ImageToImage(image)], seed=5, **settings).images for image in (small, wide)]
    assert torch.equal(*drawn)
    assert drawn[0].shape[-2:] == (16, 24)


def test_a_source_picture_starts_there_too(pipe: Pipeline) -> None:
    """Prompt-to-Prompt edits a picture that both start from."""
    controls = [ImageToImage(picture(), 0.6), PromptToPrompt("a dog")]
    result = pipe("a cat", controls=controls, seed=5, **DRAW)
    alone = pipe("a dog", controls=[ImageToImage(picture(), 0.6)], seed=5, **DRAW).images
    close(result.states["source"], alone)


def test_written_down_and_drawn_again(pipe: Pipeline) -> None:
    spec = RunSpec(prompt="a cat", controls=[ImageToImage(picture(), 0.6)], seed=5, **DRAW)
    assert torch.equal(pipe.run(spec).images, pipe.run(RunSpec.from_json(spec.to_json())).images)


def test_bad_input_is_told(pipe: Pipeline) -> None:
    for strength in (0.0, 1.1, -1.0):
        with pytest.raises(InputError, match="strength"):
            ImageToImage(picture(), strength)
    with pytest.raises(InputError, match="start from"):
        ImageToImage(None)
    with pytest.raises(InputError, match="leaves no step"):
        pipe("a cat", controls=[ImageToImage(picture(), 0.1)], **DRAW)
    latents = torch.zeros(1, 4, 16, 16)
    with pytest.raises(InputError, match="latents and a control"):
        pipe("a cat", controls=[ImageToImage(picture())], latents=latents, **DRAW)
    for image, said in (
        (torch.zeros(1, 4, 8, 8), "8 x 8, the run's 16 x 16"),
        (torch.zeros(3, 4, 16, 16), "3 latents for 1 images"),
        ([picture()] * 2, "2 images for 1"),
        ("nowhere.png", "nowhere.png"),
    ):
        with pytest.raises(InputError, match=said):
            pipe("a cat", controls=[ImageToImage(image)], **DRAW)
    with pytest.raises(ConflictError, match="ImageToImage 1 and ImageToImage 2"):
        pipe("a cat", controls=[ImageToImage(picture()), ImageToImage(picture())], **DRAW)


@pytest.mark.parametrize("scheduler", ["ddim", "euler"])
def test_with_a_mask_it_equals_diffusers_inpainting_with_four_channels(
    scheduler: str, plains: Any, pipe: Pipeline
) -> None:
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    mask[6:20, 10:28] = 255
    parts = {**plains["sd1"].components, "scheduler": make_scheduler(plains["sd1"].scheduler, scheduler)}
    theirs: Any = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    settings = {"prompt": "a cat", "image": picture(), "mask_image": Image.fromarray(mask), "strength": 0.8}
    expected = theirs(**settings, height=PIXELS, width=PIXELS, generator=generator(), **DRAW).images
    control = ImageToImage(picture(), 0.8, mask=mask)
    found = pipe("a cat", controls=[control], generator=generator(), scheduler=scheduler, **DRAW)
    close(found.images, expected)
    plain = pipe("a cat", controls=[ImageToImage(picture(), 0.8)], generator=generator(), scheduler=scheduler, **DRAW)
    assert (found.images - plain.images).abs().max() > 1e-2 * expected.std()
    white = ImageToImage(picture(), 0.8, mask=np.full((4, 4), 255, np.uint8))
    again = pipe("a cat", controls=[white], generator=generator(), scheduler=scheduler, **DRAW)
    close(again.images, plain.images)
