"""Where results go: checked before anything is computed, so that no picture is drawn that cannot be written."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from controlroom.core.errors import OutputError


def destinations(path: str | os.PathLike[str], count: int = 1) -> tuple[Path, ...]:
    """The files that ``count`` pictures are written to: ``path``, or ``name_0.png``, ``name_1.png``, … beside it.

    A device (``/dev/stdout``) is taken as it is.

    Raises:
        OutputError: it is a folder, does not end with .png, or its folder is not there or cannot be written to.
    """
    given = os.fspath(path)
    if not given or "\0" in given:
        raise OutputError(f"{given!r} is not the name of a file; give one that ends with .png.")
    target = Path(given)
    try:
        mode = target.stat().st_mode if target.exists() else None
    except OSError as error:
        raise OutputError(f"Cannot write {given!r}: {(error.strerror or str(error)).lower()}.") from error
    if mode is not None and stat.S_ISDIR(mode):
        raise OutputError(f"{given!r} is a folder; add the name of a file, such as {str(target / 'picture.png')!r}.")
    if mode is not None and not stat.S_ISREG(mode) and count == 1:
        return (target,)
    if target.suffix.lower() != ".png":
        raise OutputError(
            f"{given!r} does not end with .png. Results are PNG files, which carry the run that drew them; write "
            f"{str(target.with_name(target.stem + '.png'))!r}."
        )
    _check_folder(given)
    if count == 1:
        return (target,)
    return tuple(target.with_name(f"{target.stem}_{index}{target.suffix}") for index in range(count))


def destination(path: str, suffix: str, what: str) -> Path:
    """The file that something other than pictures is written to.

    Args:
        path: as it was given.
        suffix: its ending.
        what: what is written, with an article, for the message.

    Raises:
        OutputError: another ending, a folder, a name that is too long, or its folder is not there or cannot be written
            to.
    """
    if not path or "\0" in path or Path(path).suffix.lower() != suffix or os.path.isdir(path):
        raise OutputError(f"{path!r:.200} is not the name of {what}; give a file that ends with {suffix}.")
    try:
        os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise OutputError(f"Cannot write {path!r:.200}: {(error.strerror or str(error)).lower()}.") from error
    _check_folder(path)
    return Path(path)


def _check_folder(path: str) -> None:
    """The folder of a file is there and can be written to. Raises OutputError."""
    folder = str(Path(path).parent)
    if not os.path.isdir(folder):
        what = "is not a folder" if os.path.exists(folder) else "does not exist"
        raise OutputError(f"Cannot write {path!r}: the folder {folder!r} {what}. Create it first.")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise OutputError(f"Cannot write {path!r}: no permission in {folder!r}. Choose another folder.")


def same_file(target: Path, other: str) -> bool:
    """Whether writing to ``target`` would overwrite the file ``other``."""
    try:
        return target.is_file() and os.path.samefile(target, other)
    except (OSError, ValueError):
        return False


def name_for(prompt: str, seed: int) -> str:
    """A file name out of the first words of a prompt and the seed.

    >>> name_for("A woman with red hair, on the beach!", 7)
    'a-woman-with-red-hair-on-the-beach-7.png'
    """
    words = re.sub(r"[^a-z0-9]+", "-", prompt[:400].lower()).strip("-")[:48].rstrip("-")
    return f"{words or 'picture'}-{seed}.png"
