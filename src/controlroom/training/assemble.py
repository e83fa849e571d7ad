"""Puts trained weights together into the checkpoint that ships: half precision, diffusers' layout, samples noted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlroom.backbones.differences import WHOLE, write_difference
from controlroom.core.errors import ModelError
from controlroom.core.files import atomic_path, write_text_atomically
from controlroom.training.stored_once import INDEX, WEIGHTS, split_off, store_once

#: Weights of a stage -> folder of the checkpoint; later stages write over earlier ones.
PARTS = {
    "autoencoder": "vae",
    "unet": "unet",
    "clip": "clip",
    "attribute_reader": "readers/attributes",
    "keypoint_reader": "readers/keypoints",
    "dense_reader": "readers/dense",
    "pose": "pose",
    "appearance": "appearance",
    "retarget": ".",  # the joint stage, which writes both over
    "retarget_appearance": ".",  # the last leg, beside that stage's ControlNet
    "controlnet_multi": "multi",
    "t2i_adapter_pose": "t2i_adapter_pose",
    "uni_local": "uni_controlnet/local",
    "uni_global": "uni_controlnet/global",
    "ip_adapter": "ip_adapter",
    "instruct_pix2pix": "instruct_pix2pix",
    "inpaint": "inpaint",
    "depth2img": "depth2img",
}
#: Parts that are copies of the UNet or of its encoder, tuned whole. Not ``pose``: diffusers shall load it as it is.
TUNED = ("appearance", "instruct_pix2pix", "inpaint", "depth2img", "multi")


def assemble(runs: Path, target: Path, only: str | None = None) -> list[Path]:
    """Copy the exported weights of every trained stage under ``runs`` into ``target`` in float16.

    Returns what was written. Stages that are not trained leave what ``target`` has. Raises ModelError if ``only`` names
    a stage without weights.
    """
    written: list[Path] = []
    for stage, place in PARTS.items():
        source = runs / stage / "weights"
        if only not in (None, stage):
            continue
        if not source.is_dir():
            if only is not None:
                raise ModelError(f"{source} does not exist: train the stage {stage!r} first.")
            continue
        written += copy_half(source, target / place)
    if (target / "clip" / WEIGHTS).is_file():
        written += _text_encoder(target)
    written += _stored_once(target) + _as_differences(target)
    written += _pipeline_files(target)
    return written


def copy_half(source: Path, target: Path) -> list[Path]:
    """Copy a folder of exported weights; tensors become float16, metadata (samples, seed) stays."""
    written: list[Path] = []
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            with safe_open(str(path), "pt") as file:
                metadata = dict(file.metadata() or {})
            _save_half(load_file(str(path)), place, metadata)
        else:
            shutil.copyfile(path, place)
        written.append(place)
    return written


def _save_half(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str]) -> None:
    half = {k: (t.half() if t.is_floating_point() else t).contiguous() for k, t in tensors.items()}
    with atomic_path(path) as beside:
        save_file(half, str(beside), {"format": "pt", **metadata})


def _text_encoder(target: Path) -> list[Path]:
    """Stable Diffusion's text encoder and tokenizer, out of the CLIP; keys as diffusers' checkpoints have them."""
    clip = target / "clip"
    settings = json.loads((clip / "config.json").read_text())
    with safe_open(str(clip / "model.safetensors"), "pt") as file:
        metadata = dict(file.metadata() or {})
    tensors = load_file(str(clip / "model.safetensors"))
    text = {name: value for name, value in tensors.items() if name.startswith("text_model.")}
    folder = target / "text_encoder"
    folder.mkdir(parents=True, exist_ok=True)
    _save_half(text, folder / "model.safetensors", metadata)
    text_settings = {**settings["text_config"], "architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    text_settings["dtype"] = "float32"  # half precision is for the disk; transformers would compute in it otherwise
    write_text_atomically(folder / "config.json", json.dumps(text_settings, indent=2, sort_keys=True) + "\n")
    copied = copy_half(clip / "tokenizer", target / "tokenizer")
    _older_tokenizer_files(target / "tokenizer")
    return [folder / "model.safetensors", folder / "config.json", *copied]


def _as_differences(target: Path) -> list[Path]:
    """Tuned copies of the UNet, or of its encoder, are stored as their difference from it."""
    base, written = target / "unet" / WHOLE, list[Path]()
    for folder in (target / name for name in TUNED):
        whole = folder / WHOLE
        if base.is_file() and whole.is_file():
            with safe_open(str(whole), "pt") as file:
                metadata = dict(file.metadata() or {})
            written.append(write_difference(folder, load_file(str(whole)), base, metadata))
            whole.unlink()
    return written


def _stored_once(target: Path) -> list[Path]:
    """What CLIP shares with its text half and with the image encoder of the IP-Adapter is stored once."""
    clip, encoder = target / "clip", target / "ip_adapter" / "image_encoder"
    written: list[Path] = []
    vision = clip / "model-vision.safetensors"
    if (clip / WEIGHTS).is_file() and (encoder / WEIGHTS).is_file():
        own, theirs = load_file(str(clip / WEIGHTS)), load_file(str(encoder / WEIGHTS))
        same = {key for key, value in own.items() if key in theirs and torch.equal(value, theirs[key])}
        if same:
            split_off(clip, same, vision.name)
    if vision.is_file() and (encoder / WEIGHTS).is_file():
        written += store_once(encoder, vision)
    text = target / "text_encoder" / WEIGHTS
    if text.is_file() and (clip / INDEX).is_file():
        written += store_once(clip, text)
    return written


def _older_tokenizer_files(folder: Path) -> None:
    """``vocab.json`` and ``merges.txt``, which older readers want, out of ``tokenizer.json``."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    write_text_atomically(folder / "vocab.json", json.dumps(model["vocab"], ensure_ascii=False))
    write_text_atomically(folder / "merges.txt", "\n".join(["#version: 0.2", *merges]) + "\n")


def _pipeline_files(target: Path) -> list[Path]:
    """``model_index.json`` and the scheduler, so that diffusers loads the folder."""
    from controlroom.training.recipes.theatre_unet import noise_schedule

    noise_schedule().save_pretrained(target / "scheduler")
    index: dict[str, Any] = {
        "_class_name": "StableDiffusionPipeline",
        "_diffusers_version": "0.42.1",
        "feature_extractor": [None, None],
        "image_encoder": [None, None],
        "requires_safety_checker": False,
        "safety_checker": [None, None],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    write_text_atomically(target / "model_index.json", json.dumps(index, indent=2) + "\n")
    return [target / "model_index.json", target / "scheduler" / "scheduler_config.json"]
