"""Files of ControlNets: the original layout, told from its keys, becomes the same network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from controlroom.backbones.controlnet import load_controlnet
from controlroom.core.errors import ModelError
from tests.controls.nets import tiny_controlnet
from tests.ldm import RESNET
from tests.tiny import tiny_unet

# The miniature: two levels of one layer; the first has attention and halves.
PLACES = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "controlnet_mid_block": "middle_block_out.0",
    "controlnet_cond_embedding.conv_in": "input_hint_block.0",
    "controlnet_cond_embedding.conv_out": "input_hint_block.14",
    **{f"controlnet_cond_embedding.blocks.{i}": f"input_hint_block.{2 * i + 2}" for i in range(6)},
    **{f"controlnet_down_blocks.{i}": f"zero_convs.{i}.0" for i in range(4)},
}


def original(net: Any, prefix: str) -> dict[str, torch.Tensor]:
    """The network's weights under the names of the original code."""
    found = {}
    for key, value in net.state_dict().items():
        place = next(p for p in PLACES if key.startswith(p + "."))
        rest = key.removeprefix(place + ".")
        if ".resnets." in place:
            layer, _, kind = rest.partition(".")
            rest = f"{RESNET[layer]}.{kind}"
        found[f"{prefix}{PLACES[place]}.{rest}"] = value
    return found


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_original_keys(tmp_path: Path, prefix: str) -> None:
    unet = tiny_unet()
    net = tiny_controlnet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    stored = original(net, prefix)
    assert len(stored) == len(net.state_dict())
    save_file(stored, tmp_path / "net.safetensors")
    loaded = load_controlnet(tmp_path / "net.safetensors", unet)
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    del stored[f"{prefix}middle_block.1.proj_in.weight"]
    save_file(stored, tmp_path / "net.safetensors")
    with pytest.raises(ModelError, match="missing"):
        load_controlnet(tmp_path / "net.safetensors", unet)


def test_a_file_draws_as_the_network_does(tmp_path: Path) -> None:
    """``control_*.pth`` of the original code, stored as safetensors: same residuals, and the channels of the file."""
    unet = tiny_unet(in_channels=9)  # for inpainting: the ControlNet reads the latents alone
    net = tiny_controlnet(tiny_unet(), conditioning_embedding_out_channels=(4, 8, 12, 16), conditioning_channels=11)
    save_file(original(net, "control_model."), tmp_path / "control_sd15.safetensors")
    loaded = load_controlnet(tmp_path / "control_sd15.safetensors", unet)
    assert (loaded.config.in_channels, loaded.config.conditioning_channels) == (4, 11)
    generator = torch.Generator().manual_seed(0)
    latents, words = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 5, 32, generator=generator)
    condition = torch.rand(2, 11, 64, 64, generator=generator)
    with torch.no_grad():
        expected, found = (
            net_(latents, torch.tensor(500), words, controlnet_cond=condition, return_dict=False)
            for net_ in (net, loaded)
        )
    for ours, theirs in zip((*found[0], found[1]), (*expected[0], expected[1]), strict=True):
        assert torch.equal(ours, theirs) and theirs.abs().max() > 0


def test_original_keys_of_stable_diffusion_xl(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
    }
    unet = tiny_unet(**settings)
    net = tiny_controlnet(unet, conditioning_embedding_out_channels=(4, 8, 12, 16))
    save_file(original(net, "control_model."), tmp_path / "xl.safetensors")
    loaded = load_controlnet(tmp_path / "xl.safetensors", unet).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in net.state_dict().items())


def test_networks_for_other_models_are_named_by_their_shapes(tmp_path: Path) -> None:
    two, one = tiny_unet(cross=1024), tiny_unet(cross=768)
    net = tiny_controlnet(two, conditioning_embedding_out_channels=(4, 8, 12, 16))
    net.save_pretrained(tmp_path / "folder")
    save_file(original(net, "control_model."), tmp_path / "ldm.safetensors")
    save_file(dict(net.state_dict()), tmp_path / "diffusers.safetensors")
    for name in ("folder", "ldm.safetensors", "diffusers.safetensors"):
        with pytest.raises(ModelError, match=r"Stable Diffusion 2 \(words 1024 wide\).*Stable Diffusion 1") as error:
            load_controlnet(tmp_path / name, one)
        assert name in str(error.value)
