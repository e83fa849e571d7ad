"""Variants of IP-Adapter's files: FaceID-plus as diffusers has it, order of layers, what we save, who it is for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import controlroom as cr
from controlroom.backbones.bases import SD1, XL
from controlroom.backbones.ip_adapter import adapter_from_tensors, check_adapter, layer_numbers, save_ip_adapter
from controlroom.backbones.lora_names import UNET
from controlroom.backbones.standard_models import empty_parts
from controlroom.core.errors import InputError, ModelError
from tests.controls.nets import tiny_image_encoder, tiny_ip_adapter
from tests.tiny import BACKBONES, tiny_unet

DRAW: dict[str, Any] = {"prompt": "a red cat", "guidance_scale": 7.5, "num_inference_steps": 2, "output_type": "latent"}
FACE, TOKENS = 10, 4
GENERATOR = torch.Generator().manual_seed(2)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=GENERATOR)


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((50, 40), Image.Resampling.BICUBIC)


def face_id_plus(unet: Any) -> dict[str, torch.Tensor]:
    """Random tensors of a FaceID-plus file, with its changes to the layers."""
    width = int(unet.config.cross_attention_dim)
    # diffusers' projection is as wide inside as the words are; its heads are 64 wide.
    found = {key: value for key, value in tiny_ip_adapter(unet, "faceid").items() if key.startswith("ip_adapter.")}
    image: dict[str, torch.Tensor] = {
        "proj.0.weight": noise(2 * FACE, FACE) / 3,
        "proj.0.bias": noise(2 * FACE),
        "proj.2.weight": noise(TOKENS * width, 2 * FACE) / 4,
        "proj.2.bias": noise(TOKENS * width),
        "norm.weight": 1 + 0.3 * noise(width),
        "norm.bias": noise(width),
        "perceiver_resampler.proj_in.weight": noise(width, 32) / 5,
        "perceiver_resampler.proj_in.bias": noise(width),
        "perceiver_resampler.proj_out.weight": noise(width, width) / width**0.5,
        "perceiver_resampler.proj_out.bias": noise(width),
        "perceiver_resampler.norm_out.weight": 1 + 0.3 * noise(width),
        "perceiver_resampler.norm_out.bias": noise(width),
    }
    for i in range(4):
        sizes = {"0.to_q": (128, width), "0.to_kv": (256, width), "0.to_out": (width, 128)}
        sizes |= {"1.1": (4 * width, width), "1.3": (width, 4 * width)}
        image |= {f"perceiver_resampler.layers.{i}.{k}.weight": noise(*s) / s[1] ** 0.5 for k, s in sizes.items()}
        for name in ("0.norm1", "0.norm2", "1.0"):
            image[f"perceiver_resampler.layers.{i}.{name}.weight"] = 1 + 0.3 * noise(width)
            image[f"perceiver_resampler.layers.{i}.{name}.bias"] = 0.3 * noise(width)
    return {**{f"image_proj.{key}": value for key, value in image.items()}, **found}


def nested(file: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in file.items():
        group, _, rest = key.partition(".")
        found[group][rest] = value
    return found


@pytest.mark.parametrize("shortcut", [None, 0.7])
def test_face_id_plus_equals_diffusers(shortcut: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Version 1, and version 2 (its shortcut), whose files are alike."""
    pytest.importorskip("peft")
    from transformers import CLIPImageProcessor

    encoder, unet = tiny_image_encoder(), tiny_unet()
    file = face_id_plus(unet)
    identity = noise(2, 1, FACE)
    identity[0] = 0
    pipe = BACKBONES["sd1"]()
    pipe.set_progress_bar_config(disable=True)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    pipe.register_modules(image_encoder=encoder, feature_extractor=processor)
    pipe.load_ip_adapter(nested(file), subfolder="", weight_name="", image_encoder_folder=None)
    pipe.set_ip_adapter_scale(0.8)
    projection = pipe.unet.encoder_hid_proj.image_projection_layers[0]
    states = pipe.prepare_ip_adapter_image_embeds([[picture()]], None, torch.device("cpu"), 1, True)[0]
    projection.clip_embeds = states.reshape(2, 1, *states.shape[-2:])
    projection.shortcut, projection.shortcut_scale = shortcut is not None, shortcut or 1.0
    settings = {**DRAW, "ip_adapter_image_embeds": [identity]}
    reference = pipe(**settings, generator=torch.Generator().manual_seed(3)).images
    mine = cr.Pipeline.from_diffusers(BACKBONES["sd1"]())
    control = cr.IPAdapter(
        file, image=picture(), embeds=identity[1], scale=0.8, image_encoder=encoder, shortcut=shortcut
    )
    found = mine(**DRAW, controls=[control], generator=torch.Generator().manual_seed(3)).images
    assert torch.isfinite(reference).all() and (found - reference).abs().max() <= 1e-4 * reference.std()
    plain = mine(**DRAW, generator=torch.Generator().manual_seed(3)).images
    assert (found - plain).abs().max() > 0.05 * reference.std()
    monkeypatch.setitem(file, "image_proj.perceiver_resampler.strange", torch.zeros(1))
    for wrong, error, said in (
        (cr.IPAdapter(face_id_plus(unet), embeds=identity[1]), InputError, "embeds and image"),
        (control.model_copy(update={"embeds": torch.zeros(2, FACE)}), InputError, "2 identities.*1 pictures"),
        (control.model_copy(update={"model": file}), ModelError, "strange"),
        (cr.IPAdapter(tiny_ip_adapter(unet), embeds=torch.zeros(1, 24), shortcut=1.0), InputError, "FaceID-plus"),
    ):
        with pytest.raises(error, match=said):
            mine(**DRAW, controls=[wrong], seed=1)


