"""TIFF files: the decoder sees one directory that holds only the tags that pixels depend on.

Samples of 9 to 16 bits that Pillow can't read, or whose white the file states, are decoded as plain bytes (`Packing`)
and unpacked in `samples.py`.
"""

import struct
from dataclasses import replace
from typing import Literal, NamedTuple

from dyntok.errors import ImageError
from dyntok.imaging.container import Container, Packing, orientation

_WIDTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _STRIPS, _ORIENTATION = 256, 258, 259, 262, 266, 273, 274
_SAMPLES, _STRIP_BYTES, _MAX_SAMPLE, _PLANAR, _PREDICTOR, _TILE_WIDTH = 277, 279, 281, 284, 317, 322
_TILE_BYTES, _EXTRA, _SAMPLE_FORMAT, _SMAX_SAMPLE, _XMP, _PROFILE = 325, 338, 339, 341, 700, 34675
_DECODED = frozenset(
    [
        _WIDTH,
        257,
        _BITS,
        _COMPRESSION,
        _PHOTOMETRIC,
        _FILL_ORDER,
        _STRIPS,
        _SAMPLES,
        278,
        _STRIP_BYTES,
        _PLANAR,
        292,
        293,
        _PREDICTOR,
        320,
        _TILE_WIDTH,
        323,
        324,
        _TILE_BYTES,
        332,
        _EXTRA,
        _SAMPLE_FORMAT,
        347,
        *range(512, 522),
        *range(529, 533),
        0xBC01,
    ]
)
_SINGLE = frozenset(
    [_WIDTH, 257, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, 278, _PLANAR, _PREDICTOR, _TILE_WIDTH, 323]
)
_LETTERS = {
    1: "B",
    2: "s",
    3: "H",
    4: "I",
    5: "II",
    6: "b",
    7: "s",
    8: "h",
    9: "i",
    10: "ii",
    11: "f",
    12: "d",
    13: "I",
    16: "Q",
    17: "q",
    18: "Q",
}
_LONG = 4
_MOST_NUMBERS = 1 << 20  # of a tag that is read here: a picture has no more strips
_SUBFILE, _SUBDIRECTORIES, _DNG = 254, 330, 50706
_BLACK_IS_ZERO, _RGB, _CMYK = 1, 2, 5
_SIGNED = 2
_KINDS = {1: "unsigned integers", _SIGNED: "signed integers", 3: "floating point"}
_ALPHA: dict[float, Literal["", "straight", "premultiplied"]] = {0: "", 1: "premultiplied", 2: "straight"}


class _Entry(NamedTuple):
    kind: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    field: bytes  # as it stands in the directory: the value, or where it lies
    start: int  # of the value in the file
    length: int


class _Directory(NamedTuple):
    order: Literal["<", ">"]  # as in `struct`
    big: bool  # BigTIFF
    entries: dict[int, _Entry]
    data: bytes

    def numbers(self, tag: int, default: tuple = ()) -> tuple:
        entry = self.entries.get(tag)
        if entry is None or _LETTERS[entry.kind] == "s" or entry.count > _MOST_NUMBERS:
            return default
        return struct.unpack_from(self.order + _LETTERS[entry.kind] * entry.count, self.data, entry.start)

    def number(self, tag: int, default: float) -> float:
        return (self.numbers(tag) or (default,))[0]

    def content(self, tag: int) -> bytes | None:
        entry = self.entries.get(tag)
        return self.data[entry.start : entry.start + entry.length] if entry else None


def read(data: bytes, name: str) -> Container:
    """Returns the file with a directory of its own for the first picture. Raises `ImageError` where it has none."""
    try:
        directory = _directory(data)
    except struct.error as error:
        raise ImageError(f"{name}: its TIFF directory is cut or missing; expected an intact file") from error
    if _DNG in directory.entries or _SUBDIRECTORIES in directory.entries and int(directory.number(_SUBFILE, 0)) & 1:
        raise ImageError(
            f"{name}: camera raw, of which only a small preview could be read; develop it to PNG or JPEG first"
        )
    state = int(directory.number(_ORIENTATION, 1))
    upright = state if state in range(1, 9) and state != 1 else orientation(None, directory.content(_XMP))
    packings = _packings(directory)
    kinds, bits = set(directory.numbers(_SAMPLE_FORMAT, (1,))), set(directory.numbers(_BITS))
    raw_planes = directory.number(_PLANAR, 1) == 2 and directory.number(_COMPRESSION, 1) == 1
    if raw_planes and not packings and 16 in bits and kinds == {1}:  # Pillow would read half of every sample
        raise ImageError(
            f"{name}: a TIFF whose 16-bit channels are stored in separate planes, which can be read for RGB only; "
            "save it with its channels side by side (PlanarConfiguration 1)"
        )
    entries = {tag: entry for tag, entry in directory.entries.items() if tag in _DECODED}
    for tag in _SINGLE & set(entries):
        number = directory.number(tag, 0)
        entries[tag] = _number(directory, int(number)) if entries[tag].count > 1 else entries[tag]
    return Container(
        _with_entries(data, directory, entries),
        upright,
        directory.content(_PROFILE),
        _white(directory),
        packings,
        signed=kinds == {_SIGNED} and bits == {8},
    )


def samples(data: bytes) -> str:
    """Returns what the samples of an intact file are, such as "3 channels of 32-bit floating point"."""
    directory = _directory(data)
    channels = int(directory.number(_SAMPLES, 1))
    bits = "/".join(str(int(number)) for number in dict.fromkeys(directory.numbers(_BITS, (1,))))
    kind = _KINDS.get(int(directory.number(_SAMPLE_FORMAT, 1)), "numbers of another kind")
    return f"{channels} {'channel' if channels == 1 else 'channels'} of {bits}-bit {kind}"


