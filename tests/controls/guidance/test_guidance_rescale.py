"""Rescaled guidance against diffusers' argument of that name (arXiv 2305.08891)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from controlroom.controls.guidance.guidance_rescale import GuidanceRescale
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close, generators
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 3, "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_diffusers(kind: str) -> None:
    source = BACKBONES[kind]()
    source.set_progress_bar_config(disable=True)
    prompts, settings = [PROMPT, "a dog on the beach"], {**SMALL, "num_inference_steps": 3, "guidance_scale": 7.5}
    pipe = Pipeline.from_diffusers(source)
    for scale in (0.7, 1.0):
        expected = source(prompts, generator=generators(5, 6), guidance_rescale=scale, **settings).images
        result = pipe(prompts, controls=[GuidanceRescale(scale)], **DRAW)
        assert close(result.images, expected)
        assert torch.equal(result.images, pipe(prompts, guidance_rescale=scale, **DRAW).images)
        plain = pipe(prompts, **DRAW)
        assert (plain.images - expected).abs().max() > 1e-2 * expected.std()
        assert result.manifest["cost"] == plain.manifest["cost"]


def test_window_equals_the_equations() -> None:
    source = tiny_sd1()
    hand = ByHand(source, 3)
    cond, nothing = hand.told(PROMPT), hand.told("")
    for i, t in enumerate(hand.scheduler.timesteps):
        c, u = hand.predict(t, cond), hand.predict(t, nothing)
        guided = u + 7.5 * (c - u)
        if i == 1:
            guided = 0.6 * guided * c.std() / guided.std() + 0.4 * guided
        hand.step(guided, t)
    control = GuidanceRescale(0.6, start=0.3, end=0.7)
    assert close(Pipeline.from_diffusers(source)(PROMPT, controls=[control], **DRAW).images, hand.x)


def test_two_windows_that_do_not_meet_hold_both(pipe: Pipeline) -> None:
    halves = [GuidanceRescale(0.7, end=0.4), GuidanceRescale(0.7, start=0.3)]
    whole = pipe(PROMPT, controls=[GuidanceRescale(0.7)], **DRAW).images
    assert torch.equal(pipe(PROMPT, controls=halves, **DRAW).images, whole)
    with pytest.raises(ConflictError, match=r"GuidanceRescale 1 and GuidanceRescale 2.*windows that do not meet"):
        pipe(PROMPT, controls=[GuidanceRescale(0.7), GuidanceRescale(0.5, start=0.3)], **DRAW)


def test_argument_and_control_are_not_both_given(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match=r"guidance_rescale=0.5 and GuidanceRescale\(0.7\) both rescale"):
        pipe(PROMPT, controls=[GuidanceRescale(0.7)], guidance_rescale=0.5, **DRAW)
    # One that is dropped is not there.
    result = pipe(PROMPT, controls=[GuidanceRescale(0.0)], guidance_rescale=0.5, **DRAW).images
    assert torch.equal(result, pipe(PROMPT, guidance_rescale=0.5, **DRAW).images)


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[GuidanceRescale(1e-4)], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


def test_no_trace(pipe: Pipeline) -> None:
    before = traces(pipe)
    pipe(PROMPT, controls=[GuidanceRescale()], **DRAW)
    assert traces(pipe) == before


def test_without_guidance_it_says_so(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="GuidanceRescale rescales classifier-free guidance, but guidance_scale"):
        pipe(PROMPT, controls=[GuidanceRescale()], **DRAW, guidance_scale=1.0)


@pytest.mark.parametrize("settings", [{"scale": -0.1}, {"scale": 1.1}, {"start": -1.0}, {"end": 2.0}])
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    assert GuidanceRescale().scale == 0.7
    with pytest.raises(ControlRoomError, match=next(iter(settings))):
        GuidanceRescale(**settings)
