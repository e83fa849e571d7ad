"""A theatre of miniatures with random weights, in the layout of the package's assets."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from controlroom.signals.readers import KeypointReader
from tests.controls.nets import tiny_controlnet
from tests.tiny import tiny_sd1, tiny_unet

READER_SIZE = 64


def sure_reader(seed: int = 0) -> KeypointReader:
    """A keypoint network of random weights that is sure of every joint."""
    torch.manual_seed(seed)
    reader = KeypointReader(size=READER_SIZE, width=8).eval()
    with torch.no_grad():
        reader.presence.weight.zero_()
        reader.presence.bias.fill_(4.0)
        reader.joints.weight.mul_(30.0)
    return reader


def write_theatre(folder: Path) -> Path:
    """Save it: the checkpoint, ``pose/``, ``appearance/``, ``readers/keypoints/``."""
    tiny_sd1().save_pretrained(str(folder))
    tiny_controlnet(tiny_unet(), conditioning_embedding_out_channels=(4, 8)).save_pretrained(str(folder / "pose"))
    tiny_unet(seed=5).save_pretrained(str(folder / "appearance"))
    sure_reader().save(folder / "readers" / "keypoints")
    assert json.loads((folder / "readers" / "keypoints" / "config.json").read_text())["size"] == READER_SIZE
    return folder
