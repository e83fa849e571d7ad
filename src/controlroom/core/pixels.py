"""Arrays and tensors as 8-bit pictures, and how large a picture may be.

Brightness is scaled, never clipped: what does not lie in the range its type promises is an error that says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from controlroom.core.errors import InputError

# Just under the size at which Pillow itself warns of a decompression bomb.
MAX_PIXELS = 89_000_000
MAX_SIDE = 65_535


def as_array(source: Any) -> np.ndarray | None:
    """A numpy view of an array or tensor; None for anything else. Torch is not imported to find out."""
    if isinstance(source, np.ndarray):
        return source
    if type(source).__module__.partition(".")[0] == "torch" and hasattr(source, "detach"):
        tensor = source.detach().cpu()
        return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
    return None


def from_array(array: np.ndarray, name: str, channels_first: bool) -> Image.Image:
    """A picture of mode L, LA, RGB or RGBA from [H, W], [H, W, C], [C, H, W] or a batch of one.

    Args:
        array: as in `controlroom.core.images.load_image`.
        name: what to call it in an error.
        channels_first: read it as [C, H, W] where both orders fit.

    Raises:
        InputError: it is not one picture.
    """
    while array.ndim > 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim not in (2, 3) or array.size == 0:
        raise InputError(f"{name} is not one picture; expected [H, W], [H, W, C] or [C, H, W], not empty.")
    if array.ndim == 3:
        first, last = array.shape[0] in (1, 2, 3, 4), array.shape[2] in (1, 2, 3, 4)
        if not first and not last:
            raise InputError(
                f"{name} has neither first nor last axis of 1 to 4 channels; expected [H, W, C] or [C, H, W]."
            )
        if first and (channels_first or not last):
            array = array.transpose(1, 2, 0)
        if array.shape[2] == 1:
            array = array[..., 0]
    check_dimensions(array.shape[1], array.shape[0], name)
    values = np.ascontiguousarray(to_eight_bit(array, name))
    return Image.fromarray(values, {2: "L", 3: {2: "LA", 3: "RGB", 4: "RGBA"}.get(values.shape[-1])}[values.ndim])


def to_eight_bit(values: np.ndarray, name: str) -> np.ndarray:
    """Brightness as uint8: rounded, never clipped except by rounding errors.

    Raises:
        InputError: values outside the range of their type.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return ((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if values.dtype.kind in "iu":
        if values.min() < 0 or values.max() > 255:
            raise InputError(f"{name} has whole numbers from {values.min()} to {values.max()}; expected 0 to 255.")
        return values.astype(np.uint8)
    if values.dtype.kind != "f":
        raise InputError(f"{name} holds {values.dtype}; expected numbers.")
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(
            f"{name} has values that are not finite (NaN or infinity); expected floats in [0, 1] or [-1, 1]."
        )
    signed = low < -1e-3
    if low < -1.001 or high > 1.001:
        raise InputError(
            f"{name} has floats from {low:g} to {high:g}; expected [0, 1] or [-1, 1]: divide by its range."
        )
    unit = values.astype(np.float64) * 0.5 + 0.5 if signed else values
    return np.rint(np.clip(unit, 0, 1) * 255).astype(np.uint8)


def check_dimensions(width: int, height: int, name: str) -> None:
    """Refuse what is empty or too large, before anything of that size is made.

    Raises:
        InputError: it is.
    """
    if width < 1 or height < 1:
        raise InputError(f"{name} is empty ({width} x {height} pixels); expected at least one pixel.")
    if width * height > MAX_PIXELS or max(width, height) > MAX_SIDE:
        raise InputError(
            f"{name} is too large ({width} x {height} pixels); at most {MAX_PIXELS // 1_000_000} million pixels "
            f"and {MAX_SIDE} on a side. Make it smaller first."
        )
