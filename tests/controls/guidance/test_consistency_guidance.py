"""Consistency guidance against its equation, with two networks written out (arXiv 2402.12004)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from controlroom.backbones.lora_files import load_lora
from controlroom.backbones.lora_names import Names
from controlroom.controls.guidance.consistency_guidance import ConsistencyGuidance
from controlroom.controls.guidance.perp_neg import PerpNeg
from controlroom.controls.personal.lora import LoRA
from controlroom.controls.personal.textual_inversion import TextualInversion
from controlroom.core.errors import ConflictError, ControlRoomError, InputError
from controlroom.core.spec import RunSpec
from controlroom.sampling.pipeline import Pipeline
from tests.controls.guidance.references import PROMPT, SMALL, ByHand, close
from tests.controls.loras import tiny_lora, tiny_word
from tests.tiny import BACKBONES, tiny_sd1
from tests.traces import traces

DRAW: dict[str, Any] = {**SMALL, "num_inference_steps": 3, "seed": 5, "scheduler": "ddim"}
PLAIN = "a dog on the beach"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("loras")
    return {kind: tiny_lora(folder / f"{kind}.safetensors", make) for kind, make in BACKBONES.items()}


@pytest.fixture(scope="module")
def pipe() -> Pipeline:
    return Pipeline.from_diffusers(tiny_sd1())


def baked(kind: str, file: Path, scale: float = 1.0) -> Any:
    """A miniature whose weights hold the LoRA."""
    source: Any = BACKBONES[kind]()
    names = Names(source.unet, source.text_encoder, getattr(source, "text_encoder_2", None))
    with torch.no_grad():
        for layer, change in load_lora(file, names).layers.items():
            weight = names.layers[layer].weight
            weight += scale * change.dense(weight)
    return source


def written_out(kind: str, file: Path, text: float, subject: float, negative: str = "", lora: float = 1.0) -> Any:
    """Three steps, a row at a time, with the network as it is and with the changed one."""
    hand, tuned = ByHand(BACKBONES[kind](), 3), ByHand(baked(kind, file, lora), 3)
    nothing = hand.told(negative) if negative else hand.told("", nothing=True)
    plain, named = hand.told(PLAIN), tuned.told(PROMPT)
    for t in hand.scheduler.timesteps:
        u, c = hand.predict(t, nothing), hand.predict(t, plain)
        subject_seen = tuned.predict(t, named, hand.scheduler.scale_model_input(hand.x, t))
        hand.step(u + text * (c - u) + subject * (subject_seen - c), t)
    return hand.x


@pytest.mark.parametrize(
    ("kind", "text", "subject"), [*((kind, 7.5, 3.0) for kind in BACKBONES), ("sd1", 2.0, 0.0), ("sd1", 0.0, 1.5)]
)
def test_equals_the_equation(kind: str, text: float, subject: float, files: dict[str, Path]) -> None:
    expected = written_out(kind, files[kind], text, subject)
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    # diffusers' scale of the run is 7.5, which the words' scale is unless it is given.
    own = ConsistencyGuidance(PLAIN, subject) if text == 7.5 else ConsistencyGuidance(PLAIN, subject, text)
    controls = [LoRA(str(files[kind])), own]
    spec = RunSpec(prompt=PROMPT, controls=controls, **DRAW)
    result = pipe.run(spec)
    assert close(result.images, expected)
    assert (pipe(PROMPT, controls=controls[:1], **DRAW).images - expected).abs().max() > 1e-2 * expected.std()
    assert close(pipe(PROMPT, controls=controls[::-1], **DRAW).images, expected)
    plan = pipe.explain(spec)
    assert (plan.rows, plan.passes) == ((4,) * 3, (2,) * 3)
    assert (result.manifest["cost"]["unet_rows"], result.manifest["cost"]["unet_passes"]) == (12, 6)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_with_a_negative_prompt(kind: str, files: dict[str, Path]) -> None:
    expected = written_out(kind, files[kind], 7.5, 3.0) if kind == "sdxl" else None
    pipe = Pipeline.from_diffusers(BACKBONES[kind]())
    controls = [LoRA(str(files[kind])), ConsistencyGuidance(PLAIN)]
    found = pipe(PROMPT, negative_prompt="night", controls=controls, **DRAW).images
    if kind == "sd1":
        assert close(found, written_out(kind, files[kind], 7.5, 3.0, "night"))
    else:
        assert expected is not None and not close(found, expected, 1e-2)


def test_embeddings_without_a_prompt_stay_what_they_are(files: dict[str, Path]) -> None:
    pipe = Pipeline.from_diffusers(tiny_sd1())
    empty = pipe.backbone.encode_text([""], negative=True).tokens
    controls = [LoRA(str(files["sd1"])), ConsistencyGuidance(PLAIN)]
    told = {"prompt": PROMPT, "negative_prompt_embeds": empty}
    assert close(pipe(controls=controls, **told, **DRAW).images, written_out("sd1", files["sd1"], 7.5, 3.0))


def test_a_lora_of_a_scale_and_several(files: dict[str, Path], pipe: Pipeline) -> None:
    guidance = ConsistencyGuidance(PLAIN)
    expected = written_out("sd1", files["sd1"], 7.5, 3.0, lora=0.8)
    halves = [LoRA(str(files["sd1"]), 0.5), LoRA(str(files["sd1"]), 0.3)]
    assert close(pipe(PROMPT, controls=[*halves, guidance], **DRAW).images, expected)
    assert close(pipe(PROMPT, controls=[LoRA(str(files["sd1"]), 0.8), guidance], **DRAW).images, expected)


def test_without_loras_and_with_the_prompt_itself_it_is_classifier_free_guidance(pipe: Pipeline) -> None:
    plain = pipe(PROMPT, **DRAW).images
    assert close(pipe(PROMPT, controls=[ConsistencyGuidance(PROMPT, 2.0)], **DRAW).images, plain)
    # θ = φ: guidance by words alone, as strong as the direction is scaled.
    strong = pipe(PROMPT, controls=[ConsistencyGuidance(PROMPT, 1.0, 3.0)], **DRAW).images
    assert close(strong, pipe(PROMPT, guidance_scale=3.0, **DRAW).images)


def test_a_learned_word_names_the_subject(files: dict[str, Path], pipe: Pipeline) -> None:
    word = TextualInversion(tiny_word(tiny_sd1()), token="<anna>")
    controls = [word, LoRA(str(files["sd1"])), ConsistencyGuidance("a cat")]
    before = traces(pipe)
    result = pipe("a <anna> cat", controls=controls, **DRAW)
    assert traces(pipe) == before
    assert not close(result.images, pipe("a cat", controls=controls[1:], **DRAW).images, 1e-2)


def test_every_picture_of_a_batch_as_alone(files: dict[str, Path], pipe: Pipeline) -> None:
    prompts, plain = ["a cat and a red frog", "a dog on the beach"], ["a frog", "a beach"]
    controls = [LoRA(str(files["sd1"])), ConsistencyGuidance(plain)]
    together = pipe(prompts, controls=controls, **DRAW).images
    for i, prompt in enumerate(prompts):
        alone = [controls[0], ConsistencyGuidance(plain[i])]
        assert close(together[i : i + 1], pipe(prompt, controls=alone, **{**DRAW, "seed": 5 + i}).images)


def test_outside_the_window_there_is_classifier_free_guidance(files: dict[str, Path], pipe: Pipeline) -> None:
    lora = LoRA(str(files["sd1"]))
    seen: list[list[Any]] = [[], []]
    for number, controls in enumerate(([lora, ConsistencyGuidance(PLAIN, start=0.6)], [lora])):
        result = pipe(
            PROMPT,
            controls=controls,
            callback_on_step_end=lambda p, i, t, x, number=number: seen[number].append(x["latents"]) or x,
            **DRAW,
        )
        if number == 0:
            assert result.manifest["cost"]["unet_rows"] == 2 + 2 + 4
    assert [torch.equal(a, b) for a, b in zip(*seen, strict=True)] == [True, True, False]


@pytest.mark.parametrize("window", [(0.9, 0.95), (1.0, 1.0)])
def test_an_empty_window_is_absence_bit_for_bit_and_free(
    window: tuple[float, float], files: dict[str, Path], pipe: Pipeline
) -> None:
    lora = LoRA(str(files["sd1"]))
    plain = pipe(PROMPT, controls=[lora], **DRAW)
    control = ConsistencyGuidance(PLAIN, start=window[0], end=window[1])
    result = pipe(PROMPT, controls=[lora, control], **DRAW)
    assert torch.equal(plain.images, result.images) and plain.manifest["cost"] == result.manifest["cost"]


def test_no_trace_after_a_run_and_after_an_exception(files: dict[str, Path], pipe: Pipeline) -> None:
    controls = [LoRA(str(files["sd1"])), ConsistencyGuidance(PLAIN)]
    before = traces(pipe)
    pipe(PROMPT, controls=controls, **DRAW)
    assert traces(pipe) == before

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("in a step")

    with pytest.raises(RuntimeError, match="in a step"):
        pipe(PROMPT, controls=controls, callback_on_step_end=fail, **DRAW)
    assert traces(pipe) == before
    assert not any("forward" in vars(module) for module in pipe.unet.modules())


def test_other_guidance_is_named(pipe: Pipeline) -> None:
    with pytest.raises(ConflictError, match="ConsistencyGuidance.*PerpNeg|PerpNeg.*ConsistencyGuidance"):
        pipe(PROMPT, controls=[ConsistencyGuidance(PLAIN), PerpNeg("night")], **DRAW)
    with pytest.raises(ConflictError, match="ConsistencyGuidance 1 and ConsistencyGuidance 2"):
        pipe(PROMPT, controls=[ConsistencyGuidance(PLAIN), ConsistencyGuidance("a cat")], **DRAW)
    with pytest.raises(InputError, match="guidance_scale is at most 1"):
        pipe(PROMPT, controls=[ConsistencyGuidance(PLAIN)], **DRAW, guidance_scale=1.0)
    with pytest.raises(InputError, match="3 source prompts for 1"):
        pipe(PROMPT, controls=[ConsistencyGuidance(["a", "cat", "dog"])], **DRAW)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "plain"),
        ({"plain": ""}, "plain"),
        ({"plain": []}, "plain"),
        ({"plain": "a cat", "subject_scale": -1.0}, "subject_scale"),
        ({"plain": "a cat", "text_scale": float("nan")}, "text_scale"),
    ],
)
def test_ill_settings_are_input_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ControlRoomError, match=message):
        ConsistencyGuidance(**settings)
