"""The color that a PNG's tRNS chunk makes transparent lies on white, in every depth."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from dyntok.image import load_image

GRAY, RGB = 0, 2  # color types


def png(depth, color, row, *chunks):
    """A PNG of one row with these bytes."""
    width = len(row) * 8 // depth // (3 if color == RGB else 1)
    header = struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    checked = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(checked)


def key(*samples):
    return b"tRNS", struct.pack(f">{len(samples)}H", *samples)


CASES = {
    "1 bit": (png(1, GRAY, bytes([0b01010000]), key(1)), [0, 255] * 2 + [0] * 4),
    "2 bits": (png(2, GRAY, bytes([0b00011011]), key(1)), [0, 255, 170, 255]),
    "4 bits": (png(4, GRAY, bytes([0x05, 0x9F]), key(5)), [0, 255, 153, 255]),
    "8 bits": (png(8, GRAY, bytes([7, 9]), key(7)), [255, 9]),
    "5 of 8 bits": (png(8, GRAY, bytes([7, 9]), (b"sBIT", b"\5"), key(7)), [255, 74]),
    "16 bits": (png(16, GRAY, struct.pack(">2H", 1000, 1001), key(1000)), [255, 4]),
    "RGB": (png(8, RGB, bytes([1, 2, 3, 1, 2, 4]), key(1, 2, 3)), [[255] * 3, [1, 2, 4]]),
    "RGB, 16 bits": (
        png(16, RGB, struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1235, 0x5678, 0x9ABC), key(0x1234, 0x5678, 0x9ABC)),
        [[255] * 3, [0x12, 0x56, 0x9A]],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_transparent_color_is_white(name):
    content, expected = CASES[name]
    for source in (content, Image.open(io.BytesIO(content))):
        found = np.asarray(load_image(source))[0]
        assert (found if name.startswith("RGB") else found[:, 0]).tolist() == expected


def test_a_dark_ppm_is_dark_in_every_form():
    """Its white is what its header says, not the largest sample."""
    content = b"P5 4 1 65535\n" + struct.pack(">4H", 0, 100, 200, 255)
    for source in (content, Image.open(io.BytesIO(content))):
        assert np.asarray(load_image(source)).max() <= 1
