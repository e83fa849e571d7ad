"""Every kind of picture a person may have is read right, or refused with one clear error."""

from __future__ import annotations

import io
import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from controlroom.core.errors import InputError
from controlroom.core.images import MAX_PIXELS, fit, load_image, load_mask, placement

RAMP = np.arange(256, dtype=np.uint8)[None].repeat(4, 0)


def colours(height: int = 20, width: int = 30) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 8, y * 12, 255 - x * 4], -1).astype(np.uint8))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG whose head claims any size, with almost no data."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "GIF"])
def test_lossless_formats_keep_every_pixel(tmp_path: Path, form: str) -> None:
    picture = colours().quantize(32).convert("RGB")
    path = tmp_path / "picture"  # the format is in the bytes, not in the name
    path.write_bytes(encoded(picture, form))
    for source in (path, str(path), path.read_bytes(), Image.open(path)):
        read = load_image(source)
        assert read.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(read), np.asarray(picture))


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats(form: str) -> None:
    read = np.asarray(load_image(encoded(colours(), form, quality=95)), float)
    assert np.abs(read - np.asarray(colours(), float)).mean() < 6


def test_transparent_pixels_become_white() -> None:
    rgba = np.zeros((2, 3, 4), np.uint8)
    rgba[0] = (255, 0, 0, 255)
    rgba[1] = (255, 0, 0, 128)
    rgba[1, 2] = (0, 0, 0, 0)
    expected = [[[255, 0, 0]] * 3, [[255, 127, 127], [255, 127, 127], [255, 255, 255]]]
    np.testing.assert_array_equal(np.asarray(load_image(encoded(Image.fromarray(rgba), "PNG"))), expected)
    np.testing.assert_array_equal(np.asarray(load_image(rgba)), expected)
    grey_alpha = Image.fromarray(np.array([[[10, 255], [10, 0]]], np.uint8), "LA")
    assert np.asarray(load_image(encoded(grey_alpha, "PNG")))[0, :, 0].tolist() == [10, 255]


def test_palette_with_a_transparent_entry() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    assert np.asarray(load_image(encoded(palette, "PNG")))[0].tolist() == [[255, 0, 0], [0, 255, 0], [0, 0, 255]]
    data = encoded(palette, "PNG", transparency=1)
    assert np.asarray(load_image(data))[0].tolist() == [[255, 0, 0], [255, 255, 255], [0, 0, 255]]


@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_not_clipped(form: str) -> None:
    data = encoded(Image.fromarray(RAMP.astype(np.uint16) * 257), form)
    np.testing.assert_array_equal(np.asarray(load_image(data))[..., 1], RAMP)


def test_sixteen_bit_grey_with_a_transparent_value() -> None:
    picture = Image.fromarray(np.array([[0, 300, 65535]], np.uint16))
    assert np.asarray(load_image(encoded(picture, "PNG", transparency=300)))[0, :, 0].tolist() == [0, 255, 255]


def test_sixteen_bit_colour() -> None:
    row = b"\0" + struct.pack(">6H", 0xFFFF, 0x8000, 0, 0x1234, 0xFEFE, 0x0101)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")
    read = np.asarray(load_image(data), int)
    assert np.abs(read[0] - [[255, 128, 0], [18, 254, 1]]).max() <= 1


def test_cmyk_and_one_bit_and_float_tiff() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))
    assert np.asarray(load_image(encoded(cmyk, "TIFF")))[0, 0].tolist() == [255, 0, 0]
    red, green, blue = np.asarray(load_image(encoded(cmyk, "JPEG")))[0, 0]
    assert red > 240 and green < 15 and blue < 15
    assert np.asarray(load_image(encoded(Image.new("1", (2, 2), 1), "PNG"))).min() == 255
    floats = Image.fromarray(np.array([[0.0, 0.5, 1.0]], np.float32), "F")
    assert np.asarray(load_image(encoded(floats, "TIFF")))[0, :, 0].tolist() == [0, 128, 255]