def as_bytes(data: bytes, packing: Packing) -> bytes:
    """Returns the file of `read` changed so that each row decodes to its bytes: as 8-bit gray, or as 8-bit planes."""
    directory = _directory(data)
    wide = {tag: int(directory.number(tag, 0)) for tag in (_WIDTH, _TILE_WIDTH) if tag in directory.entries}
    together = 1 if packing.planes else packing.channels
    changed = {tag: _number(directory, -(-width * together * packing.bits // 8)) for tag, width in wide.items()}
    entries = {
        tag: entry for tag, entry in directory.entries.items() if tag not in (_PREDICTOR, _EXTRA, _SAMPLE_FORMAT)
    }
    entries |= changed | {_BITS: _number(directory, 8)}
    as_read = {_PHOTOMETRIC: _BLACK_IS_ZERO, _SAMPLES: 1, _PLANAR: 1}
    if packing.planes:
        as_read = {_PHOTOMETRIC: _RGB if packing.channels == 3 else _CMYK}  # of four channels, none is alpha
    entries |= {tag: _number(directory, value) for tag, value in as_read.items()}
    return _with_entries(data, directory, entries)


def _directory(data: bytes) -> _Directory:
    """Returns the first directory without entries that lie outside the file. Raises `struct.error` if there is none."""
    order: Literal["<", ">"] = "<" if data[:2] == b"II" else ">"
    big = 43 in data[2:4]
    offset, counter, record = ("Q", "Q", 20) if big else ("I", "H", 12)
    inline = struct.calcsize(offset)
    (start,) = struct.unpack_from(order + offset, data, 8 if big else 4)
    if start > len(data):
        raise struct.error
    (count,) = struct.unpack_from(order + counter, data, start)
    entries = {}
    for index in range(min(count, 1 << 16)):
        position = start + struct.calcsize(order + counter) + index * record
        tag, kind, number = struct.unpack_from(f"{order}HH{offset}", data, position)
        field = data[position + record - inline : position + record]
        length = struct.calcsize(order + _LETTERS.get(kind, "")) * number
        (at,) = struct.unpack(order + offset, field)
        at = position + record - inline if length <= inline else at
        if kind in _LETTERS and number and at + length <= len(data):
            entries[tag] = _Entry(kind, number, field, at, length)
    return _Directory(order, big, entries, data)


def _number(directory: _Directory, value: int) -> _Entry:
    return _Entry(_LONG, 1, struct.pack(directory.order + "I", value).ljust(8 if directory.big else 4, b"\0"), 0, 4)


def _with_entries(data: bytes, directory: _Directory, entries: dict[int, _Entry]) -> bytes:
    """Returns the file with a new directory at its end; what the entries point to stays in its place."""
    offset, counter = ("Q", "Q") if directory.big else ("I", "H")
    order, place, start = directory.order, 8 if directory.big else 4, len(data) + len(data) % 2
    header = data[:place] + struct.pack(order + offset, start)
    records = [
        struct.pack(f"{order}HH{offset}", tag, entry.kind, entry.count) + entry.field
        for tag, entry in sorted(entries.items())
    ]
    table = struct.pack(order + counter, len(records)) + b"".join(records) + struct.pack(order + offset, 0)
    return header + data[len(header) :] + b"\0" * (len(data) % 2) + table


def _white(directory: _Directory) -> float | None:
    """Returns SMaxSampleValue as it is.

    MaxSampleValue may be a statistic of this picture, so it only tells the number of bits.
    """
    stated = max(directory.numbers(_SMAX_SAMPLE), default=0)
    if stated > 0:
        return float(stated)
    largest = max(directory.numbers(_MAX_SAMPLE), default=0)
    return float((1 << int(largest).bit_length()) - 1) if largest > 0 else None


def _packings(directory: _Directory) -> tuple[Packing, ...]:
    """Returns the ways in which the samples may be stored; none where Pillow reads them."""
    photometric = directory.number(_PHOTOMETRIC, 0)
    colors, channels = 3 if photometric == _RGB else 1, int(directory.number(_SAMPLES, 1))
    bits = set(directory.numbers(_BITS, (1,)))
    planes = channels > 1 and directory.number(_PLANAR, 1) == 2
    if channels == 1:
        readable = photometric != 0 or directory.order == "<"
    else:
        readable = channels >= 3 and _white(directory) is None and not planes
    unusual = len(bits) == 1 and (8 < min(bits) < 16 or bits == {16} and not readable)
    plain = (
        photometric in (0, _BLACK_IS_ZERO, _RGB)
        and channels in (colors, colors + 1)
        and set(directory.numbers(_SAMPLE_FORMAT, (1,))) == {1}
        and directory.number(_FILL_ORDER, 1) == 1
        and (channels >= 3 or not planes)
    )
    if not (unusual and plain):
        return ()
    width, (stored,) = int(directory.number(_WIDTH, 0)), bits
    alpha = _ALPHA.get(directory.number(_EXTRA, 0) if channels > colors else 0, "")
    differences = int(directory.number(_TILE_WIDTH, width)) if directory.number(_PREDICTOR, 1) == 2 else 0
    words = Packing(width, colors, channels, alpha, planes, 16, directory.order, photometric == 0, differences)
    tight = replace(words, bits=stored, differences=0)
    if directory.number(_COMPRESSION, 1) != 1:
        return (words, tight) if stored < 16 else (words,)
    height = directory.number(257, 0)
    there = sum(directory.numbers(_STRIP_BYTES) or directory.numbers(_TILE_BYTES))
    return (words,) if there >= width * height * channels * 2 else (tight,)
