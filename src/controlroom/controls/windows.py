"""Overlapping windows over a large canvas, as MultiDiffusion places them: how they cut it and how they are averaged."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from controlroom.core.errors import InputError

if TYPE_CHECKING:
    import torch

Side = int | tuple[int, int]


@dataclass(frozen=True)
class Windows:
    """Windows of one size over a canvas; rows are ordered window by window.

    Attributes:
        canvas: its latent height and width.
        hw: latent height and width of a window.
        corners: top and left edge of each window.
        circular: a window that passes the right edge goes on at the left one.
    """

    canvas: tuple[int, int]
    hw: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    circular: bool = False
    _counts: dict[tuple[torch.device, torch.dtype], torch.Tensor] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.corners)

    def split(self, canvas: torch.Tensor, factor: int = 1) -> torch.Tensor:
        """[B, C, H, W] -> [count * B, C, h, w]; ``factor`` is pixels per latent."""
        import torch

        height, width = (side * factor for side in self.hw)
        if self.circular:
            canvas = torch.cat([canvas, canvas[..., :width]], dim=-1)
        return torch.cat(
            [
                canvas[..., top * factor : top * factor + height, left * factor : left * factor + width]
                for top, left in self.corners
            ]
        )

    def merge(self, predictions: torch.Tensor) -> torch.Tensor:
        """[count * B, C, h, w] -> [B, C, H, W], the mean where windows overlap."""
        parts = predictions.chunk(self.count)
        key = (predictions.device, predictions.dtype)
        if key not in self._counts:
            ones = predictions.new_ones(1, 1, *self.hw)
            self._counts[key] = self._sum([ones] * self.count).detach()
        return self._sum(list(parts)) / self._counts[key]

    def _sum(self, parts: list[torch.Tensor]) -> torch.Tensor:
        (height, width), canvas_width = self.hw, self.canvas[1]
        total = parts[0].new_zeros(*parts[0].shape[:2], *self.canvas)
        for part, (top, left) in zip(parts, self.corners, strict=True):
            inside = min(width, canvas_width - left)
            total[..., top : top + height, left : left + inside] += part[..., :inside]
            if inside < width:
                total[..., top : top + height, : width - inside] += part[..., inside:]
        return total


def windows_of(canvas: tuple[int, int], window: Side, stride: Side, circular: bool = False) -> Windows | None:
    """Windows that cover a canvas; None where one covers it all.

    Raises:
        InputError: a window larger than the canvas, windows with gaps between them, or a canvas that they do not cover
            to its edges.
    """
    hw, steps = _pair(window), _pair(stride)
    if hw[0] > canvas[0] or hw[1] > canvas[1]:
        raise InputError(
            f"window={_shown(hw)} is larger than the picture, whose latents are {canvas[0]} x {canvas[1]}. Give a "
            "window of the size that the network was trained at, in latent pixels (64 for Stable Diffusion at 512 "
            f"pixels), that fits in: at most {_shown((min(hw[0], canvas[0]), min(hw[1], canvas[1])))}."
        )
    if steps[0] > hw[0] or steps[1] > hw[1]:
        raise InputError(
            f"stride={_shown(steps)} leaves gaps between windows of {_shown(hw)}. Give at most the window."
        )
    if hw == canvas and not circular:
        return None
    tops = _starts("height", canvas[0], hw[0], steps[0])
    lefts = _around(canvas[1], steps[1]) if circular else _starts("width", canvas[1], hw[1], steps[1])
    return Windows(canvas, hw, tuple((top, left) for top in tops for left in lefts), circular)


def _starts(name: str, side: int, window: int, stride: int) -> list[int]:
    rest = (side - window) % stride
    if rest:
        fitting = [step for step in range(stride, 0, -1) if (side - window) % step == 0]
        raise InputError(
            f"Windows of {window} every {stride} latent pixels do not reach the edge of a {name} of {side}: {rest} are "
            f"left. Give a {name} of {side - rest} or {side - rest + stride} latent pixels, or stride={fitting[0]}."
        )
    return list(range(0, side - window + 1, stride))


def _around(side: int, stride: int) -> list[int]:
    if side % stride:
        raise InputError(
            f"Windows every {stride} latent pixels do not close around a width of {side}. Give a width of "
            f"{max(stride, side // stride * stride)} or {(side // stride + 1) * stride} latent pixels, or another "
            "stride."
        )
    return list(range(0, side, stride))


def _pair(side: Side) -> tuple[int, int]:
    return side if isinstance(side, tuple) else (side, side)


def _shown(pair: tuple[int, int]) -> str:
    return str(pair[0]) if pair[0] == pair[1] else str(pair)
