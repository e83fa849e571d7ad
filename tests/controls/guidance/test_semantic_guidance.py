"""SEGA against diffusers' pipeline, and what every control promises (arXiv 2301.12247)."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from controlroom.controls.guidance.semantic_guidance import SemanticEdit, SemanticGuidance
from controlroom.core.control import Control, Declaration
from controlroom.core.errors import ConflictError, ControlRoomError
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close, semantic
from tests.tiny import BACKBONES, tiny_sd1, tiny_sd2
from tests.traces import traces

STEPS = 5
DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": STEPS, "seed": 5, "scheduler": "ddim"}
HAT, DOG = {"prompt": "a blue hat", "warmup": 1}, {"prompt": "a dog", "reverse": True, "warmup": 2, "threshold": 0.5}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def theirs(edits: list[dict[str, Any]]) -> dict[str, Any]:
    """Edits as the arguments of diffusers' pipeline."""
    whole = [SemanticEdit(**edit) for edit in edits]
    return {
        "editing_prompt": [edit.prompt for edit in whole],
        "reverse_editing_direction": [edit.reverse for edit in whole],
        "edit_guidance_scale": [edit.scale for edit in whole],
        "edit_warmup_steps": [edit.warmup for edit in whole],
        # There None in a list is compared with a number; the default is "never".
        "edit_cooldown_steps": [99 if edit.cooldown is None else edit.cooldown for edit in whole],
        "edit_threshold": [edit.threshold for edit in whole],
        "edit_weights": [edit.weight for edit in whole],
    }


# Edits, settings of the control and of diffusers' pipeline, rows of each step.
CASES: dict[str, tuple[list[dict[str, Any]], dict[str, float], tuple[int, ...]]] = {
    "one": ([HAT], {}, (3, 3, 3, 3, 3)),
    "removed": ([{**HAT, "reverse": True, "warmup": 0}], {}, (3, 3, 3, 3, 3)),
    "several": ([HAT, DOG, {"prompt": "night", "warmup": 1, "scale": 3.0, "weight": 0.5}], {}, (5, 5, 5, 5, 5)),
    "strong momentum": ([HAT, DOG], {"momentum_scale": 0.8, "momentum_beta": 0.7}, (4, 4, 4, 4, 4)),
    "no momentum": ([HAT, DOG], {"momentum_scale": 0.0}, (2, 3, 4, 4, 4)),
    "cooled down": ([{**HAT, "cooldown": 3}, DOG], {}, (4, 4, 4, 3, 3)),
    "all cooled down": ([{**HAT, "cooldown": 3}, {**DOG, "cooldown": 4}], {}, (4, 4, 4, 3, 2)),
    "never all warm": ([HAT, DOG, {"prompt": "night", "warmup": 9}], {}, (2, 3, 4, 4, 4)),
    "weights while warming": (
        [{**HAT, "weight": 2.0}, {"prompt": "night", "warmup": 1, "weight": 0.5}, {**DOG, "warmup": 4}],
        {},
        (5, 5, 5, 5, 5),
    ),
    "all values": ([{**HAT, "threshold": 0.0}], {}, (3, 3, 3, 3, 3)),
    "largest value": ([{**HAT, "threshold": 1.0}], {}, (3, 3, 3, 3, 3)),
}


@pytest.mark.parametrize(
    ("name", "make"), [*((name, tiny_sd1) for name in CASES), ("several", tiny_sd2), ("cooled down", tiny_sd2)]
)
def test_equals_diffusers(name: str, make: Any) -> None:
    edits, momentum, rows = CASES[name]
    source = make()
    names = {"momentum_scale": "edit_momentum_scale", "momentum_beta": "edit_mom_beta"}
    settings = {names[key]: value for key, value in momentum.items()}
    expected = semantic(source, PROMPT, 5, num_inference_steps=STEPS, **theirs(edits), **settings)
    pipe = Pipeline.from_diffusers(source)
    control = SemanticGuidance([SemanticEdit(**edit) for edit in edits], **momentum)
    spec = RunSpec(prompt=PROMPT, controls=[control], **DRAW)
    result = pipe.run(spec)
    assert close(result.images, expected)
    assert (pipe(PROMPT, **DRAW).images - expected).abs().max() > 5e-3 * expected.std()
    # One pass a step; a concept that is not looked at is not run.
    assert pipe.explain(spec).rows == rows
    cost = result.manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (sum(rows), STEPS)


def test_batch_equals_diffusers_and_every_picture_alone(pipe: Pipeline) -> None:
    prompts = ["a cat and a red frog", "a dog on the beach"]
    edits = [HAT, {**DOG, "threshold": 0.9}]
    control = SemanticGuidance([SemanticEdit(**edit) for edit in edits], momentum_scale=0.5)
    together = pipe(prompts, controls=[control], negative_prompt=["night", "a hat"], **DRAW).images
    more = {"negative_prompt": ["night", "a hat"], "edit_momentum_scale": 0.5, "guidance_scale": 7.5}
    expected = semantic(tiny_sd1(), prompts, 5, 6, num_inference_steps=STEPS, **theirs(edits), **more)
    assert close(together, expected)
    for i, (prompt, negative) in enumerate(zip(prompts, ("night", "a hat"), strict=True)):
        alone = pipe(prompt, controls=[control], negative_prompt=negative, **{**DRAW, "seed": 5 + i}).images
        assert close(together[i : i + 1], alone)


