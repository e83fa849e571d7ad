"""InstructPix2Pix against diffusers' pipelines, and beside other controls."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline
from PIL import Image

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.branch import Branch
from controlroom.core.claims import Claim
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES, PIXELS, tiny_sd1

STEPS = 3
DRAW: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent", "seed": 5}
TOLERANCE = 1e-4


def picture(seed: int = 0, size: int = PIXELS) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def miniature(kind: str) -> Any:
    """Of eight channels; the picture's weigh more than random ones would, so that much is seen of it."""
    plain = BACKBONES[kind](in_channels=8)
    with torch.no_grad():
        plain.unet.conv_in.weight[:, 4:] *= 8
    return plain


def reference(kind: str, plain: Any = None, **settings: Any) -> Any:
    """diffusers' pipeline on the miniature's components."""
    plain = plain or miniature(kind)
    if kind == "sdxl":
        parts = {k: v for k, v in plain.components.items() if k not in ("image_encoder", "feature_extractor")}
        return StableDiffusionXLInstructPix2PixPipeline(**parts, add_watermarker=False, **settings)
    return StableDiffusionInstructPix2PixPipeline(**plain.components, requires_safety_checker=False, **settings)


def draw_reference(pipe: Any, **settings: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(num_inference_steps=STEPS, output_type="latent", **settings).images


@pytest.fixture(scope="module")
def plain() -> Any:
    return miniature("sd1")


@pytest.fixture(scope="module")
def pipe(plain: Any) -> Pipeline:
    return Pipeline.from_diffusers(plain)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


@pytest.mark.parametrize("scales", [(7.5, 1.5), (3.0, 1.0), (4.0, 2.5)])
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_diffusers_pipeline(kind: str, scales: tuple[float, float]) -> None:
    text, image = scales
    expected = draw_reference(
        reference(kind),
        prompt="a red hat",
        image=picture(),
        guidance_scale=text,
        image_guidance_scale=image,
        negative_prompt="blue",
        generator=generator(),
    )
    ours = Pipeline.from_diffusers(miniature(kind))
    control = InstructPix2Pix(picture(), image)
    found = ours("a red hat", "blue", controls=[control], guidance_scale=text, generator=generator(), **_without_seed())
    close(found.images, expected)


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m", "euler_a"])
def test_equals_diffusers_with_other_solvers(plain: Any, pipe: Pipeline, scheduler: str) -> None:
    from controlroom.sampling.solver import make_scheduler

    theirs = reference("sd1")
    theirs.scheduler = make_scheduler(plain.scheduler, scheduler)
    expected = draw_reference(theirs, prompt="a cat", image=picture(), generator=generator())
    found = pipe(
        "a cat", controls=[InstructPix2Pix(picture())], scheduler=scheduler, generator=generator(), **_without_seed()
    )
    close(found.images, expected)


def test_equals_diffusers_for_several_pictures_and_without_guidance(pipe: Pipeline) -> None:
    pictures = [picture(0), picture(1)]
    prompts = ["a red hat", "a green dog on the beach"]
    generators = [generator(5), generator(6)]
    expected = draw_reference(reference("sd1"), prompt=prompts, image=pictures, generator=generators)
    close(pipe(prompts, controls=[InstructPix2Pix(pictures)], **DRAW).images, expected)
    expected = draw_reference(
        reference("sd1"), prompt="a red hat", image=picture(), guidance_scale=1.0, generator=generator()
    )
    found = pipe("a red hat", controls=[InstructPix2Pix(picture())], guidance_scale=1.0, **DRAW)
    close(found.images, expected)
    assert found.manifest["cost"]["unet_rows"] == STEPS


def test_equals_diffusers_edit_of_cosxl() -> None:
    expected = draw_reference(
        reference("sdxl", is_cosxl_edit=True),
        prompt="a red hat",
        image=picture(),
        guidance_scale=7.5,
        generator=generator(),
    )
    ours = Pipeline.from_diffusers(miniature("sdxl"))
    close(ours("a red hat", controls=[InstructPix2Pix(picture(), scaled=True)], **DRAW).images, expected)
    unscaled = ours("a red hat", controls=[InstructPix2Pix(picture())], **DRAW).images
    assert (unscaled - expected).abs().max() > 0.01 * expected.std()


def test_autoencoder_with_moments_of_its_own_is_unscaled_too() -> None:
    plain = miniature("sdxl")
    plain.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 0.5, 2.0, 1.0])
    theirs = reference("sdxl", plain)
    expected = draw_reference(theirs, prompt="a cat", image=picture(), guidance_scale=7.5, generator=generator())
    close(Pipeline.from_diffusers(plain)("a cat", controls=[InstructPix2Pix(picture())], **DRAW).images, expected)


def test_three_rows_in_one_pass_as_planned(pipe: Pipeline) -> None:
    spec = RunSpec(prompt="a cat", controls=[InstructPix2Pix(picture())], **DRAW)
    planned, cost = pipe.explain(spec), pipe.run(spec).manifest["cost"]
    assert planned.rows == (3,) * STEPS and planned.passes == (1,) * STEPS
    assert (cost["unet_rows"], cost["unet_passes"]) == (3 * STEPS, STEPS)


def test_small_image_guidance_follows_the_formula(pipe: Pipeline) -> None:
    """There diffusers turns guidance off; here the prediction stays linear in the scale."""
    one = {**DRAW, "num_inference_steps": 1}
    drawn = [pipe("a cat", controls=[InstructPix2Pix(picture(), scale)], **one).images for scale in (0.0, 0.5, 1.0)]
    assert (drawn[1] - (drawn[0] + drawn[2]) / 2).abs().max() < 1e-4 * drawn[1].std()
    assert (drawn[0] - drawn[2]).abs().max() > 1e-2


