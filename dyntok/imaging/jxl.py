"""JPEG XL files, decoded by the optional package pillow-jxl-plugin. Its plugin for Pillow would decode before it tells
the size, and read JPEGs inside with `Image.open`, so its decoder is called here.

The decoder turns pictures upright itself.
"""

from dataclasses import dataclass

from PIL import Image

from dyntok.imaging.boxes import boxes

_CONTAINER = b"\x00\x00\x00\x0cJXL \r\n\x87\n"
_CODESTREAM = b"\xff\x0a"
_LENGTHS = (9, 13, 18, 30)  # bits of a side, by selector
_RATIOS = (0, 1 / 1, 12 / 10, 4 / 3, 3 / 2, 16 / 9, 5 / 4, 2 / 1)  # width by height; 0: the width is stated


@dataclass(frozen=True)
class Decoded:
    """What a file holds: a picture with its ICC profile, or a JPEG file."""

    image: Image.Image | None = None
    profile: bytes | None = None
    jpeg: bytes = b""


def read(data: bytes) -> Decoded:
    """Returns the first picture, or the JPEG file that was packed without loss. Raises `ValueError` on damaged data."""
    from pillow_jxl import Decoder

    try:
        is_jpeg, info, content, profile, *_ = Decoder(num_threads=0)(data)
    except RuntimeError as error:  # its text advises to build the decoder from source
        raise ValueError("damaged JPEG XL data") from error
    if is_jpeg:
        return Decoded(jpeg=bytes(content))
    mode = info.mode.removesuffix(";16") if info.mode.startswith("F") else info.mode  # half floats come as floats
    return Decoded(Image.frombytes(mode, (info.width, info.height), content), bytes(profile) if profile else None)


def size(data: bytes) -> tuple[int, int]:
    """Returns (width, height) as the header states it, before anything is decoded. Raises `ValueError` without one."""
    stream = _codestream(data) if data.startswith(_CONTAINER) else data
    if not stream.startswith(_CODESTREAM):
        raise ValueError("no JPEG XL codestream")
    bits = _Bits(int.from_bytes(stream[2:18], "little"))
    small = bits.take(1)
    height = _side(bits, small)
    ratio = bits.take(3)
    return int(height * _RATIOS[ratio]) if ratio else _side(bits, small), height


def _side(bits: "_Bits", small: int) -> int:
    return 8 * (bits.take(5) + 1) if small else bits.take(_LENGTHS[bits.take(2)]) + 1


@dataclass
class _Bits:
    value: int  # the lowest bit comes first

    def take(self, count: int) -> int:
        taken = self.value & ((1 << count) - 1)
        self.value >>= count
        return taken


def _codestream(data: bytes) -> bytes:
    """Returns the first box that holds a part of the codestream, or nothing."""
    for kind, _, content in boxes(data):
        if kind in (b"jxlc", b"jxlp"):
            return content[4:] if kind == b"jxlp" else content  # a part begins with its number
    return b""