def test_default_settings_equal_diffusers() -> None:
    """With as many steps as it takes to warm up and a few more."""
    source = tiny_sd1()
    expected = semantic(source, PROMPT, 5, num_inference_steps=13, editing_prompt=["a blue hat", "night"])
    control = SemanticGuidance(edits=[SemanticEdit("a blue hat"), SemanticEdit("night")])
    result = Pipeline.from_diffusers(source)(PROMPT, controls=[control], **{**DRAW, "num_inference_steps": 13})
    assert close(result.images, expected)


def kept(x: torch.Tensor, share: float) -> torch.Tensor:
    """x with only the values of each channel that are at least as large as a share of them, written out."""
    result = torch.zeros_like(x)
    for c in range(x.shape[1]):
        sizes = sorted(abs(float(value)) for value in x[0, c].flatten())
        place = share * (len(sizes) - 1)
        low, part = int(place), place - int(place)
        least = sizes[low] + part * (sizes[min(low + 1, len(sizes) - 1)] - sizes[low])
        for index, value in enumerate(x[0, c].flatten()):
            if abs(float(value)) >= least:
                result[0, c].view(-1)[index] = value
    return result


@pytest.mark.parametrize("guidance", [7.5, 1.0])
@pytest.mark.parametrize("kind", BACKBONES)
def test_equals_the_equations(kind: str, guidance: float) -> None:
    """Every backbone, with classifier-free guidance and without, in float64: two concepts, three steps, momentum."""
    source = BACKBONES[kind]().to(torch.float64)
    hand = ByHand(source, 3)
    cond, nothing = hand.told(PROMPT), hand.told("", nothing=True)
    hat, dog = hand.told("a blue hat"), hand.told("a dog")
    momentum = torch.zeros_like(hand.x)
    for i, t in enumerate(hand.scheduler.timesteps):
        u, c = hand.predict(t, nothing), hand.predict(t, cond)
        first = kept(5.0 * (hand.predict(t, hat) - u), 0.9)
        second = kept(-4.0 * (hand.predict(t, dog) - u), 0.6)
        both = 1.0 * first + 0.5 * second + 0.3 * momentum
        momentum = 0.4 * momentum + 0.6 * both
        # The first concept has warmed up at once, the second after one step.
        hand.step(u + guidance * (c - u) + (first if i == 0 else both), t)
    edits = [
        SemanticEdit("a blue hat", warmup=0),
        SemanticEdit("a dog", reverse=True, scale=4.0, warmup=1, threshold=0.6, weight=0.5),
    ]
    pipe = Pipeline.from_diffusers(source)
    settings = {**DRAW, "num_inference_steps": 3, "guidance_scale": guidance}
    # The noise is drawn in float64 there, and is handed over.
    result = pipe(
        PROMPT, controls=[SemanticGuidance(edits, momentum_scale=0.3)], latents=ByHand(source, 3).x, **settings
    )
    assert close(result.images, hand.x, 1e-6)
    assert result.manifest["cost"]["unet_rows"] == 12


