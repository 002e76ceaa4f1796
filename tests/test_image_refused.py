"""Pictures that must be refused: each with an `ImageError` that names it, before it costs memory, time or a crash."""

import io
import os
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image
from skimage import data
from support.formats import encoded

import dyntok.imaging.source
from dyntok.config import ImageConfig
from dyntok.errors import DyntokError, ImageError
from dyntok.image import ACCEPTED_FORMATS, describe, load_image, to_pixels

PHOTO = data.astronaut()[20:180, 120:360].copy()  # [160, 240, 3]
GREY = PHOTO[:, :, 1].copy()


def png_chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png_header(width, height):
    """A PNG that promises width x height pixels and holds none."""
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 64)) + png_chunk(b"IEND", b"")


def refused(source, match=None, **options):
    with pytest.raises(ImageError, match=match) as caught:
        load_image(source, **options)
    assert isinstance(caught.value, ValueError) and isinstance(caught.value, DyntokError)
    assert str(caught.value).startswith(describe(source))
    with pytest.raises(ImageError):
        to_pixels(source, ImageConfig(img_size=16), **options)
    return caught.value


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\0" * 100, b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"PK\x03\x04" + b"\0" * 60]
)
def test_what_is_not_an_image(content):
    refused(content)


@pytest.mark.parametrize("format", ["EPS", "ICO", "PCX", "DDS", "PDF"])
def test_formats_that_are_recognized_but_not_read(format):
    refused(encoded(PHOTO, format), f"{format} can't be read; convert it to PNG or JPEG first")


def test_tga_has_no_signature():
    refused(encoded(PHOTO, "TGA"), "expected one of JPEG, PNG")


def test_lazy_pil_image_of_another_format_is_not_decoded():
    lazy = Image.open(io.BytesIO(encoded(PHOTO, "EPS")))
    refused(lazy, "format EPS")
    assert lazy.tile
    tga = Image.open(io.BytesIO(encoded(PHOTO, "TGA")))
    refused(tga, r"pass image\.copy\(\)")
    assert np.array_equal(np.asarray(load_image(tga.copy())), PHOTO)


@pytest.mark.parametrize("format", ACCEPTED_FORMATS)
def test_truncated_and_damaged_files(format):
    whole = encoded(PHOTO[:48, :64], format)
    for length in np.linspace(1, len(whole) * 0.9, 25).astype(int):
        refused(whole[:length])
    random = np.random.default_rng(0)
    for _ in range(60):
        damaged = np.frombuffer(whole, np.uint8).copy()
        where = random.integers(0, min(len(whole), 400), 4)
        damaged[where] = random.integers(0, 256, 4)
        try:
            load_image(damaged.tobytes())
        except ImageError as error:
            assert str(error).startswith("<bytes, ")


def test_pillow_errors_are_chained():
    error = refused(encoded(PHOTO, "PNG")[:5000], "can't be read as an image")
    assert error.__cause__ is not None and not isinstance(error.__cause__, ImageError)


@pytest.mark.parametrize("size", [(8193, 8192), (20000, 20000), (2**31 - 1, 2**31 - 1)])
def test_bombs_are_refused_from_the_header(size, recwarn, tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    refused(path, "pixels")
    refused(png_header(*size), "scale it down first")
    assert not recwarn.list


def test_max_pixels_holds_for_every_source(tmp_path):
    count = PHOTO.shape[0] * PHOTO.shape[1]
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    tensor = torch.from_numpy(PHOTO).permute(2, 0, 1)
    for source in (
        path,
        path.read_bytes(),
        Image.open(path),
        Image.fromarray(PHOTO),
        PHOTO,
        GREY,
        tensor,
        tensor / 255,
    ):
        assert load_image(source, max_pixels=count).size == (240, 160)
        refused(source, "240 x 160 = 38,400 pixels, the limit is 38,399", max_pixels=count - 1)


def test_lazy_pil_image_over_the_limit_is_not_decoded():
    lazy = Image.open(io.BytesIO(png_header(3000, 3000)))
    refused(lazy, "9,000,000 pixels", max_pixels=1000)
    assert lazy.tile
    refused(lazy, "can't be read")


def test_too_long_a_side():
    refused(png_header(2**20 + 1, 1), "limit for a side")
    refused(np.zeros((1, 2**20 + 1), np.uint8), "limit for a side")


def test_too_large_a_file(tmp_path, monkeypatch):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    monkeypatch.setattr(dyntok.imaging.source, "MAX_FILE_BYTES", 1000)
    refused(path, "1,001 bytes, expected 1 to 1,000")
    refused(path.read_bytes(), "expected 1 to 1,000")


def test_paths_that_are_not_regular_files(tmp_path):
    refused(tmp_path / "absent.jpg", "No such file")
    refused(str(tmp_path), "directory")
    refused("photo\0.png")
    refused("")
    empty = tmp_path / "empty.jpg"
    empty.touch()
    refused(empty, "0 bytes")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("path", ["pipe", "/dev/zero"])
def test_pipes_and_devices_do_not_hang(path, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with ThreadPoolExecutor(1) as pool:
        loading = pool.submit(load_image, tmp_path / path)
        try:
            with pytest.raises(ImageError, match="not a regular file"):
                loading.result(timeout=20)
        finally:
            with suppress(OSError):  # nobody reads unless it hangs: a writer lets the thread go
                os.close(os.open(tmp_path / "pipe", os.O_WRONLY | os.O_NONBLOCK))


@pytest.mark.parametrize(
    "source, match",
    [
        (PHOTO / 254.0, r"expected \[0, 1\]"),
        (PHOTO.astype(np.uint16), "expected uint8"),
        (GREY > 3, "expected uint8"),
        (PHOTO.transpose(2, 0, 1), "channels last"),
        (PHOTO[None], "one image at a time"),
        (PHOTO[:, :, :2], r"\[H, W, 4\]"),
        (np.array(3, np.uint8), r"shape \[H, W\]"),
        (np.zeros((0, 5, 3), np.uint8), "5 x 0 pixels"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (torch.zeros(3, 0, 4), "4 x 0 pixels"),
        (torch.zeros(2, 3, 8, 8), "one image at a time"),
        (torch.zeros(8, 8, 3), "channels first"),
        (torch.zeros(3, 8, 8, dtype=torch.int64), "expected uint8"),
        (torch.full((3, 8, 8), 1.01), r"expected \[0, 1\]"),
        (torch.full((3, 8, 8), -0.1), r"expected \[0, 1\]"),
        (torch.full((3, 8, 8), float("nan")), r"expected \[0, 1\]"),
        (torch.full((3, 8, 8), float("inf")), r"expected \[0, 1\]"),
        (None, "expected a path"),
        (17, "expected a path"),
        ([PHOTO], "expected a path"),
    ],
)
def test_wrong_types_shapes_and_ranges(source, match):
    refused(source, match)


def test_closed_pil_image(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(encoded(PHOTO, "PNG"))
    closed = Image.open(path)
    closed.close()
    refused(closed)
