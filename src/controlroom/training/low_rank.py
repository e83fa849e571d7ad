"""Low-rank layers that train (LoRA, arXiv 2106.09685): beside frozen linear and convolutional layers, by hooks.

Written and read in every dialect that `backbones.lora_files` knows. DoRA (arXiv 2402.09353) learns the length of each
output's weights as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlroom.backbones.lora_layers import LayerChange, LowRank
from controlroom.backbones.lora_names import UNET, Layer, Names
from controlroom.core.errors import InputError, ModelError
from controlroom.training.randomness import seed_of

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")
"""Ends of paths of attention's layers, of the UNet and of text encoders."""


def layers_ending(names: Names, ends: Sequence[str] = ATTENTION, parts: Sequence[str] = (UNET,)) -> tuple[Layer, ...]:
    """Layers of these parts whose path ends so, in the model's order.

    Raises:
        InputError: there is none.
    """
    found = tuple(
        (part, path)
        for part, path in names.layers
        if part in parts and any(path == end or path.endswith("." + end) for end in ends)
    )
    if not found:
        raise InputError(f"No layer of {', '.join(parts)} ends in {', '.join(ends)}; nothing would be trained.")
    return found


class LowRankLayers(nn.Module):
    """ΔW = (alpha / rank) · up · down beside each of some layers; ``up`` starts at 0, so nothing changes at first.

    Args:
        names: of the model; its layers are hooked by `attached`, not changed.
        layers: which of them.
        rank: of each change; at most what the layer allows is used.
        alpha: None: the rank of each.
        dora: also learn the length of each output's weights.
        seed: of the first values.
    """

    def __init__(
        self,
        names: Names,
        layers: Sequence[Layer],
        rank: int = 4,
        alpha: float | None = None,
        dora: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if rank < 1:
            raise InputError(f"The rank of a LoRA must be at least 1, got {rank}.")
        self.layers = tuple(layers)
        self.alpha = alpha
        self._names = names
        self.scale = 1.0
        down, up, lengths = [], [], []
        for number, layer in enumerate(self.layers):
            weight = names.layers[layer].weight
            inner = min(rank, weight.shape[0], weight[0].numel())
            generator = torch.Generator().manual_seed(seed_of(seed, number, "low rank"))
            # PEFT's and diffusers' start: normal with deviation 1 / rank.
            first = torch.randn(inner, *weight.shape[1:], generator=generator) / inner
            down.append(nn.Parameter(first.to(weight.device)))
            last = torch.zeros(weight.shape[0], inner, *(1 for _ in weight.shape[2:]), device=weight.device)
            up.append(nn.Parameter(last))
            if dora:
                lengths.append(nn.Parameter(_lengths(weight.detach().float())))
        self.down, self.up = nn.ParameterList(down), nn.ParameterList(up)
        self.lengths = nn.ParameterList(lengths)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Within the block, the model's layers have these beside them."""
        with ExitStack() as stack:
            for number, layer in enumerate(self.layers):
                handle = self._names.layers[layer].register_forward_hook(self._hook(number))
                stack.callback(handle.remove)
            yield

    @contextmanager
    def off(self) -> Iterator[None]:
        """Within the block, attached layers change nothing: the base model predicts."""
        before, self.scale = self.scale, 0.0
        try:
            yield
        finally:
            self.scale = before

    def changes(self) -> dict[Layer, LayerChange]:
        """What was learned, as files and controls have it; detached."""
        found = {}
        for number, layer in enumerate(self.layers):
            down, up = self.down[number].detach(), self.up[number].detach()
            lengths = self.lengths[number].detach() if len(self.lengths) else None
            found[layer] = LayerChange(LowRank(down, up, None, self._strength(number) * down.shape[0]), lengths)
        return found

    @torch.no_grad()
    def load(self, changes: Mapping[Layer, LayerChange]) -> None:
        """Go on from what a file holds.

        Raises:
            ModelError: other layers, another rank or alpha, or not of low rank.
        """
        if set(changes) != set(self.layers):
            wrong = sorted(set(changes) ^ set(self.layers))[0]
            raise ModelError(f"The file changes other layers than are trained here, such as {'.'.join(wrong)}.")
        for number, layer in enumerate(self.layers):
            factors, magnitude = changes[layer].factors, changes[layer].magnitude
            if not isinstance(factors, LowRank) or factors.down.numel() != self.down[number].numel():
                raise ModelError(f"{'.'.join(layer)} of the file is not of rank {self.down[number].shape[0]}.")
            # Whatever alpha the file had, the product stays what it was.
            ratio = factors.strength / self._strength(number)
            self.down[number].copy_(factors.down.reshape(self.down[number].shape))
            self.up[number].copy_(factors.up.reshape(self.up[number].shape) * ratio)
            if len(self.lengths):
                if magnitude is None:
                    raise ModelError(f"{'.'.join(layer)} of the file has no lengths; it is not DoRA.")
                self.lengths[number].copy_(magnitude.reshape(-1))

    def _strength(self, number: int) -> float:
        """What up · down is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.down[number].shape[0]

    def _hook(self, number: int) -> Any:
        def add(layer: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
            if self.scale == 0.0:
                return output
            down, up = self.down[number], self.up[number]
            strength = self.scale * self._strength(number)
            if len(self.lengths):
                change = strength * (up.flatten(1) @ down.flatten(1)).reshape(layer.weight.shape)
                new = layer.weight.detach().float() + change
                # As the paper, the norm is taken as a constant of the gradient, which costs a third less memory.
                ratio = self.lengths[number] / _lengths(new.detach())
                new = new * ratio.reshape(-1, *(1 for _ in new.shape[1:]))
                return output + _apply(layer, inputs[0], new - layer.weight.detach().float()).to(output.dtype)
            if isinstance(layer, nn.Conv2d):
                hidden = F.conv2d(_apply(layer, inputs[0], down), up)
            else:
                hidden = F.linear(F.linear(inputs[0].to(down.dtype), down), up)
            return output + (strength * hidden).to(output.dtype)

        return add


def _apply(layer: Any, hidden: Tensor, weight: Tensor) -> Tensor:
    """The layer with another weight and no bias."""
    if isinstance(layer, nn.Conv2d):
        padding: Any = layer.padding
        return F.conv2d(hidden.to(weight.dtype), weight, None, layer.stride, padding, layer.dilation)
    return F.linear(hidden.to(weight.dtype), weight)


def _lengths(weight: Tensor) -> Tensor:
    """[out]: length of each output's weights."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
