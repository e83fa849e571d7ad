"""Several LoRAs as one file: their factors beside each other.

s₁ · up₁ · down₁ + s₂ · up₂ · down₂ = [s₁ · up₁, s₂ · up₂] · [down₁; down₂], so ranks add and nothing is lost. Adding
the factors themselves, as some tools do, is another change altogether: (up₁ + up₂) · (down₁ + down₂).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from controlroom.backbones.lora_layers import LayerChange, LowRank
from controlroom.backbones.lora_names import Layer
from controlroom.core.errors import InputError, ModelError


def merge_loras(
    loras: Sequence[Mapping[Layer, LayerChange]], scales: Sequence[float] | None = None
) -> dict[Layer, LayerChange]:
    """One LoRA that changes every layer as these do together, for `save_lora`.

    Args:
        loras: layers of files (``load_lora(path, names).layers``) or of trainings, for one model.
        scales: of each; one of scale 0 is left out. None: 1 for all.

    Returns:
        Low-rank changes in float32 on the CPU, of as many ranks as they have together, with one alpha for all layers.

    Raises:
        InputError: none, scales of another number, or all of them 0.
        ModelError: a change that is not of low rank (LoHa, LoKr, a full difference), or that DoRA rescales; factors for
            layers of different shapes.
    """
    chosen = [1.0] * len(loras) if scales is None else [float(scale) for scale in scales]
    if len(chosen) != len(loras):
        raise InputError(f"There are {len(chosen)} scales for {len(loras)} LoRAs; give one for each.")
    parts: dict[Layer, list[tuple[LayerChange, float]]] = {}
    for lora, scale in zip(loras, chosen, strict=True):
        if scale == 0.0:
            continue
        for layer, change in lora.items():
            parts.setdefault(layer, []).append((change, scale))
    if not parts:
        raise InputError("There is nothing to merge: no LoRA, or all of scale 0.")
    joined = {layer: _joined(".".join(layer), found) for layer, found in parts.items()}
    # diffusers loses the alphas of attention layers in kohya's files where they differ, so all have the same.
    ranks = [change.factors.rank for change in joined.values() if change.factors is not None]
    alpha = float(max(ranks, default=1))
    return {layer: _with_alpha(change, alpha) for layer, change in joined.items()}


def _joined(name: str, parts: list[tuple[LayerChange, float]]) -> LayerChange:
    """The sum of the changes of one layer."""
    downs: list[Tensor] = []
    ups: list[Tensor] = []
    biases: list[Tensor] = []
    for change, scale in parts:
        if change.magnitude is not None:
            raise ModelError(
                f"{name} is of a DoRA, whose lengths make its change depend on the weight and on the other changes; it "
                "has no sum of low rank. Use the files together in a run (controls=[cr.LoRA(...), cr.LoRA(...)])."
            )
        if change.factors is not None:
            down, up = _factors(name, change.factors)
            downs.append(down)
            ups.append(scale * up)
        if change.bias is not None:
            biases.append(scale * change.bias.detach().float().cpu())
    bias = torch.stack(biases).sum(0) if biases else None
    if not downs:
        return LayerChange(None, bias=bias)
    # A linear layer's factors may be kept as kernels of one pixel.
    shape = max((down.shape[1:] for down in downs), key=len)
    sizes = {(int(up.shape[0]), int(down[0].numel())) for down, up in zip(downs, ups, strict=True)}
    if len(sizes) > 1:
        given = " and ".join(f"{outputs} x {inputs}" for outputs, inputs in sorted(sizes))
        raise ModelError(f"{name} has factors for layers of different shapes ({given}); they are for different models.")
    down, up = torch.cat([each.reshape(-1, *shape) for each in downs]), torch.cat(ups, 1)
    return LayerChange(LowRank(down, up.reshape(*up.shape, *(1 for _ in shape[1:]))), bias=bias)


def _with_alpha(change: LayerChange, alpha: float) -> LayerChange:
    """The same change with another alpha."""
    if not isinstance(change.factors, LowRank):
        return change
    up = change.factors.up * (change.factors.rank / alpha)
    return replace(change, factors=LowRank(change.factors.down, up, None, alpha))


def _factors(name: str, factors: object) -> tuple[Tensor, Tensor]:
    """``down`` [rank, in, ...] and ``up`` [out, rank] with the strength in it."""
    if not isinstance(factors, LowRank):
        raise ModelError(
            f"{name} has a change of the kind {type(factors).__name__}, which is not of low rank. Use the files "
            "together in a run (controls=[cr.LoRA(...), cr.LoRA(...)])."
        )
    down, up = factors.down.detach().float().cpu(), factors.up.detach().float().cpu().flatten(1)
    if factors.core is not None:
        down = torch.einsum("pqkl,qi->pikl", factors.core.detach().float().cpu(), down.flatten(1))
    return down, factors.strength * up
