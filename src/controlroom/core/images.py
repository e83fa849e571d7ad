"""Pictures in: whatever a person has becomes an 8-bit RGB picture, or one clear error.

Everything that reads a picture from outside goes through `load_image` or `load_mask`. Formats are an allow-list, the
number of pixels is checked before any is decoded (a few kilobytes of PNG can hold gigapixels), and whatever a decoder
raises on broken data becomes an `InputError` that names the file, what was found and what is expected.

Example:
    >>> load_image(np.zeros((3, 4, 6), np.float32)).size  # [C, H, W] in [0, 1]
    (6, 4)
"""

from __future__ import annotations

import io
import os
import stat
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import numpy as np
from PIL import Image, UnidentifiedImageError

from controlroom.core.errors import InputError
from controlroom.core.pixels import MAX_PIXELS, as_array, check_dimensions, from_array, to_eight_bit
from controlroom.core.png import read_png_text, save_png

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

__all__ = ["MAX_PIXELS", "FitMode", "ImageSource", "checked_size", "fit", "load_image", "load_mask", "placement"]
__all__ += ["read_png_text", "save_png"]

ImageSource: TypeAlias = "str | os.PathLike[str] | bytes | Image.Image | np.ndarray | torch.Tensor"
FitMode = Literal["pad", "crop", "stretch"]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_WHITE, _BLACK = 255, 0
_EXIF_ORIENTATION = 0x0112
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def load_image(source: ImageSource) -> Image.Image:
    """Read a picture from wherever it is.

    A file may be PNG, JPEG, WebP, BMP, GIF (first frame) or TIFF; it is turned upright as its EXIF data says. What is
    transparent becomes white. 16-bit values are scaled to 8 bits, never clipped.

    An array or tensor is ``[H, W]``, ``[H, W, C]`` or ``[C, H, W]`` with 1 to 4 channels (grey, grey and alpha, RGB,
    RGBA), or a batch of one of these. Where both orders fit, an array is read as ``[H, W, C]`` and a tensor as
    ``[C, H, W]``. ``uint8`` counts from 0 to 255, ``uint16`` from 0 to 65535; other whole numbers must lie in 0..255;
    floats lie in [0, 1], or in [-1, 1] if any is negative.

    Returns:
        A new RGB picture.

    Raises:
        InputError: no such file, not a picture, broken, empty, or more than `MAX_PIXELS` pixels.
    """
    picture, name = _read(source)
    with _explained(name):
        return _flatten(picture, _WHITE)


def load_mask(source: ImageSource, size: tuple[int, int] | None = None) -> np.ndarray:
    """Read a mask: 1 where white, 0 where black or transparent.

    Args:
        source: as in `load_image`; colours count by their brightness. Floats must lie in [0, 1]; those of an array
            without colours keep their precision.
        size: ``(width, height)`` of the result; the mask is stretched to it. None keeps its own.

    Returns:
        float32 ``[H, W]`` in [0, 1].

    Raises:
        InputError: as `load_image`; negative floats; a size that is not two positive whole numbers.
    """
    array = as_array(source)
    if array is not None and array.dtype.kind == "f" and array.size:
        if array.min() < 0:
            raise InputError(f"{_describe(source)} has negative values; a mask lies in [0, 1].")
        plane = array
        while plane.ndim > 2 and plane.shape[0] == 1:
            plane = plane[0]
        plane = plane[..., 0] if plane.ndim == 3 and plane.shape[2] == 1 else plane
    else:
        plane = None
    picture, name = _read(source)
    with _explained(name):
        if plane is not None and plane.ndim == 2:
            grey = Image.fromarray(plane.astype(np.float32), "F")
        else:
            grey = Image.fromarray(
                np.asarray(_flatten(picture, _BLACK).convert("L"), np.float32) / np.float32(255), "F"
            )
        if size is not None and checked_size(*size) != grey.size:
            grey = grey.resize(checked_size(*size), Image.Resampling.BILINEAR)
    return np.clip(np.asarray(grey, dtype=np.float32), 0, 1)


