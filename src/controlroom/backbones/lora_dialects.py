"""What each dialect of LoRA files writes for one layer, and the configurations that belong to them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from controlroom.backbones.lora_layers import Full, Hadamard, Kronecker, LayerChange, LowRank
from controlroom.backbones.lora_names import PARTS, TEXT, TEXT_2, UNET, Layer
from controlroom.core.errors import ModelError
from controlroom.core.files import atomic_path, write_text_atomically

SECOND_TEXT = "CLIPTextModelWithProjection"
_CLASSES = {UNET: "UNet2DConditionModel", TEXT: "CLIPTextModel", TEXT_2: SECOND_TEXT}
_LIBRARIES = {UNET: "diffusers.models.unets.unet_2d_condition"}


def kohya_parts(change: LayerChange) -> dict[str, Tensor]:
    """Every form of change, as kohya's tools and LyCORIS store it: end of a key -> tensor, with alpha."""
    factors = change.factors
    found: dict[str, Tensor] = {}
    if isinstance(factors, LowRank):
        found = {"lora_down.weight": factors.down, "lora_up.weight": factors.up}
        if factors.core is not None:
            found["lora_mid.weight"] = factors.core
    elif isinstance(factors, Hadamard):
        names = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        found.update(zip(names, (*factors.first, *factors.second), strict=True))
        if factors.cores is not None:
            found.update(zip(("hada_t1", "hada_t2"), factors.cores, strict=True))
    elif isinstance(factors, Kronecker):
        found = _kronecker(factors)
    elif isinstance(factors, Full):
        found = {"diff": factors.change}
    if isinstance(factors, LowRank | Hadamard | Kronecker):
        found["alpha"] = torch.tensor(float(factors.rank or 1) if factors.alpha is None else float(factors.alpha))
    if change.magnitude is not None:
        lengths = change.magnitude
        found["dora_scale"] = lengths.reshape(-1, 1) if lengths.ndim == 1 else lengths
    if change.bias is not None:
        found["diff_b"] = change.bias
    return found


def _kronecker(factors: Kronecker) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for number, side in (("1", factors.first), ("2", factors.second)):
        names = (f"lokr_w{number}",) if len(side) == 1 else (f"lokr_w{number}_a", f"lokr_w{number}_b")
        found.update(zip(names, side, strict=True))
    if factors.core is not None:
        found["lokr_t2"] = factors.core
    # LyCORIS does not scale two whole sides, PEFT does: the strength goes into one of them.
    if len(factors.first) == len(factors.second) == 1 and factors.whole and factors.alpha is not None:
        found["lokr_w1"] = found["lokr_w1"] * (factors.alpha / factors.whole)
    return found


def low_rank_parts(layer: Layer, change: LayerChange) -> dict[str, Tensor]:
    """A change of low rank as PEFT and diffusers store it, without alpha, which is in their configuration.

    Raises:
        ModelError: they have no place for it.
    """
    factors, name = change.factors, ".".join(layer)
    if not isinstance(factors, LowRank) or change.bias is not None:
        raise ModelError(f"{name} has no low-rank change; only those can be written in this dialect. Use kohya's.")
    if factors.core is not None:
        raise ModelError(f"{name} has a core, which only kohya's files can hold. Use that dialect.")
    found = {"lora_A.weight": factors.down, "lora_B.weight": factors.up}
    if change.magnitude is not None:
        if change.magnitude.ndim > 1 and change.magnitude.shape[0] == 1 and factors.up.shape[0] > 1:
            raise ModelError(
                f"{name} has DoRA's lengths of inputs, which only kohya's files can hold. Use that dialect."
            )
        found["lora_magnitude_vector"] = change.magnitude.flatten()
    return found


def alpha_of(change: LayerChange) -> float:
    """Alpha of a change of low rank: the rank where the file said none."""
    factors = change.factors
    assert isinstance(factors, LowRank)
    return float(factors.rank if factors.alpha is None else factors.alpha)


def peft_config(layers: Mapping[str, LayerChange]) -> dict[str, Any]:
    """PEFT's configuration of one network: path of a layer -> its change of low rank."""
    alphas = {path: alpha_of(change) for path, change in layers.items()}
    ranks = {path: change.factors.rank for path, change in layers.items() if change.factors is not None}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "target_modules": sorted(ranks),
        "use_dora": any(change.magnitude is not None for change in layers.values()),
        "lora_bias": False,
    }


def save_peft(folder: str | os.PathLike[str], layers: Mapping[Layer, LayerChange]) -> dict[str, Path]:
    """Write folders that PEFT loads: the UNet's, and beside it one for each text encoder, since PEFT keeps one network.

    Returns:
        Part -> its folder.

    Raises:
        ModelError: a change that is not of low rank.
        OutputError: nothing can be written there.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    parts = [part for part in PARTS if any(p == part for p, _ in layers)]
    written: dict[str, Path] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for (part, path), change in layers.items():
        inner = path if part == UNET else f"text_model.{path}"
        for end, value in low_rank_parts((part, path), change).items():
            tensors.setdefault(part, {})[f"base_model.model.{inner}.{end}"] = value.detach().cpu().contiguous().clone()
    for part in parts:
        place = written[part] = folder if part == UNET or len(parts) == 1 else folder / part
        place.mkdir(parents=True, exist_ok=True)
        own = {(p if part == UNET else f"text_model.{p}"): change for (q, p), change in layers.items() if q == part}
        library = _LIBRARIES.get(part, "transformers.models.clip.modeling_clip")
        config = {
            "peft_type": "LORA",
            "inference_mode": True,
            "bias": "none",
            # Which network it is: both text encoders have the same paths.
            "auto_mapping": {"base_model_class": _CLASSES[part], "parent_library": library},
            **peft_config(own),
        }
        write_text_atomically(place / "adapter_config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
        with atomic_path(place / "adapter_model.safetensors") as beside:
            save_file(tensors[part], str(beside), {"format": "pt"})
    return written
