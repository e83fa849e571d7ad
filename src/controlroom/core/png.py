"""PNG files that carry text: a result takes its manifest with it (PNG specification, third edition, section 11.3.3).

Written in one piece or not at all, with the same bytes for the same pixels and text. Read without decoding a pixel and
without trusting a single length in the file.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from PIL import Image, PngImagePlugin

from controlroom.core.errors import InputError
from controlroom.core.files import write_atomically

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Manifests are kilobytes; ComfyUI's graphs may reach a few megabytes.
MAX_TEXT_BYTES = 64 * 1024 * 1024
_MAX_CHUNKS = 1_000_000


def save_png(image: Image.Image, path: str | os.PathLike[str], text: Mapping[str, str] | None = None) -> None:
    """Write ``image`` (L, LA, RGB, RGBA; other modes become RGB) with text chunks, atomically.

    Latin-1 text becomes ``tEXt``, as other tools expect of ``parameters``; other text becomes UTF-8 ``iTXt``. The bytes
    depend on pixels and text only: colour profiles and notes that the picture carries are left out.

    Raises:
        InputError: an empty picture, or text that PNG cannot hold.
        OutputError: the file could not be written; what was there before is untouched.
    """
    write_atomically(path, png_bytes(image, text))


def png_bytes(image: Image.Image, text: Mapping[str, str] | None = None) -> bytes:
    """What `save_png` writes."""
    if min(image.size) < 1:
        raise InputError(f"An empty picture ({image.width} x {image.height} pixels) cannot be saved as PNG.")
    plain = image.copy() if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert("RGB")
    plain.info = {}
    notes = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        _check_text(key, value)
        try:
            value.encode("latin-1")
            notes.add_text(key, value)
        except UnicodeEncodeError:
            notes.add_itxt(key, value)
    buffer = io.BytesIO()
    plain.save(buffer, "PNG", pnginfo=notes, compress_level=6)
    return buffer.getvalue()


def read_png_text(source: str | os.PathLike[str] | bytes) -> dict[str, str]:
    """The text a PNG file carries, by key; where a key comes twice, its first text.

    Raises:
        InputError: no such file, not a PNG, cut off, a checksum that does not match, or text that unfolds to more than
            `MAX_TEXT_BYTES`.
    """
    if isinstance(source, bytes | bytearray):
        return _read_text(io.BytesIO(source), len(source), f"The {len(source)} bytes given")
    name = repr(os.fspath(source))
    try:
        if not Path(source).is_file():
            raise InputError(f"{name} is not a file that exists; expected a PNG file.")
        with open(source, "rb") as file:
            return _read_text(file, os.fstat(file.fileno()).st_size, name)
    except (OSError, ValueError) as error:
        raise InputError(f"{name} cannot be read: {error}.") from error


def _read_text(file: IO[bytes], size: int, name: str) -> dict[str, str]:
    def broken(what: str) -> InputError:
        return InputError(f"{name} is a broken PNG file: {what}. Expected a whole one; copy it again from its source.")

    start = file.read(len(_SIGNATURE))
    if start != _SIGNATURE:
        raise InputError(f"{name} is not a PNG file (it starts with {start!r}); text is read from PNG files only.")
    found: dict[str, str] = {}
    room = MAX_TEXT_BYTES
    for _ in range(_MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise broken("it ends without its last chunk")
        length, kind = int.from_bytes(head[:4], "big"), head[4:]
        if length > size - file.tell() - 4:
            raise broken(f"the chunk {kind!r} claims {length} bytes, more than the file has")
        if kind == b"IEND":
            return found
        if kind not in (b"tEXt", b"zTXt", b"iTXt"):
            file.seek(length + 4, os.SEEK_CUR)
            continue
        if length > room:
            raise broken(f"its text is larger than {MAX_TEXT_BYTES} bytes")
        body, checksum = file.read(length), file.read(4)
        if zlib.crc32(kind + body) != int.from_bytes(checksum, "big"):
            raise broken(f"the checksum of a chunk {kind!r} does not match")
        try:
            key, value = _parse_text(kind, body, room)
        except (ValueError, zlib.error) as error:
            raise broken(f"a chunk {kind!r} cannot be read ({error})") from error
        room -= len(body) + len(value)
        if room < 0:
            raise broken(f"its text is larger than {MAX_TEXT_BYTES} bytes")
        found.setdefault(key, value)
    raise broken("it has too many chunks")


def _parse_text(kind: bytes, body: bytes, room: int) -> tuple[str, str]:
    key, separator, rest = body.partition(b"\0")
    if not separator or not 1 <= len(key) <= 79:
        raise ValueError("no key")
    if kind == b"tEXt":
        return key.decode("latin-1"), rest.decode("latin-1")
    if kind == b"zTXt":
        if rest[:1] != b"\0":
            raise ValueError("unknown compression")
        return key.decode("latin-1"), _inflate(rest[1:], room).decode("latin-1")
    flag, method, rest = rest[:1], rest[1:2], rest[2:]
    parts = rest.split(b"\0", 2)  # language, translated key, text
    if len(parts) != 3 or flag not in (b"\0", b"\1") or method != b"\0":
        raise ValueError("malformed international text")
    return key.decode("latin-1"), (_inflate(parts[2], room) if flag == b"\1" else parts[2]).decode("utf-8")


def _inflate(data: bytes, room: int) -> bytes:
    """Unfold at most ``room`` bytes: a few kilobytes can hold gigabytes."""
    stream = zlib.decompressobj()
    unfolded = stream.decompress(data, room + 1)
    if len(unfolded) > room:
        raise ValueError("too large")
    if not stream.eof:
        raise ValueError("cut off")
    return unfolded


def _check_text(key: Any, value: Any) -> None:
    if not isinstance(key, str) or not isinstance(value, str):
        raise InputError(f"PNG text must be pairs of strings; got {type(key).__name__} and {type(value).__name__}.")
    if (
        not 1 <= len(key) <= 79
        or key != key.strip()
        or any(not (32 <= ord(c) <= 126 or 161 <= ord(c) <= 255) for c in key)
    ):
        raise InputError(f"{key!r:.200} cannot be a key of PNG text; expected 1 to 79 printable Latin letters.")
    if "\0" in value:
        raise InputError(f"The text {key!r} has a null character; PNG text cannot hold one.")
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        raise InputError(f"The text {key!r} has a lone surrogate; expected Unicode text.") from None
    if size > MAX_TEXT_BYTES // 4:
        raise InputError(f"The text {key!r} has {size} bytes; expected at most {MAX_TEXT_BYTES // 4}.")
