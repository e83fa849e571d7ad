"""What trains, and what a checkpoint and the run that resumes it must agree on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from controlroom.core.errors import ModelError
from controlroom.training.checkpoint import ResumeError
from controlroom.training.recipe import Fingerprinted, FiniteData, Recipe


def trained_parameters(modules: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """Parameters that require a gradient, by `module.path`, each once. Raises ModelError as `train` says."""
    fixed = {id(p) for module in frozen.values() for p in module.parameters()}
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for module_name, module in modules.items():
        for name, parameter in module.named_parameters():
            full = f"{module_name}.{name}"
            if id(parameter) in fixed:
                raise ModelError(f"{full} is in modules() and in frozen(); a parameter either trains or does not.")
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            if parameter.dtype != torch.float32:
                raise ModelError(
                    f"{full} is {parameter.dtype}; weights that train are float32 (mixed_precision casts)."
                )
            seen.add(id(parameter))
            found[full] = parameter
    if not found:
        raise ModelError("The recipe trains nothing: no parameter in modules() requires a gradient.")
    return found


def identity_of(
    recipe: Recipe[Any], trajectory: Mapping[str, Any], trained: Mapping[str, nn.Parameter], frozen_hash: str
) -> dict[str, Any]:
    """Everything that decides the course of a run besides its step, as JSON: settings, recipe, shapes, frozen bytes."""
    states = {name: module.state_dict() for name, module in recipe.modules().items()}
    return {
        **trajectory,
        "recipe": recipe.name,
        "recipe fingerprint": recipe.fingerprint() if isinstance(recipe, Fingerprinted) else "",
        "dataset size": recipe.dataset_size if isinstance(recipe, FiniteData) else None,
        "frozen weights": frozen_hash,
        "shapes": {f"{name}.{key}": list(v.shape) for name, state in states.items() for key, v in state.items()},
        "trained": sorted(trained),
    }


def refuse_other_run(path: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise ResumeError, naming every difference, unless the two identities are equal."""
    changed = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    if not changed:
        return
    listed = "; ".join(_difference(key, before.get(key), now.get(key)) for key in changed)
    raise ResumeError(
        f"{path} cannot be resumed, because the run changed ({listed}). Give the former values, or another output_dir "
        f"with start_from={path.parent / 'weights'} to continue from its weights with a fresh optimizer."
    )


def _difference(key: str, before: Any, now: Any) -> str:
    """One changed entry in words; of a table, the first row that differs."""
    if isinstance(before, dict) and isinstance(now, dict):
        row = next(name for name in sorted({*before, *now}) if before.get(name) != now.get(name))
        return _difference(f"{key} of {row}", before.get(row), now.get(row))
    if isinstance(before, list) and isinstance(now, list) and before and isinstance(before[0], str):
        return f"{key}: {', '.join(sorted(set(before) ^ set(now))[:3])} in one and not in the other"
    short = [text if len(text) <= 40 else text[:37] + "..." for text in (str(before), str(now))]
    return f"{key}: {short[0]} in the checkpoint, {short[1]} now"
