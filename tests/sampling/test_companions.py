"""States that are drawn along with the picture: where they start, what is checked, what is left of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.core.attention import AttentionCall
from controlroom.core.branch import Branch, State
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.errors import ConflictError, InputError
from controlroom.core.run import Run
from controlroom.core.sites import Site, nearest_size
from controlroom.sampling.pipeline import Pipeline, replay
from tests.tiny import tiny_sd1

DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 5}


class Companion(Control):
    """A second picture on the same noise, whose features the first one reads."""

    type: Literal["companion"] = Field(default="companion", kw_only=True)
    hw: tuple[int, int] | None = None

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(
            states=(State("companion", noise_from="image", hw=self.hw),),
            branches=(Branch("companion/cond", "companion", "cond", read_by=("cond",)),),
            attention=outline.sites("self"),
            notes=("chose by itself",),
        )

    def prepare(self, run: Run) -> None:
        run.set_condition("companion/cond", run.encode_text("a dog"))

    def attention(self, call: AttentionCall) -> None:
        if "companion/cond" in call:
            call.route("cond", k="companion/cond")


class Start(Control):
    """Starts from given latents, as image to image does."""

    type: Literal["start"] = Field(default="start", kw_only=True)

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(strength=0.5)

    def prepare(self, run: Run) -> None:
        run.set_initial("image", torch.full(run.latent_shape(), 0.5))


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def test_final_latents_and_notes_are_in_the_result(pipe: Pipeline) -> None:
    result = pipe("a cat", controls=[Companion()], **DRAW)
    assert list(result.states) == ["companion"]
    assert result.states["companion"].shape == result.latents.shape
    assert not torch.equal(result.states["companion"], result.latents)
    assert result.manifest["notes"] == ["Companion: chose by itself"]
    plain = pipe("a cat", **DRAW)
    assert plain.states == {} and plain.manifest["notes"] == []


def test_a_state_that_shares_the_noise_shares_the_start(pipe: Pipeline) -> None:
    """With one prompt for both they are the same picture, also from a picture."""
    for controls in ([], [Start()]):
        result = pipe("a dog", controls=[*controls, Companion()], guidance_scale=1.0, **DRAW)
        assert (result.states["companion"] - result.latents).abs().max() < 1e-4 * result.latents.std()
    assert (result.latents - pipe("a dog", guidance_scale=1.0, **DRAW).latents).abs().max() > 1e-2


def test_a_branch_that_is_read_must_fit_its_reader(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="'cond' reads features of 'companion/cond'"):
        pipe("a cat", controls=[Companion(hw=(8, 8))], **DRAW)


@pytest.mark.parametrize(
    "control",
    [
        PromptToPrompt(
            "a dog", {"default_": 0.8, "cat": (0.0, 0.5)}, reweight={"cat": 2.0}, local_blend=["dog", "cat"]
        ),
        AttendAndExcite(words=["cat"], iterations=2, thresholds={0: 0.6}, step_size=2.0),
    ],
    ids=lambda control: control.type,
)
def test_runs_with_them_replay_byte_for_byte(pipe: Pipeline, control: Control, tmp_path: Path) -> None:
    result = pipe("a cat", controls=[control], **{**DRAW, "output_type": "pil"})
    path = tmp_path / "cat.png"
    result.images[0].save(path)
    again = tmp_path / "again.png"
    replay(path, pipe).save(again)
    assert path.read_bytes() == again.read_bytes()


def sites(*sizes: tuple[int, int]) -> list[Site]:
    return [Site(f"{i}", "cross", "down", 0, i, hw, 8) for i, hw in enumerate(sizes)]


def test_nearest_size_is_a_quarter_of_the_latents() -> None:
    sd1 = sites((64, 64), (32, 32), (16, 16), (8, 8))
    assert nearest_size(sd1, (64, 64)) == (16, 16)
    assert nearest_size(sites((64, 96), (32, 48), (16, 24)), (64, 96)) == (16, 24)
    assert nearest_size(sites((64, 64), (32, 32)), (128, 128)) == (32, 32)
    assert nearest_size(sites((64, 64), (32, 32)), (64, 64)) == (32, 32)
    assert nearest_size(sd1, (64, 64), 32) == (32, 32)
    with pytest.raises(InputError, match="resolution 24; there are 64, 32, 16, 8"):
        nearest_size(sd1, (64, 64), 24)
