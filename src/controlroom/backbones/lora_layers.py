"""Changes of one layer's weight, in the forms in which people store them: low rank, Hadamard, Kronecker, full.

LoRA (Hu et al., arXiv 2106.09685): ΔW = (alpha / rank) · up · down, for convolutions also with a core between them
(LoCon); LoHa (arXiv 2108.06098): the elementwise product of two of these; LoKr: a Kronecker product (both as LyCORIS
stores them, arXiv 2309.14859); DoRA (arXiv 2402.09353): the changed weight has a learned length for each output.
A part's own scale is linear, W + s · (W' − W), also for DoRA, as in LyCORIS and ComfyUI; PEFT agrees at s = 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from controlroom.core.errors import ModelError


@dataclass(frozen=True)
class LowRank:
    """ΔW = (alpha / rank) · up · core · down.

    Attributes:
        down: [rank, in] or [rank, in, k, k].
        up: [out, rank] or [out, rank, 1, 1].
        core: [rank, rank, k, k] between them (``lora_mid``); None: none.
        alpha: None stands for the rank.
    """

    down: Tensor
    up: Tensor
    core: Tensor | None = None
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the change."""
        return int(self.down.shape[0])

    @property
    def strength(self) -> float:
        """What up · down is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def dense(self) -> Tensor:
        """ΔW, of a linear layer [out, in], of a convolution [out, in, k, k]."""
        if self.core is not None:
            return self.strength * _rebuilt(self.core, self.up.flatten(1), self.down.flatten(1).T)
        product = self.up.flatten(1).float() @ self.down.flatten(1).float()
        return self.strength * product.reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Hadamard:
    """ΔW = (alpha / rank) · (a1 · b1) ⊙ (a2 · b2); with cores where they are there.

    Attributes:
        first, second: a [out, rank] and b [rank, in · k · k]; with cores b is [rank, in].
        cores: [rank, rank, k, k] of each; None: none.
        alpha: None stands for the rank.
    """

    first: tuple[Tensor, Tensor]
    second: tuple[Tensor, Tensor]
    cores: tuple[Tensor, Tensor] | None = None
    alpha: float | None = None

    @property
    def rank(self) -> int:
        """Rank of each product."""
        return int(self.first[1].shape[0])

    def dense(self) -> Tensor:
        """ΔW; of a convolution without cores with its kernel flattened."""
        strength = 1.0 if self.alpha is None else self.alpha / self.rank
        if self.cores is None:
            parts = [a.float() @ b.float() for a, b in (self.first, self.second)]
        else:
            # LyCORIS keeps a as [rank, out] beside a core.
            parts = [
                _rebuilt(core, a.float().T, b.float().T)
                for core, (a, b) in zip(self.cores, (self.first, self.second), strict=True)
            ]
        return strength * parts[0] * parts[1]


@dataclass(frozen=True)
class Kronecker:
    """ΔW = (alpha / rank) · kron(first, second), each whole or a product of two.

    Attributes:
        first: [a, b], or its factors [a, rank], [rank, b].
        second: [c, d] or [c, d, k, k], or its factors, or factors with a core.
        alpha: None stands for the rank.
        whole: rank that a file of two whole parts speaks of (PEFT); 0: LyCORIS, which does not use alpha then.
    """

    first: tuple[Tensor, ...]
    second: tuple[Tensor, ...]
    core: Tensor | None = None
    alpha: float | None = None
    whole: int = 0

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        if len(self.second) == 2:
            return int(self.second[1].shape[0])
        return int(self.first[1].shape[0]) if len(self.first) == 2 else self.whole

    def dense(self) -> Tensor:
        """ΔW."""
        strength = 1.0 if self.alpha is None or self.rank == 0 else self.alpha / self.rank
        first = self.first[0].float() if len(self.first) == 1 else self.first[0].float() @ self.first[1].float()
        if len(self.second) == 1:
            second = self.second[0].float()
        elif self.core is not None:
            second = _rebuilt(self.core, self.second[0].float().T, self.second[1].float().T)
        else:
            left, right = self.second
            second = (left.float() @ right.float().flatten(1)).reshape(left.shape[0], *right.shape[1:])
        return strength * torch.kron(first.reshape(*first.shape, *(1 for _ in second.shape[2:])), second.contiguous())


@dataclass(frozen=True)
class Full:
    """ΔW as it is (``diff``)."""

    change: Tensor
    rank: int = 0

    def dense(self) -> Tensor:
        """ΔW."""
        return self.change.float()


Factors = LowRank | Hadamard | Kronecker | Full


@dataclass(frozen=True)
class LayerChange:
    """Everything that a file says about one layer.

    Attributes:
        factors: change of the weight; None: only the bias changes.
        magnitude: DoRA's lengths, one number for each output ([out] or [out, 1, ...]) or for each input ([1, in, ...]).
        bias: change of the bias [out].
    """

    factors: Factors | None
    magnitude: Tensor | None = None
    bias: Tensor | None = None

    @property
    def simple(self) -> bool:
        """Whether the layer's output changes by up(down(x)) alone, without ever building ΔW."""
        return isinstance(self.factors, LowRank) and self.magnitude is None and self.bias is None

    def dense(self, weight: Tensor) -> Tensor:
        """W' − W in float32, in the shape of ``weight``.

        Raises:
            ModelError: the shapes do not fit.
        """
        if self.factors is None:
            return torch.zeros_like(weight, dtype=torch.float32)
        change = self.factors.dense().to(weight.device)
        if change.numel() != weight.numel() or change.shape[0] != weight.shape[0]:
            raise ModelError(f"it changes a weight {list(change.shape)}, the layer's is {list(weight.shape)}")
        change = change.reshape(weight.shape)
        if self.magnitude is None:
            return change
        new = weight.float() + change
        magnitude = self.magnitude.to(weight.device).float()
        by_input = magnitude.ndim > 1 and magnitude.shape[0] == 1 and new.shape[0] > 1
        if magnitude.numel() != new.shape[1 if by_input else 0]:
            raise ModelError(f"its lengths are {list(magnitude.shape)}, the layer's weight is {list(weight.shape)}")
        kept = 1 if by_input else 0
        others = [dim for dim in range(new.ndim) if dim != kept]
        shape = [-1 if dim == kept else 1 for dim in range(new.ndim)]
        return (
            new * (magnitude.reshape(shape) / torch.linalg.vector_norm(new, dim=others, keepdim=True)) - weight.float()
        )


