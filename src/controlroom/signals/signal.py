"""What a picture says about itself, one kind at a time: the maps that ControlNets are conditioned on.

A signal takes a picture and gives a `SignalMap`: numbers with a stated meaning, and the picture that a ControlNet of
that kind takes, which is also what a person is shown.

===============  ==========================================================  ====================================
kind             values, float32                                             picture
===============  ==========================================================  ====================================
``canny``        [H, W], 0 or 1: an edge, one pixel thick                    white on black
``soft_edge``    [H, W] in [0, 1]: how strong a border is                    grey, strong borders bright
``lines``        [H, W], 0 or 1: a straight line                             white on black
``scribble``     [H, W], 0 or 1: a stroke as a person would draw it          white on black
``depth``        [H, W] in [0, 1]: 1 is nearest, 0 farthest, not metric      grey, near is bright
``normal``       [H, W, 3], unit vectors: x right, y up, z to the viewer     red left, green up, blue to the viewer
``segmentation`` [H, W], class numbers                                       one colour for each class
``pose``         [people, 18, 3]: x, y in pixels, confidence in [0, 1]       OpenPose skeletons on black
===============  ==========================================================  ====================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from controlroom.core.errors import InputError

Kind = Literal["canny", "soft_edge", "lines", "scribble", "depth", "normal", "segmentation", "pose"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, eq=False)
class SignalMap:
    """One map of a picture.

    Attributes:
        kind: one of `KINDS`.
        values: float32; shape, range and meaning by kind, in the module's table. Cannot be written to.
        picture: RGB, as a ControlNet of this kind takes it.
        recognised: the picture given was a map of this kind already and was passed on.

    Raises:
        InputError: an unknown kind, values of another shape than the kind's, or a picture of another size.
    """

    kind: Kind
    values: NDArray[np.float32]
    picture: Image.Image
    recognised: bool = False

    def __post_init__(self) -> None:
        checked_kind(self.kind)
        values = np.array(self.values, dtype=np.float32)
        size = (self.picture.height, self.picture.width)
        tail = {"normal": (3,), "pose": (18, 3)}.get(self.kind, ())
        shape = values.shape[1:] if self.kind == "pose" else values.shape
        expected = tail if self.kind == "pose" else (*size, *tail)
        if shape != expected:
            raise InputError(
                f"The values of a {self.kind} map have shape {list(values.shape)}; expected "
                f"{['people' if self.kind == 'pose' else None, *expected] if self.kind == 'pose' else list(expected)} "
                f"for a picture of {size[1]} x {size[0]} pixels."
            )
        values.flags.writeable = False
        object.__setattr__(self, "values", values)


@runtime_checkable
class Signal(Protocol):
    """Finds one kind of map in a picture."""

    @property
    def kind(self) -> Kind:
        """Which kind of map it gives."""
        ...

    def __call__(self, image: Image.Image) -> SignalMap:
        """The map of an RGB picture, of the picture's size; a picture that already is such a map is passed on.

        Raises:
            InputError: the picture has nothing to find (a pose of nobody), or is too small.
        """
        ...


def checked_kind(kind: str) -> Kind:
    """``kind`` if there is such a map, else an InputError that lists them."""
    if kind not in KINDS:
        raise InputError(f"There is no signal {kind!r}; expected one of {', '.join(KINDS)}.")
    return kind


def white_on_black(values: NDArray[np.float32]) -> Image.Image:
    """Values [H, W] in [0, 1] as a grey RGB picture, 1 white."""
    grey = np.rint(np.clip(values, 0.0, 1.0) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")