def test_lab() -> None:
    lab = ImageCms.applyTransform(
        colours(),
        ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB"),
    )
    assert lab is not None
    read = np.asarray(load_image(encoded(lab, "TIFF")), float)
    assert np.abs(read - np.asarray(colours(), float)).mean() < 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int) -> None:
    """A camera stores the upright picture turned; the inverse of each turn must be undone."""
    upright = Image.new("RGB", (32, 16), (200, 0, 0))
    upright.paste((0, 0, 200), (0, 0, 16, 8))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # PIL Transpose that makes the stored one
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for form in ("JPEG", "PNG", "TIFF", "WEBP"):
        read = np.asarray(load_image(encoded(stored, form, exif=exif)), int)
        assert read.shape == (16, 32, 3), form
        assert np.abs(read[2:6, 2:14] - (0, 0, 200)).max() < 30, form


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_does_not_lose_the_picture() -> None:
    data = encoded(colours(), "JPEG", exif=b"Exif\0\0" + b"MM\0*" + b"\xff" * 40)
    assert load_image(data).size == (30, 20)


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ((255, 0, 0), (0, 255, 0))]
    for form in ("GIF", "WEBP", "PNG"):
        data = encoded(
            frames[0], form, save_all=True, append_images=frames[1:], **({"lossless": True} if form == "WEBP" else {})
        )
        assert np.asarray(load_image(data))[0, 0].tolist() == [255, 0, 0], form


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_truncated_files_name_the_file(tmp_path: Path, form: str) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    data = encoded(noise, form)
    for share in (0.1, 0.5, 0.8):
        path = tmp_path / f"cut.{form.lower()}"
        path.write_bytes(data[: int(len(data) * share)])
        with pytest.raises(InputError, match=r"cut\."):
            load_image(path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data(), st.sampled_from(["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"]))
def test_damaged_files_only_ever_raise_input_errors(data: st.DataObject, form: str) -> None:
    raw = bytearray(encoded(colours(), form))
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert load_image(bytes(raw)).mode == "RGB"
    except InputError as error:
        assert len(str(error)) > 20


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_only_ever_raise_input_errors(data: bytes) -> None:
    with pytest.raises(InputError):
        load_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_bombs_are_refused_before_a_pixel_is_decoded(tmp_path: Path) -> None:
    for width, height in ((10_000, 9_000), (30_000, 30_000), (2**31 - 1, 2**31 - 1), (70_000, 1)):
        path = tmp_path / "bomb.png"
        path.write_bytes(bomb(width, height))
        with pytest.raises(InputError, match=r"bomb\.png.*(pixels)"):
            load_image(path)
    assert MAX_PIXELS < 10_000 * 9_000


def test_twenty_thousand_pixels_wide_but_thin_works() -> None:
    wide = load_image(encoded(Image.new("RGB", (20_000, 4), (1, 2, 3)), "PNG"))
    assert wide.size == (20_000, 4)
    for mode in ("pad", "crop", "stretch"):
        assert fit(wide, 64, 64, mode).size == (64, 64)
    assert fit(load_image(np.zeros((1, 60_000), np.uint8)), 512, 512, "crop").size == (512, 512)


def test_paths_that_are_no_picture(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "notes.png").write_text("hello, this is text")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    os.mkfifo(tmp_path / "pipe.png")
    cases = {
        "missing.png": "does not exist",
        "empty.png": "empty",
        "notes.png": "not a picture",
        "drawing.svg": "not a picture",
        "pipe.png": "regular file",
        "": "folder",
    }
    for name, expected in cases.items():
        with pytest.raises(InputError, match=expected):
            load_image(tmp_path / name)
    for bad in ("a\0b.png", "x" * 5000, "https://example.org/a.png", "", b"", None, 3, [1, 2], {"a": 1}):
        with pytest.raises(InputError):
            load_image(bad)  # type: ignore[arg-type]


def test_other_formats_are_refused_even_if_pillow_reads_them(tmp_path: Path) -> None:
    for form in ("PPM", "TGA", "ICO", "PCX"):
        with pytest.raises(InputError):
            load_image(encoded(colours(), form))


@pytest.mark.parametrize("make", [np.asarray, torch.from_numpy])
def test_arrays_and_tensors_in_both_orders(make) -> None:
    hwc = np.asarray(colours())
    chw = np.ascontiguousarray(hwc.transpose(2, 0, 1))
    unit = chw.astype(np.float32) / 255
    for values in (hwc.copy(), chw, unit, unit * 2 - 1, chw[None], unit.astype(np.float64), hwc.astype(np.int64)):
        np.testing.assert_array_equal(np.asarray(load_image(make(values))), hwc)
    np.testing.assert_array_equal(np.asarray(load_image(make(hwc[..., 0].copy())))[..., 2], hwc[..., 0])
    assert np.asarray(load_image(make(np.array([[True, False]]))))[0, :, 0].tolist() == [255, 0]


def test_an_ambiguous_array_is_hwc_and_a_tensor_chw() -> None:
    values = np.zeros((3, 5, 3), np.uint8)
    assert load_image(values).size == (5, 3)
    assert load_image(torch.from_numpy(values)).size == (3, 5)