@dataclass
class Applied:
    """A change ready to be added to a layer's output.

    Attributes:
        layer: the linear or convolutional layer.
        change: what the file says.
        tensors: in the layer's precision, on its device: (down, up, core) or (ΔW,), the bias last.
    """

    layer: Any
    change: LayerChange
    tensors: list[Tensor | None] = field(default_factory=list)

    @classmethod
    def to(cls, layer: Any, change: LayerChange) -> Applied:
        """Prepare a change for a layer.

        Raises:
            ModelError: it was made for a layer of another shape.
        """
        weight = layer.weight
        made = cls(layer, change)

        def placed(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device=weight.device, dtype=weight.dtype)

        if change.bias is not None and change.bias.shape != weight.shape[:1]:
            raise ModelError(f"its bias is {list(change.bias.shape)}, the layer has {weight.shape[0]} outputs")
        if change.simple:
            assert isinstance(change.factors, LowRank)
            down, up = fitted(change.factors, weight)
            made.tensors = [placed(down), placed(up), placed(change.factors.core)]
        else:
            made.tensors = [placed(change.dense(weight.detach())), placed(change.bias)]
        return made

    def __call__(self, hidden: Tensor) -> Tensor:
        """What is added to the layer's output at scale 1."""
        if self.change.simple:
            assert isinstance(self.change.factors, LowRank)
            down, up, core = self.tensors
            assert down is not None and up is not None
            if isinstance(self.layer, nn.Conv2d):
                if core is not None:
                    hidden = _convolved(self.layer, F.conv2d(hidden, down), core)
                else:
                    hidden = _convolved(self.layer, hidden, down)
                return F.conv2d(hidden, up) * self.change.factors.strength
            return F.linear(F.linear(hidden, down), up) * self.change.factors.strength
        weight, bias = self.tensors
        assert weight is not None
        if isinstance(self.layer, nn.Conv2d):
            found = _convolved(self.layer, hidden, weight)
            return found if bias is None else found + bias[:, None, None]
        return F.linear(hidden, weight, bias)


def fitted(factors: LowRank, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``down`` and ``up`` in the form that a layer with this weight needs: matrices, or kernels.

    Raises:
        ModelError: they are for a layer of another shape.
    """
    down, up, core = factors.down, factors.up, factors.core
    into = int(weight[0].numel()) if core is None else int(weight.shape[1])
    if up.shape[0] != weight.shape[0] or down[0].numel() != into or up[0].numel() != down.shape[0]:
        raise ModelError(f"its factors are {list(down.shape)} and {list(up.shape)}, the weight is {list(weight.shape)}")
    if weight.ndim == 2:
        return down.flatten(1), up.flatten(1)
    kernel = weight.shape[1:] if core is None else (weight.shape[1], 1, 1)
    return down.reshape(down.shape[0], *kernel), up.reshape(up.shape[0], up.shape[1], 1, 1)


def _convolved(layer: nn.Conv2d, hidden: Tensor, weight: Tensor) -> Tensor:
    padding: Any = layer.padding
    return F.conv2d(hidden, weight, None, layer.stride, padding, layer.dilation)


def _rebuilt(core: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Tucker decomposition: [r1, r2, k, k] with [out, r1] and [in, r2] -> [out, in, k, k]."""
    return torch.einsum("pqkl,op,iq->oikl", core.float(), left.float(), right.float())
