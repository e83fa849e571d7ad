"""Guidance in an interval against a loop written out, and what it leaves out (arXiv 2404.07724)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from controlroom.controls.guidance.guidance_interval import GuidanceInterval
from controlroom.controls.guidance.perp_neg import PerpNeg
from controlroom.controls.guidance.semantic_guidance import SemanticEdit, SemanticGuidance
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 4, "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


@pytest.mark.parametrize(
    ("kind", "start", "end", "guided"),
    [
        *((kind, 0.25, 0.75, (1, 2)) for kind in BACKBONES),
        ("sd1", 0.0, 0.5, (0, 1)),
        ("sd1", 0.4, 1.0, (2, 3)),
        ("sd1", 0.1, 0.6, (1,)),
    ],
)
def test_equals_a_loop_by_hand(kind: str, start: float, end: float, guided: tuple[int, ...]) -> None:
    source = BACKBONES[kind]()
    hand = ByHand(source, 4)
    cond, nothing = hand.told(PROMPT), hand.told("", nothing=True)
    for i, t in enumerate(hand.scheduler.timesteps):
        c = hand.predict(t, cond)
        u = hand.predict(t, nothing) if i in guided else c
        hand.step(u + 7.5 * (c - u), t)
    pipe = Pipeline.from_diffusers(source)
    spec = RunSpec(prompt=PROMPT, controls=[GuidanceInterval(start, end)], **DRAW)
    result, found = pipe.run(spec), pipe.explain(spec)
    assert close(result.images, hand.x)
    for other in (DRAW, {**DRAW, "guidance_scale": 1.0}):
        assert (pipe(PROMPT, **other).images - hand.x).abs().max() > 3e-4 * hand.x.std()
    # Where there is no guidance, only the prompt is run.
    assert found.rows == tuple(2 if i in guided else 1 for i in range(4))
    assert result.manifest["cost"]["unet_rows"] == sum(found.rows)
    assert result.manifest["cost"]["unet_passes"] == 4
    assert f"guided in steps {guided[0]} to {guided[-1]} of 4" in str(found)


def test_the_whole_run_is_absence_bit_for_bit_and_free(pipe: Pipeline) -> None:
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[GuidanceInterval()], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert list(result.manifest["dropped"]) == ["GuidanceInterval"]


def test_other_guidance_rests_too(pipe: Pipeline) -> None:
    """Negative prompts are not run outside the interval, whatever their own window."""
    result = pipe(PROMPT, controls=[GuidanceInterval(0.25, 0.75), PerpNeg("night")], **DRAW)
    windowed = pipe(PROMPT, controls=[PerpNeg("night", start=0.25, end=0.75), GuidanceInterval(0.25, 0.75)], **DRAW)
    assert torch.equal(result.images, windowed.images)
    assert result.manifest["cost"]["unet_rows"] == 1 + 3 + 3 + 1


def test_an_addition_goes_on(pipe: Pipeline) -> None:
    """Concepts are added outside the interval too, where they keep the row that they are compared with."""
    source = tiny_sd1()
    hand = ByHand(source, 4)
    cond, nothing, night = hand.told(PROMPT), hand.told(""), hand.told("night")
    for i, t in enumerate(hand.scheduler.timesteps):
        c, u = hand.predict(t, cond), hand.predict(t, nothing)
        base = u + 7.5 * (c - u) if i in (1, 2) else c
        # All of its values are kept.
        hand.step(base + (5.0 * (hand.predict(t, night) - u) if i < 3 else 0.0), t)
    edit = SemanticGuidance([SemanticEdit("night", warmup=0, cooldown=3, threshold=0.0)], momentum_scale=0.0)
    result = pipe(PROMPT, controls=[edit, GuidanceInterval(0.25, 0.75)], **DRAW)
    assert close(result.images, hand.x)
    assert result.manifest["cost"]["unet_rows"] == 3 + 3 + 3 + 1


def test_two_intervals_name_each_other(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="GuidanceInterval 1 and GuidanceInterval 2"):
        pipe(PROMPT, controls=[GuidanceInterval(0.5), GuidanceInterval(0.25)], **DRAW)
    # One for the beginning and one for the end do not meet.
    both = pipe(PROMPT, controls=[GuidanceInterval(0.25), GuidanceInterval(0.0, 0.75)], **DRAW).images
    assert torch.equal(both, pipe(PROMPT, controls=[GuidanceInterval(0.25, 0.75)], **DRAW).images)


def test_no_trace(pipe: Pipeline) -> None:
    before = traces(pipe)
    pipe(PROMPT, controls=[GuidanceInterval(0.25, 0.75)], **DRAW)
    assert traces(pipe) == before


def test_an_interval_without_a_step_says_so(pipe: Pipeline) -> None:
    for start, end in ((0.3, 0.4), (0.6, 0.4), (1.0, 1.0)):
        with pytest.raises(InputError, match=f"no step of 4 lies between the shares {start} and {end}"):
            pipe(PROMPT, controls=[GuidanceInterval(start, end)], **DRAW)


def test_without_guidance_it_says_so(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="GuidanceInterval limits classifier-free guidance, but guidance_scale"):
        pipe(PROMPT, controls=[GuidanceInterval(0.5)], **DRAW, guidance_scale=1.0)


@pytest.mark.parametrize("settings", [{"guidance_start": -0.1}, {"guidance_end": 1.1}, {"start": 0.5}])
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ControlRoomError, match=next(iter(settings))):
        GuidanceInterval(**settings)
