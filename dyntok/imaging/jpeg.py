"""JPEG files: metadata are taken out, and the scans counted before anything is decoded."""

import re
from collections.abc import Iterator

from dyntok.errors import ImageError
from dyntok.imaging.container import Container, orientation

MAX_SCANS = 500  # cameras and optimizers write at most a few dozen
MAX_SCANNED_PIXELS = 1 << 32  # scans times pixels: about a minute of decoding

_SOI, _EOI, _SOS, _APP0, _APP1, _APP2, _APP14, _COM = 0xD8, 0xD9, 0xDA, 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE = frozenset([0x01, _SOI, _EOI, *range(0xD0, 0xD8)])
_MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")  # neither a byte of compressed data nor a restart
_EXIF, _XMP, _ICC = b"Exif\0\0", b"http://ns.adobe.com/xap/1.0/\0", b"ICC_PROFILE\0"


def read(data: bytes, name: str) -> Container:
    """Returns the file without metadata. Raises `ImageError` for a number of scans that no honest file has."""
    kept, profile, exif, xmp = [b"\xff\xd8"], [], b"", None
    scans, pixels, end = 0, 0, len(data)
    first_scan = None
    for marker, start, stop in _segments(data):
        if marker == _SOS:
            scans += 1
            first_scan = start if first_scan is None else first_scan
        elif marker == _EOI:
            end = stop
            break
        elif marker in _FRAMES:
            pixels = int.from_bytes(data[start + 5 : start + 7], "big") * int.from_bytes(
                data[start + 7 : start + 9], "big"
            )
        if first_scan is not None:
            continue
        content = data[start + 4 : stop] if marker == _COM or _APP0 <= marker <= 0xEF else None
        if content is None or _decides_colors(marker, content):
            kept.append(data[start:stop])
        elif marker == _APP1 and content.startswith(_EXIF):
            exif += content[len(_EXIF) :]
        elif marker == _APP1 and content.startswith(_XMP):
            xmp = content
        elif marker == _APP2 and content.startswith(_ICC):
            profile.append(content[len(_ICC) :])
    _check_scans(scans, pixels, name)
    if first_scan is not None:
        kept.append(data[first_scan:end])
    return Container(b"".join(kept), orientation(exif, xmp), _joined(profile))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yields (marker, start, stop) of every segment.

    Bytes between them (compressed data, junk) are skipped, as libjpeg does.
    """
    position = 2
    while match := _MARKER.search(data, position):
        marker, start = match[1][0], match.end() - 2
        length = 0 if marker in _STANDALONE else int.from_bytes(data[start + 2 : start + 4], "big")
        position = start + 2 + length
        yield marker, start, position


def _decides_colors(marker: int, content: bytes) -> bool:
    """Returns whether libjpeg reads from this segment how colors are stored; it ignores shorter ones, too."""
    jfif = marker == _APP0 and content.startswith(b"JFIF\0") and len(content) >= 14
    return jfif or marker == _APP14 and content.startswith(b"Adobe") and len(content) >= 12


def _joined(parts: list[bytes]) -> bytes | None:
    """Returns the ICC profile of numbered parts (number, count, content); None if one is missing."""
    complete = parts and [part[0] for part in sorted(parts) if part] == list(range(1, len(parts) + 1))
    return b"".join(part[2:] for part in sorted(parts)) if complete else None


def _check_scans(scans: int, pixels: int, name: str) -> None:
    if scans > MAX_SCANS or scans > 1 and scans * pixels > MAX_SCANNED_PIXELS:
        raise ImageError(
            f"{name}: a JPEG of {pixels:,} pixels in {scans:,} scans takes too long to decode, expected at most "
            f"{MAX_SCANS} scans, and {MAX_SCANNED_PIXELS:,} pixels in all of them; save it again as a baseline JPEG"
        )
