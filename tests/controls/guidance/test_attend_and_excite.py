"""Attend-and-Excite against diffusers' pipeline, and what every control promises (arXiv 2301.13826)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.pipelines.deprecated.stable_diffusion_attend_and_excite import (
    pipeline_stable_diffusion_attend_and_excite as reference,
)

from controlroom.controls.guidance.attend_and_excite import AttendAndExcite, smoothed
from controlroom.core.errors import ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES, LENGTH, tiny_sd1, tiny_sd2

PROMPT = "a cat and a red frog"
DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 5, "scheduler": "ddim"}
QUICK: dict[str, Any] = {"iterations": 3, "thresholds": {}, "step_size": 5.0}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def excited(source: Any, prompt: Any, settings: dict[str, Any], seeds: list[int], size: int, **more: Any) -> Any:
    """Latents of diffusers' pipeline, and the number of its forward passes."""
    parts = {name: part for name, part in source.components.items() if name != "image_encoder"}
    pipe = reference.StableDiffusionAttendAndExcitePipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    passes = [0]
    handle = pipe.unet.register_forward_hook(lambda *_: passes.__setitem__(0, passes[0] + 1))
    try:
        latents = pipe(
            prompt,
            num_inference_steps=4,
            output_type="latent",
            attn_res=(size, size),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            **settings,
            **more,
        ).images
    finally:
        handle.remove()
    return latents, passes[0]


def losses(source: Any, monkeypatch: pytest.MonkeyPatch, *args: Any, **more: Any) -> list[float]:
    """Every loss that diffusers' pipeline computes, to choose thresholds that some reach and some do not."""
    seen: list[float] = []
    plain = reference.StableDiffusionAttendAndExcitePipeline._compute_loss

    def recorded(max_attention_per_index: Any) -> Any:
        loss = plain(max_attention_per_index)
        seen.append(float(loss))
        return loss

    monkeypatch.setattr(reference.StableDiffusionAttendAndExcitePipeline, "_compute_loss", staticmethod(recorded))
    excited(source, *args, **more)
    monkeypatch.undo()
    return seen


# Subjects; indices, settings of ours and their names in diffusers; resolution. With losses of 0.47 at the first step, a
# threshold of 0.65 is reached after some moves and one of 0.95 never, so that a refinement ends for both reasons.
CASES: dict[str, tuple[list[int], dict[str, Any], int]] = {
    "moves only": ([2, 6], {"iterations": 3, "thresholds": {}, "step_size": 20.0}, 8),
    "one subject": ([6], {"iterations": 4, "thresholds": {}, "step_size": 10.0}, 8),
    "finer layers": ([2, 5, 6], {"iterations": 2, "thresholds": {}, "step_size": 10.0}, 16),
    "threshold that holds": ([2, 6], {"iterations": 3, "thresholds": {0: 0.2, 1: 0.1}, "step_size": 5.0}, 8),
    "refined until reached": ([2, 6], {"iterations": 3, "thresholds": {0: 0.58, 2: 0.5}, "step_size": 5.0}, 8),
    "refined to the end": ([2, 6], {"iterations": 2, "thresholds": {1: 0.95}, "step_size": 2.0}, 8),
    "refined behind the last move": ([2, 6], {"iterations": 0, "thresholds": {1: 0.6, 3: 0.9}, "step_size": 3.0}, 8),
}


def theirs(settings: dict[str, Any]) -> dict[str, Any]:
    names = {"iterations": "max_iter_to_alter", "thresholds": "thresholds", "step_size": "scale_factor"}
    return {names[name]: value for name, value in settings.items()}


