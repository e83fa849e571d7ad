"""Imagic's stages against the formulas written plainly; resume, refusals, and the enhancement from end to end."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file

from controlroom.controls.editing.image_to_image import ImageToImage
from controlroom.controls.editing.imagic import EMBEDDING, UNET, Imagic
from controlroom.core.errors import InputError, ModelError
from controlroom.sampling.pipeline import Pipeline
from controlroom.tasks.enhance import EnhanceOptions, enhance
from controlroom.training.checkpoint import ResumeError
from controlroom.training.randomness import StepRandom
from controlroom.training.recipes.imagic import ImagicRecipe, ImagicSettings, UnfinishedError, fit_imagic
from tests.tiny import BACKBONES, PIXELS, tiny_sd1
from tests.traces import traces

PROMPT = "a red cat"
# Rates that move much in few steps.
SHORT: dict[str, Any] = {"embedding_steps": 3, "embedding_rate": 0.05, "unet_steps": 2, "unet_rate": 1e-3}


def picture(seed: int = 0, size: int = PIXELS) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


@torch.no_grad()
def latents_of(plain: Any, image: Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.asarray(image, np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1
    return plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor


class ByHand:
    """Both stages, written plainly: Adam on the words, then on the network."""

    def __init__(self, kind: str) -> None:
        self.plain = plain = BACKBONES[kind]()
        self.unet, self.kind = plain.unet, kind
        with torch.no_grad():
            found = plain.encode_prompt(
                PROMPT, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        self.words = [found[0].clone()] + ([found[2].clone()] if kind == "sdxl" else [])
        self.latents = latents_of(plain, picture())

    def loss(self, step: int) -> torch.Tensor:
        rng = StepRandom(0, step, [step])
        noise, t = rng.normal("noise", self.latents.shape[1:]), rng.integers("timestep", 0, 1000)
        a = self.plain.scheduler.alphas_cumprod[t][0]
        x = a.sqrt() * self.latents + (1 - a).sqrt() * noise
        more: dict[str, Any] = {}
        if self.kind == "sdxl":
            ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]], dtype=torch.float32)
            more["added_cond_kwargs"] = {"text_embeds": self.words[1], "time_ids": ids}
        predicted = self.unet(x, t, encoder_hidden_states=self.words[0], **more).sample
        target = a.sqrt() * noise - (1 - a).sqrt() * self.latents if self.kind == "sd2" else noise
        return ((predicted - target) ** 2).mean()

    def minimise(self, parameters: list[torch.Tensor], steps: int, rate: float) -> None:
        optimizer = torch.optim.Adam(parameters, lr=rate)
        for step in range(steps):
            optimizer.zero_grad()
            self.loss(step).backward()
            optimizer.step()

    def fit(self) -> ByHand:
        for part in self.words:
            part.requires_grad_(True)
        self.minimise(self.words, SHORT["embedding_steps"], SHORT["embedding_rate"])
        for part in self.words:
            part.requires_grad_(False)
        self.minimise(list(self.unet.parameters()), SHORT["unet_steps"], SHORT["unet_rate"])
        return self


@pytest.mark.parametrize("kind", BACKBONES)
def test_words_and_network_are_those_of_the_formulas(kind: str, tmp_path: Path) -> None:
    expected = ByHand(kind).fit()
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    pipe.backbone.encode_text([PROMPT])  # transformers notes the first call in the module
    before = traces(pipe)
    control = fit_imagic(pipe, picture(), PROMPT, tmp_path, ImagicSettings(**SHORT))
    assert traces(pipe) == before
    words = load_file(str(tmp_path / EMBEDDING))
    names = ("tokens", "pooled")[: len(expected.words)]
    assert set(words) == set(names)
    # Adam's first steps go by the sign of a gradient, which rounding may turn where it is nearly zero.
    for name, wanted in zip(names, expected.words, strict=True):
        assert ((words[name] - wanted).abs() > 1e-4).float().mean() < 1e-3
    tuned = UNet2DConditionModel.from_pretrained(tmp_path / UNET)
    plain = dict(pipe.unet.named_parameters())
    wrong = total = 0
    for (name, ours), theirs in zip(tuned.named_parameters(), expected.unet.parameters(), strict=True):
        assert not torch.equal(ours, plain[name]), name
        wrong += int(((ours - theirs).abs() > 1e-4).sum())
        total += ours.numel()
    assert wrong < 2e-3 * total
    # The result draws, and its words with a strength of 0 are the learned ones.
    settings: dict[str, Any] = {"num_inference_steps": 2, "output_type": "latent", "seed": 1}
    drawn = pipe("a dog", controls=[control.model_copy(update={"alpha": 0.0})], **settings).images
    again = pipe("a frog", controls=[control.model_copy(update={"alpha": 0.0})], **settings).images
    assert torch.equal(drawn, again)
    assert control.network == "tuned"


def test_a_stopped_fit_continues_exactly(tmp_path: Path, pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ImagicSettings(**SHORT)
    fit_imagic(pipe, picture(), PROMPT, tmp_path / "whole", settings)
    loss, seen = ImagicRecipe.loss, []

    def stopping(self: ImagicRecipe, batch: Any, step: int, rng: StepRandom) -> Any:
        if (self.stage, step) in (("embedding", 1), ("unet", 0)) and (self.stage, step) not in seen:
            seen.append((self.stage, step))
            os.kill(os.getpid(), signal.SIGTERM)
        return loss(self, batch, step, rng)

    monkeypatch.setattr(ImagicRecipe, "loss", stopping)
    for what in ("words was stopped .SIGTERM. at step 2 of 3", "network was stopped .SIGTERM. at step 1 of 2"):
        with pytest.raises(UnfinishedError, match=what):
            fit_imagic(pipe, picture(), PROMPT, tmp_path / "broken", settings)
    torch.rand(3)
    fit_imagic(pipe, picture(), PROMPT, tmp_path / "broken", settings)
    for file in (EMBEDDING, UNET / "diffusion_pytorch_model.safetensors"):
        left, right = (load_file(str(tmp_path / name / file)) for name in ("whole", "broken"))
        assert all(torch.equal(left[key], right[key]) for key in left)
    # A finished fit is used again, and nothing is trained.
    monkeypatch.setattr(ImagicRecipe, "loss", lambda *_: pytest.fail("trained again"))
    assert isinstance(fit_imagic(pipe, picture(), PROMPT, tmp_path / "whole", settings), Imagic)
    assert '"event": "step"' in (tmp_path / "whole/unet/log.jsonl").read_text()


def test_time_box_stops_between_steps(tmp_path: Path, pipe: Pipeline) -> None:
    with pytest.raises(UnfinishedError, match="time box"):
        fit_imagic(pipe, picture(), PROMPT, tmp_path, ImagicSettings(**SHORT, stop_after_seconds=1e-3))
    fit_imagic(pipe, picture(), PROMPT, tmp_path, ImagicSettings(**SHORT))


def test_the_text_encoder_may_learn_instead(tmp_path: Path, pipe: Pipeline) -> None:
    before = traces(pipe)
    settings = ImagicSettings(learn="text_encoder", embedding_steps=2, embedding_rate=1e-2, unet_steps=0)
    control = fit_imagic(pipe, picture(), PROMPT, tmp_path, settings)
    assert traces(pipe) == before
    assert control.network == "base"
    trained = tiny_sd1().text_encoder
    step = next(path for path in (tmp_path / "embedding").glob("step-*") if path.is_dir())
    trained.load_state_dict(load_file(str(step / "weights.text_encoder.safetensors")))
    ids = pipe.backbone.tokenize(pipe.backbone.tokenizer, [PROMPT])
    with torch.no_grad():
        expected, plain = trained(ids)[0], pipe.backbone.encode_text([PROMPT]).tokens
    found = load_file(str(tmp_path / EMBEDDING))["tokens"]
    torch.testing.assert_close(found, expected)
    assert (found - plain).abs().max() > 1e-2


def test_the_network_may_see_the_wanted_words_at_another_size(tmp_path: Path, pipe: Pipeline) -> None:
    seen: list[tuple[torch.Tensor, torch.Size]] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: seen.append((args[0], args[0].shape)) if type(module) is UNet2DConditionModel else None
    )
    try:
        settings = ImagicSettings(**SHORT, unet_words="wanted", size=(16, 32), unet_size=(48, 32))
        fit_imagic(pipe, picture(), PROMPT, tmp_path, settings)
    finally:
        hook.remove()
    assert [tuple(shape) for _, shape in seen] == [(1, 4, 8, 16)] * 3 + [(1, 4, 24, 16)] * 2


def test_bad_input_is_told(tmp_path: Path, pipe: Pipeline) -> None:
    for settings, said in (
        ({"unet_steps": -1}, "unet_steps"),
        ({"embedding_rate": 0.0}, "embedding_rate"),
        ({"learn": "latin"}, "learn"),
        ({"speed": 3}, "speed"),
    ):
        with pytest.raises(InputError, match=said):
            ImagicSettings(**settings)
    one = ImagicSettings(embedding_steps=1, unet_steps=0)
    for image, prompt, more, said in (
        (picture(), "  ", {}, "prompt is empty"),
        ([picture(), picture()], PROMPT, {}, "one picture"),
        ("nowhere.png", PROMPT, {}, "nowhere.png"),
        (picture(), PROMPT, {"size": (15, 16)}, "multiples of 2"),
    ):
        with pytest.raises(InputError, match=said):
            fit_imagic(pipe, image, prompt, tmp_path, one.model_copy(update=more))
    with pytest.raises(ModelError, match="reads 8 channels, not 4"):
        fit_imagic(Pipeline.from_diffusers(tiny_sd1(in_channels=8)), picture(), PROMPT, tmp_path, one)
    fit_imagic(pipe, picture(), PROMPT, tmp_path, one)
    for image, prompt in ((picture(1), PROMPT), (picture(), "a dog")):
        with pytest.raises(ResumeError, match="fingerprint"):
            fit_imagic(pipe, image, prompt, tmp_path, one)


def test_enhancement_draws_small_and_enlarges(tmp_path: Path, pipe: Pipeline) -> None:
    fit = ImagicSettings(**SHORT, unet_words="wanted")
    options = EnhanceOptions(
        strengths=(0.2, 1.1), small_size=(16, 24), upscale_mode="latents", fit=fit, num_inference_steps=4, seed=3
    )
    before = traces(pipe)
    result = enhance(pipe, picture(), PROMPT, tmp_path, options)
    assert traces(pipe) == before
    assert [image.size for image in result.images] == [(48, 32)] * 2
    assert result.small.images.shape == (2, 4, 8, 12)
    # Each of the two runs, written out.
    folder, more = str(tmp_path), {"num_inference_steps": 4, "output_type": "latent"}
    for i, strength in enumerate((0.2, 1.1)):
        small = pipe(PROMPT, controls=[Imagic(folder, strength, "base")], seed=3, height=16, width=24, **more).images
        assert (small[0] - result.small.images[i]).abs().max() < 1e-4 * small.std()
        enlarged = torch.nn.functional.interpolate(small, size=(16, 24), mode="bicubic")
        controls = [ImageToImage(enlarged, 0.4), Imagic(folder, 1.0)]
        large = pipe(PROMPT, controls=controls, seed=3, height=32, width=48, **more).images
        assert (large[0] - result.large.latents[i]).abs().max() < 1e-3 * large.std()
    assert not torch.equal(result.small.images[0], result.small.images[1])
    assert result.control == Imagic(folder)


def test_options_of_the_enhancement_are_checked() -> None:
    for options in ({"strengths": ()}, {"factor": 0}, {"upscale_strength": 0.0}, {"small_network": "half"}, {"x": 1}):
        with pytest.raises(InputError, match=next(iter(options))):
            EnhanceOptions(**options)
