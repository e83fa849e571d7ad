"""Inversion against diffusers' inverse scheduler and pipeline, and null-text optimisation written out plainly."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMInverseScheduler
from diffusers.pipelines.deprecated.stable_diffusion_variants import (
    pipeline_stable_diffusion_pix2pix_zero as reference,
)
from PIL import Image
from torch.nn import functional as F

from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.spatial.controlnet import ControlNet
from controlroom.core.errors import InputError
from controlroom.sampling.inversion import invert
from controlroom.sampling.inverted import Inversion, NullText, Regularisation
from controlroom.sampling.pipeline import Pipeline
from tests.controls.nets import tiny_controlnet
from tests.tiny import BACKBONES, tiny_scheduler, tiny_sd1
from tests.traces import traces

PROMPT = "a red cat"


def picture(seed: int = 0, size: int = 32) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def gentle_sd1() -> Any:
    """Latents as large as those of a trained autoencoder, and a network that bends its way little.

    Without that a random network's way back has little to do with its way there.
    """
    source = tiny_sd1()
    source.vae.register_to_config(scaling_factor=3.6)
    with torch.no_grad():
        for parameter in source.unet.conv_out.parameters():
            parameter.mul_(0.3)
    return source


@pytest.fixture(scope="module")
def gentle() -> Pipeline:
    return Pipeline.from_diffusers(gentle_sd1())


def encoded(source: Any, image: Image.Image) -> torch.Tensor:
    """Scaled latents of a picture, the mean of the posterior."""
    # Strides count: convolutions of other layouts round otherwise.
    pixels = source.image_processor.preprocess(image).contiguous()
    return source.vae.encode(pixels).latent_dist.mean * source.vae.config.scaling_factor


Told = tuple[torch.Tensor, dict[str, Any]]


def text_of(source: Any, prompt: str) -> tuple[Told, Told]:
    """What the branches with and without the prompt are told: embeddings, and for XL what is beside them."""
    if not hasattr(source, "text_encoder_2"):
        cond, uncond = source.encode_prompt(prompt, "cpu", 1, True)
        return (cond, {}), (uncond, {})
    cond, uncond, pooled, unpooled = source.encode_prompt(prompt)
    ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]], dtype=cond.dtype)
    beside = [{"added_cond_kwargs": {"text_embeds": x, "time_ids": ids}} for x in (pooled, unpooled)]
    return (cond, beside[0]), (uncond, beside[1])


@torch.no_grad()
def walked(source: Any, image: Image.Image, prompt: str, steps: int, scale: float = 1.0) -> list[torch.Tensor]:
    """DDIM inversion, written out with diffusers' inverse scheduler."""
    scheduler: Any = DDIMInverseScheduler.from_config(source.scheduler.config)
    scheduler.set_timesteps(steps)
    (cond, more), (uncond, _) = text_of(source, prompt)
    latents = [encoded(source, image)]
    for t in scheduler.timesteps:
        x = latents[-1]
        if scale > 1:
            eps_u, eps_c = source.unet(torch.cat([x, x]), t, torch.cat([uncond, cond])).sample.chunk(2)
            eps = eps_u + scale * (eps_c - eps_u)
        else:
            eps = source.unet(x, t, cond, **more).sample
        latents.append(scheduler.step(eps, t, x).prev_sample)
    return latents


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("steps", [1, 4])
def test_ddim_equals_the_inverse_scheduler_bit_for_bit(backbone: str, steps: int) -> None:
    source = BACKBONES[backbone]()
    expected = walked(source, picture(), PROMPT, steps)
    found = invert(Pipeline.from_diffusers(source), picture(), PROMPT, num_inference_steps=steps, measure=False)
    assert torch.equal(found.latents, torch.stack(expected))
    assert torch.equal(found.noise, expected[-1])
    assert found.latents.shape == (steps + 1, 1, 4, 16, 16)


@pytest.mark.parametrize(
    "settings", [{"steps_offset": 0, "set_alpha_to_one": True}, {"timestep_spacing": "trailing"}], ids=str
)
def test_ddim_for_other_schedules(settings: dict[str, Any]) -> None:
    source = tiny_sd1()
    source.scheduler = tiny_scheduler(**settings)
    expected = walked(source, picture(), PROMPT, 5)
    found = invert(Pipeline.from_diffusers(source), picture(), PROMPT, num_inference_steps=5, measure=False)
    assert torch.equal(found.latents, torch.stack(expected))


