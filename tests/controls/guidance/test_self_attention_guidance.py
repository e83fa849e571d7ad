"""Self-attention guidance against diffusers' pipeline and its equations (arXiv 2210.00939)."""

from __future__ import annotations

import copy
import math
from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from controlroom.controls.guidance.guidance_interval import GuidanceInterval
from controlroom.controls.guidance.self_attention_guidance import SelfAttentionGuidance, blurred, looked_at
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close, self_attention
from tests.tiny import BACKBONES, tiny_sd1, tiny_sd2
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 3, "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


# diffusers reads the number of heads from a list.
MAKE = {"sd1": tiny_sd1, "sd2": lambda: tiny_sd2(attention_head_dim=[2, 4])}


@pytest.mark.parametrize(
    ("kind", "scale", "more"),
    [
        ("sd1", 0.75, {}),
        ("sd1", 3.0, {"height": 24, "width": 40}),
        ("sd1", 2.0, {"guidance_scale": 1.0}),
        ("sd2", 0.75, {}),
        ("sd2", 2.0, {"guidance_scale": 1.0}),
    ],
)
def test_equals_diffusers(kind: str, scale: float, more: dict[str, Any]) -> None:
    source = MAKE[kind]()
    expected = self_attention(source, PROMPT, 5, num_inference_steps=3, sag_scale=scale, **more)
    spec = RunSpec(prompt=PROMPT, controls=[SelfAttentionGuidance(scale)], **{**DRAW, **more})
    pipe = Pipeline.from_diffusers(source)
    result = pipe.run(spec)
    assert close(result.images, expected)
    assert (pipe(PROMPT, **{**DRAW, **more}).images - expected).abs().max() > 5e-3 * expected.std()
    rows = 2 if "guidance_scale" in more else 3
    found, cost = pipe.explain(spec), result.manifest["cost"]
    assert (found.rows, found.passes) == ((rows,) * 3, (2,) * 3)
    assert (cost["unet_rows"], cost["unet_passes"]) == (3 * rows, 6)


def test_batch_equals_diffusers_and_every_picture_alone(pipe: Pipeline) -> None:
    prompts, negatives = ["a cat and a red frog", "a dog on the beach"], ["night", "a hat"]
    more = {"negative_prompt": negatives, "sag_scale": 1.5}
    expected = self_attention(tiny_sd1(), prompts, 5, 6, num_inference_steps=3, **more)
    control = SelfAttentionGuidance(1.5)
    together = pipe(prompts, controls=[control], negative_prompt=negatives, **DRAW).images
    assert close(together, expected)
    for i in range(2):
        alone = pipe(prompts[i], controls=[control], negative_prompt=negatives[i], **{**DRAW, "seed": 5 + i}).images
        assert close(together[i : i + 1], alone)


class Watched:
    """Plain attention that keeps its probabilities."""

    def __call__(self, attn: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        projected = (layer(hidden) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        self.probabilities = torch.softmax(q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]), dim=-1)
        return attn.to_out[0]((self.probabilities @ v).transpose(1, 2).flatten(2))


def gaussian(x: torch.Tensor) -> torch.Tensor:
    """9 x 9 places, deviation 1, mirrored at the edges; place by place."""
    height, width = x.shape[-2:]

    def mirrored(at: int, size: int) -> int:
        at = abs(at)
        return 2 * (size - 1) - at if at >= size else at

    result, total = torch.zeros_like(x), sum(math.exp(-0.5 * d * d) for d in range(-4, 5)) ** 2
    for i in range(height):
        for j in range(width):
            for a in range(-4, 5):
                for b in range(-4, 5):
                    weight = math.exp(-0.5 * (a * a + b * b)) / total
                    result[..., i, j] += weight * x[..., mirrored(i + a, height), mirrored(j + b, width)]
    return result


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [(kind, scheduler) for kind in BACKBONES for scheduler in ("ddim", "euler")]
    + [("sd1", "lms"), ("sd1", "dpmpp_2m"), ("sd1", "heun")],
)
def test_equals_the_equations_for_solvers_that_scale_their_input(kind: str, scheduler: str) -> None:
    """The network sees x = √ᾱ·x₀ + √(1−ᾱ)·ε in both passes, whatever the solver keeps; in float64."""
    source = BACKBONES[kind]().to(torch.float64)
    hand = ByHand(source, 3, make_scheduler(source.scheduler, scheduler))
    start = hand.x / hand.scheduler.init_noise_sigma
    cond, nothing, watched = hand.told(PROMPT), hand.told("", nothing=True), Watched()
    layer = source.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    held, velocity = layer.processor, source.scheduler.config.prediction_type == "v_prediction"
    layer.processor = watched
    try:
        for i, t in enumerate(hand.scheduler.timesteps):
            if hasattr(hand.scheduler, "sigmas"):
                bar = 1 / (1 + float(hand.scheduler.sigmas[i]) ** 2)
            else:
                bar = float(hand.scheduler.alphas_cumprod[int(t)])
            a, b = math.sqrt(bar), math.sqrt(1 - bar)
            c, u = hand.predict(t, cond), hand.predict(t, nothing)
            looked_at = watched.probabilities[0].mean(0).sum(0) > 1
            x = hand.scheduler.scale_model_input(hand.x, t)
            clean, noise = (a * x - b * u, a * u + b * x) if velocity else ((x - b * u) / a, u)
            soft = gaussian(clean)
            size = math.isqrt(len(looked_at))
            degraded = clean.clone()
            for row in range(8):
                for column in range(8):
                    if looked_at[row * size // 8 * size + column * size // 8]:
                        degraded[..., row, column] = soft[..., row, column]
            blind = hand.predict(t, nothing, a * degraded + b * noise)
            hand.step(u + 7.5 * (c - u) + 1.5 * (u - blind), t)
    finally:
        layer.processor = held
    settings = {**DRAW, "scheduler": scheduler, "latents": start}
    pipe = Pipeline.from_diffusers(source)
    result = pipe(PROMPT, controls=[SelfAttentionGuidance(1.5)], **settings).images
    assert close(result, hand.x, 1e-5)
    assert not close(pipe(PROMPT, **settings).images, hand.x, 1e-3)


def test_the_smoothing_is_the_published_one() -> None:
    from diffusers.pipelines.deprecated.stable_diffusion_sag.pipeline_stable_diffusion_sag import gaussian_blur_2d

    x = torch.randn(2, 4, 9, 12, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blurred(x), gaussian_blur_2d(x, 9, 1.0))
    # Latents with no room for a mirror keep their size.
    assert blurred(x[..., :4, :3]).shape == (2, 4, 4, 3)


def test_joined_keys_change_nothing_of_where_the_picture_is_looked_at(pipe: Pipeline) -> None:
    own = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0)).softmax(-1)
    mask = looked_at(own, (3, 4))
    assert mask.shape == (2, 1, 3, 4) and 0 < mask.sum() < mask.numel()
    # Half, or all but nothing, of the attention goes to keys that another control has joined.
    for share in (0.5, 1e-6):
        joined = torch.cat([own * share, own * (1 - share)], dim=-1)
        assert torch.equal(looked_at(joined, (3, 4)), mask)
    style = ReferenceOnly(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)))
    assert torch.isfinite(pipe(PROMPT, controls=[style, SelfAttentionGuidance()], **DRAW).images).all()


