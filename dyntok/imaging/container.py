"""What a file says about its picture besides the compressed pixels, and how each part is read so that a broken one does
no harm.

Not here: finding these parts in a file; the module of each format does that (`jpeg.py`, `png.py`, ...).
"""

import re
import struct
import zlib
from dataclasses import dataclass
from typing import Literal

_ORIENTATION_TAG, _SHORT, _LONG = 274, 3, 4
_XMP_ORIENTATION = re.compile(rb'tiff:Orientation(?:="|>)([1-8])["<]')
_MAX_EXPANDED = 1 << 24  # bytes of a decompressed ICC profile or text


@dataclass(frozen=True)
class Packing:
    """How a TIFF stores samples that Pillow can't unpack: its rows are decoded as if they were 8-bit gray."""

    width: int
    colors: int
    channels: int  # colors, and whatever follows them
    alpha: Literal["", "straight", "premultiplied"]  # the channel after the colors
    planes: bool  # every channel is stored for itself
    bits: int  # per stored sample: 16, or fewer if samples are packed without padding
    byte_order: Literal["<", ">"]
    white_is_zero: bool
    differences: int  # columns in which a sample is stored as the difference from the one on its left; 0: as it is


@dataclass(frozen=True)
class Container:
    """A file without its metadata, and what the valid ones among them say."""

    data: bytes
    orientation: int = 1  # as in EXIF
    profile: bytes | None = None  # ICC
    white: float | None = None  # the largest value of a sample, where the file states it
    packings: tuple[Packing, ...] = ()  # the first that yields a complete picture is right
    signed: bool = False  # 8-bit samples are -128 to 127, which decoders give as 0 to 255


def exif_orientation(exif: bytes) -> int | None:
    """Returns the orientation stated by the first directory of an EXIF block.

    None if there is none or the block is broken.
    """
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return None
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (count,) = struct.unpack_from(order + "H", exif, start)
        for position in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", exif, position)
            if tag == _ORIENTATION_TAG:
                (value,) = struct.unpack_from(order + ("I" if kind == _LONG else "H"), exif, position + 8)
                return value if kind in (_SHORT, _LONG) and 1 <= value <= 8 else None
    except struct.error:
        pass
    return None


def xmp_orientation(xmp: bytes) -> int | None:
    """Returns the orientation stated by an XMP packet, if any."""
    match = _XMP_ORIENTATION.search(xmp)
    return int(match[1]) if match else None


def orientation(exif: bytes | None, xmp: bytes | None) -> int:
    """Returns the orientation of the picture. EXIF goes before XMP."""
    return (exif and exif_orientation(exif)) or (xmp and xmp_orientation(xmp)) or 1


def expand(compressed: bytes) -> bytes | None:
    """Returns the content of a zlib stream; None if it is broken or larger than 16 MiB."""
    decompressor = zlib.decompressobj()
    try:
        content = decompressor.decompress(compressed, _MAX_EXPANDED)
    except zlib.error:
        return None
    return content if decompressor.eof else None
