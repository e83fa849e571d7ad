"""Text in PNG files: written whole or not at all, the same bytes each time, read without trust."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from controlroom.core.errors import InputError, OutputError
from controlroom.core.png import png_bytes, read_png_text, save_png

PICTURE = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(4, 4, 3))
SIGNATURE = b"\x89PNG\r\n\x1a\n"


def chunk(kind: bytes, body: bytes, checksum: int | None = None) -> bytes:
    crc = zlib.crc32(kind + body) if checksum is None else checksum
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)


def png(*chunks: bytes, end: bool = True) -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    return SIGNATURE + head + b"".join(chunks) + (chunk(b"IEND", b"") if end else b"")


def test_round_trip_of_pixels_and_text(tmp_path: Path) -> None:
    text = {
        "parameters": "a cat, Steps: 20\nSeed: 7",
        "controlroom": '{"prompt": "кошка 猫 🐈"}',
        "café": "é",
        "none": "",
    }
    save_png(PICTURE, tmp_path / "out.png", text)
    assert read_png_text(tmp_path / "out.png") == text
    with Image.open(tmp_path / "out.png") as read:
        np.testing.assert_array_equal(np.asarray(read), np.asarray(PICTURE))
        assert read.text == text  # type: ignore[attr-defined]
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_latin_text_is_a_text_chunk_that_old_tools_read() -> None:
    assert b"tEXtparameters\0caf\xe9" in png_bytes(PICTURE, {"parameters": "café"})


def test_bytes_depend_on_pixels_and_text_only() -> None:
    noted = PICTURE.copy()
    noted.info = {
        "dpi": (300, 300),
        "icc_profile": b"x",
        "Comment": "hi",
        "transparency": (0, 0, 0),
        "exif": b"Exif\0\0",
    }
    assert png_bytes(noted, {"a": "b"}) == png_bytes(PICTURE, {"a": "b"})
    assert read_png_text(png_bytes(noted)) == {}


@settings(deadline=None)
@given(st.dictionaries(st.from_regex(r"[A-Za-z][A-Za-z0-9_]{0,30}", fullmatch=True), st.text(max_size=50), max_size=4))
def test_any_text_survives_or_is_refused(text: dict[str, str]) -> None:
    try:
        data = png_bytes(PICTURE, text)
    except InputError:
        assert any("\0" in value or any(0xD800 <= ord(c) < 0xE000 for c in value) for value in text.values())
        return
    assert read_png_text(data) == text


@pytest.mark.parametrize("key", ["", "x" * 80, " a", "a\n", "猫", "a\0", 3])
def test_keys_that_png_cannot_hold(key: str) -> None:
    with pytest.raises(InputError):
        png_bytes(PICTURE, {key: "text"})


def test_values_that_png_cannot_hold() -> None:
    for value in ("a\0b", "\ud800", 7, None, b"x", "x" * (17 * 1024 * 1024)):
        with pytest.raises(InputError):
            png_bytes(PICTURE, {"key": value})  # type: ignore[dict-item]
    with pytest.raises(InputError, match="empty"):
        png_bytes(Image.new("RGB", (0, 1)))


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_png(PICTURE, tmp_path / "out.png", {"version": "1"})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError):
        save_png(PICTURE, tmp_path / "out.png", {"version": "2"})
    assert read_png_text(tmp_path / "out.png") == {"version": "1"}
    assert [file.name for file in tmp_path.iterdir()] == ["out.png"]


def test_compressed_text_of_other_tools() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("workflow", "zipped " * 50, zip=True)
    notes.add_itxt("猫"[:0] + "title", "über 猫", lang="de", tkey="Titel", zip=True)
    buffer = io.BytesIO()
    PICTURE.save(buffer, "PNG", pnginfo=notes)
    assert read_png_text(buffer.getvalue()) == {"workflow": "zipped " * 50, "title": "über 猫"}


def test_text_after_the_pixels_is_found_and_the_first_of_a_key_wins() -> None:
    data = png(chunk(b"tEXt", b"a\0one"), chunk(b"IDAT", b"junk"), chunk(b"tEXt", b"a\0two"), chunk(b"tEXt", b"b\0x"))
    assert read_png_text(data) == {"a": "one", "b": "x"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xd8\xff\xe0 a jpeg",
        SIGNATURE,
        png(end=False),
        png(chunk(b"tEXt", b"a\0b", checksum=1)),
        png(chunk(b"tEXt", b"no separator")),
        png(chunk(b"tEXt", b"\0empty key")),
        png(chunk(b"zTXt", b"a\0\0not zlib")),
        png(chunk(b"zTXt", b"a\0\1" + zlib.compress(b"x"))),
        png(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 99)[:-6])),
        png(chunk(b"iTXt", b"a\0\0\0\0\0\xff\xfe")),
        png(chunk(b"iTXt", b"a\0\0")),
        png()[:-4],
        SIGNATURE + struct.pack(">I", 2**32 - 1) + b"tEXt" + b"x" * 50,
        SIGNATURE + struct.pack(">I", 2**31) + b"IDAT" + b"x" * 50,
    ],
)
def test_broken_files(data: bytes) -> None:
    with pytest.raises(InputError):
        read_png_text(data)


def test_a_text_bomb_is_refused_without_unfolding_it() -> None:
    body = b"a\0\0" + zlib.compress(bytes(400 * 1024 * 1024), 1)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="large"):
            read_png_text(png(chunk(b"zTXt", body)))
        assert tracemalloc.get_traced_memory()[1] < 200 * 1024 * 1024
    finally:
        tracemalloc.stop()


def test_files_that_are_not_there(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "no.png", "a\0b"):
        with pytest.raises(InputError):
            read_png_text(path)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damage_only_ever_raises_input_errors(data: st.DataObject) -> None:
    raw = bytearray(png_bytes(PICTURE, {"parameters": "x" * 30, "controlroom": "猫"}))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        read_png_text(bytes(raw[: data.draw(st.integers(0, len(raw)))]))
    except InputError:
        pass
