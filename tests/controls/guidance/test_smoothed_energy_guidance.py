"""Smoothed energy guidance against its equations, written out (arXiv 2408.00760)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from controlroom.controls.guidance.perturbed_attention_guidance import PerturbedAttentionGuidance
from controlroom.controls.guidance.smoothed_energy_guidance import SmoothedEnergyGuidance, blurred
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 2, "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def weights(sigma: float, side: int) -> list[float]:
    """A Gaussian at whole distances from the middle, six deviations wide, at most as far as half of the map."""
    reach = math.ceil(6 * sigma)
    reach = min(reach // 2, side // 2)
    found = [math.exp(-(d**2) / (2 * sigma**2)) for d in range(-reach, reach + 1)]
    return [one / sum(found) for one in found]


def mirrored(at: int, side: int) -> int:
    at = abs(at)
    return 2 * (side - 1) - at if at >= side else at


def smoothing(hw: tuple[int, int], sigma: float | None) -> torch.Tensor:
    """[h·w, h·w]: row i says of which queries the logits are mixed to those of query i."""
    height, width = hw
    matrix = torch.zeros(height * width, height * width, dtype=torch.float64)
    if sigma is None:
        return torch.full_like(matrix, 1 / (height * width))
    down, across = weights(sigma, height), weights(sigma, width)
    for i in range(height):
        for j in range(width):
            for a, first in enumerate(down):
                for b, second in enumerate(across):
                    row = mirrored(i + a - len(down) // 2, height)
                    column = mirrored(j + b - len(across) // 2, width)
                    matrix[i * width + j, row * width + column] += first * second
    return matrix


class Smoothed:
    """Attention whose logits are blurred over the queries, probabilities materialised."""

    def __init__(self, matrix: torch.Tensor) -> None:
        self.matrix = matrix

    def __call__(self, attn: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        projected = (layer(hidden) for layer in (attn.to_q, attn.to_k, attn.to_v))
        q, k, v = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in projected)
        logits = self.matrix.to(q) @ (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1]))
        return attn.to_out[0]((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("kind", "sigma"), [*((kind, sigma) for kind in BACKBONES for sigma in (None, 1.0)), ("sd1", 0.4), ("sd1", 10.0)]
)
def test_equals_the_equations(kind: str, sigma: float | None) -> None:
    """Logits blurred over the queries in the middle, in float64, with guidance and without."""
    source = BACKBONES[kind]().to(torch.float64)
    layers = [block.attn1 for block in source.unet.mid_block.attentions[0].transformer_blocks]
    pipe, start = Pipeline.from_diffusers(source), ByHand(source, 2).x
    for guidance in (7.5, 1.0):
        hand = ByHand(source, 2)
        cond, nothing = hand.told(PROMPT), hand.told("", nothing=True)
        held = [layer.processor for layer in layers]
        for t in hand.scheduler.timesteps:
            c, u = hand.predict(t, cond), hand.predict(t, nothing)
            for layer in layers:
                layer.processor = Smoothed(smoothing((4, 4), sigma))
            smooth = hand.predict(t, cond)
            for layer, processor in zip(layers, held, strict=True):
                layer.processor = processor
            hand.step(u + guidance * (c - u) + 3.0 * (c - smooth), t)
        settings = {**DRAW, "guidance_scale": guidance, "latents": start}
        result = pipe(PROMPT, controls=[SmoothedEnergyGuidance(sigma=sigma)], **settings)
        assert close(result.images, hand.x, 1e-6)
        assert (pipe(PROMPT, **settings).images - hand.x).abs().max() > 1e-4 * hand.x.std()
        assert result.manifest["cost"]["unet_rows"] == 2 * (3 if guidance > 1 else 2)
        assert result.manifest["cost"]["unet_passes"] == 2


@pytest.mark.parametrize("sigma", [None, 0.5, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("hw", [(8, 8), (5, 7), (3, 4), (2, 1)])
def test_blurring_queries_is_blurring_logits(hw: tuple[int, int], sigma: float | None) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, hw[0] * hw[1], 6, generator=generator) for _ in range(2))
    expected = smoothing(hw, sigma).float() @ (q @ k.transpose(2, 3))
    torch.testing.assert_close(blurred(q, hw, sigma) @ k.transpose(2, 3), expected, atol=1e-5, rtol=1e-5)
    assert blurred(q.half(), hw, sigma).dtype == torch.float16


def test_narrow_is_absence_and_wide_is_the_mean(pipe: Pipeline) -> None:
    """Without a blur both rows are the same; an endless one is where widening leads."""
    plain = pipe(PROMPT, **DRAW).images
    sharp = pipe(PROMPT, controls=[SmoothedEnergyGuidance(sigma=0.05)], **DRAW).images
    assert (sharp - plain).abs().max() < 1e-3 * plain.std()
    endless = blurred(torch.arange(64.0).reshape(1, 1, 64, 1), (8, 8), None)
    assert torch.all(endless == 31.5)


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[SmoothedEnergyGuidance(**settings)], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[SmoothedEnergyGuidance(1e-4, "up")], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


def test_beside_perturbed_attention_each_has_its_row(pipe: Pipeline) -> None:
    first, second = SmoothedEnergyGuidance(layers="up", sigma=1.0), PerturbedAttentionGuidance()
    both, other = (pipe(PROMPT, controls=pair, **DRAW) for pair in ([first, second], [second, first]))
    assert both.manifest["cost"]["unet_rows"] == 2 * 4
    torch.testing.assert_close(both.images, other.images, atol=1e-4, rtol=1e-4)


def test_no_trace_and_two_of_them_name_each_other(pipe: Pipeline) -> None:
    before = traces(pipe)
    pipe(PROMPT, controls=[SmoothedEnergyGuidance(sigma=1.0)], **DRAW)
    assert traces(pipe) == before
    with pytest.raises(ConflictError, match="SmoothedEnergyGuidance 1 and SmoothedEnergyGuidance 2"):
        pipe(PROMPT, controls=[SmoothedEnergyGuidance(), SmoothedEnergyGuidance(layers="up")], **DRAW)


def test_a_layer_that_is_not_there_is_named(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="is named 'middle'"):
        pipe(PROMPT, controls=[SmoothedEnergyGuidance(layers="middle")], **DRAW)


@pytest.mark.parametrize("settings", [{"scale": -1.0}, {"sigma": 0.0}, {"sigma": float("inf")}, {"layers": []}])
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ControlRoomError, match=next(iter(settings))):
        SmoothedEnergyGuidance(**settings)
