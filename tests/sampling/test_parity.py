"""Without controls the engine is diffusers: the same latents from the same weights and the same generator."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import SCHEDULERS
from tests.tiny import BACKBONES

FIVE = ("ddim", "euler", "euler_a", "dpmpp_2m", "unipc")


@pytest.fixture(scope="module", params=BACKBONES)
def reference(request: pytest.FixtureRequest) -> Any:
    pipe = BACKBONES[request.param]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def both(pipe: Any, scheduler: str, seed: int = 3, steps: int = 5, **settings: Any) -> tuple[Any, Any]:
    import diffusers

    kind, more = SCHEDULERS[scheduler]
    before = pipe.scheduler
    pipe.scheduler = getattr(diffusers, kind).from_config(before.config, **more)
    try:
        settings = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": 7.5, **settings}
        theirs = pipe(generator=torch.Generator().manual_seed(seed), **settings).images
        ours = Pipeline.from_diffusers(pipe)(generator=torch.Generator().manual_seed(seed), **settings).images
    finally:
        pipe.scheduler = before
    return ours, theirs


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("scheduler", FIVE)
def test_latents_equal_diffusers(reference: Any, scheduler: str, batch: int) -> None:
    ours, theirs = both(reference, scheduler, prompt=["a red cat", "a dog on the beach", "frog"][:batch])
    assert ours.shape == theirs.shape
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


@pytest.mark.parametrize(
    "settings",
    [
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"negative_prompt": "a blue hat"},
        {"num_images_per_prompt": 2},
        {"height": 24, "width": 40},
        {"eta": 0.6},
    ],
    ids=lambda s: next(iter(s)),
)
def test_settings_mean_what_they_mean_in_diffusers(reference: Any, settings: dict[str, Any]) -> None:
    ours, theirs = both(reference, "ddim", prompt="a red cat", **settings)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


def test_clip_skip_of_sdxl() -> None:
    # For Stable Diffusion 1 and 2, diffusers 0.42.1 asks for `text_model`, which encoders of transformers 5 lost.
    pipe = BACKBONES["sdxl"]()
    pipe.set_progress_bar_config(disable=True)
    ours, theirs = both(pipe, "ddim", prompt="a red cat", clip_skip=1)
    plain, _ = both(pipe, "ddim", prompt="a red cat")
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()
    assert (ours - plain).abs().max() > 1e-3


def test_given_latents_are_scaled_by_the_scheduler(reference: Any) -> None:
    latents = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    ours, theirs = both(reference, "euler", prompt=["cat", "dog"], latents=latents)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.std()


@pytest.mark.parametrize("kind", ["np", "pt", "pil"])
def test_pictures_equal_diffusers(reference: Any, kind: str) -> None:
    import numpy as np

    ours, theirs = both(reference, "ddim", steps=2, prompt="cat", output_type=kind)
    if kind == "pil":
        ours, theirs = np.asarray(ours[0], np.float32) / 255, np.asarray(theirs[0], np.float32) / 255
    assert np.abs(np.asarray(ours) - np.asarray(theirs)).max() <= (1 / 254 if kind == "pil" else 1e-5)
