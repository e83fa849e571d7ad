"""Tensors that several networks of one checkpoint share are stored once: transformers' index says where they lie.

A folder whose weights are in several files has an index that names the file of each tensor. The file may lie in a
neighbouring folder, so that ``from_pretrained`` of either folder loads what one of them holds. The theatre's CLIP
shares its text half with Stable Diffusion's text encoder, and nearly all of its picture half with the image encoder of
its IP-Adapter.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from controlroom.core.files import atomic_path, write_text_atomically

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def store_once(folder: Path, shared: Path, own: str = "model-own.safetensors") -> list[Path]:
    """Leave out of ``folder/model.safetensors`` what a file beside it holds too, bit for bit.

    Args:
        folder: of one network in transformers' layout, with its weights in one file or, after an earlier call, several.
        shared: a ``.safetensors`` file, all of whose tensors belong to the network. Others would hide its own.
        own: name of the file for the rest.

    Returns:
        What was written: nothing if the files have no tensor in common.
    """
    files = weight_files(folder)
    held = {key: file for file in files for key in _keys(file)}
    theirs = load_file(str(shared))
    tensors = {key: value for file in files for key, value in load_file(str(file)).items()}
    both = {key for key, value in theirs.items() if key in tensors and torch.equal(tensors[key], value)}
    if not both or len(both) < len(theirs) or shared in files:
        return []
    mine = [file for file in files if file.parent == folder]
    changed = [file for file in mine if file == folder / own or not both.isdisjoint(_keys(file))]
    rest = {key: tensors[key] for key, file in held.items() if file in changed and key not in both}
    metadata = _metadata(mine[0])
    with atomic_path(folder / own) as beside:
        save_file(rest, str(beside), metadata)
    places = {key: folder / own if key in rest else shared if key in both else held[key] for key in sorted(tensors)}
    names = {key: os.path.relpath(place, folder).replace(os.sep, "/") for key, place in places.items()}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": names}, indent=1) + "\n"
    write_text_atomically(folder / INDEX, text)
    for file in changed:
        if file != folder / own:
            file.unlink()
    return [folder / own, folder / INDEX]


def split_off(folder: Path, keys: set[str], name: str) -> Path | None:
    """Put some tensors of ``folder/model.safetensors`` into a file of their own, so that others can share it.

    Returns:
        That file; None if the folder's weights lie in several files already.
    """
    whole = folder / WEIGHTS
    if not whole.is_file():
        return None
    tensors = load_file(str(whole))
    with atomic_path(folder / name) as beside:
        save_file({key: tensors[key] for key in tensors if key in keys}, str(beside), _metadata(whole))
    store_once(folder, folder / name)
    return folder / name


def weight_files(folder: Path) -> list[Path]:
    """The files of a network's weights, those in neighbouring folders too."""
    index = folder / INDEX
    # A whole file beside an index was copied there after it: newer weights, of which the index does not know.
    if not index.is_file() or (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    names = json.loads(index.read_text())["weight_map"].values()
    return [Path(os.path.normpath(folder / name)) for name in sorted(set(names))]


def _keys(file: Path) -> list[str]:
    with safe_open(str(file), "pt") as content:
        return list(content.keys())


def _metadata(file: Path) -> dict[str, str]:
    with safe_open(str(file), "pt") as content:
        return {"format": "pt", **(content.metadata() or {})}
