"""All controls of guidance in one run: any order, any of them neutral, batches, half precision, and no trace."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch

from controlroom.controls.guidance.attend_and_excite import AttendAndExcite
from controlroom.controls.guidance.guidance_interval import GuidanceInterval
from controlroom.controls.guidance.guidance_rescale import GuidanceRescale
from controlroom.controls.guidance.perp_neg import PerpNeg
from controlroom.controls.guidance.perturbed_attention_guidance import PerturbedAttentionGuidance
from controlroom.controls.guidance.self_attention_guidance import SelfAttentionGuidance
from controlroom.controls.guidance.semantic_guidance import SemanticEdit, SemanticGuidance
from controlroom.controls.guidance.smoothed_energy_guidance import SmoothedEnergyGuidance
from controlroom.core.control import Control
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.tiny import BACKBONES
from tests.traces import traces

PROMPT = "a red cat"
DRAW: dict[str, Any] = {"num_inference_steps": 4, "output_type": "latent", "seed": 5, "height": 16, "width": 16}
EDITS = [SemanticEdit("night", warmup=1), SemanticEdit("a hat", reverse=True, warmup=0, cooldown=3)]
ALL: tuple[Control, ...] = (
    SemanticGuidance(EDITS),
    SelfAttentionGuidance(1.0, start=0.25),
    PerturbedAttentionGuidance(2.0, end=0.75),
    SmoothedEnergyGuidance(2.0, "up", sigma=1.0),
    PerpNeg(["a dog", "the beach"], [1.0, 0.5]),
    GuidanceRescale(0.7, end=0.75),
    GuidanceInterval(0.0, 0.75),
    AttendAndExcite(words=["cat"], iterations=1, thresholds={}, step_size=2.0),
)
NEUTRAL: tuple[Control, ...] = (
    SemanticGuidance([]),
    SelfAttentionGuidance(0.0),
    PerturbedAttentionGuidance(0.0),
    SmoothedEnergyGuidance(0.0),
    PerpNeg("night", 0.0),
    GuidanceRescale(0.0),
    GuidanceInterval(),
    AttendAndExcite(words=["cat"], step_size=0.0),
)
IDS = [type(control).__name__ for control in ALL]
ORDERS = ((7, 6, 5, 4, 3, 2, 1, 0), (3, 6, 0, 5, 7, 1, 4, 2))


@pytest.fixture(scope="module")
def pipes() -> dict[str, Pipeline]:
    # In float64: gradients and random weights multiply rounding.
    return {kind: Pipeline.from_diffusers(make()).to(torch.float64) for kind, make in BACKBONES.items()}


@pytest.fixture(scope="module")
def everything(pipes: dict[str, Pipeline]) -> dict[str, Any]:
    return {kind: pipe(PROMPT, controls=ALL, **DRAW) for kind, pipe in pipes.items()}


@pytest.mark.parametrize("kind", BACKBONES)
def test_runs_at_the_planned_cost_in_any_order(kind: str, pipes: Any, everything: Any) -> None:
    expected, found = everything[kind], pipes[kind].explain(RunSpec(prompt=PROMPT, controls=list(ALL), **DRAW))
    assert torch.isfinite(expected.images).all()
    # u, c, two concepts, two negatives, perturbed, smoothed; then a further pass; behind the interval no negatives.
    assert found.rows == (8, 9, 9, 5)
    assert found.passes == (1, 2, 2, 2)
    assert found.energy_rows == (1, 0, 0, 0)
    cost = expected.manifest["cost"]
    assert cost["unet_rows"] == sum(found.rows) + sum(found.energy_rows)
    assert cost["unet_passes"] == sum(found.passes) + 1
    for order in ORDERS:
        result = pipes[kind](PROMPT, controls=[ALL[i] for i in order], **DRAW)
        assert (result.images - expected.images).abs().max() <= 1e-7 * expected.images.std()
        assert result.manifest["cost"] == cost


@pytest.mark.parametrize("index", range(len(ALL)), ids=IDS)
def test_each_acts_among_the_others_and_neutral_is_absent(index: int, pipes: Any, everything: Any) -> None:
    pipe: Pipeline = pipes["sd1"]
    others = [control for i, control in enumerate(ALL) if i != index]
    without = pipe(PROMPT, controls=others, **DRAW)
    assert (without.images - everything["sd1"].images).abs().max() > 1e-5 * without.images.std()
    for place in (0, 4):
        listed = [*others[:place], NEUTRAL[index], *others[place:]]
        result = pipe(PROMPT, controls=listed, **DRAW)
        assert torch.equal(result.images, without.images)
        assert result.manifest["cost"] == without.manifest["cost"]
        assert list(result.manifest["dropped"]) == [IDS[index]]


@pytest.mark.parametrize("kind", BACKBONES)
def test_all_neutral_is_nothing(kind: str, pipes: Any) -> None:
    plain, result = pipes[kind](PROMPT, **DRAW), pipes[kind](PROMPT, controls=NEUTRAL, **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]
    assert sorted(result.manifest["dropped"]) == sorted(IDS)


def test_a_batch_is_every_picture_alone(pipes: Any) -> None:
    prompts = ["a red cat", "a cat on the beach"]
    together = pipes["sd1"](prompts, controls=ALL, **DRAW).images
    for i, prompt in enumerate(prompts):
        alone = pipes["sd1"](prompt, controls=ALL, **{**DRAW, "seed": 5 + i}).images
        assert (together[i] - alone[0]).abs().max() < 1e-7 * alone.std()


@pytest.mark.parametrize("scheduler", ["euler", "dpmpp_2m", "unipc", "heun"])
def test_every_kind_of_solver(pipes: Any, scheduler: str) -> None:
    result = pipes["sd1"](PROMPT, controls=ALL, scheduler=scheduler, **DRAW).images
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("kind", BACKBONES)
def test_half_precision(kind: str) -> None:
    pipe = Pipeline.from_diffusers(BACKBONES[kind]()).to(torch.bfloat16)
    for control in ALL:
        result = pipe(PROMPT, controls=[control], **DRAW).images
        assert result.dtype == torch.bfloat16 and torch.isfinite(result).all()


def test_no_trace(pipes: Any) -> None:
    pipe: Pipeline = pipes["sd1"]
    before = traces(pipe)
    pipe(PROMPT, controls=ALL, **DRAW)
    assert traces(pipe) == before

    def broken(*args: Any) -> Any:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        pipe(PROMPT, controls=ALL, callback_on_step_end=broken, **DRAW)
    assert traces(pipe) == before


def test_what_each_adds_does_not_depend_on_the_others(pipes: Any) -> None:
    """In one step from the same latents, additions add up."""
    pipe: Pipeline = pipes["sd1"]
    settings = {**DRAW, "num_inference_steps": 1, "scheduler": "ddim"}
    added = [
        SemanticGuidance([SemanticEdit("night", warmup=0)]),
        SelfAttentionGuidance(1.0),
        PerturbedAttentionGuidance(2.0),
        SmoothedEnergyGuidance(2.0, "up", sigma=1.0),
    ]
    plain = pipe(PROMPT, **settings).images
    each = [pipe(PROMPT, controls=[control], **settings).images - plain for control in added]
    assert all(not torch.equal(a, b) for a, b in pairwise(each))
    together = pipe(PROMPT, controls=added, **settings).images
    assert (together - plain - sum(each)).abs().max() < 1e-9 * plain.std()
