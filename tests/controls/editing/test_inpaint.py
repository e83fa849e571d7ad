"""Inpainting against diffusers' pipelines, draw for draw: by five further channels, and by putting back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.inpaint import Inpaint
from controlroom.controls.editing.instruct_pix2pix import InstructPix2Pix
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.controls.word_mask import WordMask
from controlroom.core.control import Control
from controlroom.core.errors import ConflictError, InputError, ModelError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES, PIXELS, tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 5, "output_type": "latent"}
TOLERANCE = 1e-4


def picture(seed: int = 0, size: int = PIXELS) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


def hole(seed: int = 0) -> Image.Image:
    """White in one rectangle, whose borders fall between latents."""
    mask = np.zeros((PIXELS, PIXELS), np.uint8)
    mask[5 + seed : 21, 8 : 27 - seed] = 255
    return Image.fromarray(mask)


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def plains() -> dict[tuple[str, int], Any]:
    return {(kind, channels): make(in_channels=channels) for kind, make in BACKBONES.items() for channels in (4, 9)}


@pytest.fixture(scope="module")
def pipes(plains: Any) -> dict[tuple[str, int], Pipeline]:
    return {key: Pipeline.from_diffusers(plain) for key, plain in plains.items()}


@pytest.fixture(scope="module")
def pipe(pipes: Any) -> Pipeline:
    return pipes["sd1", 4]


def reference(plain: Any, scheduler: str | None = None, **settings: Any) -> torch.Tensor:
    parts = {**plain.components, "scheduler": make_scheduler(plain.scheduler, scheduler)}
    if hasattr(plain, "text_encoder_2"):
        theirs: Any = StableDiffusionXLInpaintPipeline(**parts, add_watermarker=False)
    else:
        theirs = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    size = {"height": PIXELS, "width": PIXELS}
    return theirs(**{"guidance_scale": 7.5, **size, **DRAW, **settings}).images


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("channels", [4, 9])
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_diffusers_pipeline(kind: str, channels: int, strength: float, plains: Any, pipes: Any) -> None:
    given = {"image": picture(), "mask_image": hole(), "strength": strength}
    expected = reference(plains[kind, channels], prompt="a red cat", eta=0.5, generator=generator(), **given)
    control = Inpaint(picture(), hole(), strength)
    found = pipes[kind, channels]("a red cat", controls=[control], seed=5, eta=0.5, **DRAW)
    close(found.images, expected)
    assert found.manifest["cost"]["unet_rows"] == 2 * int(5 * strength)


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "heun", "dpmpp_2m", "ddpm", "unipc"])
@pytest.mark.parametrize("channels", [4, 9])
def test_equals_diffusers_with_other_solvers(channels: int, scheduler: str, plains: Any, pipes: Any) -> None:
    given = {"image": picture(), "mask_image": hole(), "strength": 0.6}
    expected = reference(plains["sd1", channels], scheduler, prompt="a cat", generator=generator(), **given)
    control = Inpaint(picture(), hole(), 0.6)
    found = pipes["sd1", channels]("a cat", controls=[control], scheduler=scheduler, generator=generator(), **DRAW)
    close(found.images, expected)


@pytest.mark.parametrize("channels", [4, 9])
def test_equals_diffusers_for_batches(channels: int, plains: Any, pipes: Any) -> None:
    both, holes, prompts = [picture(0), picture(1)], [hole(0), hole(3)], ["a cat", "a dog"]
    cases: list[tuple[Any, Any, dict[str, Any], Any]] = [
        (picture(), hole(), {"prompt": "a cat", "num_images_per_prompt": 2}, generator),
        (both, holes, {"prompt": prompts}, generator),
        (both, holes, {"prompt": prompts}, lambda: [generator(7), generator(9)]),
        (both, hole(), {"prompt": prompts, "guidance_scale": 1.0}, lambda: [generator(7), generator(9)]),
    ]
    for image, mask, settings, make in cases:
        given = {"image": image, "mask_image": mask, "strength": 0.8, "eta": 1.0}
        expected = reference(plains["sd1", channels], generator=make(), **given, **settings)
        found = pipes["sd1", channels](
            controls=[Inpaint(image, mask, 0.8)], generator=make(), eta=1.0, **settings, **DRAW
        )
        close(found.images, expected)


@pytest.mark.parametrize("channels", [4, 9])
def test_every_image_of_a_batch_is_as_alone(channels: int, pipes: Any) -> None:
    pictures, masks = [picture(0), picture(1)], [hole(0), hole(3)]
    pipe = pipes["sd1", channels]
    control = Inpaint(pictures, masks, 0.8)
    together = pipe(["a cat", "a dog"], controls=[control], num_images_per_prompt=2, seed=5, **DRAW)
    for i, (prompt, k) in enumerate([("a cat", 0), ("a cat", 0), ("a dog", 1), ("a dog", 1)]):
        alone = pipe(prompt, controls=[Inpaint(pictures[k], masks[k], 0.8)], seed=5 + i, **DRAW).images
        assert (together.images[i] - alone[0]).abs().max() < 1e-4 * alone.std()


def test_masks_of_every_kind_are_one(pipe: Pipeline) -> None:
    array = np.asarray(hole())
    drawn = [
        pipe("a cat", controls=[Inpaint(picture(), mask)], seed=5, **DRAW).images
        for mask in (hole(), array, array > 0, array / 255, torch.from_numpy(array / 255.0), [hole()])
    ]
    assert all(torch.equal(one, drawn[0]) for one in drawn[1:])


def test_picture_and_mask_are_stretched_together(pipe: Pipeline) -> None:
    """A picture of twice the size with its mask, and the same picture with a mask of the run's size."""
    large = hole().resize((2 * PIXELS, 2 * PIXELS), Image.Resampling.NEAREST)
    own, same = (
        pipe("a cat", controls=[Inpaint(picture(size=2 * PIXELS), mask)], seed=5, height=PIXELS, width=PIXELS, **DRAW)
        for mask in (large, hole())
    )
    assert torch.equal(own.images, same.images)


