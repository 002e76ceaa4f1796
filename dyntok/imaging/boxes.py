"""Boxes, of which JPEG 2000 and JPEG XL files consist: a length, a kind of four letters, and content."""

import struct
from collections.abc import Iterator


def boxes(data: bytes) -> Iterator[tuple[bytes, bytes, bytes]]:
    """Yields (kind, whole box, content) until the data end or a length makes no sense; the last one may be cut."""
    position = 0
    while position + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        head = 8
        if length == 1 and position + 16 <= len(data):
            (length,), head = struct.unpack_from(">Q", data, position + 8), 16
        length = length or len(data) - position  # 0: up to the end
        if length < head:
            return
        yield kind, data[position : position + length], data[position + head : position + length]
        position += length


def box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I4s", 8 + len(content), kind) + content