def test_layers_are_numbered_down_up_mid_in_every_published_model() -> None:
    """The numbers of the note: Stable Diffusion 1 has 1 to 31, XL 1 to 139; the middle comes last."""
    for base, count in ((SD1, 16), (XL, 70)):
        numbers = layer_numbers(empty_parts(base)[UNET])
        assert list(numbers.values()) == list(range(1, 2 * count, 2))
        places = [name.partition("_")[0] for name in numbers]
        assert places == sorted(places, key=["down", "up", "mid"].index) and places[-1] == "mid"


@pytest.mark.parametrize("variant", ["base", "plus", "full", "faceid"])
def test_what_is_saved_loads_in_diffusers(variant: str, tmp_path: Path) -> None:
    encoder, kind = tiny_image_encoder(), "sd1"
    pipe = cr.Pipeline.from_diffusers(BACKBONES[kind]())
    model = adapter_from_tensors(tiny_ip_adapter(pipe.unet, variant), pipe.unet)
    save_ip_adapter(model, tmp_path / "ours.safetensors")
    shapes = {"base": (1, 1, 24), "faceid": (1, 1, FACE)}
    embeds = noise(*shapes.get(variant, (1, 1, 17, 32)))
    theirs = BACKBONES[kind]()
    theirs.set_progress_bar_config(disable=True)
    theirs.register_modules(image_encoder=encoder)
    theirs.load_ip_adapter(str(tmp_path), subfolder="", weight_name="ours.safetensors", image_encoder_folder=None)
    negative = torch.zeros_like(embeds)
    settings = {**DRAW, "ip_adapter_image_embeds": [torch.cat([negative, embeds])]}
    reference = theirs(**settings, generator=torch.Generator().manual_seed(3)).images
    control = cr.IPAdapter(str(tmp_path / "ours.safetensors"), embeds=torch.cat([negative, embeds]))
    found = pipe(**DRAW, controls=[control], generator=torch.Generator().manual_seed(3)).images
    assert (found - reference).abs().max() <= 1e-4 * reference.std()


def test_one_for_another_model_says_for_which() -> None:
    big = {"image_proj.proj.weight": torch.zeros(8192, 24), "image_proj.proj.bias": torch.zeros(8192)}
    big |= {f"image_proj.norm.{end}": torch.zeros(2048) for end in ("weight", "bias")}
    big |= {f"ip_adapter.{n}.to_{p}_ip.weight": torch.zeros(4, 2048) for n in range(1, 140, 2) for p in "kv"}
    unet = tiny_unet()
    with pytest.raises(ModelError, match=rf"another base model, {XL}: it has 70 cross-attention layers, this model 6"):
        adapter_from_tensors(big, unet)
    model = adapter_from_tensors(tiny_ip_adapter(unet), unet)
    with pytest.raises(ModelError, match="a model with words 32 wide: its tokens are 32 wide, this model's words 48"):
        check_adapter(model, tiny_unet(cross=48))
