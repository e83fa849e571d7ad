"""Perturbed-attention guidance against diffusers' pipelines (arXiv 2403.17377)."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from controlroom.controls.guidance.guidance_rescale import GuidanceRescale
from controlroom.controls.guidance.perturbed_attention_guidance import PerturbedAttentionGuidance
from controlroom.controls.personal.ip_adapter import IPAdapter
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, close, perturbed
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_sd1, tiny_sdxl
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 3, "seed": 5, "scheduler": "ddim"}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("sd1", {}, {}),
    ("sd1", {"layers": ["up"], "scale": 2.0}, {}),
    ("sd1", {"layers": ["mid", "down_blocks.0.attentions.0", "up_blocks.1"]}, {}),
    ("sd1", {"layers": ["up_blocks.(0|1).attentions.1", "down"]}, {}),
    ("sd1", {"layers": "mid", "adaptive_scale": 0.004}, {}),
    ("sd1", {}, {"guidance_scale": 1.0}),
    ("sd1", {}, {"guidance_rescale": 0.7}),
    ("sd2", {}, {}),
    ("sd2", {"layers": ["up"], "adaptive_scale": 0.001}, {"guidance_scale": 1.0}),
    ("sdxl", {}, {}),
    ("sdxl", {"layers": ["mid", "up_blocks.0.attentions.1"], "scale": 1.5}, {"guidance_rescale": 0.5}),
    ("sdxl", {"adaptive_scale": 0.006}, {"guidance_scale": 1.0}),
]


@pytest.mark.parametrize(("kind", "settings", "more"), CASES)
def test_equals_diffusers(kind: str, settings: dict[str, Any], more: dict[str, Any]) -> None:
    source = BACKBONES[kind]()
    control = PerturbedAttentionGuidance(**settings)
    names = {"pag_scale": control.scale, "pag_adaptive_scale": control.adaptive_scale, "layers": control.layers}
    expected = perturbed(source, PROMPT, 5, num_inference_steps=3, **{"guidance_scale": 7.5, **names, **more})
    pipe = Pipeline.from_diffusers(source)
    result = pipe(PROMPT, controls=[control], **{**DRAW, **more})
    assert close(result.images, expected)
    assert (pipe(PROMPT, **{**DRAW, **more}).images - expected).abs().max() > 3e-4 * expected.std()
    rows = 3 if more.get("guidance_scale") is None else 2
    assert result.manifest["cost"]["unet_rows"] == 3 * rows
    assert result.manifest["cost"]["unet_passes"] == 3


@pytest.mark.parametrize("scheduler", ["euler", "unipc"])
def test_batch_and_other_solvers_equal_diffusers(scheduler: str) -> None:
    from controlroom.sampling.solver import make_scheduler

    source = tiny_sd1()
    prompts, negatives = ["a cat and a red frog", "a dog on the beach"], ["night", "a hat"]
    source.scheduler = make_scheduler(source.scheduler, scheduler)
    more = {"negative_prompt": negatives, "pag_scale": 3.0}
    expected = perturbed(source, prompts, 5, 6, num_inference_steps=3, guidance_scale=7.5, **more)
    settings = {**DRAW, "scheduler": None, "negative_prompt": negatives}
    result = Pipeline.from_diffusers(source)(prompts, controls=[PerturbedAttentionGuidance()], **settings)
    assert close(result.images, expected)


def test_rescaling_comes_after_it_in_either_order(pipe: Pipeline) -> None:
    expected = perturbed(tiny_sd1(), PROMPT, 5, num_inference_steps=3, guidance_scale=7.5, guidance_rescale=0.7)
    controls = [PerturbedAttentionGuidance(), GuidanceRescale(0.7)]
    for listed in (controls, controls[::-1]):
        assert close(pipe(PROMPT, controls=listed, **DRAW).images, expected)


def test_an_image_prompt_reaches_the_perturbed_rows(pipe: Pipeline) -> None:
    """As it reaches the prompt's, so that only the attention differs."""
    features = torch.randn(1, 1, 24, generator=torch.Generator().manual_seed(3))
    adapter = IPAdapter(tiny_ip_adapter(pipe.unet), embeds=features, image_encoder=tiny_image_encoder())
    spec = RunSpec(prompt=PROMPT, controls=[PerturbedAttentionGuidance(), adapter], **DRAW)
    assert set(pipe.explain(spec).reach["IPAdapter"]) == {"uncond", "cond", "perturbed"}
    assert torch.isfinite(pipe.run(spec).images).all()


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"start": 0.9, "end": 0.95}])
def test_neutral_is_absence_bit_for_bit_and_free(pipe: Pipeline, settings: dict[str, Any]) -> None:
    plain, result = pipe(PROMPT, **DRAW), pipe(PROMPT, controls=[PerturbedAttentionGuidance(**settings)], **DRAW)
    assert torch.equal(plain.images, result.images)
    assert plain.manifest["cost"] == result.manifest["cost"]


def test_a_small_scale_is_close_to_absence(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    result = pipe(PROMPT, controls=[PerturbedAttentionGuidance(1e-4)], **DRAW).images
    assert 0 < (result - plain).abs().max() < 1e-2 * plain.std()


def test_every_name_of_a_layer_counts(pipe: Pipeline) -> None:
    names = ["mid", "up", "down", "up_blocks.0.attentions.1", "attn1", ".*1.transformer"]
    pictures = [pipe(PROMPT, controls=[PerturbedAttentionGuidance(layers=[n])], **DRAW).images for n in names]
    for i, first in enumerate(pictures):
        assert all(not torch.equal(first, second) for second in pictures[i + 1 :])
    by_name = RunSpec(prompt=PROMPT, controls=[PerturbedAttentionGuidance(layers="mid")], **DRAW)
    assert pipe.explain(by_name).claims["PerturbedAttentionGuidance"][0] == "identity out at 1 layers"
    large = Pipeline.from_diffusers(tiny_sdxl()).explain(by_name)
    assert large.claims["PerturbedAttentionGuidance"][0] == "identity out at 2 layers"


def test_no_trace_and_two_of_them_name_each_other(pipe: Pipeline) -> None:
    before = traces(pipe)
    pipe(PROMPT, controls=[PerturbedAttentionGuidance()], **DRAW)
    assert traces(pipe) == before
    with pytest.raises(ConflictError, match="PerturbedAttentionGuidance 1 and PerturbedAttentionGuidance 2"):
        pipe(PROMPT, controls=[PerturbedAttentionGuidance(), PerturbedAttentionGuidance(layers="up")], **DRAW)


def test_a_layer_that_is_not_there_is_named(pipe: Pipeline) -> None:
    for layers in ("down_blocks.7", ["mid", "middle"]):
        with pytest.raises(InputError, match="is named '(down_blocks.7|middle)'. It has such layers in down_blocks.0"):
            pipe(PROMPT, controls=[PerturbedAttentionGuidance(layers=layers)], **DRAW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale": -1.0}, "scale"),
        ({"adaptive_scale": -1.0}, "adaptive_scale"),
        ({"layers": []}, "no layer is named"),
        ({"layers": ["mid", ""]}, "1 to 200 characters"),
        ({"layers": "("}, "no regular expression"),
        ({"layers": "x" * 1000}, "1 to 200 characters"),
        ({"layers": 7}, "layers"),
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    control = PerturbedAttentionGuidance()
    assert (control.scale, control.layers) == (3.0, ["mid"])
    with pytest.raises(ControlRoomError, match=message):
        PerturbedAttentionGuidance(**settings)
