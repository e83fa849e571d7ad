"""Converted files draw what the originals draw: between dialects, out of pickles, from single files to folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import controlroom as cr
from controlroom.backbones.adapter_files import recognise
from controlroom.backbones.bases import SD1, SD2, XL
from controlroom.backbones.convert import convert
from controlroom.backbones.lora_names import UNET
from controlroom.backbones.standard_models import empty_names
from controlroom.core.errors import InputError, ModelError, OutputError
from tests.backbones.test_controlnet_files import original
from tests.controls.loras import ATTENTION, TEXT, add_peft, randomise, saved_by_diffusers, tiny_word
from tests.controls.nets import tiny_controlnet, tiny_ip_adapter
from tests.ldm import ldm_checkpoint
from tests.saved import tiny_folder
from tests.tiny import BACKBONES, tiny_sd1, tiny_unet

DRAW: dict[str, Any] = {"prompt": "a red cat", "num_inference_steps": 2, "guidance_scale": 5.0, "output_type": "latent"}


def drawn(pipe: Any, *controls: Any, **more: Any) -> torch.Tensor:
    return pipe(**{**DRAW, **more}, controls=list(controls), generator=torch.Generator().manual_seed(3)).images


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.std())


@pytest.mark.parametrize("backbone", ["sd1", "sdxl"])
def test_loras_from_dialect_to_dialect(backbone: str, tmp_path: Path) -> None:
    """diffusers -> kohya -> PEFT -> diffusers, each drawn; words that came along lie beside it."""
    source = BACKBONES[backbone]()
    add_peft(source.unet, [*ATTENTION, "conv1"])
    add_peft(source.text_encoder, TEXT, seed=4)
    if backbone == "sdxl":
        add_peft(source.text_encoder_2, TEXT, seed=5)
    first = saved_by_diffusers(source, tmp_path)
    pipe, base = cr.Pipeline.from_diffusers(BACKBONES[backbone]()), tiny_folder(backbone)
    expected = drawn(pipe, cr.LoRA(str(first)))
    assert not close(drawn(pipe), expected)
    kohya = convert(first, tmp_path / "kohya.safetensors", "kohya", base)
    assert "keys read" in kohya.notes[0] and recognise(kohya.files[0]).name == "LoRA (kohya)"
    assert close(drawn(pipe, cr.LoRA(str(kohya.files[0]))), expected)
    peft = convert(kohya.files[0], tmp_path / "peft", "peft", base)
    assert [path.name for path in peft.files] == ["peft", "text_encoder", "text_encoder_2"][: len(peft.files)]
    assert len(peft.files) == (3 if backbone == "sdxl" else 2)
    assert close(drawn(pipe, *(cr.LoRA(str(path)) for path in peft.files)), expected)
    net = BACKBONES[backbone]()
    net.unet = PeftModel.from_pretrained(net.unet, str(peft.files[0])).merge_and_unload()
    theirs = drawn(cr.Pipeline.from_diffusers(net), *(cr.LoRA(str(path)) for path in peft.files[1:]))
    assert (theirs - expected).abs().max() < 1e-4 * expected.std()
    again = convert(peft.files[0], tmp_path / "again.safetensors", "diffusers", base)
    rest = [cr.LoRA(str(path)) for path in peft.files[1:]]
    assert close(drawn(pipe, cr.LoRA(str(again.files[0])), *rest), expected)
    word = tiny_word(source)
    ends = {"clip_l": "clip_l" if len(word) > 1 else "string_to_param.*", "clip_g": "clip_g"}
    bundled = {**load_file(kohya.files[0]), **{f"bundle_emb.<anna>.{ends[key]}": value for key, value in word.items()}}
    save_file(bundled, str(tmp_path / "bundled.safetensors"))
    wanted = drawn(pipe, cr.LoRA(bundled), prompt="a <anna>")
    split = convert(tmp_path / "bundled.safetensors", tmp_path / "split.safetensors", "diffusers", base)
    assert [path.name for path in split.files] == ["split.safetensors", "split.anna.safetensors"]
    token = None if backbone == "sd1" else "<anna>"
    both = [cr.LoRA(str(split.files[0])), cr.TextualInversion(str(split.files[1]), token=token)]
    assert close(drawn(pipe, *both, prompt="a <anna>"), wanted)
    kept = convert(tmp_path / "bundled.safetensors", tmp_path / "kept.safetensors", "kohya", base)
    assert close(drawn(pipe, cr.LoRA(str(kept.files[0])), prompt="a <anna>"), wanted)


@pytest.mark.parametrize("kind", ["dora", "loha", "loha-core", "lokr", "lokr-core", "rslora"])
def test_relatives_of_loras_become_kohyas(kind: str, tmp_path: Path) -> None:
    targets = ["to_q", "to_v", "conv1"]
    config: Any = {
        "dora": LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_dora=True),
        "rslora": LoraConfig(r=3, lora_alpha=5, target_modules=targets, use_rslora=True),
        "loha": LoHaConfig(r=3, alpha=5, target_modules=targets),
        "loha-core": LoHaConfig(r=3, alpha=5, target_modules=targets, use_effective_conv2d=True),
        "lokr": LoKrConfig(r=2, alpha=5, target_modules=targets),
        "lokr-core": LoKrConfig(r=2, alpha=5, target_modules=targets, use_effective_conv2d=True),
    }[kind]
    model = get_peft_model(tiny_unet(), config)
    randomise(model, 2)
    model.save_pretrained(str(tmp_path / "peft"))
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    expected = drawn(pipe, cr.LoRA(str(tmp_path / "peft")))
    done = convert(tmp_path / "peft", tmp_path / "kohya.safetensors", "kohya", tiny_folder())
    found = drawn(pipe, cr.LoRA(str(done.files[0])))
    assert (found - expected).abs().max() <= 1e-4 * expected.std() and not close(drawn(pipe), expected)
    form = {"dora": "DoRA", "rslora": ""}.get(kind, "LoHa" if "loha" in kind else "LoKr")
    assert recognise(done.files[0]).name == f"LoRA (kohya{', ' if form else ''}{form})"
    if form in ("LoHa", "LoKr"):
        with pytest.raises(ModelError, match="Use kohya's"):
            convert(done.files[0], tmp_path / "d.safetensors", "diffusers", tiny_folder())
        with pytest.raises(ModelError, match="Use kohya's"):
            convert(done.files[0], tmp_path / "p", "peft", tiny_folder())
        assert not list(tmp_path.glob("*.part")) and not (tmp_path / "p").exists()


def test_published_models_are_known_without_a_folder(tmp_path: Path) -> None:
    counts = {SD1: (16, 12), SD2: (16, 23), XL: (70, 12)}
    for base, (crossed, layers) in counts.items():
        names = empty_names(base)
        assert sum(path.endswith("attn2.to_k") for part, path in names.layers if part == UNET) == crossed
        assert sum(path.endswith("q_proj") for part, path in names.layers if part == "text_encoder") == layers
    assert sum(path.endswith("q_proj") for part, path in names.layers if part == "text_encoder_2") == 32
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"unet.{path}.lora_A.weight": torch.randn(2, 2048), f"unet.{path}.lora_B.weight": torch.randn(640, 2)}
    save_file(tensors, str(tmp_path / "xl.safetensors"))
    convert(tmp_path / "xl.safetensors", tmp_path / "kohya.safetensors", "kohya")
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    written = load_file(tmp_path / "kohya.safetensors")
    assert set(written) == {f"{name}.{end}" for end in ("alpha", "lora_down.weight", "lora_up.weight")}
    assert float(written[f"{name}.alpha"]) == 2.0
    wrong = {key.replace("attn2", "attn9"): value for key, value in tensors.items()}
    save_file(wrong, str(tmp_path / "wrong.safetensors"))
    with pytest.raises(ModelError, match="--base"):
        convert(tmp_path / "wrong.safetensors", tmp_path / "x.safetensors", "kohya")


def test_pickles_of_adapters(tmp_path: Path) -> None:
    pipe = cr.Pipeline.from_diffusers(tiny_sd1())
    flat = tiny_ip_adapter(pipe.unet)
    nested: dict[str, Any] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in flat.items():
        group, _, rest = key.partition(".")
        nested[group][rest] = value
    torch.save(nested, tmp_path / "ip.bin")
    done = convert(tmp_path / "ip.bin", tmp_path / "ip.safetensors")
    embeds = torch.randn(1, 24, generator=torch.Generator().manual_seed(1))
    expected = drawn(pipe, cr.IPAdapter(flat, embeds=embeds))
    assert done.kind is not None and done.kind.name == "IP-Adapter (base)"
    assert (drawn(pipe, cr.IPAdapter(str(done.files[0]), embeds=embeds)) - expected).abs().max() < 1e-4 * expected.std()
    word = tiny_word(tiny_sd1())["clip_l"]
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": word}, "name": "anna", "step": 500}
    torch.save(content, tmp_path / "a1111.pt")
    done = convert(tmp_path / "a1111.pt", tmp_path / "word.safetensors")
    wanted = drawn(pipe, cr.TextualInversion({"anna": word}), prompt="a anna")
    assert torch.equal(drawn(pipe, cr.TextualInversion(str(done.files[0])), prompt="a anna"), wanted)
    theirs = tiny_sd1()
    theirs.load_textual_inversion(str(done.files[0]))
    assert (drawn(cr.Pipeline.from_diffusers(theirs), prompt="a anna") - wanted).abs().max() < 1e-4 * wanted.std()
    with safe_open(str(done.files[0]), framework="pt") as file:
        assert file.metadata()["step"] == "500"


def test_controlnets_become_folders(tmp_path: Path) -> None:
    """The published ``control_*.pth`` holds its base model too, which is left out."""
    unet = tiny_unet()
    net = tiny_controlnet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16), conditioning_channels=11).half()
    whole = {**original(net, "control_model."), **{k: v.half() for k, v in ldm_checkpoint(tiny_sd1()).items()}}
    torch.save({"state_dict": whole}, tmp_path / "control.pth")
    done = convert(tmp_path / "control.pth", tmp_path / "net", base=tiny_folder())
    assert any("base model were left out" in note for note in done.notes)
    theirs: Any = ControlNetModel.from_pretrained(str(tmp_path / "net"), torch_dtype=torch.float16)
    assert theirs.config.conditioning_channels == 11 and recognise(tmp_path / "net").name == "ControlNet (diffusers)"
    own = net.state_dict()
    assert own.keys() == theirs.state_dict().keys()
    generator = torch.Generator().manual_seed(0)
    latents, words = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    condition = torch.rand(2, 11, 64, 64, generator=generator)
    with torch.no_grad():
        expected, found = (
            each.float()(latents, torch.tensor(500), words, controlnet_cond=condition, return_dict=False)
            for each in (net, theirs)
        )
    for ours, wanted in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert torch.equal(ours, wanted) and wanted.abs().max() > 0


def test_checkpoints_become_folders(tmp_path: Path) -> None:
    save_file(ldm_checkpoint(tiny_sd1(seed=4)), str(tmp_path / "model.safetensors"))
    convert(tmp_path / "model.safetensors", tmp_path / "model", base=tiny_folder())
    found = drawn(cr.Pipeline.from_pretrained(tmp_path / "model"))
    assert (found - drawn(cr.Pipeline.from_diffusers(tiny_sd1(seed=4)))).abs().max() < 1e-5 * found.std()
    assert recognise(tmp_path / "model").kind == "pipeline" and not list(tmp_path.glob(".*"))


def test_what_cannot_be_converted_is_said_before_anything_is_written(tmp_path: Path) -> None:
    word, there = tmp_path / "word.safetensors", tmp_path / "there"
    save_file({"<anna>": torch.zeros(2, 768)}, str(word))
    there.mkdir()
    (there / "file").write_text("kept")
    save_file({"encoder.x": torch.zeros(1, 1)}, str(tmp_path / "unknown.safetensors"))
    cases: list[tuple[Any, Any, Any, Any, str]] = [
        (word, "new.safetensors", None, InputError, "already"),
        (word, "new.safetensors", "kohya", InputError, "--to is for LoRAs"),
        (word, "no/new.safetensors", None, OutputError, "does not exist"),
        (word, "there", None, OutputError, "there already"),
        (tmp_path / "lost.safetensors", "new.safetensors", None, ModelError, "no file"),
        (tmp_path / "lost.bin", "new.safetensors", None, ModelError, "no file"),
        (tmp_path / "there" / "file", "new.safetensors", None, ModelError, "neither a pickle"),
        (tmp_path / "unknown.safetensors", "new.safetensors", None, ModelError, "no file that controlroom knows"),
    ]
    before = sorted(path.name for path in tmp_path.iterdir())
    for source, target, to, kind, said in cases:
        with pytest.raises(kind, match=said):
            convert(source, tmp_path / target, to)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