def test_known_latents_come_back(pipe: Pipeline) -> None:
    """Outside of the mask the last step leaves the picture's own latents, whatever the prompt says."""
    first, second = (pipe(text, controls=[Inpaint(picture(), hole())], seed=5, **DRAW).images for text in ("a", "dog"))
    mask = torch.nn.functional.interpolate(torch.from_numpy(np.asarray(hole()) / 255.0)[None, None], size=(16, 16))
    outside = (mask < 0.5).expand_as(first)
    assert torch.equal(first[outside], second[outside])
    assert (first - second)[~outside].abs().max() > 1e-3


@pytest.mark.parametrize("channels", [4, 9])
def test_pasted_pixels_are_the_pictures_own(channels: int, pipes: Any) -> None:
    """As diffusers' overlay of the picture over what was drawn."""
    settings = {**DRAW, "output_type": "pil"}
    pipe = pipes["sd1", channels]
    plain = pipe("a cat", controls=[Inpaint(picture(), hole())], seed=5, **settings).images[0]
    pasted = pipe("a cat", controls=[Inpaint(picture(), hole(), paste=True)], seed=5, **settings).images[0]
    expected = VaeImageProcessor().apply_overlay(hole(), picture(), plain)
    assert np.array_equal(np.asarray(pasted), np.asarray(expected.convert("RGB")))
    assert not np.array_equal(np.asarray(pasted), np.asarray(plain))


# Masks by words.


def test_words_are_found_in_the_given_picture(pipe: Pipeline) -> None:
    """The mask does not depend on what is drawn, its outside is the picture's own, and one more row reads it."""
    words = WordMask("cat", threshold=0.5)
    spec = RunSpec(prompt="a red cat", controls=[Inpaint(picture(), words)], seed=5, **DRAW)
    found = pipe.run(spec)
    mask = found.masks["Inpaint.mask"]
    assert 0 < mask.mean() < 1 and set(mask.unique().tolist()) == {0.0, 1.0}
    assert found.manifest["cost"]["unet_rows"] == 3 * 5 == sum(pipe.explain(spec).rows)
    other = pipe(controls=[Inpaint(picture(), "words: cat")], prompt="a red cat", seed=5, guidance_scale=2.0, **DRAW)
    same = pipe(controls=[Inpaint(picture(), words)], prompt="a red cat", seed=5, guidance_scale=2.0, **DRAW)
    assert torch.equal(same.masks["Inpaint.mask"], mask) and not torch.equal(same.images, found.images)
    assert not torch.equal(other.masks["Inpaint.mask"], mask)
    outside = (mask < 0.5).expand_as(found.images)
    assert torch.equal(found.images[outside], same.images[outside])


def test_mask_by_words_equals_probabilities_read_by_hand(pipe: Pipeline) -> None:
    """One step: attention of the given picture, noised with the run's own noise, materialised."""
    import torch.nn.functional as F

    plain = tiny_sd1()
    settings = {**DRAW, "num_inference_steps": 1}
    found = pipe("a red cat", controls=[Inpaint(picture(), WordMask("cat", resolution=16))], seed=5, **settings)
    draws = generator()
    pixels = plain.image_processor.preprocess(picture())
    known = plain.vae.encode(pixels).latent_dist.sample(draws) * plain.vae.config.scaling_factor
    noise = torch.randn(1, 4, 16, 16, generator=draws)
    plain.scheduler.set_timesteps(1)
    t = plain.scheduler.timesteps[:1]
    maps = []
    for name, module in plain.unet.named_modules():
        if name.endswith("attn2"):

            def read(module: Any, arguments: Any, keywords: Any) -> None:
                hidden = arguments[0] if arguments else keywords["hidden_states"]
                if hidden.shape[1] != 16 * 16:
                    return
                q = module.head_to_batch_dim(module.to_q(hidden))
                k = module.head_to_batch_dim(module.to_k(keywords["encoder_hidden_states"]))
                maps.append(torch.softmax(q @ k.transpose(1, 2) * module.scale, dim=-1)[..., 3].sum(0))

            module.register_forward_pre_hook(read, with_kwargs=True)
    text = plain.encode_prompt("a red cat", "cpu", 1, False)[0]
    with torch.no_grad():
        plain.unet(plain.scheduler.add_noise(known, noise, t), t[0], encoder_hidden_states=text)
    total = F.max_pool2d(torch.stack(maps).sum(0).reshape(1, 1, 16, 16), 3, 1, 1)
    assert len(maps) > 1
    assert torch.equal(found.masks["Inpaint.mask"], (total / total.max() > 0.3).float())


