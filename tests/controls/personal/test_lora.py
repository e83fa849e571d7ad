"""LoRA: the pictures of diffusers and PEFT with the same file; windows, masks, several at once, no trace."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file

import controlroom as cr
from controlroom.backbones.lora_files import load_lora, save_lora
from controlroom.backbones.lora_names import Names
from controlroom.controls.word_mask import WordMask
from controlroom.core.errors import InputError, ModelError
from tests.controls.loras import ATTENTION, TEXT, add_peft, saved_by_diffusers, tiny_lora, tiny_word
from tests.tiny import BACKBONES, PIXELS, tiny_sd1, tiny_sdxl
from tests.traces import traces

DRAW: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}
CONVOLUTIONS = ["conv1", "conv2", "time_emb_proj", "proj_in", "ff.net.0.proj"]


def drawn(pipe: Any, controls: list[Any] | None = None, **more: Any) -> torch.Tensor:
    arguments = DRAW | more | ({} if controls is None else {"controls": controls})
    return pipe(**arguments, generator=torch.Generator().manual_seed(3)).images


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_lora(tmp_path_factory.mktemp("lora") / "anna.safetensors", tiny_sd1)


@pytest.mark.parametrize("backbone", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("dora", [False, True])
def test_equals_diffusers(backbone: str, dora: bool, tmp_path: Path) -> None:
    theirs = BACKBONES[backbone]()
    add_peft(theirs.unet, ATTENTION + CONVOLUTIONS, use_dora=dora)
    for name in ("text_encoder", "text_encoder_2"):
        if getattr(theirs, name, None) is not None:
            add_peft(getattr(theirs, name), TEXT, seed=4)
    file = saved_by_diffusers(theirs, tmp_path)
    theirs.set_progress_bar_config(disable=True)
    expected = drawn(theirs)
    ours = cr.Pipeline.from_diffusers(BACKBONES[backbone]())
    plain = drawn(ours)
    found = drawn(ours, [cr.LoRA(str(file))])
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (found - plain).abs().max() > 0.05 * expected.std()
    assert torch.equal(drawn(ours), plain)


@pytest.mark.parametrize("scale", [0.5, -1.0])
def test_its_scale_is_that_of_diffusers(lora: Path, scale: float) -> None:
    theirs = tiny_sd1()
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(lora), adapter_name="anna")
    theirs.set_adapters(["anna"], [scale])
    expected = drawn(theirs)
    found = drawn(cr.Pipeline.from_diffusers(tiny_sd1()), [cr.LoRA(str(lora), scale)])
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_two_add_up_as_in_diffusers(lora: Path, tmp_path: Path) -> None:
    other = tiny_lora(tmp_path / "style.safetensors", tiny_sd1, seed=9)
    theirs = tiny_sd1()
    theirs.set_progress_bar_config(disable=True)
    theirs.load_lora_weights(str(lora), adapter_name="anna")
    theirs.load_lora_weights(str(other), adapter_name="style")
    theirs.set_adapters(["anna", "style"], [1.0, 0.4])
    expected = drawn(theirs)
    ours = cr.Pipeline.from_diffusers(tiny_sd1())
    controls = [cr.LoRA(str(lora)), cr.LoRA(str(other), 0.4)]
    found = drawn(ours, controls)
    assert (found - expected).abs().max() < 1e-4 * expected.std()
    assert (drawn(ours, controls[::-1]) - found).abs().max() < 1e-4 * expected.std()


def test_no_trace_after_a_run_and_after_an_exception(lora: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    before = traces(pipe)

    def fail(*_: Any) -> dict[str, Any]:
        raise RuntimeError("in a step")

    drawn(pipe, [cr.LoRA(str(lora)), cr.LoRA(str(lora), mask=Image.new("L", (8, 8), 255))])
    assert traces(pipe) == before
    with pytest.raises(RuntimeError, match="in a step"):
        drawn(pipe, [cr.LoRA(str(lora))], callback_on_step_end=fail)
    assert traces(pipe) == before
    assert not any("forward" in vars(module) for module in pipe.backbone.unet.modules())


def test_its_window_acts_on_the_network_alone(lora: Path) -> None:
    """The first half with it, the second without: the same as two runs joined by their latents."""
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    seen: list[torch.Tensor] = []

    def keep(_: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return {}

    half = cr.LoRA(str(lora), end=0.5, text_scale=0.0)
    drawn(pipe, [half], num_inference_steps=4, callback_on_step_end=keep)
    whole: list[torch.Tensor] = []

    def keep_whole(_: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        whole.append(tensors["latents"].clone())
        return {"latents": seen[1]} if i == 1 else {}

    drawn(pipe, [cr.LoRA(str(lora), text_scale=0.0)], num_inference_steps=4, callback_on_step_end=keep_whole)
    assert torch.equal(whole[0], seen[0]) and torch.equal(whole[1], seen[1])
    plain: list[torch.Tensor] = []

    def keep_plain(_: Any, i: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        plain.append(tensors["latents"].clone())
        return {"latents": seen[1]} if i == 1 else {}

    drawn(pipe, num_inference_steps=4, callback_on_step_end=keep_plain)
    assert torch.equal(plain[2], seen[2]) and torch.equal(plain[3], seen[3])
    assert not torch.equal(whole[2], seen[2])


def test_a_white_mask_is_everywhere(lora: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    whole = drawn(pipe, [cr.LoRA(str(lora))])
    white = drawn(pipe, [cr.LoRA(str(lora), mask=Image.new("L", (8, 8), 255))])
    assert (white - whole).abs().max() < 1e-4 * whole.std()


def test_two_in_two_places_draw_each_its_own(lora: Path, tmp_path: Path) -> None:
    """After one step each half is what its LoRA alone draws there."""
    other = tiny_lora(tmp_path / "ben.safetensors", tiny_sd1, seed=9)
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    left = Image.new("L", (PIXELS, PIXELS), 0)
    left.paste(255, (0, 0, PIXELS // 2, PIXELS))
    right = ImageOps.invert(left)
    both = drawn(pipe, [cr.LoRA(str(lora), mask=left), cr.LoRA(str(other), mask=right)], num_inference_steps=1)
    first, second = (drawn(pipe, [cr.LoRA(str(each))], num_inference_steps=1) for each in (lora, other))
    half = both.shape[-1] // 2
    assert (both[..., :half] - first[..., :half]).abs().max() < 1e-4 * first.std()
    assert (both[..., half:] - second[..., half:]).abs().max() < 1e-4 * first.std()
    assert (first - second).abs().max() > 0.01 * first.std()


def test_rows_and_passes(lora: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    cost = pipe(**DRAW, seed=1, controls=[cr.LoRA(str(lora))]).manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (6, 3)
    mask = Image.new("L", (8, 8), 255)
    cost = pipe(**DRAW, seed=1, controls=[cr.LoRA(str(lora), mask=mask)]).manifest["cost"]
    assert (cost["unet_rows"], cost["unet_passes"]) == (12, 6)


def test_a_mapping_of_tensors_is_a_model_too(lora: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    # diffusers keeps alpha in the file's metadata, which a mapping has not: rank is taken for it.
    halved = {key: value * (2.0 if "lora_B" in key or ".up." in key else 1.0) for key, value in load_file(lora).items()}
    found, expected = drawn(pipe, [cr.LoRA(halved)]), drawn(pipe, [cr.LoRA(str(lora))])
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def test_a_file_for_another_model_is_refused_by_name(lora: Path, tmp_path: Path) -> None:
    before = traces(pipe := cr.Pipeline.from_diffusers(tiny_sdxl()))
    with pytest.raises(ModelError, match=r"does not fit this model"):
        drawn(pipe, [cr.LoRA(str(lora))])
    assert traces(pipe) == before
    tensors = load_file(lora)
    save_file({**tensors, "strange.key": torch.zeros(2)}, str(tmp_path / "more.safetensors"))
    with pytest.raises(ModelError, match=r"strange\.key"):
        drawn(cr.Pipeline.from_diffusers(tiny_sd1()), [cr.LoRA(str(tmp_path / "more.safetensors"))])
    with pytest.raises(ModelError, match="pickle"):
        drawn(cr.Pipeline.from_diffusers(tiny_sd1()), [cr.LoRA("anna.pt")])
    (tmp_path / "broken.safetensors").write_bytes(lora.read_bytes()[:500])
    with pytest.raises(ModelError, match="broken"):
        drawn(cr.Pipeline.from_diffusers(tiny_sd1()), [cr.LoRA(str(tmp_path / "broken.safetensors"))])


def test_a_mask_may_be_words(lora: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    result = pipe(**DRAW, seed=1, controls=[cr.LoRA(str(lora), mask=WordMask("cat", threshold=0.7))])
    (mask,) = result.masks.values()
    assert 0 < mask.mean() < 1
    assert not torch.equal(result.images, pipe(**DRAW, seed=1).images)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("make", [tiny_sd1, tiny_sdxl])
def test_words_that_kohya_bundled_are_known(make: Any, masked: bool, tmp_path: Path) -> None:
    """The same as the LoRA and the word as two controls; in the order of the encoders, whatever the keys' order."""
    file = tiny_lora(tmp_path / "anna.safetensors", make)
    source = make()
    names = Names(source.unet, source.text_encoder, getattr(source, "text_encoder_2", None))
    save_lora(tmp_path / "kohya.safetensors", load_lora(file, names).layers, names, "kohya")
    tensors, word = load_file(tmp_path / "kohya.safetensors"), tiny_word(source)
    ends = {"clip_l": "clip_l" if len(word) > 1 else "string_to_param.*", "clip_g": "clip_g"}
    bundled = {**{f"bundle_emb.<anna>.{ends[end]}": vectors for end, vectors in word.items()}, **tensors}
    save_file(bundled, str(tmp_path / "bundled.safetensors"))
    pipe = cr.Pipeline.from_diffusers(make())
    mask: dict[str, Any] = {"mask": Image.new("L", (8, 8), 255)} if masked else {}
    settings: dict[str, Any] = {"prompt": "a red <anna>"}
    plain = [cr.LoRA(str(tmp_path / "kohya.safetensors"), **mask), cr.TextualInversion(word, token="<anna>")]
    expected = drawn(pipe, plain, **settings)
    before = traces(pipe)
    for model in (str(tmp_path / "bundled.safetensors"), bundled):
        found = drawn(pipe, [cr.LoRA(model, **mask)], **settings)
        assert (found - expected).abs().max() <= 1e-5 * expected.std()
    assert (expected - drawn(pipe, plain[:1], **settings)).abs().max() > 0.01 * expected.std()
    assert traces(pipe) == before and not any("run" in str(key[0]) for key in pipe.backbone.kept)
    with pytest.raises(InputError, match="two words"):
        wrong = {"bundle_emb.two words.clip_l": word["clip_l"], **tensors}
        drawn(pipe, [cr.LoRA(wrong)])


def test_what_was_read_and_assumed_is_said(lora: Path, tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    tensors = load_file(lora)
    save_file(tensors, str(tmp_path / "bare.safetensors"))
    control = cr.LoRA(str(tmp_path / "bare.safetensors"))
    notes = pipe(**DRAW, seed=1, controls=[control]).manifest["notes"]
    assert notes[0].startswith("LoRA: ") and f"{len(tensors)} of {len(tensors)} keys read: " in notes[0]
    assert "layers of the unet" in notes[0] and "layers of the text_encoder" in notes[0]
    assert "no alpha" in notes[1] and len(notes) == 2
    assert len(pipe(**DRAW, seed=1, controls=[cr.LoRA(str(lora))]).manifest["notes"]) == 1
    spec = cr.RunSpec(prompt="a red cat", num_inference_steps=2, controls=[control])
    assert [line for line in notes if f"note: {line}" in str(pipe.explain(spec))] == notes
    lost = cr.RunSpec(prompt="a red cat", num_inference_steps=2, controls=[cr.LoRA("lost.safetensors")])
    assert "would stop here" in str(pipe.explain(lost)) and "lost.safetensors" in str(pipe.explain(lost))