def placement(
    size: tuple[int, int], width: int, height: int, mode: FitMode = "pad"
) -> tuple[float, float, float, float]:
    """Where `fit` puts a picture of ``size``: ``(scale_x, scale_y, left, top)``, so that x becomes x * scale_x + left.

    Raises:
        InputError: a size that is not two positive whole numbers, or an unknown mode.
    """
    if mode not in get_args(FitMode):
        raise InputError(f"Unknown way to fit a picture: {mode!r}; expected one of {', '.join(get_args(FitMode))}.")
    width, height = checked_size(width, height)
    scale_x, scale_y = width / size[0], height / size[1]
    if mode != "stretch":
        scale_x = scale_y = min(scale_x, scale_y) if mode == "pad" else max(scale_x, scale_y)
    return scale_x, scale_y, (width - size[0] * scale_x) / 2, (height - size[1] * scale_y) / 2


def fit(
    image: Image.Image,
    width: int,
    height: int,
    mode: FitMode = "pad",
    fill: tuple[int, int, int] = (255, 255, 255),
) -> Image.Image:
    """Bring a picture to ``width`` x ``height``: whole with a ``fill`` border, cropped to the middle, or stretched.

    Raises:
        InputError: as `placement`, or an empty picture.
    """
    if min(image.size) < 1:
        raise InputError(f"The picture is empty ({image.width} x {image.height} pixels); it cannot be resized.")
    scale_x, scale_y, left, top = placement(image.size, width, height, mode)
    with _explained("the picture"):
        rgb = image if image.mode == "RGB" else _flatten(_eight_bit(image), _WHITE)
        if mode == "crop":
            # The part that stays is cut out first: resizing all of a very long picture would need gigabytes.
            x, y = -left / scale_x, -top / scale_y
            box = (max(x, 0.0), max(y, 0.0), min(x + width / scale_x, rgb.width), min(y + height / scale_y, rgb.height))
            return rgb.resize((width, height), Image.Resampling.LANCZOS, box=box)
        inner = max(1, round(rgb.width * scale_x)), max(1, round(rgb.height * scale_y))
        inner = min(inner[0], width), min(inner[1], height)
        resized = rgb.resize(inner, Image.Resampling.LANCZOS)
        if inner == (width, height):
            return resized
        canvas = Image.new("RGB", (width, height), fill)
        canvas.paste(resized, ((width - inner[0]) // 2, (height - inner[1]) // 2))
        return canvas


def _read(source: Any) -> tuple[Image.Image, str]:
    """The picture, upright, in mode L, LA, RGB or RGBA, and what to call it in an error."""
    name = _describe(source)
    array = as_array(source)
    if array is not None:
        return from_array(array, name, channels_first=not isinstance(source, np.ndarray)), name
    if isinstance(source, Image.Image):
        return _decode(source, name), name
    if isinstance(source, bytes | bytearray | memoryview):
        data = bytes(source)
        if not data:
            raise InputError(f"{name} are empty; expected the bytes of a picture ({', '.join(FORMATS)}).")
        return _open(io.BytesIO(data), data[:16], name), name
    if isinstance(source, str | os.PathLike):
        with _opened(source, name) as file:
            start = file.read(16)
            file.seek(0)
            if not start:
                raise InputError(f"{name} is empty (0 bytes); expected a picture ({', '.join(FORMATS)}).")
            return _open(file, start, name), name
    raise InputError(
        f"A picture cannot be read from {name}; expected a path, bytes, a PIL image, a numpy array or a torch tensor."
    )


@contextmanager
def _opened(source: str | os.PathLike[Any], name: str) -> Iterator[Any]:
    """A regular file opened for reading; anything else (a folder, a pipe that would block, a URL) is refused."""
    text = os.fspath(source)
    if isinstance(text, str) and text.startswith(("http://", "https://", "data:")):
        raise InputError(f"{name} is an address; nothing is downloaded. Save the picture and give its path.")
    try:
        kind = os.stat(text).st_mode
        if stat.S_ISDIR(kind):
            raise InputError(f"{name} is a folder; expected the file of a picture ({', '.join(FORMATS)}).")
        if not stat.S_ISREG(kind):
            raise InputError(f"{name} is not a regular file; expected the file of a picture ({', '.join(FORMATS)}).")
        file = open(text, "rb")
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; expected the path of a picture.") from None
    except (OSError, ValueError) as error:  # a null character in the path is a ValueError
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(f"{name} cannot be opened: {reason}.") from error
    with file:
        yield file


def _open(file: Any, start: bytes, name: str) -> Image.Image:
    try:
        picture = Image.open(file, formats=FORMATS)
    except UnidentifiedImageError:
        found = f"it starts with {start!r}"
        raise InputError(
            f"{name} is not a picture that can be read ({found}); expected {', '.join(FORMATS)}."
        ) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(f"{name} has too many pixels: {error} Expected at most {MAX_PIXELS}.") from None
    except Exception as error:
        raise InputError(f"{name} is broken: {_reason(error)}. Expected {', '.join(FORMATS)}.") from error
    return _decode(picture, name)


def _decode(picture: Image.Image, name: str) -> Image.Image:
    check_dimensions(*picture.size, name)
    with _explained(name):
        picture.load()
        try:
            orientation = picture.getexif().get(_EXIF_ORIENTATION)
        except Exception:  # broken EXIF data does not make the pixels unusable
            orientation = None
        transpose = _TRANSPOSE.get(orientation) if isinstance(orientation, int) else None
        plain = _eight_bit(picture)
        return plain if transpose is None else plain.transpose(transpose)


def _eight_bit(picture: Image.Image) -> Image.Image:
    """Any Pillow mode as L, LA, RGB or RGBA."""
    mode = picture.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        values = np.asarray(picture)
        if mode == "I":
            if values.min() < 0 or values.max() > 65535:
                raise InputError("32-bit values outside 0..65535 are not brightness; save it with 8 or 16 bits")
            values = values.astype(np.uint16)
        grey = Image.fromarray(to_eight_bit(values, "the picture"), "L")
        key = picture.info.get("transparency")
        if isinstance(key, int) and mode != "F":
            grey.putalpha(Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8), "L"))
        return grey
    if mode in ("L", "LA", "RGB", "RGBA") and "transparency" not in picture.info:
        return picture
    if mode in ("1", "CMYK", "YCbCr", "HSV", "RGBX") and "transparency" not in picture.info:
        return picture.convert("RGB")
    return picture.convert("RGBA")


