"""Files of pictures as `Picture`s: found, measured and hashed without decoding, read through `load_image`.

What every reader of a folder shares. Nothing is decoded: the size comes from the header, the orientation from EXIF, the
content from the bytes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from controlroom.core.errors import InputError
from controlroom.core.images import FORMATS, load_image, load_mask
from controlroom.core.pixels import check_dimensions
from controlroom.data.pictures import ConditionedPicture, Picture

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
MASK_FOLDER = "mask"
MASK_ENDING = "-masklabel"
"""OneTrainer keeps the mask of ``a.jpg`` beside it, as ``a-masklabel.png``."""

_EXIF_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)
# How far the shape of a mask may be from its picture's: rounding of a smaller copy, not another crop.
_SHAPE_TOLERANCE = 0.02


def existing_folder(path: str | os.PathLike[str], expected: str) -> Path:
    """The path, if it is a folder. Raises InputError, saying what was ``expected`` there."""
    folder = Path(path)
    if not folder.is_dir():
        found = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{str(folder)!r} {found}; expected {expected}.")
    return folder


def is_picture_file(path: Path) -> bool:
    """Whether a file is one of the set's pictures, by its name: not hidden, not a mask, of a known format."""
    seen = not path.name.startswith(".") and not path.stem.endswith(MASK_ENDING)
    return seen and path.suffix.lower() in SUFFIXES and path.is_file()


def pictures_in(folder: Path) -> list[Path]:
    """Files of pictures directly in a folder, by name."""
    return [path for path in _entries(folder) if is_picture_file(path)]


def subfolders(folder: Path) -> list[Path]:
    """Folders directly in a folder, by name; neither hidden ones nor masks."""
    return [path for path in _entries(folder) if path.is_dir() and path.name[0] != "." and path.name != MASK_FOLDER]


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir(), key=lambda path: path.name)
    except OSError as error:
        raise InputError(f"{str(folder)!r} cannot be listed: {error.strerror or error}.") from error


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) of a picture as `load_image` gives it, from its header.

    Raises:
        InputError: no such file, not a picture, or too large.
    """
    name = repr(str(path))
    try:
        with Image.open(path, formats=FORMATS) as picture:
            size = picture.size
            try:
                turned = picture.getexif().get(_EXIF_ORIENTATION) in _ON_ITS_SIDE
            except Exception:  # broken EXIF data does not make the pixels unusable
                turned = False
    except FileNotFoundError:
        raise InputError(f"{name} does not exist; expected a picture.") from None
    except (UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name} is not a picture that can be read ({error}); expected {', '.join(FORMATS)}."
        ) from None
    except Exception as error:  # decoders raise anything on broken headers
        raise InputError(f"{name} is broken: {error}. Expected {', '.join(FORMATS)}; remove or replace it.") from error
    check_dimensions(*size, name)
    return (size[1], size[0]) if turned else size


def hash_of(path: Path) -> str:
    """SHA-256 of a file. Raises InputError if it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error


def picture_of(
    path: Path, root: Path, caption: str = "", mask: Path | None = None, repeats: int = 1, subject: str = ""
) -> Picture:
    """The picture in a file.

    Args:
        path: the file.
        root: the set's folder, which its name is relative to.
        caption, repeats, subject: as in `Picture`.
        mask: file of its mask, of its size or a smaller copy of the same shape.

    Raises:
        InputError: the picture or the mask is none that can be read, or the mask has another shape.
    """
    size, content = upright_size(path), hash_of(path)
    read_mask = None
    if mask is not None:
        read_mask = mask_reader(mask, path, size)
        content = hashlib.sha256(f"{content} {hash_of(mask)}".encode()).hexdigest()
    name = path.relative_to(root).as_posix()
    return Picture(name, content, size, partial(load_image, path), caption, read_mask, repeats, subject)


def with_condition(picture: Picture, path: Path, condition: Path, root: Path) -> ConditionedPicture:
    """The picture in the file ``path``, with the condition in another.

    Raises:
        InputError: the condition is no picture that can be read, or has another shape.
    """
    found = picture_of(condition, root)
    _same_shape("condition", condition, found.size, path, picture.size)
    content = hashlib.sha256(f"{picture.content} along {found.content}".encode()).hexdigest()
    fields = {each.name: getattr(picture, each.name) for each in dataclasses.fields(picture)}
    return ConditionedPicture(**{**fields, "content": content}, condition=found)


