"""ControlNet together with a picture to start from, against diffusers' pipelines for both at once; and its kinds."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    ControlNetModel,
    MultiControlNetModel,
    StableDiffusionControlNetImg2ImgPipeline,
    StableDiffusionControlNetInpaintPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLControlNetImg2ImgPipeline,
)
from PIL import Image

from controlroom.backbones.controlnet import CONDITION_KINDS, with_kind
from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from controlroom.signals.inpaint_condition import HOLE, inpaint_condition
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent", "height": 32, "width": 32}
IMG2IMG = {
    "sd1": StableDiffusionControlNetImg2ImgPipeline,
    "sd2": StableDiffusionControlNetImg2ImgPipeline,
    "sdxl": StableDiffusionXLControlNetImg2ImgPipeline,
}


def picture(seed: int = 0, size: tuple[int, int] = (32, 32)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def mapped(seed: int = 0) -> torch.Tensor:
    return torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    assert torch.isfinite(theirs).all()
    return bool((ours - theirs).abs().max() <= 1e-4 * theirs.std())


def reference(pipeline: Any, source: Any, controls: list[ControlNet], scheduler: str | None = None) -> tuple[Any, Any]:
    """Diffusers' pipeline for the same networks, and what its controls are called with."""
    many = len(controls) > 1
    nets: Any = [control.model for control in controls]
    parts = {name: part for name, part in source.components.items() if name != "image_encoder"}
    parts["scheduler"] = make_scheduler(source.scheduler, scheduler)
    found = pipeline(**parts, controlnet=MultiControlNetModel(nets) if many else nets[0])
    found.set_progress_bar_config(disable=True)

    def each(name: str) -> Any:
        values = [getattr(control, name) for control in controls]
        return values if many else values[0]

    settings = {
        "control_image": each("image"),
        "controlnet_conditioning_scale": each("scale"),
        "control_guidance_start": each("start"),
        "control_guidance_end": each("end"),
        "guess_mode": controls[0].guess_mode,
        "generator": generator(),
    }
    return found, settings


def nets(source: Any, number: int, guess: bool = False) -> list[ControlNet]:
    made = [ControlNet(tiny_controlnet(source.unet), mapped(0), 0.7, guess_mode=guess)]
    if number > 1:
        made.append(ControlNet(tiny_controlnet(source.unet, seed=8), mapped(1), 1.2, 0.25, 0.8, guess_mode=guess))
    return made


@pytest.mark.parametrize(
    ("kind", "number", "guess", "scheduler"),
    [
        ("sd1", 1, False, "unipc"),
        ("sd1", 2, False, None),
        ("sd1", 1, True, None),
        ("sd2", 2, False, None),
        ("sdxl", 1, False, None),
        ("sdxl", 2, False, None),
    ],
)
def test_image_to_image_equals_diffusers(kind: str, number: int, guess: bool, scheduler: str | None) -> None:
    """Steps that are not run are none of the windows' either."""
    source = BACKBONES[kind]()
    controls = nets(source, number, guess)
    pipe, settings = reference(IMG2IMG[kind], source, controls, scheduler)
    expected = pipe(prompt="a red cat", image=picture(3), strength=0.8, guidance_scale=5.0, **DRAW, **settings).images
    ours = Pipeline.from_diffusers(source)(
        "a red cat",
        controls=[ImageToImage(picture(3), 0.8), *controls],
        guidance_scale=5.0,
        scheduler=scheduler,
        generator=generator(),
        **DRAW,
    )
    assert close(ours.images, expected)
    assert ours.manifest["cost"]["side_passes"] == 4 + (2 if number > 1 else 0)
    alone = Pipeline.from_diffusers(source)(
        "a red cat", controls=[ImageToImage(picture(3), 0.8)], guidance_scale=5.0, generator=generator(), **DRAW
    ).images
    assert (ours.images - alone).abs().max() > 0.05 * expected.std()