def _flatten(picture: Image.Image, background: int) -> Image.Image:
    """RGB with what is transparent replaced by a grey of value ``background``; always a new picture."""
    if picture.mode not in ("LA", "RGBA"):
        return picture.convert("RGB") if picture.mode != "RGB" else picture.copy()
    rgba = picture.convert("RGBA")
    base = Image.new("RGBA", rgba.size, (background, background, background, 255))
    return Image.alpha_composite(base, rgba).convert("RGB")


def checked_size(width: Any, height: Any) -> tuple[int, int]:
    """The two as plain ints, if they can be the size of a picture.

    Raises:
        InputError: they are not two positive whole numbers, or make too large a picture.
    """
    for value in (width, height):
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
            raise InputError(f"The size {width!r} x {height!r} is not one; expected two positive whole numbers.")
    check_dimensions(int(width), int(height), "The size asked for")
    return int(width), int(height)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Decoders raise anything on broken data (OSError, SyntaxError, struct.error, EOFError, ...): one error for all."""
    try:
        yield
    except InputError as error:
        message = str(error)
        raise InputError(
            message if message.startswith(name) else f"{name} cannot be used: {message}"
        ) from error.__cause__
    except MemoryError:
        raise InputError(f"{name} does not fit into memory; make it smaller first.") from None
    except Exception as error:
        raise InputError(f"{name} is broken or cut off: {_reason(error)}. Expected a whole picture.") from error


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")


def _describe(source: Any) -> str:
    if isinstance(source, str | os.PathLike):
        text = repr(os.fspath(source))
        return text if len(text) <= 200 else f"{text[:90]}...{text[-90:]}"
    if isinstance(source, bytes | bytearray | memoryview):
        return f"The {len(source)} bytes given"
    if isinstance(source, Image.Image):
        path = getattr(source, "filename", "")
        return repr(path) if path else f"The picture ({source.mode}, {source.width} x {source.height})"
    if isinstance(source, np.ndarray) or hasattr(source, "detach"):
        return f"The {'array' if isinstance(source, np.ndarray) else 'tensor'} {list(source.shape)} ({source.dtype})"
    return f"a value of type {type(source).__name__}"