def mask_reader(mask: Path, path: Path, size: tuple[int, int]) -> Callable[[], Image.Image]:
    """What decodes a mask for the picture in the file ``path``, of its upright ``size``.

    Raises:
        InputError: the mask is no picture that can be read, or has another shape.
    """
    _same_shape("mask", mask, upright_size(mask), path, size)
    return partial(_read_mask, mask, size)


def _same_shape(what: str, file: Path, found: tuple[int, int], path: Path, size: tuple[int, int]) -> None:
    across, down = found
    if abs(across * size[1] / (down * size[0]) - 1) > _SHAPE_TOLERANCE:
        raise InputError(
            f"The {what} {str(file)!r} is {across} x {down}, its picture {str(path)!r} {size[0]} x {size[1]}; "
            "expected the same shape."
        )


def _read_mask(path: Path, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.rint(load_mask(path, size) * 255).astype(np.uint8), "L")


def mask_of(path: Path, root: Path) -> Path | None:
    """The file of a picture's mask by the names that are usual, if there is one.

    ``mask/NAME.png`` beside the picture, or in the set's folder with the picture's own subfolders; or
    ``NAME-masklabel.png`` beside it.
    """
    places = (
        path.parent / MASK_FOLDER / f"{path.stem}.png",
        root / MASK_FOLDER / path.relative_to(root).with_suffix(".png"),
        path.with_name(f"{path.stem}{MASK_ENDING}.png"),
    )
    return next((place for place in places if place.is_file()), None)


def caption_beside(path: Path, endings: Iterable[str]) -> str | None:
    """What the first file of the picture's name with one of the endings says, in one line; None if there is none."""
    for ending in endings:
        file = path.with_suffix(ending)
        if file.is_file():
            return " ".join(text_of(file).split())
    return None


def text_of(path: Path) -> str:
    """A file's text. Raises InputError if it is not UTF-8 or cannot be read."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(path)!r} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from None
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror or error}.") from error


def inside(root: Path, named: str, where: str) -> Path:
    """The file that a table names, relative to a folder.

    Links are followed wherever they lead: caches of downloads consist of them.

    Raises:
        InputError: an absolute path, one that leaves the folder, or one that cannot be a path.
    """
    path = Path(named.replace("\\", "/"))
    parts = path.parts
    if not named.strip() or not parts or path.is_absolute() or path.drive or ".." in parts or ":" in parts[0]:
        raise InputError(f"{where} names {named!r}; expected a path inside of {str(root)!r}, relative to it.")
    try:
        (root / path).is_file()
    except (OSError, ValueError) as error:  # too long, or a character that no path has
        raise InputError(f"{where} names {named[:80]!r}, which cannot be a path ({error}).") from None
    return root / path


def file_in(root: Path, named: str, where: str, what: str = "") -> Path:
    """The file that a table names, relative to a folder; it is there.

    Args:
        root: the folder.
        named: the path in the table.
        where: file and line of the table, for messages.
        what: what is named, for messages.

    Raises:
        InputError: as `inside`, or there is no such file.
    """
    path = inside(root, named, where)
    if not path.is_file():
        raise InputError(f"{where} names {f'the {what} ' if what else ''}{named!r}, which is not in {str(root)!r}.")
    return path


def twice(pictures: Sequence[Picture]) -> Iterator[tuple[str, str]]:
    """Names of pictures with the same bytes, each with the first of them."""
    first: dict[str, str] = {}
    for picture in pictures:
        known = first.setdefault(picture.content, picture.name)
        if known != picture.name:
            yield known, picture.name


def note_of_copies(pictures: Sequence[Picture]) -> str | None:
    """A line about pictures that are in the set several times, if any are."""
    copies = [f"{again} is {known}" for known, again in twice(pictures)]
    if not copies:
        return None
    more = f", and {len(copies) - 3} more" if len(copies) > 3 else ""
    return f"The same picture is there under several names ({', '.join(copies[:3])}{more}); each is shown as its own."
