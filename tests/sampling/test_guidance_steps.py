"""Steps without guidance, what is kept in them, rescaling by a control, and passes that additions ask for."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from pydantic import Field

from controlroom.controls.editing.prompt_to_prompt import PromptToPrompt
from controlroom.controls.style.reference_only import ReferenceOnly
from controlroom.core.branch import Branch
from controlroom.core.control import Control, Declaration, Outline
from controlroom.core.run import Run
from controlroom.core.spec import RunSpec
from controlroom.core.step import Step
from controlroom.sampling.pipeline import Pipeline
from controlroom.sampling.solver import make_scheduler
from tests.tiny import BACKBONES, tiny_sd1

DRAW: dict[str, Any] = {
    "num_inference_steps": 4,
    "output_type": "latent",
    "seed": 5,
    "height": 16,
    "width": 16,
    "scheduler": "ddim",
}
PROMPT = "a red cat"


class Unguided(Control):
    """No guidance at some steps."""

    type: Literal["unguided"] = Field(default="unguided", kw_only=True)
    steps: list[int]

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(unguided=frozenset(self.steps))


class Away(Control):
    """An addition that reads the branch without the prompt, and may say so; may own the base combination."""

    type: Literal["away"] = Field(default="away", kw_only=True)
    scale: float = 0.5
    keeps: bool = True
    own: bool = False

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(branches=(Branch("other", role="uncond"),), keeps=("uncond", "other") if self.keeps else ())

    def prepare(self, run: Run) -> list[tuple[str, ...]]:
        run.set_condition("other", run.encode_text("a dog"))
        return []

    def combine(self, step: Step, state: str) -> torch.Tensor | None:
        return step.eps["uncond"] if self.own else None

    def guide(self, step: Step, state: str) -> torch.Tensor | None:
        step.memory(self).append(step.running)
        if "other" not in step.eps:
            return None
        return self.scale * (step.eps["other"] - step.eps["uncond"])


class Rescaled(Control):
    """Rescales guidance in its window."""

    type: Literal["rescaled"] = Field(default="rescaled", kw_only=True)
    scale: float = 0.7
    start: float = 0.0
    end: float = 1.0

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(rescale=self.scale)


class Probing(Control):
    """Asks for a further pass over the prompt's branch."""

    type: Literal["probing"] = Field(default="probing", kw_only=True)
    start: float = 0.0
    end: float = 1.0

    def declare(self, outline: Outline) -> Declaration:
        return Declaration(probes=("cond",))

    def guide(self, step: Step, state: str) -> torch.Tensor:
        return 0.1 * step.forward(("cond",), {"image": 0.5 * step.latents["image"]})["cond"]


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def by_hand(kind: str, unguided: list[int], rescale: float = 0.0, scale: float = 7.5) -> torch.Tensor:
    """A run of diffusers' parts, a row at a time: guided at some steps only."""
    plain = BACKBONES[kind]()
    scheduler = make_scheduler(plain.scheduler, "ddim")
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        c, u = plain.encode_prompt(PROMPT, "cpu", 1, True)
        for i, t in enumerate(scheduler.timesteps):
            eps = plain.unet(x, t, c).sample
            if i not in unguided:
                nothing = plain.unet(x, t, u).sample
                guided = nothing + scale * (eps - nothing)
                eps = rescale * guided * (eps.std() / guided.std()) + (1 - rescale) * guided
            x = scheduler.step(eps, t, x).prev_sample
    return x


@pytest.mark.parametrize("unguided", [[0], [3], [1, 2], [0, 3], [0, 1, 2, 3]])
@pytest.mark.parametrize("kind", ["sd1", "sd2"])
def test_steps_without_guidance_equal_a_loop_by_hand(kind: str, unguided: list[int]) -> None:
    expected = by_hand(kind, unguided)
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    result = pipe(PROMPT, controls=[Unguided(unguided)], **DRAW)
    assert (result.images - expected).abs().max() <= 1e-4 * expected.std()
    # The last step moves little.
    assert (pipe(PROMPT, **DRAW).images - expected).abs().max() > 5e-4 * expected.std()
    assert result.manifest["cost"]["unet_rows"] == 8 - len(unguided)
    assert result.manifest["cost"]["unet_passes"] == 4


