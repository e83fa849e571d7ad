"""Depth to image against diffusers' pipeline, draw for draw."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionDepth2ImgPipeline
from PIL import Image

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.spatial.depth_to_image import DepthToImage, depth_channel
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES, PIXELS, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
TOLERANCE = 1e-4


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((PIXELS, PIXELS), Image.Resampling.BICUBIC)


def depths(seed: int = 0, size: int = 24) -> torch.Tensor:
    """[1, size, size] in metres or whatever."""
    return 300 + 70 * torch.randn(1, size, size, generator=generator(seed + 40))


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def plains() -> dict[str, Any]:
    return {kind: make(in_channels=5) for kind, make in BACKBONES.items()}


@pytest.fixture(scope="module")
def pipes(plains: Any) -> dict[str, Pipeline]:
    return {kind: Pipeline.from_diffusers(plain) for kind, plain in plains.items()}


@pytest.fixture(scope="module")
def pipe(pipes: Any) -> Pipeline:
    return pipes["sd2"]


def reference(plain: Any, image: Any, depth: torch.Tensor, scheduler: str | None = None, **settings: Any) -> Any:
    names = ("vae", "text_encoder", "tokenizer", "unet")
    theirs: Any = StableDiffusionDepth2ImgPipeline(
        **{name: getattr(plain, name) for name in names},
        scheduler=make_scheduler(plain.scheduler, scheduler),
        depth_estimator=None,
        feature_extractor=None,
    )
    theirs.set_progress_bar_config(disable=True)
    # It reads the size of the result off a list of pictures, and wants tensors for what it encodes.
    pictures = image if isinstance(image, list) else [image]
    return theirs(image=pictures, depth_map=depth, **{"guidance_scale": 7.5, **DRAW, **settings}).images


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


@pytest.mark.parametrize("strength", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_equals_diffusers_pipeline(kind: str, strength: float, plains: Any, pipes: Any) -> None:
    settings = {"prompt": "a red cat", "strength": strength, "eta": 0.5}
    expected = reference(plains[kind], picture(), depths(), generator=generator(), **settings)
    found = pipes[kind]("a red cat", controls=[DepthToImage(picture(), depths(), strength)], seed=5, eta=0.5, **DRAW)
    close(found.images, expected)
    assert found.manifest["cost"]["unet_rows"] == 2 * int(5 * strength)


@pytest.mark.parametrize("scheduler", ["euler_a", "pndm", "dpmpp_2m"])
def test_equals_diffusers_with_other_solvers(scheduler: str, plains: Any, pipe: Pipeline) -> None:
    expected = reference(
        plains["sd2"], picture(), depths(), scheduler, prompt="a cat", strength=0.6, generator=generator()
    )
    control = DepthToImage(picture(), depths(), 0.6)
    close(pipe("a cat", controls=[control], scheduler=scheduler, generator=generator(), **DRAW).images, expected)


def test_equals_diffusers_for_batches(plains: Any, pipe: Pipeline) -> None:
    both, maps = [picture(0), picture(1)], torch.cat([depths(0), depths(1)])
    cases: list[tuple[Any, torch.Tensor, dict[str, Any], Any]] = [
        (picture(), depths(), {"prompt": "a cat", "num_images_per_prompt": 2}, generator),
        (both, maps, {"prompt": ["a cat", "a dog"]}, generator),
        (both, maps, {"prompt": ["a cat", "a dog"], "guidance_scale": 1.0}, lambda: [generator(7), generator(9)]),
    ]
    for image, depth, settings, make in cases:
        expected = reference(plains["sd2"], image, depth, strength=0.6, generator=make(), **settings)
        for given in (depth[:, None], list(depth)):
            control = DepthToImage(image, given, 0.6)
            close(pipe(controls=[control], generator=make(), **settings, **DRAW).images, expected)


def test_acts_on_xl_too(pipes: Any) -> None:
    first, second = (
        pipes["sdxl"]("a cat", controls=[DepthToImage(picture(), depths(seed))], seed=5, **DRAW).images
        for seed in (0, 1)
    )
    assert torch.isfinite(first).all() and (first - second).abs().max() > 1e-3


def test_depth_in_any_unit_and_form(pipe: Pipeline) -> None:
    grey = Image.fromarray(np.random.default_rng(0).integers(0, 256, (24, 24), dtype=np.uint8))
    array = np.asarray(grey, np.float32)
    deep = Image.fromarray((array * 257).astype(np.uint16))
    forms = (grey, grey.convert("RGB"), array, torch.from_numpy(array)[None] * 3 - 7, array[..., None], deep, [grey])
    drawn = [pipe("a cat", controls=[DepthToImage(picture(), form)], seed=5, **DRAW).images for form in forms]
    for one in drawn[1:]:
        close(one, drawn[0])
    # Sixteen bits say what eight do not.
    fine = Image.fromarray((30000 + array).astype(np.uint16))
    close(pipe("a cat", controls=[DepthToImage(picture(), fine)], seed=5, **DRAW).images, drawn[0])


def test_values_of_a_reader_are_taken(pipe: Pipeline) -> None:
    class Reading:
        values = depths()[0].numpy()

    control = DepthToImage(picture(), Reading())
    expected = pipe("a cat", controls=[DepthToImage(picture(), depths())], seed=5, **DRAW).images
    assert torch.equal(pipe("a cat", controls=[control], seed=5, **DRAW).images, expected)


def test_channel_is_from_minus_one_to_one_in_each() -> None:
    channel = depth_channel(torch.stack([depths(0), depths(1) * 9, torch.full((1, 24, 24), 7.0)]), (16, 16))
    for row in channel[:2]:
        assert (float(row.min()), float(row.max())) == (-1.0, 1.0)
    assert torch.equal(channel[2], torch.zeros(1, 16, 16))
    ramp = depth_channel(torch.arange(32.0).expand(1, 1, 32, 32), (16, 16))
    assert bool((ramp[0, 0, :, 1:] > ramp[0, 0, :, :-1]).all())


def test_joins_with_others(plains: Any, pipes: Any) -> None:
    net = tiny_controlnet(tiny_sd1().unet)
    edges = torch.rand(1, 3, PIXELS, PIXELS, generator=generator(1))
    control, pipe = DepthToImage(picture(), depths()), pipes["sd1"]
    alone = pipe("a cat", controls=[control], seed=5, **DRAW).images
    joined = pipe("a cat", controls=[control, ControlNet(net, edges)], seed=5, **DRAW).images
    assert (joined - alone).abs().max() > 1e-3
    with pytest.raises(ConflictError, match="DepthToImage and ImageToImage"):
        pipe("a cat", controls=[control, ImageToImage(picture())], **DRAW)


def test_written_down_and_drawn_again(pipe: Pipeline) -> None:
    spec = RunSpec(prompt="a cat", controls=[DepthToImage(picture(), depths().numpy(), 0.6)], seed=5, **DRAW)
    assert torch.equal(pipe.run(spec).images, pipe.run(RunSpec.from_json(spec.to_json())).images)


def test_bad_input_is_told(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="reader of depth"):
        DepthToImage(picture(), None)
    with pytest.raises(InputError, match="strength"):
        DepthToImage(picture(), depths(), 1.2)
    for depth, said in (
        ("nowhere.png", "nowhere.png"),
        (torch.zeros(2, 2, 8, 8), r"shape \[2, 2, 8, 8\]"),
        (torch.full((1, 8, 8), float("nan")), "not finite"),
        ([depths()] * 3, "3 depths for 1 images"),
        ([], "list of depths is empty"),
    ):
        with pytest.raises(InputError, match=said):
            pipe("a cat", controls=[DepthToImage(picture(), depth)], **DRAW)
    with pytest.raises(ModelError, match=r"reads 4 channels.*depth checkpoint.*5 channels"):
        Pipeline.from_diffusers(tiny_sd1())("a cat", controls=[DepthToImage(picture(), depths())], **DRAW)