def test_ddim_with_guidance(pipe: Pipeline) -> None:
    expected = walked(tiny_sd1(), picture(), PROMPT, 4, scale=3.0)
    found = invert(pipe, picture(), PROMPT, num_inference_steps=4, guidance_scale=3.0, measure=False)
    assert (found.noise - expected[-1]).abs().max() < 1e-5 * expected[-1].std()


def test_timesteps_are_those_of_a_drawing(pipe: Pipeline) -> None:
    found = invert(pipe, picture(), PROMPT, num_inference_steps=7, measure=False)
    seen: list[int] = []
    pipe(
        PROMPT,
        num_inference_steps=7,
        scheduler="ddim",
        output_type="latent",
        callback_on_step_end=lambda p, i, t, d: seen.append(int(t)) or {},
    )
    assert found.timesteps == tuple(seen[::-1])


class TestQuality:
    def test_a_picture_comes_back_and_the_numbers_are_right(self, gentle: Pipeline) -> None:
        pipe = gentle
        few = invert(pipe, picture(), PROMPT, num_inference_steps=3)
        assert few.quality is not None and few.quality.autoencoder[0] > 25

        def drawn(latents: torch.Tensor) -> torch.Tensor:
            return pipe.decode(latents, "pt")

        settings: dict[str, Any] = {"scheduler": "ddim", "guidance_scale": 1.0, "output_type": "pt"}
        back = pipe(PROMPT, latents=few.noise, num_inference_steps=3, **settings).images
        given = torch.from_numpy(np.asarray(picture())).permute(2, 0, 1)[None] / 255
        own = drawn(few.latents[0])

        def db(a: torch.Tensor, b: torch.Tensor) -> float:
            return float(10 * torch.log10(1 / F.mse_loss(a, b)))

        assert few.quality.picture[0] == pytest.approx(db(back, given), abs=1e-3)
        assert few.quality.autoencoder[0] == pytest.approx(db(back, own), abs=1e-3)
        assert few.quality.ceiling[0] == pytest.approx(db(own, given), abs=1e-3)

    def test_a_picture_that_does_not_come_back_is_a_warning_with_its_name(self, pipe: Pipeline, tmp_path: Path) -> None:
        path = tmp_path / "anna.png"
        picture().save(path)
        with pytest.warns(UserWarning, match="anna.png.* does not come back"):
            found = invert(pipe, [str(path), picture(1)], PROMPT, num_inference_steps=2, min_db=110)
        assert len(found.warnings) == 2 and "picture 2" in found.warnings[1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert invert(pipe, picture(), PROMPT, num_inference_steps=2, min_db=-99).warnings == ()

    @pytest.mark.parametrize("method", ["ddim", "regularised", "null_text"])
    def test_divergence_is_an_error_with_the_pictures_name(self, method: Any, tmp_path: Path) -> None:
        pipe = Pipeline.from_diffusers(tiny_sd1())
        path = tmp_path / "anna.png"
        picture().save(path)
        with torch.no_grad():
            pipe.unet.conv_out.bias.fill_(float("inf"))
        with pytest.raises(InputError, match="picture 1|anna.png") as caught:
            invert(pipe, path, PROMPT, method, num_inference_steps=3)
        assert "step 1 of" in str(caught.value) and "\n" not in str(caught.value)


class TestRegularised:
    # With guidance and a network that predicts v, the reference regularises two copies of the noise: see the module.
    @pytest.mark.parametrize(("backbone", "scale"), [("sd1", 1.0), ("sd1", 2.0), ("sd2", 1.0)])
    def test_equals_diffusers(self, backbone: str, scale: float) -> None:
        source = BACKBONES[backbone]()
        parts: dict[str, Any] = {name: part for name, part in source.components.items() if name != "image_encoder"}
        parts["inverse_scheduler"] = DDIMInverseScheduler.from_config(source.scheduler.config)
        parts |= dict.fromkeys(("caption_generator", "caption_processor"))
        theirs: Any = reference.StableDiffusionPix2PixZeroPipeline(**parts, requires_safety_checker=False)
        theirs.set_progress_bar_config(disable=True)
        with torch.no_grad():
            clean = encoded(source, picture())
        pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
        settings: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": scale}
        # Four channels are latents to diffusers.
        expected = theirs.invert(PROMPT, image=clean, generator=torch.Generator().manual_seed(11), **settings).latents
        found = invert(pipe, picture(), PROMPT, "regularised", seed=11, measure=False, **settings)
        assert (found.noise - expected).abs().max() <= 1e-4 * expected.std()
        plain = invert(pipe, picture(), PROMPT, measure=False, **settings)
        assert (found.noise - plain.noise).abs().max() > 1e-2 * expected.std()

    def test_without_weights_it_is_ddim(self, pipe: Pipeline) -> None:
        none = Regularisation(auto_correlation=0, divergence=0)
        found = invert(pipe, picture(), PROMPT, "regularised", 2, regularisation=none, measure=False)
        assert torch.equal(found.noise, invert(pipe, picture(), PROMPT, "ddim", 2, measure=False).noise)

    def test_noise_is_more_like_noise(self, gentle: Pipeline) -> None:
        def correlation(noise: torch.Tensor) -> float:
            shifted = [(noise * noise.roll(k, d)).mean((2, 3)).abs().mean() for k in (1, 2) for d in (2, 3)]
            return float(sum(shifted)) / float(noise.var())

        plain = invert(gentle, picture(), PROMPT, num_inference_steps=5, measure=False).noise
        strong = Regularisation(auto_correlation=60.0)
        found = invert(gentle, picture(), PROMPT, "regularised", 5, regularisation=strong, measure=False).noise
        assert correlation(found) < 0.8 * correlation(plain)
        assert abs(float(found.std()) - 1) < 0.7 * abs(float(plain.std()) - 1)


def null_text(
    source: Any, latents: list[torch.Tensor], prompt: str, steps: int, scale: float, iterations: int = 10
) -> tuple[list[torch.Tensor], torch.Tensor, list[int]]:
    """The published optimisation, plainly: embeddings of each step, the latents it ends with, iterations made."""
    source.scheduler.set_timesteps(steps)
    (cond, more), (uncond, other) = text_of(source, prompt)
    cond, uncond = cond.detach(), uncond.detach()
    more, other = ({k: {n: x.detach() for n, x in v.items()} for k, v in d.items()} for d in (more, other))
    x, found, made = latents[-1], [], []
    for i, t in enumerate(source.scheduler.timesteps):
        uncond = uncond.clone().requires_grad_(True)
        adam, count = torch.optim.Adam([uncond], lr=1e-2 * (1.0 - i / 100.0)), 0
        with torch.no_grad():
            eps_c = source.unet(x, t, cond, **more).sample
        for _ in range(iterations):
            eps_u = source.unet(x, t, uncond, **other).sample
            previous = source.scheduler.step(eps_u + scale * (eps_c - eps_u), t, x).prev_sample
            loss = F.mse_loss(previous, latents[steps - i - 1])
            count += 1
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + i * 2e-5:
                break
        made.append(count)
        uncond = uncond.detach()
        found.append(uncond)
        with torch.no_grad():
            eps_u = source.unet(x, t, uncond, **other).sample
            x = source.scheduler.step(eps_u + scale * (eps_c - eps_u), t, x).prev_sample
    return found, x, made


class TestNullText:
    @pytest.mark.parametrize("backbone", BACKBONES)
    def test_equals_the_published_optimisation(self, backbone: str) -> None:
        # Adam divides by the size of the gradient, so rounding of small ones shows: float64.
        source = BACKBONES[backbone]().to(torch.float64)
        if backbone == "sdxl":
            # The published code has no case of an absent negative prompt's zeros.
            source.register_to_config(force_zeros_for_empty_prompt=False)
        pipe = Pipeline.from_diffusers(source)
        steps, scale = 3, 4.0
        found = invert(pipe, picture(), PROMPT, "null_text", steps, scale, min_db=-99)
        plain = invert(pipe, picture(), PROMPT, "ddim", steps, measure=False)
        assert torch.equal(found.latents, plain.latents)
        expected, last, made = null_text(source, list(plain.latents), PROMPT, steps, scale)
        assert found.uncond is not None and found.uncond.shape[:2] == (steps, 1)
        for ours, theirs in zip(found.uncond, expected, strict=True):
            assert (ours - theirs).abs().max() <= 1e-4 * theirs.std()
        assert max(made) > 1
        assert found.quality is not None
        with torch.no_grad():
            back, own = (pipe.backbone.decode(x).clamp(-1, 1) for x in (last, plain.latents[0]))
        db = float(-10 * torch.log10(((back - own) / 2).square().mean()))
        assert found.quality.autoencoder[0] == pytest.approx(db, abs=1e-3)
        # One pass with the prompt, one for each iteration, one with what was found.
        assert found.cost[1] == steps + sum(count + 2 for count in made)

    def test_a_run_with_guidance_comes_back_where_plain_inversion_does_not(self, gentle: Pipeline) -> None:
        settings: dict[str, Any] = {"num_inference_steps": 5, "guidance_scale": 4.0}
        found = invert(
            gentle, picture(), PROMPT, "null_text", null_text=NullText(iterations=15), min_db=-99, **settings
        )
        assert found.quality is not None
        drawn = gentle(PROMPT, latents=found.noise, scheduler="ddim", output_type="latent", **settings).images
        with torch.no_grad():
            plain, own = (gentle.backbone.decode(x).clamp(-1, 1) / 2 for x in (drawn, found.latents[0]))
        assert found.quality.autoencoder[0] > -10 * float(F.mse_loss(plain, own).log10()) + 2

    def test_stops_early_and_without_iterations_changes_nothing(self, pipe: Pipeline) -> None:
        lax = invert(pipe, picture(), PROMPT, "null_text", 3, null_text=NullText(tolerance=1e9), min_db=-99)
        assert lax.cost[1] == 3 + 3 * 3
        none = invert(pipe, picture(), PROMPT, "null_text", 3, null_text=NullText(iterations=0), min_db=-99)
        assert none.uncond is not None and torch.equal(none.uncond[0], none.uncond[2])

    def test_with_a_control_that_reads_other_branches(self, pipe: Pipeline) -> None:
        """All branches run in each pass, since the prompt's may depend on them."""
        from controlroom.controls.style.reference_only import ReferenceOnly

        found = invert(pipe, picture(), PROMPT, "null_text", 2, controls=[ReferenceOnly(picture(3))], min_db=-99)
        assert found.uncond is not None and torch.isfinite(found.uncond).all()
        assert found.cost[0] > found.cost[1] * 2

    def test_guidance_is_needed(self, pipe: Pipeline) -> None:
        with pytest.raises(InputError, match="guidance_scale is 1"):
            invert(pipe, picture(), PROMPT, "null_text", guidance_scale=1.0)


@pytest.mark.parametrize("method", ["ddim", "regularised", "null_text"])
def test_pictures_of_a_batch_are_inverted_each_on_its_own(pipe: Pipeline, method: Any) -> None:
    settings: dict[str, Any] = {"method": method, "num_inference_steps": 3, "min_db": -99}
    prompts = ["a cat", "a dog on the beach"]
    together = invert(pipe, [picture(0), picture(1)], prompts, seed=4, **settings)
    for i in range(2):
        alone = invert(pipe, picture(i), prompts[i], seed=4 + i, **settings)
        assert (together.latents[:, i] - alone.latents[:, 0]).abs().max() < 1e-4
        assert together.quality is not None and alone.quality is not None
        assert together.quality.autoencoder[i] == pytest.approx(alone.quality.autoencoder[0], abs=0.05)
        if alone.uncond is not None:
            assert together.uncond is not None
            assert (together.uncond[:, i] - alone.uncond[:, 0]).abs().max() < 2e-2


class TestControls:
    def test_a_control_acts_and_comes_back_with_it(self, gentle: Pipeline) -> None:
        pipe, steps = gentle, 5
        net = tiny_controlnet(pipe.unet)
        plain = invert(pipe, picture(), PROMPT, num_inference_steps=steps)
        with_net = invert(pipe, picture(), PROMPT, num_inference_steps=steps, controls=[ControlNet(net, picture(2))])
        assert (plain.noise - with_net.noise).abs().max() > 1e-2
        assert with_net.quality is not None and with_net.quality.autoencoder[0] > 20
        settings: dict[str, Any] = {"num_inference_steps": steps, "scheduler": "ddim", "guidance_scale": 1.0}
        drawn = [
            pipe(PROMPT, latents=with_net.noise, controls=list(c), output_type="latent", **settings).images
            for c in ([ControlNet(net, picture(2))], [])
        ]
        errors = [float(F.mse_loss(x, with_net.latents[0])) for x in drawn]
        assert errors[0] < 0.5 * errors[1]

    def test_neutral_control_is_absence(self, pipe: Pipeline) -> None:
        net = tiny_controlnet(pipe.unet)
        plain = invert(pipe, picture(), PROMPT, num_inference_steps=2, measure=False)
        found = invert(
            pipe,
            picture(),
            PROMPT,
            num_inference_steps=2,
            controls=[ControlNet(net, picture(2), scale=0)],
            measure=False,
        )
        assert torch.equal(plain.latents, found.latents) and plain.cost == found.cost

    def test_windows_are_those_of_a_drawing(self, pipe: Pipeline) -> None:
        """A control of the first half of a drawing acts in the second half of an inversion."""
        net = tiny_controlnet(pipe.unet)
        plain, early = (
            invert(pipe, picture(), PROMPT, num_inference_steps=4, controls=controls, measure=False).latents
            for controls in ([], [ControlNet(net, picture(2), end=0.5)])
        )
        same = [torch.equal(a, b) for a, b in zip(plain, early, strict=True)]
        assert same == [True, True, True, False, False]

    @pytest.mark.parametrize(
        "control",
        [
            AttendAndExcite(words=["cat"]),
            PromptToPrompt("a red dog"),
            PromptToPrompt("a red dog", local_blend=(["dog"], ["cat"])),
        ],
        ids=str,
    )
    def test_what_cannot_be_walked_backwards_is_named(self, pipe: Pipeline, control: Any) -> None:
        with pytest.raises(InputError, match=f"{type(control).__name__} cannot act during an inversion"):
            invert(pipe, picture(), PROMPT, controls=[control])


class TestProgress:
    @pytest.mark.parametrize("method", ["ddim", "null_text"])
    def test_every_step_is_told(self, pipe: Pipeline, method: Any) -> None:
        seen: list[tuple[int, int]] = []
        invert(
            pipe, picture(), PROMPT, method, 3, min_db=-99, on_progress=lambda done, total: seen.append((done, total))
        )
        assert seen == [(k, 6) for k in range(1, 7)]

    @pytest.mark.parametrize("at", [1, 3, 4, 6])
    @pytest.mark.parametrize("method", ["ddim", "null_text"])
    def test_cancelled(self, pipe: Pipeline, method: Any, at: int, tmp_path: Path) -> None:
        seen: list[int] = []

        def on_progress(done: int, total: int) -> None:
            seen.append(done)
            if done == at:
                pipe.cancel()

        found = invert(pipe, picture(), PROMPT, method, 3, on_progress=on_progress)
        assert seen[-1] == at and found.cancelled and found.quality is None and found.uncond is None
        with pytest.raises(InputError, match="cancelled"):
            found.save(tmp_path / "half.safetensors")
        assert list(tmp_path.iterdir()) == []
        assert not invert(pipe, picture(), PROMPT, "ddim", 1, measure=False).cancelled


class TestFile:
    @pytest.mark.parametrize("method", ["ddim", "null_text"])
    def test_saved_and_loaded_it_is_the_same(self, pipe: Pipeline, method: Any, tmp_path: Path) -> None:
        found = (
            invert(pipe, picture(), PROMPT, method, 2, negative_prompt="blue", min_db=120)
            if method == "ddim"
            else (invert(pipe, [picture(), picture(1)], PROMPT, method, 2, min_db=-99))
        )
        found.save(tmp_path / "anna.safetensors")
        read = Inversion.load(tmp_path / "anna.safetensors")
        assert torch.equal(read.latents, found.latents)
        assert (read.uncond is None) == (found.uncond is None)
        assert found.uncond is None or (read.uncond is not None and torch.equal(read.uncond, found.uncond))
        plain = torch.zeros(1)
        assert replace(read, latents=plain, uncond=None).__dict__ == replace(found, latents=plain, uncond=None).__dict__

    def test_what_is_no_inversion_says_so(self, pipe: Pipeline, tmp_path: Path) -> None:
        from safetensors.torch import save_file

        good = invert(pipe, picture(), PROMPT, num_inference_steps=2, measure=False)
        data = good.to_bytes()
        other = tmp_path / "other.safetensors"
        save_file({"latents": torch.zeros(1)}, other)
        (tmp_path / "empty.safetensors").write_bytes(b"")
        (tmp_path / "cut.safetensors").write_bytes(data[:-10])
        (tmp_path / "text.safetensors").write_text("nothing of the kind")
        (tmp_path / "old.safetensors").write_bytes(data.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
        broken = good.latents.clone()
        broken[0] = float("nan")
        (tmp_path / "nan.safetensors").write_bytes(replace(good, latents=broken).to_bytes())
        (tmp_path / "few.safetensors").write_bytes(replace(good, latents=good.latents[:1]).to_bytes())
        (tmp_path / "endless.safetensors").write_bytes(data.replace(b"[1, 501]", b"[1e9999]"))
        for name in ("endless", "other", "empty", "cut", "text", "old", "nan", "few", "missing"):
            with pytest.raises(InputError, match=name):
                Inversion.load(tmp_path / f"{name}.safetensors")
        with pytest.raises(InputError):
            Inversion.load(tmp_path)


def test_no_trace() -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1())
    invert(pipe, picture(), PROMPT, "ddim", 1, measure=False)
    pipe.unet.requires_grad_(True)
    pipe.unet.mid_block.requires_grad_(False)
    before = traces(pipe)
    for method in ("ddim", "regularised", "null_text"):
        invert(
            pipe, picture(), PROMPT, method, 2, controls=[ControlNet(tiny_controlnet(pipe.unet), picture())], min_db=-99
        )
        assert traces(pipe) == before
        with pytest.raises(ZeroDivisionError):
            invert(pipe, picture(), PROMPT, method, 2, on_progress=lambda done, total: done // (3 - done))
        assert traces(pipe) == before


class TestInput:
    @pytest.mark.parametrize("kind", ["path", "array", "tensor", "bytes"])
    def test_kinds_of_pictures(self, pipe: Pipeline, kind: str, tmp_path: Path) -> None:
        image = picture()
        path = tmp_path / "a.png"
        image.save(path)
        array = np.asarray(image)
        given: Any = {
            "path": path,
            "array": array,
            "tensor": torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255,
            "bytes": path.read_bytes(),
        }[kind]
        expected = invert(pipe, image, PROMPT, num_inference_steps=1, measure=False)
        found = invert(pipe, given, PROMPT, num_inference_steps=1, measure=False)
        assert torch.equal(found.latents, expected.latents)

    def test_size_is_the_models_or_the_one_asked_for(self, pipe: Pipeline) -> None:
        wide = picture().resize((80, 40))
        settings: dict[str, Any] = {"num_inference_steps": 1, "measure": False}
        assert invert(pipe, wide, **settings).latents.shape[-2:] == (16, 16)
        assert invert(pipe, wide, height=16, width=48, mode="pad", **settings).latents.shape[-2:] == (8, 24)

    @pytest.mark.parametrize(
        ("settings", "said"),
        [
            ({"method": "magic"}, "Choose one of ddim, regularised, null_text"),
            ({"image": "nowhere.png"}, "nowhere.png"),
            ({"image": []}, "0 pictures"),
            ({"image": [picture()] * 3, "prompt": ["a", "b"]}, "3 pictures and 2 prompts"),
            ({"num_inference_steps": 0}, "num_inference_steps"),
            ({"height": 33}, "multiples"),
            ({"guidance_scale": float("nan")}, "guidance_scale"),
            ({"seed": -1}, "seed"),
        ],
    )
    def test_bad_input(self, pipe: Pipeline, settings: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            invert(pipe, **{"image": picture(), "prompt": PROMPT, **settings})
