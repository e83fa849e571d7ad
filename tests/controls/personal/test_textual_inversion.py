"""Textual Inversion: the states of diffusers with the same file, in its four forms; no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import controlroom as cr
from controlroom.core.errors import InputError, ModelError
from tests.tiny import BACKBONES, tiny_sd1, tiny_sdxl
from tests.traces import traces

DRAW: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}


def vectors(count: int, width: int = 32, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def drawn(pipe: Any, prompt: str = "a <anna> on the beach", **more: Any) -> torch.Tensor:
    return pipe(prompt=prompt, **DRAW, **more, generator=torch.Generator().manual_seed(3)).images


@pytest.fixture
def file(tmp_path: Path) -> Path:
    save_file({"<anna>": vectors(3)}, str(tmp_path / "anna.safetensors"))
    return tmp_path / "anna.safetensors"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("backbone", ["sd1", "sd2"])
def test_equals_diffusers(backbone: str, count: int, tmp_path: Path) -> None:
    save_file({"<anna>": vectors(count)}, str(tmp_path / "anna.safetensors"))
    theirs = BACKBONES[backbone]()
    theirs.set_progress_bar_config(disable=True)
    theirs.load_textual_inversion(str(tmp_path / "anna.safetensors"))
    expected = drawn(theirs)
    ours = cr.Pipeline.from_diffusers(BACKBONES[backbone]())
    plain = drawn(ours)
    found = drawn(ours, controls=[cr.TextualInversion(str(tmp_path / "anna.safetensors"))])
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - plain).abs().max() > 0.01 * expected.std()
    assert torch.equal(drawn(ours), plain)


def test_xl_has_vectors_for_both_encoders(tmp_path: Path) -> None:
    """diffusers loads each encoder's vectors by hand, as its documentation shows."""
    theirs = tiny_sdxl()
    theirs.set_progress_bar_config(disable=True)
    widths = [int(e.config.hidden_size) for e in (theirs.text_encoder, theirs.text_encoder_2)]
    parts = {"clip_l": vectors(2, widths[0]), "clip_g": vectors(2, widths[1], 1)}
    save_file(parts, str(tmp_path / "anna.safetensors"))
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        encoder, tokenizer = getattr(theirs, f"text_encoder{end}"), getattr(theirs, f"tokenizer{end}")
        theirs.load_textual_inversion(parts[key], token="<anna>", text_encoder=encoder, tokenizer=tokenizer)
    expected = drawn(theirs)
    ours = cr.Pipeline.from_diffusers(tiny_sdxl())
    found = drawn(ours, controls=[cr.TextualInversion(str(tmp_path / "anna.safetensors"), token="<anna>")])
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_every_form_says_the_same(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    expected = drawn(pipe, controls=[cr.TextualInversion({"<anna>": vectors(2)})])
    save_file({"emb_params": vectors(2)}, str(tmp_path / "kohya.safetensors"))
    save_file({"clip_l": vectors(2)}, str(tmp_path / "comfy.safetensors"))
    forms: list[Any] = [str(tmp_path / "kohya.safetensors"), str(tmp_path / "comfy.safetensors")]
    forms += [{"string_to_param": {"*": vectors(2)}, "name": "x"}, {"other": vectors(2)}]
    for form in forms:
        assert torch.equal(drawn(pipe, controls=[cr.TextualInversion(form, token="<anna>")]), expected)
    named = drawn(pipe, "a kohya on the beach", controls=[cr.TextualInversion(forms[0])])
    assert torch.equal(named, expected)


def test_two_words_and_other_controls(file: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    words = [cr.TextualInversion(str(file)), cr.TextualInversion({"<ben>": vectors(1, seed=5)})]
    both = drawn(pipe, "a <anna> and <ben>", controls=words)
    other = drawn(pipe, "a <anna> and <ben>", controls=words[:1])
    assert not torch.equal(both, other)
    again = cr.TextualInversion(str(file))
    assert torch.equal(drawn(pipe, "a <anna> and <ben>", controls=[*words, again]), both)
    with pytest.raises(InputError, match="knows already"):
        drawn(pipe, "a <anna>", controls=[words[0], cr.TextualInversion({"<anna>": vectors(1, seed=8)})])
    edit = cr.SemanticGuidance(edits=[cr.SemanticEdit("<anna>", warmup=0)])
    assert torch.isfinite(drawn(pipe, "a cat", controls=[words[0], edit])).all()


def test_no_trace_after_a_run_and_after_an_exception(file: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    before, tokenizer = traces(pipe), pipe.backbone.tokenizer
    rows = pipe.backbone.text_encoder.get_input_embeddings().weight
    drawn(pipe, controls=[cr.TextualInversion(str(file))])

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("in a step")

    with pytest.raises(RuntimeError, match="in a step"):
        drawn(pipe, controls=[cr.TextualInversion(str(file))], callback_on_step_end=fail)
    assert traces(pipe) == before and pipe.backbone.tokenizer is tokenizer
    assert pipe.backbone.text_encoder.get_input_embeddings().weight is rows
    assert "<anna>" not in tokenizer.get_vocab()


def test_bad_input_is_named(file: Path, tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    before = traces(pipe)
    save_file({"<anna>": vectors(1, 48)}, str(tmp_path / "wide.safetensors"))
    for model, message in (
        (str(tmp_path / "wide.safetensors"), r"\[48\].*\[32\]"),
        (str(tmp_path / "nothing.safetensors"), "no learned word"),
        ("anna.pt", "pickle"),
        ({"a": torch.zeros(2, 2, 2)}, "not a file of learned words"),
        ({"a": torch.full((1, 32), float("nan"))}, "not finite"),
        ({"clip_l": vectors(1), "more": vectors(1)}, "'more'"),
    ):
        with pytest.raises(ModelError, match=message):
            drawn(pipe, controls=[cr.TextualInversion(model)])
    with pytest.raises(InputError, match="knows already"):
        drawn(pipe, controls=[cr.TextualInversion(str(file), token="cat")])
    with pytest.raises(InputError, match="one word"):
        cr.TextualInversion(str(file), token="two words")
    with pytest.raises(ModelError, match="2 words"):
        drawn(pipe, controls=[cr.TextualInversion({"<a>": vectors(1), "<b>": vectors(1)}, token="<c>")])
    assert traces(pipe) == before
