"""Cross-image attention against a transcription of the published equations (arXiv 2311.03335, 2304.06140)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from controlroom.controls.style.cross_image_attention import CrossImageAttention, contrasted
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.random import Streams
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES

STEPS = 6
DRAW: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "latent", "guidance_scale": 1.0, "seed": 3}
PROMPT = "a red cat"
OUT, APP, STRUCT = 0, 1, 2
TOLERANCE = 1e-4


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((32, 32), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def plains() -> dict[str, Any]:
    return {name: make() for name, make in BACKBONES.items()}


@pytest.fixture(scope="module")
def pipe(plains: dict[str, Any]) -> Pipeline:
    return Pipeline.from_diffusers(plains["sd1"])


class Published:
    """Decoder self-attention in which row 0 is answered by row 1 (or 2)."""

    def __init__(self, plain: Any, contrast: float) -> None:
        self.unet, self.contrast = plain.unet, contrast
        self.source: int | None = None
        self.processors = self.unet.attn_processors
        for name, module in self.unet.named_modules():
            if name.endswith("attn1") and name.startswith("up_blocks"):
                module.processor = lambda a, h, *args, **more: self.attention(a, h)

    def attention(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            p(x).reshape(len(x), x.shape[1], attn.heads, -1).transpose(1, 2) for p in (attn.to_q, attn.to_k, attn.to_v)
        )
        k, v = k.clone(), v.clone()
        if self.source is not None:
            k[OUT], v[OUT] = k[self.source], v[self.source]
        p = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)
        if self.source is not None:
            for head in range(attn.heads):
                mean = p[OUT, head].mean(-1, keepdim=True)
                p[OUT, head] = ((p[OUT, head] - mean) * self.contrast + mean).clip(0, 1)
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


@torch.no_grad()
def published(plain: Any, kind: str, guidance: float = 1.0, masks: Any = None, **given: Any) -> torch.Tensor:
    """Latents of the result: rows are the result, the appearance, the structure; 4 of the 6 steps are run."""
    n = 4
    s = {"contrast": 1.67, "swap": 3.5, "first": 1, "until": 2, "every": 5, "adain": 2, **given}
    texts: dict[str, Any] = {}
    for name, text in (("uncond", ""), ("cond", PROMPT)):
        if kind == "sdxl":
            tokens, _, pooled, _ = plain.encode_prompt(text, device="cpu")
            texts[name] = (tokens * (name == "cond"), pooled * (name == "cond"))
        else:
            texts[name] = (plain.encode_prompt(text, "cpu", 1, False)[0], None)
    scheduler, streams = plain.scheduler, Streams([3])
    scheduler.set_timesteps(STEPS)
    steps = scheduler.timesteps[STEPS - n :]
    bars = [float(scheduler.alphas_cumprod[t]) for t in steps] + [float(scheduler.final_alpha_cumprod)]
    levels: dict[int, list[torch.Tensor]] = {}
    for row, name, seed in ((STRUCT, "structure", 0), (APP, "appearance", 1)):
        pixels = torch.from_numpy(np.asarray(picture(seed), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        clean = plain.vae.encode(pixels).latent_dist.mode() * plain.vae.config.scaling_factor
        levels[row] = [a**0.5 * clean + (1 - a) ** 0.5 * streams.normal(name, clean.shape) for a in bars[:-1]] + [clean]
    method = Published(plain, s["contrast"])

    def predict(x: torch.Tensor, t: Any, text: str, source: int | None) -> torch.Tensor:
        method.source = source
        more: dict[str, Any] = {}
        if kind == "sdxl":
            ids = torch.tensor([[32.0, 32.0, 0.0, 0.0, 32.0, 32.0]]).repeat(3, 1)
            more["added_cond_kwargs"] = {"text_embeds": texts[text][1].repeat(3, 1), "time_ids": ids}
        return plain.unet(x, t, encoder_hidden_states=texts[text][0].repeat(3, 1, 1), **more).sample

    out = levels[STRUCT][0]
    try:
        for i, t in enumerate(steps):
            x = torch.cat([out, levels[APP][i], levels[STRUCT][i]])
            source = None
            if i >= s["first"]:
                source = STRUCT if i % s["every"] == 0 and i < s["until"] else APP
            swap, plainly = predict(x, t, "cond", source), predict(x, t, "cond", None)
            if guidance > 1:
                uncond = predict(x, t, "uncond", None)
                eps = uncond + guidance * (swap - uncond)
            else:
                strength = np.linspace(s["swap"], max(s["swap"] / 2, 1.0), n)[i]
                eps = plainly + float(strength) * (swap - plainly)
            a, b = bars[i], bars[i + 1]
            if scheduler.config.prediction_type == "v_prediction":
                x0 = a**0.5 * x - (1 - a) ** 0.5 * eps
                eps = a**0.5 * eps + (1 - a) ** 0.5 * x
            else:
                x0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
            variance = (1 - b) / (1 - a) * (1 - a / b)
            mu = b**0.5 * x0 + (1 - b - variance) ** 0.5 * eps
            z = (levels[STRUCT][i + 1] - mu[STRUCT]) / variance**0.5
            if i == n - 1:
                z = torch.zeros_like(z)
            out = mu[OUT] + variance**0.5 * z
            if i >= s["adain"]:
                out = like(out[0], levels[APP][i + 1][0], masks)[None]
    finally:
        plain.unet.set_attn_processor(method.processors)
    return out


def like(x: torch.Tensor, other: torch.Tensor, masks: Any) -> torch.Tensor:
    """AdaIN of [C, h, w], with the statistics of the places of two masks [h, w]."""
    inside = [torch.ones(x.shape[1:]) == 1] * 2 if masks is None else [mask == 1 for mask in masks]
    result = x.clone()
    for channel in range(len(x)):
        own, wanted = x[channel][inside[0]], other[channel][inside[1]]
        normal = (x[channel] - own.mean()) / (own.var() + 1e-5).sqrt()
        moved = normal * (wanted.var() + 1e-5).sqrt() + wanted.mean()
        result[channel] = torch.where(inside[0], moved, x[channel])
    return result


def check(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.isfinite(theirs).all()
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.std()


# Of 4 steps (0.67 of 6): attention from 1, AdaIN from 2, the structure's keys and values at those divisible by `every`.
SETTINGS: dict[str, Any] = {"strength": 0.67, "attention_start": 0.25, "adain_start": 0.5, "structure_until": 0.5}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any], float, int]] = {
    "default": ({}, {}, 1.0, 1 * 2 + 3 * 4),
    "the structure's keys again": ({"structure_every": 2, "structure_until": 0.8}, {"every": 2, "until": 3}, 1.0, 14),
    "no contrast, no swap": ({"contrast": 1, "swap_guidance_scale": 1}, {"contrast": 1.0, "swap": 1.0}, 1.0, 11),
    "attention alone": ({"latent_adain": False}, {"adain": 9}, 1.0, 14),
    "guided": ({}, {}, 4.0, 1 * 4 + 3 * 5),
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "case"), [*(("sd1", case) for case in CASES), ("sd2", "default"), ("sdxl", "default"), ("sdxl", "guided")]
)
def test_equals_the_published_equations(plains: Any, kind: str, case: str) -> None:
    settings, given, guidance, rows = CASES[case]
    control = CrossImageAttention(picture(0), picture(1), **{**SETTINGS, **settings})
    draw = {**DRAW, "guidance_scale": guidance}
    result = Pipeline.from_diffusers(plains[kind])(PROMPT, controls=[control], **draw)
    check(result.images, published(plains[kind], kind, guidance, **given))
    cost = result.manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (rows, 4)


def test_masked_adain(plains: Any, pipe: Pipeline) -> None:
    """Masks of whole latents, and attention everywhere (the authors' masks are AdaIN's alone)."""
    masks = [torch.zeros(16, 16) for _ in range(2)]
    masks[0][2:12, 4:], masks[1][:, :10] = 1, 1
    given = [mask.repeat_interleave(2, 0).repeat_interleave(2, 1).numpy() for mask in masks]
    control = CrossImageAttention(
        picture(0), picture(1), mask=given[0], appearance_mask=given[1], **{**SETTINGS, "attention_start": 1.0}
    )
    check(pipe(PROMPT, controls=[control], **DRAW).images, published(plains["sd1"], "sd1", masks=masks, first=9))


def test_mask_of_attention(pipe: Pipeline) -> None:
    one = {**DRAW, "num_inference_steps": 1}
    settings: dict[str, Any] = {"strength": 1.0, "attention_start": 0.0, "structure_every": 0, "latent_adain": False}
    whole = pipe(PROMPT, controls=[CrossImageAttention(picture(), picture(1), **settings)], **one).images
    white = CrossImageAttention(picture(), picture(1), mask=np.ones((32, 32), np.float32), **settings)
    check(pipe(PROMPT, controls=[white], **one).images, whole)
    left = np.zeros((32, 32), np.float32)
    left[:, :8] = 1
    half = pipe(PROMPT, controls=[CrossImageAttention(picture(), picture(1), mask=left, **settings)], **one).images
    settings["attention_start"] = 1.0
    none = pipe(PROMPT, controls=[CrossImageAttention(picture(), picture(1), **settings)], **one).images
    change = (half - none).abs().mean((0, 1, 2))
    assert change[:4].mean() > 1.5 * change[-8:].mean()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_without_a_swap_the_structure_comes_back(pipe: Pipeline, guidance: float) -> None:
    """All but the last step, which is without noise."""
    control = CrossImageAttention(picture(0), picture(1), strength=1.0, attention_start=1.0, latent_adain=False)
    seen: list[torch.Tensor] = []

    def keep(_: Any, i: int, t: Any, kept: dict[str, Any]) -> dict[str, Any]:
        seen.append(kept["latents"].clone())
        return {}

    draw = {**DRAW, "guidance_scale": guidance}
    pipe(PROMPT, controls=[control], callback_on_step_end=keep, **draw)
    pixels = torch.from_numpy(np.asarray(picture(0), np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    clean, streams = pipe.backbone.encode_picture(pixels), Streams([3])
    pipe.scheduler.set_timesteps(STEPS)
    for i, t in enumerate(pipe.scheduler.timesteps):
        level = pipe.scheduler.add_noise(clean, streams.normal("structure", clean.shape), t.reshape(1))
        if i:
            assert (seen[i - 1] - level).abs().max() < 1e-3


def test_contrast() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 2, 2000, 4), torch.randn(1, 2, 50, 4), torch.randn(1, 2, 50, 4)
    torch.testing.assert_close(contrasted(q, k, v, 1.0), torch.nn.functional.scaled_dot_product_attention(q, k, v))
    p = (q @ k.transpose(-1, -2) / 2).softmax(-1)
    expected = ((p - 0.02) * 2 + 0.02).clip(0, 1)
    assert (expected == 0).any() and (expected.sum(-1) > 1.05).any()
    torch.testing.assert_close(contrasted(q, k, v, 2.0), expected @ v)


@pytest.mark.parametrize("settings", [{"end": 0.0}, {"scale": 0.0}])
def test_absence_is_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain = pipe(PROMPT, **DRAW)
    ours = pipe(PROMPT, controls=[CrossImageAttention(picture(), picture(1), **settings)], **DRAW)
    assert torch.equal(ours.images, plain.images) and ours.manifest["cost"] == plain.manifest["cost"]


@pytest.mark.parametrize("masked", [False, True])
def test_a_small_scale_leaves_the_structure(pipe: Pipeline, masked: bool) -> None:
    """What is drawn without a swap, its guidance and AdaIN; from there it grows in proportion."""
    mask = np.ones((32, 32), np.float32) if masked else None

    def draw(**settings: Any) -> torch.Tensor:
        control = CrossImageAttention(picture(0), picture(1), mask=mask, **{**SETTINGS, **settings})
        return pipe(PROMPT, controls=[control], **DRAW).images

    kept = draw(attention_start=1.0, latent_adain=False)
    assert 0 < (draw(scale=1e-4) - kept).abs().max() < 1e-2 * kept.std()
    little, twice = (float((draw(scale=scale) - kept).norm()) for scale in (0.01, 0.02))
    assert 1.7 * little < twice < 2.3 * little


def test_batches_are_as_if_alone(pipe: Pipeline) -> None:
    prompts = ["a red cat", "a dog"]
    both = pipe(
        prompts, controls=[CrossImageAttention([picture(0), picture(2)], picture(1), **SETTINGS)], **DRAW
    ).images
    for i, prompt in enumerate(prompts):
        control = CrossImageAttention(picture(2 * i), picture(1), **SETTINGS)
        check(both[i : i + 1], pipe(prompt, controls=[control], **{**DRAW, "seed": 3 + i}).images)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"structure": "nowhere.png"}, "nowhere.png"),
        ({"appearance": [picture(), picture(), picture()]}, "3 appearance"),
        ({"mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"appearance_mask": np.zeros((32, 32), np.float32)}, "black"),
        ({"swap_guidance_scale": 0.5}, "greater than or equal"),
        ({"strength": 0.0}, "greater than"),
        ({"wrong": 1}, "not permitted"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_bad_input(pipe: Pipeline, settings: dict[str, Any], match: str) -> None:
    with pytest.raises(ControlRoomError, match=match):
        control = CrossImageAttention(**{"structure": picture(), "appearance": picture(1), **settings})
        pipe(["a cat", "a dog"], controls=[control], **DRAW)


@pytest.mark.parametrize("draw", [{"scheduler": "euler"}, {"eta": 1.0}])
def test_another_solver_is_refused(pipe: Pipeline, draw: dict[str, Any]) -> None:
    with pytest.raises(InputError, match='scheduler="ddim"'):
        pipe(PROMPT, controls=[CrossImageAttention(picture(), picture(1))], **draw, **DRAW)
