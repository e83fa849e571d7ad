"""Small image filters in numpy that several signals share: grey, Gaussian blur, gradients, neighbours, thinning."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Plane = NDArray[np.float32]
Mask = NDArray[np.bool_]


def grey_of(image: Image.Image) -> Plane:
    """Luma of a picture (BT.601): [H, W] in [0, 1]."""
    pixels = np.asarray(image.convert("RGB"), np.float32)
    return (pixels @ np.array([0.299, 0.587, 0.114], np.float32)) / np.float32(255)


def gaussian(values: Plane, sigma: float) -> Plane:
    """Gaussian blur of [H, W] or [H, W, C], edges continued; ``sigma`` in pixels, 0 changes nothing."""
    if sigma <= 0:
        return values
    reach = max(1, math.ceil(3 * sigma))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (0, 1):
        pad = [(0, 0)] * values.ndim
        pad[axis] = (reach, reach)
        wide, length = np.pad(values, pad, mode="edge"), values.shape[axis]
        values = sum(  # type: ignore[assignment]
            weight * np.take(wide, range(shift, shift + length), axis) for shift, weight in enumerate(weights)
        )
    return values


def slopes(values: Plane) -> tuple[Plane, Plane]:
    """Central differences per pixel of [H, W]: to the right and downwards."""
    padded = np.pad(values, 1, mode="edge")
    half = np.float32(0.5)
    right, down = padded[1:-1, 2:] - padded[1:-1, :-2], padded[2:, 1:-1] - padded[:-2, 1:-1]
    return (right * half).astype(np.float32, copy=False), (down * half).astype(np.float32, copy=False)


def neighbour(values: NDArray, dy: int, dx: int) -> NDArray:
    """For every pixel of [H, W] its neighbour ``dy`` below and ``dx`` to the right; 0 outside."""
    height, width = values.shape
    return np.pad(values, 1)[1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]


def thickened(mask: Mask, steps: int = 1) -> Mask:
    """``mask`` and all within ``steps`` of it, diagonals counted as one."""
    for _ in range(steps):
        mask = mask | neighbour(mask, 0, -1) | neighbour(mask, 0, 1)
        mask = mask | neighbour(mask, -1, 0) | neighbour(mask, 1, 0)
    return mask


def connected(seeds: Mask, allowed: Mask) -> Mask:
    """``seeds`` and every pixel of ``allowed`` that a path of 8-neighbours within it joins to a seed."""
    found = np.pad(seeds, 1)
    open_ = np.pad(allowed, 1) & ~found
    width = found.shape[1]
    steps = (-width - 1, -width, -width + 1, -1, 1, width - 1, width, width + 1)
    kept, free = found.ravel(), open_.ravel()
    front = np.flatnonzero(kept)
    while len(front):
        near = np.unique(np.concatenate([front + step for step in steps]))
        near = near[(near >= 0) & (near < len(free))]
        front = near[free[near]]
        kept[front], free[front] = True, False
    return found[1:-1, 1:-1]


def ridges(strength: Plane) -> Mask:
    """Pixels of [H, W] that are a maximum across the direction in which ``strength`` rises: borders made thin."""
    smooth = gaussian(strength, 0.7)
    # Across a ridge the curvature is strongest; its direction is the eigenvector of the Hessian.
    right, down = slopes(smooth)
    xx, xy = slopes(right)
    yy = slopes(down)[1]
    turn = 0.5 * np.arctan2(2 * xy, xx - yy)  # axis of the larger eigenvalue; a ridge's is the most negative
    octant = np.rint((turn + math.pi / 2) / (math.pi / 4)).astype(int) % 4
    found = np.zeros(strength.shape, bool)
    for number, (dx, dy) in enumerate(((1, 0), (1, 1), (0, 1), (-1, 1))):
        ahead, behind = neighbour(smooth, dy, dx), neighbour(smooth, -dy, -dx)
        found |= (octant == number) & (smooth > behind) & (smooth >= ahead)
    return found & (strength > 0)
