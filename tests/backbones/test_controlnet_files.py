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
