"""WebP files: only the first picture goes to the decoder."""

import struct

from dyntok.imaging.container import Container, orientation

_METADATA_FLAGS = 0x20 | 0x08 | 0x04  # ICC, EXIF, XMP in the flags of a VP8X chunk
_PICTURE = (b"VP8 ", b"VP8L", b"ANMF")


def read(data: bytes) -> Container:
    """Returns the file without metadata and without further frames."""
    kept: list[bytes] = []
    found: dict[bytes, bytes] = {}
    position, pictures = 12, 0
    while position + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, position)
        chunk = data[position : position + 8 + length + length % 2]
        position += 8 + length + length % 2
        if kind == b"VP8X" and length >= 10:
            kept.append(chunk[:8] + bytes([chunk[8] & ~_METADATA_FLAGS]) + chunk[9:])
        elif kind in (b"ANIM", b"ALPH") or kind in _PICTURE:
            if pictures == 0:
                kept.append(chunk)
            pictures += kind in _PICTURE
        elif len(chunk) >= 8 + length:
            found.setdefault(kind, chunk[8 : 8 + length])
    content = b"WEBP" + b"".join(kept)
    return Container(
        struct.pack("<4sI", b"RIFF", len(content)) + content,
        orientation(found.get(b"EXIF"), found.get(b"XMP ")),
        found.get(b"ICCP"),
    )