def test_nothing_is_added_while_those_that_warmed_up_have_cooled_down(pipe: Pipeline) -> None:
    """The published code divides by their weights, which are 0."""
    first = {"prompt": "a blue hat", "warmup": 0, "cooldown": 1}
    edits = [SemanticEdit(**first), SemanticEdit("night", warmup=4)]
    settings = {**DRAW, "guidance_scale": 5.0}
    seen: list[Any] = []

    def look(p: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"])
        return tensors

    pipe(PROMPT, controls=[SemanticGuidance(edits)], callback_on_step_end=look, **settings)
    assert all(torch.isfinite(latents).all() for latents in seen)
    # Steps 1 to 3 are the plain ones, from where step 0 led.
    alone: list[Any] = []

    def follow(p: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        alone.append(tensors["latents"])
        return {"latents": seen[0]} if i == 0 else tensors

    pipe(PROMPT, callback_on_step_end=follow, **settings)
    for i in (1, 2, 3):
        assert close(alone[i], seen[i])
    assert not close(alone[0], seen[0], 1e-3) and not close(alone[4], seen[4])


@pytest.mark.parametrize("absent", [{"scale": 0.0}, {"weight": 0.0}])
def test_a_concept_of_nothing_is_absent_bit_for_bit_and_free(pipe: Pipeline, absent: dict[str, float]) -> None:
    one = pipe(PROMPT, controls=[SemanticGuidance([SemanticEdit(**HAT)])], **DRAW)
    edits = [SemanticEdit(**HAT), SemanticEdit("night", warmup=3, **absent)]
    both = pipe(PROMPT, controls=[SemanticGuidance(edits)], **DRAW)
    assert torch.equal(one.images, both.images)
    assert one.manifest["cost"] == both.manifest["cost"]


@pytest.mark.parametrize(
    "edits",
    [[], [{**HAT, "scale": 0.0}], [{**HAT, "weight": 0.0}, {**DOG, "scale": 0.0}], [{**HAT, "warmup": STEPS}]],
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, edits: list[dict[str, Any]]) -> None:
    plain = pipe(PROMPT, **DRAW)
    result = pipe(PROMPT, controls=[SemanticGuidance([SemanticEdit(**edit) for edit in edits])], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert list(result.manifest["dropped"]) == ["SemanticGuidance"]


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[SemanticGuidance([SemanticEdit("night", scale=1e-4, warmup=0)])], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


def test_more_of_a_concept_is_further_away(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    moved = [
        float((pipe(PROMPT, controls=[SemanticGuidance([SemanticEdit("night", scale=s, warmup=0)])], **DRAW).images
               - plain).norm())
        for s in (1.0, 3.0, 9.0)
    ]  # fmt: skip
    assert moved[0] < moved[1] < moved[2]


class Again(Control):
    """Runs the second step twice from where it started."""

    type: Literal["again"] = Field(default="again", kw_only=True)

    def declare(self, outline: Any) -> Declaration:
        return Declaration(repeats=True)

    def prepare(self, run: Any) -> dict[str, Any]:
        return {}

    def before(self, step: Step) -> None:
        step.memory(self)["from"] = step.latents["image"]

    def finish(self, step: Step) -> bool:
        again = step.i == 1 and "done" not in step.memory(self)
        if again:
            step.memory(self)["done"] = True
            step.latents["image"] = step.memory(self)["from"]
        return again


def test_a_step_that_is_run_again_builds_up_no_more_momentum(pipe: Pipeline) -> None:
    control = SemanticGuidance([SemanticEdit("night", warmup=0)], momentum_scale=0.8)
    once, twice = (pipe(PROMPT, controls=[control, *more], **DRAW).images for more in ([], [Again()]))
    assert torch.equal(once, twice)


def test_no_trace_and_two_runs_do_not_meet(pipe: Pipeline) -> None:
    control = SemanticGuidance([SemanticEdit(**HAT), SemanticEdit(**DOG)])
    first, before = pipe(PROMPT, controls=[control], **DRAW).images, traces(pipe)
    assert torch.equal(pipe(PROMPT, controls=[control], **DRAW).images, first)
    assert traces(pipe) == before


def test_two_of_them_name_each_other(pipe: Pipeline) -> None:
    controls = [SemanticGuidance([SemanticEdit(**HAT)]), SemanticGuidance([SemanticEdit(**DOG)])]
    with pytest.raises(ConflictError, match="SemanticGuidance 1 and SemanticGuidance 2"):
        pipe(PROMPT, controls=controls, **DRAW)


def test_settings_survive_a_file() -> None:
    control = SemanticGuidance([SemanticEdit("smiling", True, 3.0, 5, 20, 0.95, 0.5)], 0.2, 0.3)
    assert SemanticGuidance.model_validate_json(control.model_dump_json()) == control
    assert SemanticGuidance(edits=[{"prompt": "smiling"}]).edits == [SemanticEdit("smiling")]  # type: ignore[list-item]
    edit = SemanticEdit("smiling")
    assert (edit.reverse, edit.scale, edit.warmup, edit.cooldown, edit.threshold, edit.weight) == (
        False,
        5.0,
        10,
        None,
        0.9,
        1.0,
    )
    whole = SemanticGuidance([])
    assert (whole.momentum_scale, whole.momentum_beta) == (0.1, 0.4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "prompt"),
        ({"prompt": " "}, "names no concept"),
        ({"prompt": "x", "warmup": -1}, "warmup"),
        ({"prompt": "x", "warmup": 5, "cooldown": 5}, "cooldown 5 is not behind warmup 5"),
        ({"prompt": "x", "threshold": 1.5}, "threshold"),
        ({"prompt": "x", "weight": -1.0}, "weight"),
        ({"prompt": "x", "scale": float("nan")}, "scale"),
        ({"prompt": "x", "strenght": 1.0}, "strenght"),
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlRoomError, match=message):
        SemanticEdit(**settings)
    with pytest.raises(ControlRoomError, match=message):
        SemanticGuidance([settings])  # type: ignore[list-item]
    with pytest.raises(ControlRoomError, match=message):
        RunSpec.from_data({"controls": [{"type": "semantic_guidance", "edits": [settings]}]})


@pytest.mark.parametrize("settings", [{"edits": "smiling"}, {"momentum_beta": 1.5}, {"momentum_scale": -1.0}, {"x": 1}])
def test_ill_settings_of_the_whole_are_input_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ControlRoomError, match=next(iter(settings))):
        SemanticGuidance(**{"edits": [], **settings})
