"""Writing files so that a reader never meets half of one.

A file is written beside its place under a temporary name, flushed to the disk, and renamed over the old one: renaming
within a folder is atomic, so the old file stays whole until the new one is. Whatever goes wrong on the way (a full
disk, a missing permission, an interrupt), the temporary file is removed and the old file is as it was.

Example:
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> write_atomically(folder / "pose.json", b"{}")
    >>> [file.name for file in folder.iterdir()]
    ['pose.json']
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from controlroom.core.errors import OutputError

_REMEDIES: dict[int, str] = {
    errno.ENOSPC: "free some space or choose a folder on another disk",
    errno.EDQUOT: "free some space or choose a folder on another disk",
    errno.EACCES: "choose a folder you may write to",
    errno.EPERM: "choose a folder you may write to",
    errno.EROFS: "choose a folder that is not read-only",
    errno.ENOENT: "create the folder first",
    errno.ENOTDIR: "a part of the path is a file, not a folder; choose another path",
    errno.EISDIR: "that is a folder; add a file name to it",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write ``data`` to ``path``, all of it or nothing.

    A symbolic link is followed and keeps pointing at the file; an existing file keeps its permissions. A device or a
    pipe (``/dev/stdout``) cannot be renamed over and is written to directly.

    Raises:
        OutputError: the file could not be written; what was at ``path`` before is untouched.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_text_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` to ``path`` as UTF-8 with the line ends it has; see `write_atomically`."""
    write_atomically(path, text.encode("utf-8"))


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a temporary path to write to, for libraries that want a file name; it becomes ``path`` when the block ends.

    The temporary path lies in the same folder and has the same suffix (Pillow chooses the format by it). If the block
    raises, the temporary file is removed; an `OSError` becomes an `OutputError`, any other exception passes.

    Raises:
        OutputError: the file could not be written; what was at ``path`` before is untouched.
    """
    if "\0" in os.fspath(path):
        raise OutputError(f"Cannot write {os.fspath(path)!r}: a path has no null character. Choose another path.")
    try:
        target = Path(os.path.realpath(path))
        mode = _mode_of(target)
        if mode is not None and stat.S_ISDIR(mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if mode is not None and not stat.S_ISREG(mode):
            yield target
            return
        # Short, so that a target with the longest name the disk allows can still be written.
        temporary = target.with_name(f".{secrets.token_hex(6)}.part{target.suffix[:16]}")
        try:
            # Created here, not by the library: O_EXCL never follows a link that someone else put there, and permissions
            # follow the umask (those of `tempfile` would make every result private).
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            yield temporary
            _flush_to_disk(temporary, os.O_RDWR)
            if mode is not None:
                os.chmod(temporary, stat.S_IMODE(mode))
            os.replace(temporary, target)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise
        # The file is in place; whether its name is on the disk yet is not worth an error.
        with contextlib.suppress(OSError):
            _flush_to_disk(target.parent, os.O_RDONLY)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        remedy = _REMEDIES.get(error.errno or 0, "choose another path")
        raise OutputError(
            f"Cannot write {os.fspath(path)!r}: {reason}. Nothing was written there; {remedy}."
        ) from error


def _mode_of(target: Path) -> int | None:
    """Type and permissions of what is at ``target``; None if nothing is."""
    try:
        return target.stat().st_mode
    except FileNotFoundError:
        return None


def _flush_to_disk(path: Path, flags: int) -> None:
    """Ask the system to put a file or a folder's list of names on the disk (a full disk may only show here)."""
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