@pytest.mark.parametrize("kind", BACKBONES)
def test_no_guided_step_is_no_guidance_bit_for_bit(kind: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    result, expected = pipe(PROMPT, controls=[Unguided([0, 1, 2, 3])], **DRAW), pipe(PROMPT, **DRAW, guidance_scale=1.0)
    assert torch.equal(result.images, expected.images)
    assert result.manifest["cost"] == expected.manifest["cost"]


def test_steps_of_two_controls_add_up(pipe: Pipeline) -> None:
    both = pipe(PROMPT, controls=[Unguided([0]), Unguided([2])], **DRAW)
    assert torch.equal(both.images, pipe(PROMPT, controls=[Unguided([0, 2])], **DRAW).images)


def test_who_reads_the_branch_keeps_it(pipe: Pipeline) -> None:
    """And the base combination is the prompt's nonetheless, whoever would make it."""

    def seen(*controls: Control) -> tuple[Any, list[Any]]:
        memories: list[Any] = []
        plain = Away.prepare

        def prepare(self: Away, run: Run) -> Any:
            memories.append(plain(self, run))
            return memories[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Away, "prepare", prepare)
            result = pipe(PROMPT, controls=list(controls), **{**DRAW, "num_inference_steps": 2})
        return result, memories[0]

    kept, running = seen(Away(), Unguided([0]))
    assert running == [("uncond", "cond", "other")] * 2
    assert kept.manifest["cost"]["unet_rows"] == 6
    gone, running = seen(Away(keeps=False), Unguided([0]))
    assert running == [("cond",), ("uncond", "cond", "other")]
    assert gone.manifest["cost"]["unet_rows"] == 4
    assert not torch.equal(kept.images, gone.images)
    owned, _ = seen(Away(own=True), Unguided([0, 1]))
    free, _ = seen(Away(), Unguided([0, 1]))
    assert torch.equal(owned.images, free.images)
    # Kept for an addition of nothing, it changes nothing.
    silent, _ = seen(Away(scale=1e-30), Unguided([0]))
    without = pipe(PROMPT, controls=[Unguided([0])], **{**DRAW, "num_inference_steps": 2})
    torch.testing.assert_close(silent.images, without.images, atol=1e-4, rtol=1e-4)


def test_other_states_are_not_guided_either(pipe: Pipeline) -> None:
    """The source of an edit is drawn as its prompt would be drawn with the same steps guided."""
    edit = PromptToPrompt("a green dog", cross_replace=0.5, self_replace=0.5)
    result = pipe(PROMPT, controls=[edit, Unguided([0, 2])], **DRAW)
    alone = pipe("a green dog", controls=[Unguided([0, 2])], **DRAW)
    assert (result.states["source"] - alone.images).abs().max() <= 1e-4 * alone.images.std()
    assert result.manifest["cost"]["unet_rows"] == 2 * 4 + 2 * 2


def test_references_that_only_unguided_rows_read_are_left_out(pipe: Pipeline) -> None:
    style = ReferenceOnly(torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1)), style_fidelity=0.5)
    result = pipe(PROMPT, controls=[style, Unguided([1])], **DRAW)
    assert result.manifest["cost"]["unet_rows"] == 3 * 4 + 2
    # Where the row stays, so does what it reads.
    kept = pipe(PROMPT, controls=[style, Away(), Unguided([1])], **DRAW)
    assert kept.manifest["cost"]["unet_rows"] == 4 * 5
    assert torch.isfinite(kept.images).all()


@pytest.mark.parametrize("kind", BACKBONES)
def test_rescale_of_a_control_is_the_argument(kind: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    expected = pipe(PROMPT, guidance_rescale=0.7, **DRAW).images
    assert torch.equal(pipe(PROMPT, controls=[Rescaled(0.7)], **DRAW).images, expected)
    assert not torch.equal(pipe(PROMPT, controls=[Rescaled(0.7, end=0.5)], **DRAW).images, expected)


def test_nothing_is_rescaled_without_guidance(pipe: Pipeline) -> None:
    for controls in ([Unguided([0, 3]), Rescaled()], [Rescaled(), Unguided([0, 3])]):
        result = pipe(PROMPT, controls=controls, **DRAW).images
        expected = by_hand("sd1", [0, 3], rescale=0.7)
        assert (result - expected).abs().max() <= 1e-4 * expected.std()
    by_argument = pipe(PROMPT, controls=[Unguided([0, 3])], guidance_rescale=0.7, **DRAW).images
    assert torch.equal(by_argument, result)
    # Also where the branch without the prompt runs for another's sake.
    kept = pipe(PROMPT, controls=[Unguided([0, 1, 2, 3]), Away(), Rescaled()], **DRAW).images
    assert torch.equal(kept, pipe(PROMPT, controls=[Unguided([0, 1, 2, 3]), Away()], **DRAW).images)


def test_explain_counts_what_runs(pipe: Pipeline) -> None:
    for controls, rows, passes in (
        ([Unguided([0, 2])], (1, 2, 1, 2), (1, 1, 1, 1)),
        ([Unguided([0]), Away()], (3, 3, 3, 3), (1, 1, 1, 1)),
        ([Unguided([0]), Away(keeps=False)], (1, 3, 3, 3), (1, 1, 1, 1)),
        ([Probing(start=0.5)], (2, 2, 3, 3), (1, 1, 2, 2)),
    ):
        spec = RunSpec(prompt=PROMPT, controls=controls, **DRAW)
        found = pipe.explain(spec)
        assert (found.rows, found.passes) == (rows, passes)
        cost = pipe.run(spec).manifest["cost"]
        assert (cost["unet_rows"], cost["unet_passes"]) == (sum(rows), sum(passes))
