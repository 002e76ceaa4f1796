"""GIF files: only the first frame goes to the decoder."""

from dyntok.imaging.container import Container

_EXTENSION, _IMAGE, _CONTROL = 0x21, 0x2C, 0xF9
_TRANSPARENT = 1  # flag of a control extension


def read(data: bytes) -> Container:
    """Returns the first frame without comments and extensions; the file as it is where no frame is found."""
    try:
        return Container(_first_frame(data))
    except IndexError:
        return Container(data)


def _first_frame(data: bytes) -> bytes:
    position = 13 + _palette_bytes(data[10])
    control = b""
    while data[position] != _IMAGE:
        if data[position] == _EXTENSION:
            if data[position + 1] == _CONTROL and data[position + 2] >= 4:
                flags = data[position + 3] & _TRANSPARENT  # what happens after the frame does not matter
                control = b"\x21\xf9\x04" + bytes([flags, 0, 0, data[position + 6], 0])
            position = _after_blocks(data, position + 2)
        elif data[position] == 0x3B:
            return data
        else:
            position += 1
    left, top, width, height = (
        int.from_bytes(data[position + offset : position + offset + 2], "little") for offset in (1, 3, 5, 7)
    )
    pixels = position + 10 + _palette_bytes(data[position + 9]) + 1
    if pixels >= len(data):
        raise IndexError
    screen = (
        max(int.from_bytes(data[6:8], "little"), left + width),
        max(int.from_bytes(data[8:10], "little"), top + height),
    )
    if max(screen) > 0xFFFF:
        return data
    sizes = b"".join(side.to_bytes(2, "little") for side in screen)
    header = data[:6] + sizes + data[10 : 13 + _palette_bytes(data[10])]
    return header + control + data[position : _end_of_blocks(data, pixels)] + b";"


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 128 else 0


def _after_blocks(data: bytes, position: int) -> int:
    while data[position]:
        position += 1 + data[position]
    return position + 1


def _end_of_blocks(data: bytes, position: int) -> int:
    try:
        return _after_blocks(data, position)
    except IndexError:  # cut: the decoder decides whether all pixels are there
        return len(data)
