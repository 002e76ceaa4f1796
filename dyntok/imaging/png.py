"""PNG files: only the chunks that hold pixels go to the decoder."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress

from dyntok.imaging.container import Container, expand, orientation

_SIGNATURE = 8  # bytes
_PALETTE = 3  # color type
_ANCILLARY = 0x20  # a lower-case first letter
_CHANNELS = {0: 1, 2: 3, 4: 1, 6: 3}  # of color, by color type
_TRANSPARENCY_BYTES = {0: 2, 2: 6}  # at least, by color type
_PALETTE_SIZE = 256  # colors, with a byte of transparency for each


def read(data: bytes) -> Container:
    """Returns the file without ancillary chunks, except valid transparency."""
    kept: list[bytes | memoryview] = [data[:_SIGNATURE]]
    found: dict[bytes, bytes] = {}
    header = data[_SIGNATURE + 8 : _SIGNATURE + 21]
    depth, color_type = (header[8], header[9]) if len(header) == 13 else (0, 0)
    for kind, chunk in _chunks(data):
        if not kind[0] & _ANCILLARY:
            kept.append(chunk)
        elif struct.unpack(">I", chunk[-4:])[0] == zlib.crc32(chunk[4:-4]):
            content = chunk[8:-4]
            if kind == b"tRNS" and _TRANSPARENCY_BYTES.get(color_type, 1) <= len(content) <= _PALETTE_SIZE:
                kept.append(chunk)
            elif kind in (b"iCCP", b"eXIf", b"sBIT"):
                found.setdefault(kind, bytes(content))
            elif kind in (b"iTXt", b"zTXt", b"tEXt"):
                _keep_text(kind, bytes(content), found)
    return Container(
        b"".join(kept),
        orientation(found.get(b"eXIf") or found.get(b"exif text"), found.get(b"xmp text")),
        _profile(found.get(b"iCCP", b"")),
        _white(found.get(b"sBIT", b""), depth, color_type),
    )


def _chunks(data: bytes) -> Iterator[tuple[bytes, memoryview]]:
    """Yields (kind, whole chunk) until the data end; the last one may be cut."""
    view, position = memoryview(data), _SIGNATURE
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        kind = data[position + 4 : position + 8]
        if not kind.isalpha():
            break
        yield kind, view[position : position + 12 + length]
        position += 12 + length
        if kind == b"IEND":
            break


def _keep_text(kind: bytes, content: bytes, found: dict[bytes, bytes]) -> None:
    """Notes the texts that may hold an orientation."""
    keyword, _, rest = content.partition(b"\0")
    if kind == b"iTXt" and keyword == b"XML:com.adobe.xmp":
        text = rest[2:].split(b"\0", 2)[-1]  # after the language and the translated keyword
        found.setdefault(b"xmp text", (expand(text) if rest[:1] == b"\1" else text) or b"")
    elif keyword == b"Raw profile type exif":
        text = (expand(rest[1:]) if kind == b"zTXt" else rest) or b""
        digits = b"".join(text.split()[2:])  # after the name and the length
        with suppress(ValueError):
            found.setdefault(b"exif text", bytes.fromhex(digits.decode("ascii")))


def _profile(content: bytes) -> bytes | None:
    _, _, rest = content.partition(b"\0")
    return expand(rest[1:]) if rest[:1] == b"\0" else None


def _white(significant_bits: bytes, depth: int, color_type: int) -> float | None:
    channels = _CHANNELS.get(color_type, 0)
    bits = max(significant_bits[:channels], default=0) if len(significant_bits) >= channels else 0
    return float((1 << bits) - 1) if 0 < bits < depth and depth >= 8 else None
