"""Perp-Neg against its equations, written out (arXiv 2304.04968)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from controlroom.controls.guidance.perp_neg import PerpNeg, perpendicular
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 3, "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def written_out(source: Any, negatives: dict[str, float], negative_prompt: str = "") -> torch.Tensor:
    """Three steps of u + s·(e − Σ wᵢ·(eᵢ − ⟨eᵢ, e⟩/⟨e, e⟩·e)), a row and a number at a time."""
    hand = ByHand(source, 3)
    cond = hand.told(PROMPT)
    nothing = hand.told(negative_prompt) if negative_prompt else hand.told("", nothing=True)
    told = [(hand.told(text), weight) for text, weight in negatives.items()]
    for t in hand.scheduler.timesteps:
        u = hand.predict(t, nothing)
        e = hand.predict(t, cond) - u
        total = e.clone()
        for condition, weight in told:
            away = hand.predict(t, condition) - u
            along = sum(float(a) * float(b) for a, b in zip(away.flatten(), e.flatten(), strict=True))
            length = sum(float(b) ** 2 for b in e.flatten())
            total -= weight * (away - along / length * e)
        hand.step(u + 7.5 * total, t)
    return hand.x


@pytest.mark.parametrize(
    ("kind", "negatives"),
    [
        *((kind, {"a blue hat": 1.0, "night": 0.4}) for kind in BACKBONES),
        ("sd1", {"night": 2.0}),
        ("sd1", {"a blue hat": 0.5, "night": 0.0, "a dog": 1.5}),
    ],
)
def test_equals_the_equations(kind: str, negatives: dict[str, float]) -> None:
    source = BACKBONES[kind]()
    expected = written_out(source, negatives)
    pipe = Pipeline.from_diffusers(source)
    spec = RunSpec(prompt=PROMPT, controls=[PerpNeg(list(negatives), list(negatives.values()))], **DRAW)
    result = pipe.run(spec)
    assert close(result.images, expected)
    assert (pipe(PROMPT, **DRAW).images - expected).abs().max() > 1e-2 * expected.std()
    # A negative of weight 0 is not run.
    rows = 2 + sum(weight > 0 for weight in negatives.values())
    assert pipe.explain(spec).rows == (rows,) * 3
    cost = result.manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (3 * rows, 3)


def test_what_there_is_nothing_of_can_be_told(pipe: Pipeline) -> None:
    source = tiny_sd1()
    expected = written_out(source, {"night": 1.0}, negative_prompt="a dog")
    result = pipe(PROMPT, negative_prompt="a dog", controls=[PerpNeg("night")], **DRAW)
    assert close(result.images, expected)


def test_every_picture_of_a_batch_as_alone(pipe: Pipeline) -> None:
    prompts, control = ["a cat and a red frog", "a dog on the beach"], PerpNeg(["night", "a hat"], 0.7)
    together = pipe(prompts, controls=[control], **DRAW).images
    for i, prompt in enumerate(prompts):
        alone = pipe(prompt, controls=[control], **{**DRAW, "seed": 5 + i}).images
        assert close(together[i : i + 1], alone)


def test_the_rest_is_perpendicular() -> None:
    generator = torch.Generator().manual_seed(0)
    x, to = (torch.randn(3, 4, 5, 6, generator=generator) for _ in range(2))
    rest = perpendicular(x, to)
    assert ((rest * to).sum((1, 2, 3)).abs() < 1e-4).all()
    assert torch.equal(perpendicular(x, torch.zeros_like(to)), x)
    assert perpendicular(to, to).abs().max() < 1e-6
    assert perpendicular(x.half(), to.half()).dtype == torch.float16


def test_a_negative_that_is_the_prompt_takes_nothing(pipe: Pipeline) -> None:
    """All of it lies along the prompt."""
    plain = pipe(PROMPT, **DRAW).images
    assert close(pipe(PROMPT, controls=[PerpNeg(PROMPT)], **DRAW).images, plain)


def test_outside_the_window_there_is_classifier_free_guidance(pipe: Pipeline) -> None:
    result = pipe(PROMPT, controls=[PerpNeg("night", start=0.6)], **DRAW)
    seen: list[list[Any]] = [[], []]
    for number, controls in enumerate(([PerpNeg("night", start=0.6)], [])):
        pipe(
            PROMPT,
            controls=controls,
            callback_on_step_end=lambda p, i, t, x, number=number: seen[number].append(x["latents"]) or x,
            **DRAW,
        )
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [True, True, False]
    assert result.manifest["cost"]["unet_rows"] == 2 + 2 + 3


def test_other_controls_treat_a_negative_as_nothing(pipe: Pipeline) -> None:
    """The rows without the prompt do not see an image prompt; a negative that did would push it away."""
    features = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(3))
    image = IPAdapter(tiny_ip_adapter(pipe.unet), embeds=features, image_encoder=tiny_image_encoder())
    # A negative of the same words as the branch without the prompt has no direction.
    expected = pipe(PROMPT, negative_prompt="night", controls=[image], **DRAW).images
    result = pipe(PROMPT, negative_prompt="night", controls=[image, PerpNeg("night")], **DRAW).images
    assert close(result, expected)
    assert not close(pipe(PROMPT, negative_prompt="night", **DRAW).images, expected, 1e-2)


@pytest.mark.parametrize(
    "settings", [{"scale": 0.0}, {"scale": [0.0, 0.0]}, {"start": 0.9, "end": 0.95}, {"start": 1.0}]
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[PerpNeg(["night", "a hat"], **settings)], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[PerpNeg("night", 1e-4)], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


def test_no_trace_and_two_of_them_name_each_other(pipe: Pipeline) -> None:
    before = traces(pipe)
    pipe(PROMPT, controls=[PerpNeg("night")], **DRAW)
    assert traces(pipe) == before
    with pytest.raises(ConflictError, match="PerpNeg 1 and PerpNeg 2"):
        pipe(PROMPT, controls=[PerpNeg("night"), PerpNeg("a hat")], **DRAW)


def test_without_guidance_it_says_so(pipe: Pipeline) -> None:
    with pytest.raises(InputError, match="PerpNeg is a kind of guidance, but guidance_scale is at most 1"):
        pipe(PROMPT, controls=[PerpNeg("night")], **DRAW, guidance_scale=1.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "negatives"),
        ({"negatives": ""}, "empty"),
        ({"negatives": []}, "empty"),
        ({"negatives": ["night", " "]}, "empty"),
        ({"negatives": ["night", "hat"], "scale": [1.0]}, "1 weights in scale for 2 negatives"),
        ({"negatives": "night", "scale": -1.0}, "at least 0"),
        ({"negatives": "night", "scale": [float("nan")]}, "scale"),
        ({"negatives": 7}, "negatives"),
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlRoomError, match=message):
        PerpNeg(**settings)
