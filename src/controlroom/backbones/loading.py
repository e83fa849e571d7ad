"""Loading a checkpoint, and checking that it is whole.

diffusers and transformers load a missing tokenizer as two tokens and a text encoder with missing keys as noise, and say
nothing. Here every component, every key and every vocabulary is checked, and no pickle is ever opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from controlroom.backbones.base import Backbone, execution_device
from controlroom.backbones.model_files import PICKLES, THEATRE, explained, read_json, theatre_folder
from controlroom.backbones.model_files import find_model as find_model
from controlroom.backbones.model_files import read_safetensors as read_safetensors
from controlroom.backbones.sd1 import StableDiffusion1
from controlroom.backbones.sd2 import StableDiffusion2
from controlroom.backbones.sdxl import StableDiffusionXL
from controlroom.backbones.single_file import load_single_file
from controlroom.core.backbone import Backbone as CoreBackbone
from controlroom.core.errors import ModelError

# Buffers that some versions of transformers store and others compute.
_COMPUTED = ("position_ids",)


def keep(backbone: CoreBackbone, key: tuple[Any, ...], path: Path, load: Callable[[], Any]) -> Any:
    """What ``load`` gives, loaded once for as long as the backbone lives and the file stays the same.

    Args:
        backbone: holds what was loaded; its device and precision are part of the key.
        key: what is loaded.
        path: file or folder it is loaded from.
        load: loads it.
    """
    files = sorted(path.glob("**/*")) if path.is_dir() else [path]
    stamp = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file())
    full = (*key, str(path), str(backbone.device), str(backbone.dtype))
    held = backbone.kept.get(full)
    if held is None or held[0] != stamp:
        held = backbone.kept[full] = (stamp, load())
    return held[1]


def check_device(module: Any, device: torch.device, what: str) -> None:
    """A module that was given is where the network runs; it is not moved, since it is the caller's.

    Raises:
        ModelError: it is elsewhere.
    """
    there = execution_device(module)
    if there.type != device.type or (there.index or 0) != (device.index or 0):
        raise ModelError(
            f"The {what} is on {there}, the pipeline on {device}. Bring it there with .to({str(device)!r})."
        )


def backbone_from_components(source: Any) -> Backbone:
    """A backbone over the components of a loaded diffusers pipeline; nothing is copied.

    Raises:
        ModelError: not a Stable Diffusion 1, 2 or XL pipeline, or a component is missing.
    """
    unet = getattr(source, "unet", None)
    if unet is None or type(unet).__name__ != "UNet2DConditionModel":
        raise ModelError(
            f"{type(source).__name__} has no UNet2DConditionModel. Load a Stable Diffusion 1, 2 or XL pipeline."
        )
    for part in ("vae", "scheduler"):
        if getattr(source, part, None) is None:
            raise ModelError(f"{type(source).__name__} has no {part}. Load the whole pipeline.")
    parts: dict[str, Any] = {"unet": unet, "vae": source.vae, "scheduler": source.scheduler}
    for part in ("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"):
        parts[part] = getattr(source, part, None)
    kind = _kind(unet, parts)
    needed = ("text_encoder_2", "tokenizer_2") if kind is StableDiffusionXL else ("text_encoder", "tokenizer")
    for part in needed:
        if parts[part] is None:
            raise ModelError(f"{type(source).__name__} has no {part}. Load the whole pipeline.")
    config = getattr(source, "config", {})
    backbone = kind(**parts, zero_empty_negative=bool(config.get("force_zeros_for_empty_prompt", True)))
    check_vocabularies(backbone)
    return backbone


def _kind(unet: Any, parts: dict[str, Any]) -> type[Backbone]:
    if getattr(unet.config, "addition_embed_type", None) == "text_time" or parts["text_encoder_2"] is not None:
        return StableDiffusionXL
    width = unet.config.cross_attention_dim
    width = width[0] if isinstance(width, list | tuple) else width
    predicts_v = parts["scheduler"].config.get("prediction_type") == "v_prediction"
    if width == 1024 or predicts_v or getattr(unet.config, "upcast_attention", False):
        return StableDiffusion2
    return StableDiffusion1


def check_vocabularies(backbone: Backbone) -> None:
    """Every id a tokenizer can give must have a row in its text encoder.

    Raises:
        ModelError: a tokenizer is empty, larger than its encoder, or does not know where a text ends.
    """
    pairs = [("tokenizer", backbone.tokenizer, backbone.text_encoder)]
    pairs.append(("tokenizer_2", backbone.tokenizer_2, backbone.text_encoder_2))
    for name, tokenizer, encoder in pairs:
        if tokenizer is None or encoder is None:
            continue
        size, rows = len(tokenizer), encoder.get_input_embeddings().weight.shape[0]
        if size <= 2:
            raise ModelError(
                f"The {name} knows {size} tokens: its vocabulary file is missing or empty. Restore vocab.json and "
                "merges.txt (or tokenizer.json) in its folder."
            )
        if size > rows:
            raise ModelError(
                f"The {name} has {size} tokens, its text encoder {rows} rows: they do not belong together. Use the "
                "tokenizer that came with the text encoder."
            )
        if tokenizer.eos_token_id is None:
            raise ModelError(f"The {name} has no end-of-text token. Restore its tokenizer_config.json.")


def load_backbone(
    model: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    variant: str | None = None,
    revision: str | None = None,
    config: str | os.PathLike[str] | None = None,
) -> tuple[Backbone, Any]:
    """Load a checkpoint: the backbone and the diffusers pipeline that holds its components.

    Args:
        model: ``theatre``, a folder in diffusers' layout, a hub id, or a single ``.safetensors`` file.
        dtype: precision; None: float32.
        variant: files of a variant, e.g. ``fp16``.
        revision: branch, tag or commit on the hub.
        config: for a single file, the folder in diffusers' layout with its configurations and tokenizers; None: those
            of the hub repository that diffusers takes it for.

    Raises:
        ModelError: nothing there, a part or key is missing, or only pickles are.
    """
    name = os.fspath(model)
    path = theatre_folder() if name == THEATRE else Path(name)
    if name.lower().endswith(PICKLES):
        raise ModelError(
            f"{name!r} is a pickle, which can run code when it is opened. Use the .safetensors file of that model, or "
            "convert it where you trust it."
        )
    if name == THEATRE and not (path / "model_index.json").is_file():
        raise ModelError(f"The theatre's checkpoint is not in this installation ({path}). Reinstall the package.")
    if path.is_dir():
        check_folder(path, variant)
        pipeline = _load_folder(path, dtype, variant)
    elif path.is_file():
        pipeline = load_single_file(path, dtype, None if config is None else Path(config))
    elif name.endswith(".safetensors") or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ModelError(f"There is no model at {name!r}. Check the path.")
    else:
        pipeline = _load_hub(name, dtype, variant, revision)
    return backbone_from_components(pipeline), pipeline


def check_folder(folder: Path, variant: str | None = None) -> None:
    """Every part that ``model_index.json`` names is there with its configuration and its safetensors.

    Raises:
        ModelError: a part is missing, or only a pickle of it is there.
    """
    index = folder / "model_index.json"
    if not index.is_file():
        raise ModelError(
            f"{folder} has no model_index.json, so it is not a model in diffusers' layout. Give the folder that holds "
            "unet/, vae/ and text_encoder/."
        )
    parts = read_json(index)
    for part, entry in parts.items():
        if part.startswith("_") or not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
            continue
        if part in ("safety_checker", "feature_extractor", "image_encoder"):
            continue
        place = folder / part
        if not place.is_dir():
            raise ModelError(f"{folder} has no {part}/, which its model_index.json names. Restore it.")
        if part.startswith("tokenizer"):
            if (
                not ((place / "vocab.json").is_file() and (place / "merges.txt").is_file())
                and not (place / "tokenizer.json").is_file()
            ):
                raise ModelError(f"{place} has neither vocab.json with merges.txt nor tokenizer.json. Restore them.")
        elif part == "scheduler":
            read_json(place / "scheduler_config.json")
        else:
            read_json(place / "config.json")
            _check_weights(place, variant)


def _check_weights(place: Path, variant: str | None) -> None:
    weights = [file for file in place.iterdir() if file.suffix == ".safetensors"]
    if variant is not None:
        weights = [file for file in weights if f".{variant}." in file.name or f".{variant}-" in file.name] or weights
    if not weights:
        pickles = [file.name for file in place.iterdir() if file.suffix in PICKLES]
        what = f"only {pickles[0]}, a pickle, which is never opened" if pickles else "no weights"
        raise ModelError(f"{place} has {what}. Put its .safetensors file there.")
    for file in weights:
        if file.stat().st_size < 8:
            raise ModelError(f"{file} is empty or cut off. Copy it again.")


def _load_folder(folder: Path, dtype: torch.dtype | None, variant: str | None) -> Any:
    import diffusers

    kind = str(read_json(folder / "model_index.json").get("_class_name", ""))
    base = diffusers.StableDiffusionXLPipeline if "XL" in kind else diffusers.StableDiffusionPipeline
    pipeline = explained(
        str(folder),
        lambda: (
            base.from_pretrained(
                str(folder),
                torch_dtype=dtype or torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
                safety_checker=None,
                requires_safety_checker=False,
            )
            if base is diffusers.StableDiffusionPipeline
            else base.from_pretrained(
                str(folder),
                torch_dtype=dtype or torch.float32,
                variant=variant,
                use_safetensors=True,
                local_files_only=True,
            )
        ),
    )
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        if module is not None:
            check_keys(module, folder / part, variant)
    return pipeline


def check_keys(module: Any, place: Path, variant: str | None = None) -> None:
    """Every parameter of a module stands in its files, in its shape.

    Raises:
        ModelError: a key is missing or has another shape; the message names the first.
    """
    from safetensors import safe_open

    files = sorted(place.glob("*.safetensors"))
    if variant is not None:
        files = [file for file in files if f".{variant}." in file.name or f".{variant}-" in file.name] or files
    else:
        files = [file for file in files if file.name.count(".") == 1] or files
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(str(file), framework="pt") as content:
            for key in content.keys():
                stored[key] = tuple(content.get_slice(key).get_shape())
    tied = set(getattr(module, "_tied_weights_keys", None) or ())
    for key, value in module.state_dict().items():
        if key.endswith(_COMPUTED) or key in tied:
            continue
        found = _stored_shape(stored, key)
        if found is None:
            raise ModelError(
                f"{place} lacks the weights {key!r}; the network would start from noise there. Copy it again."
            )
        if found != tuple(value.shape):
            raise ModelError(f"{place} has {key!r} as {list(found)}, its config asks for {list(value.shape)}.")


def _stored_shape(stored: dict[str, tuple[int, ...]], key: str) -> tuple[int, ...] | None:
    # transformers 5 dropped the prefix of CLIP's text model; files of both layouts load.
    names = [key, f"text_model.{key}", key.removeprefix("text_model.")]
    return next((stored[name] for name in names if name in stored), None)


def _load_hub(name: str, dtype: torch.dtype | None, variant: str | None, revision: str | None) -> Any:
    import diffusers

    def load() -> Any:
        folder = diffusers.DiffusionPipeline.download(
            name,
            variant=variant,
            revision=revision,
            use_safetensors=True,
        )
        check_folder(Path(folder), variant)
        return _load_folder(Path(folder), dtype, variant)

    return explained(name, load)