def test_words_reach_a_network_that_reads_masks(pipes: Any) -> None:
    """Step after step it is told the mask so far; the first one knows nothing of the picture."""
    seen: list[torch.Tensor] = []
    net = tiny_sd1(in_channels=9)
    net.unet.conv_in.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0][:, 4:].clone()))
    found = Pipeline.from_diffusers(net)(
        "a cat", controls=[Inpaint(picture(), WordMask("cat", threshold=0.6))], seed=5, **DRAW
    )
    assert len(seen) == 5 and bool((seen[0][:, 0] == 1).all())
    empty = net.vae.encode(torch.zeros(1, 3, PIXELS, PIXELS)).latent_dist.mode() * net.vae.config.scaling_factor
    close(seen[0][:1, 1:], empty)
    assert 0 < seen[-1][0, 0].mean() < 1
    assert "Inpaint.mask" in found.masks


# Together with others.


def test_joins_with_others(pipes: Any, pipe: Pipeline) -> None:
    net = tiny_controlnet(tiny_sd1().unet)
    edges = torch.rand(1, 3, PIXELS, PIXELS, generator=generator(1))
    alone = pipe("a cat", controls=[Inpaint(picture(), hole())], seed=5, **DRAW).images
    found = pipe("a cat", controls=[Inpaint(picture(), hole()), ControlNet(net, edges)], seed=5, **DRAW).images
    mask = torch.nn.functional.interpolate(torch.from_numpy(np.asarray(hole()) / 255.0)[None, None], size=(16, 16))
    outside = (mask < 0.5).expand_as(found)
    assert torch.equal(found[outside], alone[outside]) and (found - alone).abs().max() > 1e-3
    editor = Pipeline.from_diffusers(tiny_sd1(in_channels=8))
    pair: list[Control] = [InstructPix2Pix(picture(1)), Inpaint(picture(), hole())]
    edited = editor("a cat", controls=pair, seed=5, **DRAW).images
    assert torch.equal(edited[outside], alone[outside])
    with pytest.raises(ConflictError, match="ImageToImage and Inpaint|Inpaint and ImageToImage"):
        pipe("a cat", controls=[Inpaint(picture(), hole()), ImageToImage(picture())], seed=5, **DRAW)


def test_written_down_and_drawn_again(pipe: Pipeline) -> None:
    for mask in (hole(), "words: cat"):
        spec = RunSpec(prompt="a cat", controls=[Inpaint(picture(), mask, 0.6)], seed=5, **DRAW)
        assert torch.equal(pipe.run(spec).images, pipe.run(RunSpec.from_json(spec.to_json())).images)


def test_bad_input_is_told(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="strength"):
        Inpaint(picture(), hole(), 0.0)
    for arguments in ((None, hole()), (picture(), None), (picture(),)):
        with pytest.raises(InputError, match="white where it is drawn anew"):
            Inpaint(*arguments)
    for image, mask, said in (
        (picture(), hole().resize((16, 16)), r"mask is 16 x 16 .*expected 32 x 32"),
        (picture(size=64), hole().resize((16, 16)), "expected 32 x 32 or 64 x 64"),
        (picture(), np.zeros((PIXELS, PIXELS)), "black all over"),
        (picture(), [hole()] * 3, "3 masks for 1 images"),
        ([picture()] * 2, hole(), "2 images for 1"),
        (picture(), "nowhere.png", "nowhere.png"),
        (picture(), "words: giraffe", "giraffe"),
        (picture(), ["words: cat"], "list of masks"),
    ):
        with pytest.raises(InputError, match=said):
            pipe("a cat", controls=[Inpaint(image, mask)], **DRAW)
    with pytest.raises(InputError, match="leaves no step"):
        pipe("a cat", controls=[Inpaint(picture(), hole(), 0.1)], **DRAW)
    with pytest.raises(ModelError, match="reads 5 channels"):
        Pipeline.from_diffusers(tiny_sd1(in_channels=5))("a cat", controls=[Inpaint(picture(), hole())], **DRAW)
