"""Surface normals of a picture, from its depth.

The convention is that of ControlNet 1.1's normal maps (ScanNet's): blue faces the viewer, green up, red left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlroom.core.errors import InputError
from controlroom.signals.filters import gaussian, slopes
from controlroom.signals.recognise import recognise_normals
from controlroom.signals.signal import Signal, SignalMap

RELIEF = 0.25
"""How far the whole range of depth stands out, in shorter sides of the picture."""


@dataclass(frozen=True)
class Normal:
    """Normals of the surface that ``depth`` finds.

    Attributes:
        depth: what gives the depth, such as `TransformersDepth`.
        relief: how far the whole range of depth stands out, in shorter sides of the picture.
        recognise: pass on a picture that already is a map of normals.

    Raises:
        InputError: ``depth`` gives another kind of map.
    """

    depth: Signal
    relief: float = RELIEF
    recognise: bool = True
    kind: Literal["normal"] = "normal"

    def __post_init__(self) -> None:
        if self.depth.kind != "depth":
            raise InputError(f"Normals are computed from depth, and the signal given finds {self.depth.kind}.")

    def __call__(self, image: Image.Image) -> SignalMap:
        if self.recognise and (found := recognise_normals(image)) is not None:
            return SignalMap(self.kind, found, normals_picture(found), recognised=True)
        values = normals_of(self.depth(image).values, self.relief)
        return SignalMap(self.kind, values, normals_picture(values))


def normals_of(depth: NDArray[np.float32], relief: float = RELIEF) -> NDArray[np.float32]:
    """Normals [H, W, 3] (x right, y up, z to the viewer) of ``depth`` [H, W] in [0, 1], 1 nearest.

    Depth is smoothed a little first, so that a step between two surfaces becomes a rounded border.

    Example:
        >>> nearer_to_the_right = np.tile(np.linspace(0, 1, 33, dtype=np.float32), (33, 1))
        >>> print(normals_of(nearer_to_the_right)[16, 16].round(2))  # it faces left
        [-0.25  0.    0.97]
    """
    side = min(depth.shape)
    right, down = slopes(gaussian(depth, 1.5 * side / 128))
    height = np.float32(relief * side)
    normal = np.stack([-right * height, down * height, np.ones_like(depth)], axis=-1)
    return normal / np.linalg.norm(normal, axis=-1, keepdims=True) + np.float32(0.0)


def normals_picture(normals: NDArray[np.float32]) -> Image.Image:
    """Normals [H, W, 3] as ControlNet's colours: red left, green up, blue to the viewer."""
    turned = normals * np.array([-1, 1, 1], np.float32)
    return Image.fromarray(np.rint((turned + 1) * 127.5).astype(np.uint8))
