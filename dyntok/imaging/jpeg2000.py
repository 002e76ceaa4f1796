"""JPEG 2000 files: of the boxes around the compressed data, only those that pixels depend on go to the decoder."""

from dyntok.imaging.boxes import box, boxes
from dyntok.imaging.container import Container

_SIGNATURE_BOX = b"\x00\x00\x00\x0cjP  "
_DECODED = (b"jP  ", b"ftyp", b"jp2c")  # boxes of the file
_DECODED_HEADERS = (b"ihdr", b"bpcc", b"colr", b"pclr", b"cmap", b"cdef")  # boxes of the header
_COLOR_BYTES = 7  # the least that a decoder reads of a colr box
_PROFILES = (2, 3)  # methods of a colr box that hold an ICC profile


def read(data: bytes) -> Container:
    """Returns the file without metadata; a bare codestream as it is."""
    if not data.startswith(_SIGNATURE_BOX):
        return Container(data)
    kept, profile = [], None
    for kind, whole, content in boxes(data):
        if kind in _DECODED:
            kept.append(whole)
        elif kind == b"jp2h":
            header = list(boxes(content))
            needed = [whole for kind, whole, content in header if _is_needed(kind, content)]
            kept.append(box(kind, b"".join(needed)))
            colors = (content for kind, _, content in header if kind == b"colr" and content[:1])
            profile = next((content[3:] for content in colors if content[0] in _PROFILES), None)
    return Container(b"".join(kept), profile=profile)


def _is_needed(kind: bytes, content: bytes) -> bool:
    return kind in _DECODED_HEADERS and (kind != b"colr" or len(content) >= _COLOR_BYTES)
