"""Whether a folder in diffusers' layout holds a whole model: every part, every key, every shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from controlroom.backbones.model_files import PICKLES, pickle_refused, read_json
from controlroom.core.errors import ModelError

# Buffers that some versions of transformers store and others compute.
_COMPUTED = ("position_ids",)


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
        if part in ("safety_checker", "feature_extractor", "image_encoder", "image_processor"):
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
        for file in sorted(place.iterdir()):
            if file.suffix.lower() in PICKLES:
                raise pickle_refused(str(file), "model")
        raise ModelError(f"{place} has no weights. Put its .safetensors file there.")
    for file in weights:
        if file.stat().st_size < 8:
            raise ModelError(f"{file} is empty or cut off. Copy it again.")


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
    for file in [*files, *_shared_files(place)]:
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


def _shared_files(place: Path) -> list[Path]:
    """Files of neighbouring folders that the index of a folder names, as transformers loads them.

    Raises:
        ModelError: one is not there.
    """
    index = place / "model.safetensors.index.json"
    names = set(read_json(index).get("weight_map", {}).values()) if index.is_file() else set()
    files = [place / name for name in sorted(names) if "/" in name]
    for file in files:
        if not file.is_file():
            raise ModelError(f"{place} needs the weights in {file}, which is not there. Copy the whole checkpoint.")
    return files


def _stored_shape(stored: dict[str, tuple[int, ...]], key: str) -> tuple[int, ...] | None:
    # transformers 5 dropped the prefix of CLIP's text model; files of both layouts load.
    names = [key, f"text_model.{key}", key.removeprefix("text_model.")]
    return next((stored[name] for name in names if name in stored), None)
