"""Checkpoints that are either whole or not there: written beside, hashed, synced, renamed.

Layout of `step-00001000/`: `weights.<module>.safetensors` (whole state of each module), `ema.safetensors`,
`optimizer.safetensors` (`<parameter>|exp_avg` and so on), `state.json`, `manifest.json` (SHA-256 and size of each
file, written last). A crash while writing leaves only `step-N.tmp`, which the next start removes. A checkpoint that
does not match its manifest is renamed to `step-N.broken`, never deleted, and the one before is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from controlroom.core.errors import ControlRoomError, OutputError

FORMAT = 1
_STEP = re.compile(r"step-(\d{8,})")


class ResumeError(ControlRoomError):
    """A run that cannot be continued with the settings, recipe or weights given."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a checkpoint holds besides the weights of modules; `state` is JSON."""

    path: Path
    state: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]
    ema: dict[str, Tensor]
    optimizer: dict[str, Tensor]


# -- writing ----------------------------------------------------------------------------------------------------------


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, Any],
    modules: Mapping[str, nn.Module],
    ema: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
) -> Path:
    """Write `folder/step-N` and return its path; a whole one of that step is left (runs are deterministic).

    Raises OutputError, leaving nothing half-written, if it cannot be written.
    """
    final = folder / f"step-{step:08d}"
    beside = final.with_name(final.name + ".tmp")
    try:
        if final.exists():  # a run that ends on the step it resumed from; replacing it would risk the only copy
            if problem_of(final) is None:
                return final
            shutil.rmtree(final)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, module in modules.items():
            save_file(storable(module.state_dict()), beside / f"weights.{name}.safetensors")
        save_file(storable(ema), beside / "ema.safetensors")
        save_file(storable(optimizer), beside / "optimizer.safetensors")
        (beside / "state.json").write_text(json.dumps(state, indent=1))
        files = {p.name: {"sha256": file_hash(p), "size": p.stat().st_size} for p in sorted(beside.iterdir())}
        (beside / "manifest.json").write_text(json.dumps({"format": FORMAT, "files": files}, indent=1))
        for path in (*beside.iterdir(), beside):
            sync(path)
        beside.rename(final)
        sync(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(beside, ignore_errors=True)
        raise OutputError(
            f"The checkpoint {final} could not be written: {error}. Earlier checkpoints are untouched; make room or "
            f"give another output_dir, then run again to resume."
        ) from error
    return final


def prune(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, once the newest is seen to be whole on disk."""
    paths = checkpoints(folder)
    if paths and problem_of(paths[-1]) is None:
        for path in paths[:-keep]:
            shutil.rmtree(path, ignore_errors=True)


# -- reading ----------------------------------------------------------------------------------------------------------


def checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first, unverified."""
    found = [p for p in folder.iterdir() if p.is_dir() and _STEP.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("step-")))


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and a line for each broken one that was set aside."""
    notes = []
    for path in reversed(checkpoints(folder)):
        problem = problem_of(path)
        if problem is None:
            return path, notes
        aside = path.with_name(path.name + ".broken")
        shutil.rmtree(aside, ignore_errors=True)  # an older breakage of the same step
        path.rename(aside)
        notes.append(f"{path.name} is broken ({problem}); set aside as {aside.name}")
    return None, notes


def problem_of(path: Path) -> str | None:
    """What is wrong with a checkpoint, in words, or None if every file matches its hash."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
        if manifest["format"] != FORMAT:
            raise ResumeError(f"{path} has checkpoint format {manifest['format']}; this version reads {FORMAT}.")
        files = dict(manifest["files"])
        for name, expected in files.items():
            if (path / name).stat().st_size != expected["size"]:
                return f"{name} has {(path / name).stat().st_size} bytes, expected {expected['size']}"
            if file_hash(path / name) != expected["sha256"]:
                return f"{name} does not match its hash"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError):
        return "manifest.json cannot be read"
    return None if "state.json" in files else "state.json is missing"


def load_checkpoint(path: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint already verified by `newest_whole`."""
    weights = {
        p.name.removeprefix("weights.").removesuffix(".safetensors"): load_file(p, device=str(device))
        for p in sorted(path.glob("weights.*.safetensors"))
    }
    return Checkpoint(
        path=path,
        state=json.loads((path / "state.json").read_text()),
        weights=weights,
        ema=load_file(path / "ema.safetensors", device=str(device)),
        optimizer=load_file(path / "optimizer.safetensors", device=str(device)),
    )


def remove_unfinished(folder: Path) -> None:
    """Delete what a killed run left half-written. Only call while holding the lock of the run."""
    for pattern in ("step-*.tmp", "weights*.tmp"):
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)


# -- tensors and files ------------------------------------------------------------------------------------------------


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: contiguous, and none sharing memory with another (tied weights)."""
    seen: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(storage.data_ptr())
        result[name] = tensor
    return result


def optimizer_tensors(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """State of the optimizer by name of parameter and of moment; parameters never stepped have none."""
    return {
        f"{name}|{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor)
    }


def optimizer_numbers(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, dict[str, float]]]:
    """What an optimizer keeps as plain numbers, as JSON: counters beside the moments, and what it found out.

    Of a group, what differs from the optimizer's defaults (Prodigy's distance, for example) and is not the learning
    rate, which the loop sets at each step. Python writes and reads its numbers in JSON without loss.
    """
    states = {name: _numbers(optimizer.state.get(parameter, {})) for name, parameter in parameters.items()}
    groups = {
        str(place): {k: v for k, v in _numbers(group).items() if k != "lr" and optimizer.defaults.get(k) != v}
        for place, group in enumerate(optimizer.param_groups)
    }
    return {"parameters": {k: v for k, v in states.items() if v}, "groups": {k: v for k, v in groups.items() if v}}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Tensor],
    numbers: Mapping[str, Mapping[str, Mapping[str, float]]] | None = None,
) -> None:
    """Inverse of `optimizer_tensors` and `optimizer_numbers`, into memory laid out as that of the parameters."""
    numbers = numbers or {}  # checkpoints written before there were any have none
    for name, values in numbers.get("parameters", {}).items():
        optimizer.state[parameters[name]].update(values)
    for place, values in numbers.get("groups", {}).items():
        optimizer.param_groups[int(place)].update(values)
    for key, value in tensors.items():
        name, moment = key.rsplit("|", 1)
        parameter = parameters[name]
        place = (
            torch.empty_like(parameter, dtype=value.dtype)
            if value.shape == parameter.shape
            else torch.empty_like(value, device=parameter.device)
        )
        optimizer.state[parameter][moment] = place.detach().copy_(value)


def modules_hash(modules: Mapping[str, nn.Module]) -> str:
    """SHA-256 over names, shapes, types and bytes of every parameter and buffer."""
    digest = hashlib.sha256()
    for module_name, module in sorted(modules.items()):
        for name, tensor in sorted(module.state_dict().items()):
            tensor = tensor.detach().cpu().contiguous()
            digest.update(f"{module_name}.{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Force a file or the entries of a folder to disk."""
    if sys.platform == "win32" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