@pytest.mark.parametrize("make", [tiny_sd1, tiny_sd2])
@pytest.mark.parametrize("name", CASES)
def test_equals_diffusers(name: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    indices, settings, size = CASES[name]
    refined = bool(settings["thresholds"])
    # A gradient through random weights multiplies rounding at each of up to 21 moves: those are compared in float64
    # (in float32 it is 1.1e-3 after 43 moves of 20, and 1.5e-4 after 3 where v is predicted).
    source = make().to(torch.float64 if refined or make is tiny_sd2 else torch.float32)
    expected, passes = excited(source, PROMPT, {"token_indices": indices, **theirs(settings)}, [5], size)
    pipe = Pipeline.from_diffusers(source)
    result = pipe(PROMPT, controls=[AttendAndExcite(indices, resolution=size, **settings)], **DRAW)
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    plain = pipe(PROMPT, **DRAW).images
    assert (plain - expected).abs().max() > 1e-2 * expected.std()
    cost = result.manifest["cost"]
    assert cost["unet_passes"] == 4 + cost["energy_passes"] <= passes
    if name == "refined to the end":
        assert cost["energy_passes"] == 1 + 21
    if name == "refined until reached" and make is tiny_sd1:
        assert 3 < cost["energy_passes"] < 21


def test_batch_equals_diffusers_and_every_picture_alone() -> None:
    source = tiny_sd1().to(torch.float64)
    prompts, indices = ["a cat and a red frog", "a dog on the beach"], [[2, 6], [2, 5]]
    settings: dict[str, Any] = {"iterations": 3, "thresholds": {0: 0.55, 1: 0.5}, "step_size": 5.0}
    expected, _ = excited(source, prompts, {"token_indices": indices, **theirs(settings)}, [5, 6], 8)
    pipe = Pipeline.from_diffusers(source)
    together = pipe(prompts, controls=[AttendAndExcite(indices, **settings)], **DRAW)
    assert (together.images - expected).abs().max() <= 1e-4 * expected.std()
    passes = []
    for i, (prompt, listed) in enumerate(zip(prompts, indices, strict=True)):
        alone = pipe(prompt, controls=[AttendAndExcite(listed, **settings)], **{**DRAW, "seed": 5 + i})
        assert (together.images[i] - alone.images[0]).abs().max() < 1e-6
        passes.append(alone.manifest["cost"]["energy_passes"])
    # Each is refined for as long as it needs, and they share the passes.
    assert passes[0] != passes[1]
    assert max(passes) <= together.manifest["cost"]["energy_passes"] < sum(passes)


def test_words_are_their_positions(pipe: Pipeline) -> None:
    by_index = pipe(PROMPT, controls=[AttendAndExcite([2, 6], **QUICK)], **DRAW).images
    by_word = pipe(PROMPT, controls=[AttendAndExcite(words=["Cat", "frog"], **QUICK)], **DRAW).images
    assert torch.equal(by_index, by_word)
    listed = pipe(PROMPT, controls=[AttendAndExcite(words=[["cat", "frog"]], **QUICK)], **DRAW).images
    assert torch.equal(by_index, listed)


def test_a_word_of_several_tokens_is_one_subject(pipe: Pipeline) -> None:
    control = AttendAndExcite(words=["zebra", "red frog"], **QUICK)
    seen: list[Any] = []
    plain = AttendAndExcite.prepare

    def prepare(self: AttendAndExcite, run: Any) -> Any:
        seen.append(plain(self, run))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttendAndExcite, "prepare", prepare)
        result = pipe("a zebra and a red frog", controls=[control], **DRAW)
    assert seen[0].subjects == (((2, 3, 4, 5, 6), (9, 10)),)
    assert torch.isfinite(result.images).all()


def test_raises_the_attention_to_the_neglected(pipe: Pipeline) -> None:
    measured: list[float] = []
    plain = AttendAndExcite.energy

    def energy(self: AttendAndExcite, step: Any, round: int) -> Any:
        answer = plain(self, step, round)
        if step.i == 0 and answer.loss is not None:
            measured.append(float(answer.loss.detach()) / self.step_size)
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AttendAndExcite, "energy", energy)
        control = AttendAndExcite([2, 6], iterations=1, thresholds={0: 0.95}, step_size=2.0)
        pipe(PROMPT, controls=[control], **DRAW)
    assert len(measured) == 21
    assert measured[-1] < 0.8 * measured[0]


@pytest.mark.parametrize("scheduler", ["euler", "euler_a", "heun", "lms", "unipc"])
def test_a_move_is_as_long_for_every_solver(pipe: Pipeline, scheduler: str) -> None:
    """In the network's input, whatever the solver keeps: DPM++ keeps what the network gets, Euler 14 times as much."""

    def move(name: str) -> torch.Tensor:
        found: list[torch.Tensor] = []
        plain = AttendAndExcite.energy

        def energy(self: AttendAndExcite, step: Any, round: int) -> Any:
            answer = plain(self, step, round)
            assert answer.loss is not None
            if step.i == 0:
                (gradient,) = torch.autograd.grad(answer.loss.sum(), step.latents["image"], retain_graph=True)
                found.append(step.scaled(gradient))
            return answer

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AttendAndExcite, "energy", energy)
            control = AttendAndExcite([2, 6], iterations=1, thresholds={}, step_size=1.0)
            settings = {**DRAW, "scheduler": name, "num_inference_steps": 50}
            pipe(PROMPT, controls=[control], **settings, callback_on_step_end=lambda p, i, t, d: (p.cancel(), {})[1])
        return found[0]

    # All of these start at t = 999 from the same noise.
    ours, base = move(scheduler), move("dpmpp_2m")
    assert base.norm() > 0.01
    assert (ours - base).norm() < 0.05 * base.norm()