class Concept(Control):
    """Adds the direction of further words, as semantic guidance does."""

    type: str = "concept"

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(branches=(Branch("edit:0"),), claims=(Claim("prediction", "add"),))

    def prepare(self, run: Run) -> None:
        run.set_condition("edit:0", run.encode_text("a frog"))

    def guide(self, step: Step, state: str) -> torch.Tensor:
        return 2.0 * (step.eps["edit:0"] - step.eps["uncond"])


@torch.no_grad()
def by_hand(plain: Any, concept: float, residuals: Any = None) -> torch.Tensor:
    """Two steps of DDIM with three or four rows, written plainly."""
    prompt, empty = (plain.encode_prompt(text, "cpu", 1, False)[0] for text in ("a cat", ""))
    frog = plain.encode_prompt("a frog", "cpu", 1, False)[0]
    pixels = plain.image_processor.preprocess(picture())
    seen = plain.vae.encode(pixels).latent_dist.mode()
    blind = torch.zeros_like(seen)
    rows = [(prompt, seen), (empty, seen), (empty, blind), (frog, seen)]
    plain.scheduler.set_timesteps(2)
    x = torch.randn(1, 4, 16, 16, generator=generator())
    for t in plain.scheduler.timesteps:
        found = []
        for text, channels in rows:
            more = {} if residuals is None else residuals(x, t, text)
            found.append(plain.unet(torch.cat([x, channels], 1), t, encoder_hidden_states=text, **more).sample)
        eps = found[2] + 7.5 * (found[0] - found[1]) + 1.5 * (found[1] - found[2]) + concept * (found[3] - found[2])
        x = plain.scheduler.step(eps, t, x).prev_sample
    return x


def test_an_addition_of_semantic_guidance_joins(plain: Any, pipe: Pipeline) -> None:
    expected = by_hand(plain, 2.0)
    for controls in ([InstructPix2Pix(picture()), Concept()], [Concept(), InstructPix2Pix(picture())]):
        found = pipe("a cat", controls=controls, **{**DRAW, "num_inference_steps": 2})
        close(found.images, expected)
        assert found.manifest["cost"]["unet_rows"] == 2 * 4
    assert (by_hand(plain, 0.0) - expected).abs().max() > 1e-2


def test_a_controlnet_reaches_all_three_rows(plain: Any, pipe: Pipeline) -> None:
    net = tiny_controlnet(tiny_sd1().unet)
    edges = torch.rand(1, 3, PIXELS, PIXELS, generator=generator(1))

    def residuals(x: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
        down, mid = net(x, t, text, edges, return_dict=False)
        return {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}

    expected = by_hand(plain, 0.0, residuals)
    controls = [InstructPix2Pix(picture()), ControlNet(net, edges)]
    close(pipe("a cat", controls=controls, **{**DRAW, "num_inference_steps": 2}).images, expected)


def test_starting_from_the_picture_and_looking_at_others(pipe: Pipeline) -> None:
    control = InstructPix2Pix(picture())
    alone = pipe("a cat", controls=[control], **DRAW).images
    others: list[list[Control]] = [
        [ImageToImage(picture(2), strength=0.7)],
        [ReferenceOnly(picture(3), reference_adain=True)],
        [PromptToPrompt("a dog")],
    ]
    for more in others:
        found = pipe("a cat", controls=[control, *more], **DRAW).images
        assert torch.isfinite(found).all()
        assert (found - alone).abs().max() > 1e-3


def test_picture_is_stretched_and_tensors_are_pictures(pipe: Pipeline) -> None:
    pixels = torch.from_numpy(np.asarray(picture(), np.float32) / 255).permute(2, 0, 1)
    small = picture(size=20)
    expected = pipe("a cat", controls=[InstructPix2Pix(picture())], **DRAW).images
    for same in (pixels, pixels[None], pixels * 2 - 1, np.asarray(picture()), [picture()]):
        close(pipe("a cat", controls=[InstructPix2Pix(same)], **DRAW).images, expected)
    stretched = small.resize((PIXELS, PIXELS), Image.Resampling.LANCZOS)
    assert torch.equal(
        pipe("a cat", controls=[InstructPix2Pix(small)], **DRAW).images,
        pipe("a cat", controls=[InstructPix2Pix(stretched)], **DRAW).images,
    )


@pytest.mark.parametrize("kind", BACKBONES)
def test_a_network_of_four_channels_names_the_checkpoint(kind: str) -> None:
    with pytest.raises(ModelError, match=r"reads 4 channels.*InstructPix2Pix checkpoint.*8 channels.*timbrooks"):
        Pipeline.from_diffusers(BACKBONES[kind]())("a cat", controls=[InstructPix2Pix(picture())], **DRAW)


def test_bad_input_is_told(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="image_guidance_scale"):
        InstructPix2Pix(picture(), -1.0)
    with pytest.raises(InputError, match="picture to edit"):
        InstructPix2Pix(None)
    for image, said in (
        ("nowhere.png", "nowhere.png"),
        ([picture()] * 3, "3 images for 1 images"),
        ([], "There is no image"),
        (torch.full((3, 8, 8), 200.0), r"\[0, 1\]"),
    ):
        with pytest.raises(InputError, match=said):
            pipe("a cat", controls=[InstructPix2Pix(image)], **DRAW)
    with pytest.raises(ConflictError, match="InstructPix2Pix 1 and InstructPix2Pix 2"):
        pipe("a cat", controls=[InstructPix2Pix(picture()), InstructPix2Pix(picture())], **DRAW)


def _without_seed() -> dict[str, Any]:
    return {key: value for key, value in DRAW.items() if key != "seed"}