class Windows:
    """Two halves of a canvas, twice as wide as high, that do not overlap."""

    count, hw = 2, (8, 8)

    def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
        return torch.cat([canvas[..., : 8 * factor], canvas[..., 8 * factor :]])

    def merge(self, predictions: torch.Tensor) -> torch.Tensor:
        return torch.cat(predictions.chunk(2), dim=-1)


class Seen(Control):
    """Shows the network a wide canvas through two windows."""

    type: Literal["seen"] = Field(default="seen", kw_only=True)

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(views=Windows())


def test_a_canvas_seen_through_views(pipe: Pipeline) -> None:
    """A canvas of two equal halves is drawn twice as each would be, but at the seam, where it is blurred as a whole."""
    half = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    canvas = torch.cat([half, half.flip(-1)], dim=-1)
    settings = {**DRAW, "num_inference_steps": 1}
    controls = [Seen(), SelfAttentionGuidance(3.0)]
    result = pipe(PROMPT, controls=controls, latents=canvas, **{**settings, "width": 32})
    alone = pipe(PROMPT, controls=controls[1:], latents=half, **settings)
    plain = pipe(PROMPT, latents=half, **settings)
    assert result.manifest["cost"]["unet_rows"] == 6
    assert (alone.images - plain.images).abs().max() > 1e-3
    # What the blur took from beyond the seam reaches the whole half only through the second pass.
    assert (result.images[..., :8] - alone.images).abs().mean() < (alone.images - plain.images).abs().mean()


def test_where_there_is_no_guidance_the_prompt_is_looked_at(pipe: Pipeline) -> None:
    control = SelfAttentionGuidance(2.0)
    unguided = pipe(PROMPT, controls=[control], guidance_scale=1.0, **{**DRAW, "num_inference_steps": 2})
    seen: list[Any] = []
    interval = GuidanceInterval(guidance_start=0.5)
    result = pipe(
        PROMPT,
        controls=[control, interval],
        callback_on_step_end=lambda p, i, t, tensors: seen.append(tensors["latents"]) or tensors,
        **{**DRAW, "num_inference_steps": 2},
    )
    first: list[Any] = []
    pipe(
        PROMPT,
        controls=[control],
        guidance_scale=1.0,
        callback_on_step_end=lambda p, i, t, tensors: first.append(tensors["latents"]) or tensors,
        **{**DRAW, "num_inference_steps": 2},
    )
    assert torch.equal(seen[0], first[0])
    assert not torch.equal(result.images, unguided.images)
    assert result.manifest["cost"]["unet_rows"] == 2 + 3


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[SelfAttentionGuidance(**settings)], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[SelfAttentionGuidance(1e-4)], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


def test_window_costs_passes_only_where_it_is_open(pipe: Pipeline) -> None:
    control = SelfAttentionGuidance(start=0.5)
    cost = pipe(PROMPT, controls=[control], **{**DRAW, "num_inference_steps": 4}).manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (2 * 2 + 2 * 3, 4 + 2)


def test_no_trace(pipe: Pipeline) -> None:
    before = traces(pipe)
    pipe(PROMPT, controls=[SelfAttentionGuidance()], **DRAW)
    assert traces(pipe) == before


def test_a_network_without_middle_attention_says_so() -> None:
    source = copy.copy(tiny_sd1(mid_block_type="UNetMidBlock2D"))
    with pytest.raises(InputError, match="No self layer of this network in mid"):
        Pipeline.from_diffusers(source)(PROMPT, controls=[SelfAttentionGuidance()], **DRAW)


@pytest.mark.parametrize("settings", [{"scale": -1.0}, {"scale": float("inf")}, {"start": 2.0}, {"sigma": 1.0}])
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    assert SelfAttentionGuidance().scale == 0.75
    with pytest.raises(ControlRoomError, match=next(iter(settings))):
        SelfAttentionGuidance(**settings)