@pytest.mark.parametrize(("channels", "strength"), [(4, 1.0), (4, 0.8), (9, 1.0)])
def test_inpainting_equals_diffusers(channels: int, strength: float) -> None:
    """With a mask of whole latent pixels, so that resizing it is no question."""
    inpaint = pytest.importorskip("controlroom.controls.editing.inpaint").Inpaint
    source = BACKBONES["sd1"](in_channels=channels)
    plain = BACKBONES["sd1"]() if channels != 4 else source
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 8, 24, 32))
    condition = inpaint_condition(picture(3), mask)
    control = ControlNet(tiny_controlnet(plain.unet), condition[None])
    pipe, settings = reference(StableDiffusionControlNetInpaintPipeline, source, [control])
    expected = pipe(
        prompt="a red cat", image=picture(3), mask_image=mask, strength=strength, guidance_scale=5.0, **DRAW, **settings
    ).images
    ours = Pipeline.from_diffusers(source)(
        "a red cat",
        controls=[inpaint(picture(3), mask, strength=strength), control],
        guidance_scale=5.0,
        generator=generator(),
        **DRAW,
    )
    assert close(ours.images, expected)


def test_condition_of_inpainting() -> None:
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (8, 0, 16, 32))
    found = inpaint_condition(picture(), mask)
    hole = torch.zeros(32, 32, dtype=torch.bool)
    hole[:, 8:16] = True
    assert found.shape == (3, 32, 32) and bool((found[:, hole] == HOLE).all())
    pixels = torch.from_numpy(np.asarray(picture(), np.float32) / 255).permute(2, 0, 1)
    assert torch.equal(found[:, ~hole], pixels[:, ~hole])
    assert inpaint_condition(picture(), mask, (16, 24)).shape == (3, 24, 16)
    with pytest.raises(InputError, match="white nowhere"):
        inpaint_condition(picture(), Image.new("L", (4, 4), 0))


# One network for several kinds of condition.


@pytest.fixture(scope="module")
def plain() -> Any:
    return BACKBONES["sd1"]()


@pytest.fixture(scope="module")
def multi(plain: Any) -> ControlNetModel:
    return tiny_controlnet(plain.unet, conditioning_channels=3 + len(CONDITION_KINDS))


def test_kinds_are_planes_that_diffusers_reads_too(plain: Any, multi: ControlNetModel) -> None:
    pipe, given = Pipeline.from_diffusers(plain), mapped()
    drawn = {}
    for place, kind in enumerate(("canny", "pose")):
        planes = torch.zeros(1, 8, 32, 32)
        planes[:, CONDITION_KINDS.index(kind)] = 1.0
        whole = torch.cat([given, planes], dim=1)
        assert torch.equal(whole, with_kind(given, kind))
        controls = [ControlNet(multi, whole)]
        parts = {name: part for name, part in plain.components.items() if name != "image_encoder"}
        theirs: Any = StableDiffusionControlNetPipeline(**parts, controlnet=multi)
        theirs.set_progress_bar_config(disable=True)
        expected = theirs("a cat", image=whole, generator=generator(), **DRAW).images
        ours = pipe("a cat", controls=[ControlNet(multi, given, kind=kind)], generator=generator(), **DRAW).images
        assert close(ours, expected)
        assert torch.equal(ours, pipe("a cat", controls=controls, generator=generator(), **DRAW).images)
        drawn[place] = ours
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2 * drawn[0].std()
    # A network for one kind does not ask.
    one = tiny_controlnet(plain.unet)
    ours, same = (
        pipe("a cat", controls=[ControlNet(one, given, kind=kind)], seed=1, **DRAW).images for kind in (None, "pose")
    )
    assert torch.equal(ours, same)


def test_kinds_that_do_not_fit(plain: Any, multi: ControlNetModel) -> None:
    pipe = Pipeline.from_diffusers(plain)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"model": multi}, InputError, "Say which one"),
        ({"model": multi, "kind": "sketch"}, InputError, "kind"),
        ({"model": tiny_controlnet(BACKBONES["sd1"](in_channels=9).unet)}, ModelError, "latents alone"),
    ]
    for settings, error, message in cases:
        with pytest.raises(error, match=message):
            pipe("a cat", controls=[ControlNet(**{"image": mapped(), **settings})], seed=1, **DRAW)