@pytest.mark.parametrize(
    "settings", [{"step_size": 0.0}, {"iterations": 0, "thresholds": {}}, {"iterations": 0, "thresholds": {9: 0.5}}]
)
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[AttendAndExcite([2], **settings)], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert list(result.manifest["dropped"]) == ["AttendAndExcite"]


def test_small_steps_are_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[AttendAndExcite([2, 6], step_size=1e-4, thresholds={})], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_every_size_and_no_trace(backbone: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[backbone]())
    before = pipe("a cat", **DRAW).images
    processors = {name: id(part) for name, part in pipe.unet.attn_processors.items()}
    for more in ({}, {"height": 24, "width": 40}, {"guidance_scale": 1.0}):
        result = pipe(["a cat", "a red frog"], controls=[AttendAndExcite(words=[["cat"], ["frog"]])], **DRAW, **more)
        assert torch.isfinite(result.images).all()
    assert processors == {name: id(part) for name, part in pipe.unet.attn_processors.items()}
    assert all(parameter.requires_grad and parameter.grad is None for parameter in pipe.unet.parameters())
    assert torch.equal(before, pipe("a cat", **DRAW).images)


def test_explain_counts_the_passes(pipe: Pipeline) -> None:
    control = AttendAndExcite([2, 6], iterations=2, thresholds={}, step_size=5.0)
    spec = RunSpec(prompt=PROMPT, controls=[control], **DRAW)
    explanation = pipe.explain(spec)
    assert explanation.energy_passes == (1, 1, 0, 0)
    cost = pipe.run(spec).manifest["cost"]
    assert cost == {"unet_rows": 4 * 2 + 2, "unet_passes": 6, "energy_passes": 2, "side_rows": 0, "side_passes": 0}


def test_beside_an_edit_by_words(pipe: Pipeline) -> None:
    from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt

    edit, subjects = PromptToPrompt("a dog and a red frog"), AttendAndExcite([2, 6], **QUICK)
    first = pipe(PROMPT, controls=[edit, subjects], **DRAW)
    second = pipe(PROMPT, controls=[subjects, edit], **DRAW)
    assert torch.isfinite(first.images).all()
    assert (first.images - second.images).abs().max() < 1e-4 * first.images.std()
    off = pipe(PROMPT, controls=[edit, AttendAndExcite([2, 6], step_size=0.0)], **DRAW).images
    assert torch.equal(off, pipe(PROMPT, controls=[edit], **DRAW).images)


def test_settings_survive_a_file() -> None:
    control = AttendAndExcite(words=[["cat"], ["a frog"]], thresholds={0: 0.1, 7: 0.5}, resolution=8)
    assert AttendAndExcite.model_validate_json(control.model_dump_json()) == control
    assert AttendAndExcite([2]).thresholds == {0: 0.05, 10: 0.5, 20: 0.8}


def test_the_smoothing_is_the_published_one() -> None:
    maps = torch.rand(3, 5, 7)
    expected = reference.GaussianSmoothing()(torch.nn.functional.pad(maps[:, None], (1, 1, 1, 1), mode="reflect"))
    torch.testing.assert_close(smoothed(maps), expected[:, 0])


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        (PROMPT, {"words": ["cat", "zebra"]}, "'zebra' is not in the prompt 'a cat and a red frog'"),
        (PROMPT, {"words": ["kat"]}, "Did you mean 'cat'"),
        (PROMPT, {"indices": [0]}, "between 1 and 14"),
        (PROMPT, {"indices": [2, LENGTH]}, "got 16"),
        (PROMPT, {"indices": [2], "resolution": 5}, "resolution 5; there are 16, 8"),
        (PROMPT, {"indices": [[2], [3]]}, "2 lists of subjects for 1"),
        ("", {"words": ["cat"]}, "as text"),
    ],
)
def test_what_does_not_fit_is_an_input_error(
    pipe: Pipeline, prompt: str, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipe(prompt, controls=[AttendAndExcite(**settings)], **DRAW)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"indices": [2], "words": ["cat"]},
        {"indices": []},
        {"indices": [[]]},
        {"words": [""]},
        {"indices": [2], "thresholds": {0: 1.5}},
        {"indices": [2], "thresholds": {-1: 0.5}},
        {"indices": [2], "step_size": float("inf")},
        {"indices": [2], "step_size": -1.0},
        {"indices": [2], "iterations": -1},
        {"indices": "cat"},
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any]) -> None:
    with pytest.raises(ControlRoomError):
        AttendAndExcite(**settings)