def test_sixteen_bit_array_and_bfloat16_with_gradient() -> None:
    np.testing.assert_array_equal(np.asarray(load_image(RAMP.astype(np.uint16) * 257))[..., 0], RAMP)
    tensor = torch.ones(3, 4, 4, dtype=torch.bfloat16, requires_grad=True)
    assert np.asarray(load_image(tensor)).min() == 255


@pytest.mark.parametrize(
    "values",
    [
        np.zeros((0, 4, 3)),
        np.zeros((2, 4, 4, 3)),
        np.zeros(5),
        np.zeros((7, 8, 9)),
        np.full((4, 4, 3), np.nan),
        np.full((4, 4, 3), np.inf),
        np.full((4, 4, 3), 200.0),
        np.full((4, 4, 3), -2.0),
        np.full((4, 4, 3), 256),
        np.full((4, 4, 3), -1),
        np.full((4, 4), "a"),
        np.full((4, 4), None),
        np.zeros((4, 4), complex),
    ],
)
def test_arrays_that_are_no_picture(values: np.ndarray) -> None:
    with pytest.raises(InputError):
        load_image(values)
    with pytest.raises(InputError):
        load_mask(values)


def test_empty_and_lazy_pil_images() -> None:
    with pytest.raises(InputError, match="empty"):
        load_image(Image.new("RGB", (0, 5)))
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8))
    lazy = Image.open(io.BytesIO(encoded(noise, "PNG")[:2000]))
    with pytest.raises(InputError, match="cut off"):
        load_image(lazy)


def test_the_result_is_a_new_picture() -> None:
    source = colours()
    load_image(source).putpixel((0, 0), (9, 9, 9))
    assert source.getpixel((0, 0)) != (9, 9, 9)


def test_masks() -> None:
    levels = np.array([[0, 51, 255]], np.uint8)
    np.testing.assert_allclose(load_mask(encoded(Image.fromarray(levels), "PNG")), [[0, 0.2, 1]], atol=1e-6)
    exact = np.array([[0.1234567, 0.9]], np.float32)
    np.testing.assert_array_equal(load_mask(exact), exact)
    np.testing.assert_array_equal(load_mask(torch.from_numpy(exact)[None, None]), exact)
    assert load_mask(np.array([[True, False]])).tolist() == [[1.0, 0.0]]
    assert load_mask(Image.new("RGBA", (2, 2), (255, 255, 255, 0))).max() == 0  # transparent is not chosen
    half = np.zeros((64, 64), np.float32)
    half[:, 32:] = 1
    small = load_mask(half, (8, 4))
    assert small.shape == (4, 8) and small.dtype == np.float32
    assert small[:, :3].max() == 0 and small[:, 5:].min() == 1 and 0 <= small.min() and small.max() <= 1
    with pytest.raises(InputError, match="negative"):
        load_mask(-exact)
    for size in ((0, 4), (4, -1), (2.5, 4), (True, 4), (10**9, 10**9)):
        with pytest.raises(InputError):
            load_mask(half, size)


def test_fit_and_placement_agree() -> None:
    """A point lands where `placement` says, in each mode."""
    source = Image.new("RGB", (200, 100))
    source.paste((255, 0, 0), (118, 38, 123, 43))  # centre (120.5, 40.5)
    for mode in ("pad", "crop", "stretch"):
        scale_x, scale_y, left, top = placement(source.size, 128, 128, mode)
        red = np.asarray(fit(source, 128, 128, mode, fill=(0, 0, 0)), float)[..., 0]
        y, x = np.mgrid[:128, :128] + 0.5
        assert abs((red * x).sum() / red.sum() - (120.5 * scale_x + left)) < 0.5, mode
        assert abs((red * y).sum() / red.sum() - (40.5 * scale_y + top)) < 0.5, mode
    padded = np.asarray(fit(source, 128, 128, "pad"))
    assert (padded[0] == 255).all() and (padded[64] == 0).all()


def test_fit_refuses_what_is_no_size_or_mode() -> None:
    for width, height in ((0, 5), (5, 0), (1.5, 2), ("3", 3), (10**6, 10**6)):
        with pytest.raises(InputError):
            fit(colours(), width, height)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="pad, crop, stretch"):
        fit(colours(), 5, 5, "squash")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="empty"):
        fit(Image.new("RGB", (0, 3)), 5, 5)
    assert fit(Image.new("I;16", (5, 5)), 4, 4).mode == "RGB"
