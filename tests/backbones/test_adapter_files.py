"""What a file is, told from its keys: every kind and form, the base model by shapes, every key accounted for."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ControlNetModel, T2IAdapter, UNet2DConditionModel
from safetensors.torch import save_file

from controlroom.backbones.adapter_files import recognise, recognise_header
from controlroom.backbones.bases import SD1, SD2, XL
from controlroom.backbones.differences import FILE
from controlroom.backbones.file_header import Header, header_of
from controlroom.backbones.loading import theatre_folder
from controlroom.core.errors import ModelError
from tests.backbones.test_controlnet_files import original
from tests.controls.nets import gated_unet, tiny_controlnet, tiny_ip_adapter, tiny_t2i_adapter, write_uni_controlnet
from tests.ldm import ldm_checkpoint
from tests.saved import tiny_folder
from tests.tiny import tiny_sd1, tiny_unet

ATTN2 = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
KOHYA = f"lora_unet_{ATTN2.replace('.', '_')}"
WIDTHS = {768: SD1, 1024: SD2, 2048: XL}


def tensors(shapes: dict[str, tuple[int, ...]]) -> Header:
    return header_of({key: torch.zeros(shape) for key, shape in shapes.items()}, "x.safetensors")


def low_rank(name: str, ends: tuple[str, str], width: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.{ends[0]}": (4, width), f"{name}.{ends[1]}": (640, 4)}


LORAS: dict[str, Callable[[int], dict[str, tuple[int, ...]]]] = {
    "PEFT": lambda w: low_rank(f"base_model.model.{ATTN2}", ("lora_A.weight", "lora_B.weight"), w),
    "kohya": lambda w: {**low_rank(KOHYA, ("lora_down.weight", "lora_up.weight"), w), f"{KOHYA}.alpha": ()},
    "ComfyUI": lambda w: low_rank(
        "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn2.to_k", ("lora_A.weight", "lora_B.weight"), w
    ),
    "diffusers": lambda w: low_rank(f"unet.{ATTN2}", ("lora_A.weight", "lora_B.weight"), w),
    "diffusers (old)": lambda w: low_rank(
        ATTN2.replace(".to_k", ".processor.to_k_lora"), ("down.weight", "up.weight"), w
    ),
    "kohya, LoHa": lambda w: {
        f"{KOHYA}.hada_w1_a": (640, 4),
        f"{KOHYA}.hada_w1_b": (4, w),
        f"{KOHYA}.hada_w2_a": (640, 4),
        f"{KOHYA}.hada_w2_b": (4, w),
    },
    "kohya, LoKr": lambda w: {
        f"{KOHYA}.lokr_w1": (8, 8),
        f"{KOHYA}.lokr_w2_a": (80, 4),
        f"{KOHYA}.lokr_w2_b": (4, w // 8),
    },
    "kohya, DoRA": lambda w: {
        **low_rank(KOHYA, ("lora_down.weight", "lora_up.weight"), w),
        f"{KOHYA}.dora_scale": (640, 1),
    },
    "kohya, full differences": lambda w: {f"{KOHYA}.diff": (640, w)},
}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("dialect", LORAS)
def test_loras(dialect: str, width: int) -> None:
    shapes = LORAS[dialect](width)
    text = {f"lora_te_text_model_encoder_layers_0_self_attn_q_proj.{end}": (4, 768) for end in ("lora_down.weight",)}
    text = text if dialect.startswith("kohya") else {}
    found = recognise_header(tensors({**shapes, **text}))
    assert (found.kind, found.name, found.base) == ("lora", f"LoRA ({dialect})", WIDTHS[width])
    assert found.groups["of the UNet"] == len(shapes) and sum(found.groups.values()) == found.keys
    assert found.use == "cr.LoRA('x.safetensors')"
    assert any("no alpha" in note for note in found.notes) == (dialect != "kohya")


def test_a_lora_of_text_encoders_and_with_words() -> None:
    te = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer"
    found = recognise_header(tensors({f"{te}.down.weight": (4, 1280), f"{te}.up.weight": (1280, 4)}))
    assert found.base == XL and found.groups == {"of the second text encoder": 2}
    words = {"bundle_emb.anna.clip_l": (2, 768), "bundle_emb.anna.clip_g": (2, 1280)}
    found = recognise_header(tensors({**LORAS["kohya"](2048), **words}))
    assert found.groups == {"of the UNet": 3, "of learned words": 2}
    with pytest.raises(ModelError, match=r"LoRA \(kohya\).*nothing reads 1 of its 4 keys: 'strange\.key'"):
        recognise_header(tensors({**LORAS["kohya"](768), "strange.key": (1,)}))


@pytest.mark.parametrize(
    ("shapes", "form", "base"),
    [
        ({"<anna>": (3, 768)}, "diffusers", SD1),
        ({"<anna>": (1024,)}, "diffusers", SD2),
        ({"emb_params": (3, 768)}, "kohya", SD1),
        ({"clip_l": (2, 768), "clip_g": (2, 1280)}, "one for each text encoder", XL),
        ({"clip_l": (2, 768)}, "ComfyUI", SD1),
        ({"string_to_param.*": (2, 1024)}, "A1111", SD2),
    ],
)
def test_learned_words(shapes: dict[str, tuple[int, ...]], form: str, base: str) -> None:
    found = recognise_header(tensors(shapes))
    assert (found.kind, found.name, found.base) == ("textual_inversion", f"learned word ({form})", base)
    assert ("token=" in found.use) == (form != "diffusers")


@lru_cache(maxsize=1)
def one_unet() -> Any:
    return tiny_unet()


@pytest.mark.parametrize(
    ("kind", "form"), [("base", "base"), ("full", "full face"), ("plus", "plus"), ("faceid", "FaceID")]
)
def test_ip_adapters(kind: str, form: str) -> None:
    found = recognise_header(header_of(tiny_ip_adapter(one_unet(), kind), "x.safetensors"))
    assert found.name == f"IP-Adapter ({form})" and found.base == "a model with words 32 wide"
    assert found.use.startswith("cr.IPAdapter(") and ("embeds=" in found.use) == (kind == "faceid")
    assert sum(found.groups.values()) == found.keys


def test_relatives_of_ip_adapter() -> None:
    plus = {f"image_proj.{key}": shape for key, shape in resampler(1280, 512, 16, 2048).items()}
    layers = {f"ip_adapter.{2 * i + 1}.to_{p}_ip.weight": (640, 2048) for i in range(70) for p in "kv"}
    found = recognise_header(tensors({**plus, **layers}))
    assert (found.kind, found.name, found.base) == ("ip_adapter", "InstantID adapter", XL)
    assert found.control == "InstantID" and "70 cross-attention layers" in found.notes
    clip = {**plus, "image_proj.proj_in.weight": (1280, 1280)}
    assert recognise_header(tensors({**clip, **layers})).name == "IP-Adapter (plus)"
    faceid = {
        f"image_proj.perceiver_resampler.{k}": s for k, s in resampler(768, 1280, 4, 768).items() if k != "latents"
    }
    faceid |= {f"image_proj.{p}.{end}": (4,) for p in ("proj.0", "proj.2", "norm") for end in ("weight", "bias")}
    faceid |= {f"ip_adapter.{i}.to_{p}_lora.{e}.weight": (4, 4) for i in (0, 1) for p in "qkv" for e in ("up", "down")}
    found = recognise_header(tensors({**faceid, "ip_adapter.1.to_k_ip.weight": (320, 768)}))
    assert (found.name, found.base) == ("IP-Adapter (FaceID-plus)", SD1) and found.groups[
        "of changes to the layers"
    ] == 12
    grounded = {k.replace(".latents", ".grounding_latents"): s for k, s in plus.items()}
    grounded |= {f"image_proj.latent_{p}.weight": (4,) for p in ("proj.0", "proj.2", "norm")}
    grounded |= {k.replace("ip_adapter", "ms_adapter"): s for k, s in layers.items()}
    found = recognise_header(tensors({**grounded, "dummy_image_tokens": (1, 4, 2048)}))
    assert (found.kind, found.base) == ("ms_diffusion", XL)
    photo = {"id_encoder.vision_model.x.weight": (1,), "id_encoder.visual_projection_2.weight": (1280, 1024)}
    photo |= {"id_encoder.fuse_module.layer_norm.weight": (2048,), "lora_weights.unet.x": (1,)}
    assert recognise_header(tensors(photo)).name == "PhotoMaker (v1)"
    found = recognise_header(tensors({**photo, "id_encoder.qformer_perceiver.token_proj.0.weight": (1,)}))
    assert (found.name, found.base) == ("PhotoMaker (v2)", XL)


def resampler(hidden: int, reads: int, tokens: int, width: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"latents": (1, tokens, hidden), "proj_in.weight": (hidden, reads)}
    found |= {"proj_in.bias": (hidden,), "proj_out.weight": (width, hidden), "norm_out.weight": (width,)}
    for i in range(2):
        found |= {f"layers.{i}.0.{name}.weight": (4,) for name in ("norm1", "norm2", "to_q", "to_kv", "to_out")}
        found |= {f"layers.{i}.1.{name}.weight": (4,) for name in ("0", "1", "3")}
    return found


def test_controlnets_and_t2i_adapters(tmp_path: Path) -> None:
    net = tiny_controlnet(one_unet(), conditioning_embedding_out_channels=(4, 8, 12, 16), conditioning_channels=11)
    for form, stored in (
        ("diffusers", dict(net.state_dict())),
        ("original layout", original(net, "")),
        ("original layout", original(net, "control_model.")),
    ):
        found = recognise_header(header_of(stored, "x.safetensors"))
        assert (found.name, found.keys) == (f"ControlNet ({form})", len(stored))
        assert "reads 11 channels of a condition" in found.notes and found.control == "ControlNet"
    whole = {**original(net, "control_model."), **ldm_checkpoint(tiny_sd1())}
    found = recognise_header(header_of(whole, "x.safetensors"))
    assert found.kind == "controlnet" and "whole base" in found.notes[1]
    net.save_pretrained(tmp_path / "net")
    assert recognise(tmp_path / "net").use == f"cr.ControlNet({str(tmp_path / 'net')!r}, image='map.png')"
    for light in (False, True):
        adapter = tiny_t2i_adapter(one_unet(), light=light)
        found = recognise_header(header_of(adapter.state_dict(), "x.safetensors"))
        assert found.name == f"T2I-Adapter ({'light, ' if light else ''}diffusers)" and found.base == ""
    with torch.device("meta"):
        sizes = {"full_adapter": (f"{SD1} or 2", 8), "full_adapter_xl": (XL, 16), "light_adapter": (f"{SD1} or 2", 8)}
        for kind, (base, factor) in sizes.items():
            big = T2IAdapter(3, [320, 640, 1280, 1280], 2, downscale_factor=factor, adapter_type=kind)
            assert recognise_header(header_of(big.state_dict(), "x")).base == base
        unet = UNet2DConditionModel(cross_attention_dim=1024)
        assert recognise_header(header_of(ControlNetModel.from_unet(unet).state_dict(), "x")).base == SD2
    flat = {"conv_in.weight": (320, 64, 3, 3), "body.0.block1.weight": (320, 320, 3, 3)}
    assert recognise_header(tensors(flat)).name == "T2I-Adapter (original layout)"


@pytest.mark.parametrize(
    ("channels", "form", "control"),
    [
        (4, "", "Pipeline"),
        (5, ", depth to image", "DepthToImage"),
        (8, ", InstructPix2Pix", "InstructPix2Pix"),
        (9, ", inpainting", "Inpaint"),
    ],
)
def test_networks(channels: int, form: str, control: str) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(in_channels=channels, cross_attention_dim=768)
    found = recognise_header(header_of(unet.state_dict(), "x"))
    assert (found.name, found.base, found.control) == (f"UNet (diffusers{form})", SD1, control)


def test_parts_of_a_model() -> None:
    kinds = {part: recognise(tiny_folder() / part).kind for part in ("unet", "vae", "text_encoder")}
    assert kinds == {"unet": "unet", "vae": "autoencoder", "text_encoder": "clip"}


def test_networks_that_are_stored_as_differences_are_what_they_are_whole() -> None:
    folder = theatre_folder()
    assert recognise(folder / "appearance").control == "AppearanceControl"
    assert recognise(folder / "multi").kind == "controlnet"
    found = recognise(folder / "instruct_pix2pix")
    assert found.control == "InstructPix2Pix" and found.keys == recognise(folder / "unet").keys
    assert recognise(folder / "instruct_pix2pix" / FILE).name == found.name


def test_tensors_with_another_number_of_axes_are_refused() -> None:
    for weights in (
        {"conv_in.weight": (36,)},
        {"conv_in.weight": (64, 4, 3, 3), "down_blocks.0.attn2.to_k.weight": (9,)},
    ):
        with pytest.raises(ModelError, match="number of axes|no file that"):
            recognise_header(tensors(weights))


def test_gligen_and_uni_controlnet(tmp_path: Path) -> None:
    assert recognise_header(header_of(gated_unet(one_unet()).state_dict(), "x")).control == "Gligen"
    found = recognise(write_uni_controlnet(tiny_unet(), tmp_path / "uni"))
    assert found.kind == "uni_controlnet" and sum(found.groups.values()) == found.keys > 0
    assert "knows canny, depth, pose" in found.notes
    published = {"local_adapter.input_blocks.0.0.weight": (320, 4, 3, 3), "global_adapter.x.weight": (4, 4)}
    assert recognise_header(tensors(published)).name == "Uni-ControlNet (local and global, published)"


def test_checkpoints_and_folders(tmp_path: Path) -> None:
    weights = ldm_checkpoint(tiny_sd1())
    found = recognise_header(header_of({**weights, "betas": torch.zeros(3)}, "x.safetensors"))
    assert (found.kind, found.use) == ("checkpoint", "cr.Pipeline.from_pretrained('x.safetensors')")
    assert found.keys == len(weights) + 1 and not found.notes
    only = {key: value for key, value in weights.items() if key.startswith("model.")}
    assert "without autoencoder and text encoder" in recognise_header(header_of(only, "x")).notes[0]
    for width, base in WIDTHS.items():
        part = {
            "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, width),
            "model.diffusion_model.input_blocks.0.0.weight": (320, 8, 3, 3),
        }
        found = recognise_header(tensors(part))
        assert (found.base, found.control) == (base, "InstructPix2Pix")
    found = recognise(tiny_folder("sdxl"))
    assert found.kind == "pipeline" and "StableDiffusionXLPipeline" in found.name
    assert sum(found.groups.values()) == found.keys > 100
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match=r"holds 0 \.safetensors files"):
        recognise(tmp_path / "empty")


def test_unknown_files_are_refused_with_their_keys(tmp_path: Path) -> None:
    save_file(
        {"encoder.0.weight": torch.zeros(2, 2), "encoder.0.bias": torch.zeros(2)}, str(tmp_path / "x.safetensors")
    )
    with pytest.raises(ModelError, match=r"nothing reads its 2 keys, 'encoder\.0\.bias', 'encoder\.0\.weight'"):
        recognise(tmp_path / "x.safetensors")
    for name, data, said in (
        ("x.bin", b"", "controlroom convert"),
        ("lost.safetensors", None, "no file"),
        ("cut.safetensors", b"\x10\0\0\0\0\0\0\0{broken", "cannot be loaded"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(ModelError, match=said):
            recognise(tmp_path / name)
    with pytest.raises(ModelError, match="empty"):
        recognise_header(Header({}))
