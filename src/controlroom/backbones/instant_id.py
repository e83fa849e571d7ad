"""Files of InstantID (Wang et al., arXiv 2401.07519): an IP-Adapter of plus shape, and IdentityNet, a ControlNet.

A folder holds ``ip-adapter.safetensors`` (published as a pickle, which `controlroom convert` turns into that) and
``ControlNetModel`` in diffusers' layout. The adapter's resampler reads a face's vector as a sequence of one state; its
tokens are what both networks attend to: the UNet beside the words, IdentityNet in their place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from controlroom.backbones.controlnet import check_controlnet, load_controlnet
from controlroom.backbones.image_projection import Resampler
from controlroom.backbones.ip_adapter import (
    IPAdapterModel,
    adapter_file,
    adapter_from_tensors,
    check_adapter,
    load_ip_adapter,
    save_ip_adapter,
)
from controlroom.backbones.loading import check_device, find_model, keep
from controlroom.backbones.model_files import pickle_refused
from controlroom.core.backbone import Backbone
from controlroom.core.errors import ModelError

FILE, NET, ENCODER = "ip-adapter.safetensors", "ControlNetModel", "face_encoder"


def find_identity_adapter(model: Any, backbone: Backbone) -> IPAdapterModel:
    """The adapter: of a file or folder, a mapping with a file's keys, or as it is given.

    Raises:
        ModelError: no such file, a pickle, not InstantID's adapter, or made for another base model.
    """
    unet = backbone.unet
    if isinstance(model, str | os.PathLike):
        path = find_model(model, "InstantID")
        if path.is_dir() and not list(path.glob("*.safetensors")) and (path / "ip-adapter.bin").exists():
            raise pickle_refused(str(path / "ip-adapter.bin"), "InstantID")
        file = adapter_file(path)
        found = keep(backbone, ("instant_id",), file, lambda: load_ip_adapter(file, unet)).to(backbone.device)
    elif isinstance(model, Mapping):
        found = adapter_from_tensors(model, unet, "the InstantID given").to(backbone.device)
    elif isinstance(model, IPAdapterModel):
        check_adapter(model, unet, "the InstantID given")
        check_device(model, backbone.device, "InstantID")
        found = model
    else:
        raise ModelError(f"InstantID cannot be made from a {type(model).__name__}; give a path.")
    if not isinstance(found.image_proj, Resampler):
        raise ModelError(
            f"This is not InstantID's adapter: its image projection is a {type(found.image_proj).__name__}, and "
            "InstantID's is a resampler. Use cr.IPAdapter for it."
        )
    return found


def find_identity_net(net: Any, model: Any, backbone: Backbone) -> Any:
    """IdentityNet: as given, of a folder or file, or ``ControlNetModel`` beside the adapter.

    Raises:
        ModelError: there is none, or it was made for another base model.
    """
    unet = backbone.unet
    if net is None:
        if not isinstance(model, str | os.PathLike):
            raise ModelError("An InstantID given in memory has no IdentityNet beside it. Give controlnet=….")
        net = _beside(model) / NET
        if not net.is_dir():
            raise ModelError(f"There is no IdentityNet at {net}. Give its folder: controlnet=….")
    if isinstance(net, str | os.PathLike):
        path = find_model(net, "IdentityNet")
        found = keep(backbone, ("controlnet",), path, lambda: load_controlnet(path, unet)).to(backbone.device)
    else:
        if not hasattr(net, "config"):
            raise ModelError(f"An IdentityNet cannot be made from a {type(net).__name__}; give a path or a module.")
        check_controlnet(net, unet, "given")
        check_device(net, backbone.device, "IdentityNet")
        found = net
    halvings = 2 ** (len(found.config.conditioning_embedding_out_channels) - 1)
    if halvings != backbone.pixels_per_latent or found.config.conditioning_channels != 3:
        raise ModelError(
            f"This IdentityNet shrinks a picture of {found.config.conditioning_channels} channels {halvings} times; "
            f"this model needs 3 channels and {backbone.pixels_per_latent} times. Use the one for this model."
        )
    return found


def face_encoder_beside(model: Any) -> Path | None:
    """The folder of the encoder of faces that lies beside the adapter, if there is one."""
    if not isinstance(model, str | os.PathLike):
        return None
    folder = _beside(model) / ENCODER
    return folder if folder.is_dir() else None


def save_instant_id(folder: Path, adapter: IPAdapterModel, net: Any) -> None:
    """Write both parts as they are published, the adapter as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    save_ip_adapter(adapter, folder / FILE)
    net.save_pretrained(folder / NET)


def _beside(model: str | os.PathLike[str]) -> Path:
    path = find_model(model, "InstantID")
    return path if path.is_dir() else path.parent
