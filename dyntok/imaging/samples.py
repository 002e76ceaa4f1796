"""Samples of more than 8 bits to 8-bit gray or RGB, by what the file says is white."""

from dataclasses import replace

import numpy as np
from PIL import Image

from dyntok.errors import ImageError
from dyntok.imaging.container import Packing

_WHITES = {
    "I": (255, 65535),
    "F": (1, 255, 65535),
}  # by mode; where nothing states what is white, the first that holds every value

_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF


def scaled(values: np.ndarray, white: float) -> np.ndarray:
    """Returns uint8 values in which `white` has become 255, rounded."""
    floats = values.astype(np.float32)
    floats *= 255 / white
    floats += 0.5
    return floats.astype(np.uint8)


def gray_8bit(image: Image.Image, name: str, white: float | None) -> np.ndarray:
    """Returns an image of mode I;16 (all byte orders), I or F as uint8 [H, W].

    White is the given value unless a sample exceeds it. Pillow's own conversion clips these modes at 255.
    """
    values = np.asarray(image)  # [H, W]
    low, high = values.min(), values.max()
    whites = _WHITES.get(image.mode, (65535,))
    candidates = whites if white is None or image.mode == "I;16" and white > 65535 else (white, *whites)
    white = next((white for white in candidates if high <= white), None)
    if white is None or not low >= 0:  # not: NaN
        raise ImageError(
            f"{name}: values from {low} to {high}, expected 0 to one of {', '.join(map(str, whites))}; scale them first"
        )
    gray = scaled(values, white)
    if image.mode.startswith("I;16") and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray  # Pillow heeds this tag at 8 bits only
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return gray


def rgb_8bit(high: np.ndarray, low: np.ndarray, white: float) -> np.ndarray | None:
    """Returns uint8 [H, W, C] from the two halves of 16-bit samples.

    None if `white` is not the white of this picture.
    """
    values = high.astype(np.uint16) << 8 | low
    return scaled(values, white) if values.max() <= white else None


def unpacked(rows: np.ndarray, packing: Packing) -> np.ndarray:
    """Returns the uint16 samples [H, W, C] of uint8 rows [H, bytes], as a `Packing` describes them.

    Where every channel is stored for itself, the rows are [H, bytes, C].
    """
    if packing.planes:
        one = replace(packing, channels=1, planes=False)
        return np.concatenate([unpacked(rows[:, :, i], one) for i in range(packing.channels)], axis=2)
    height, count = len(rows), packing.width * packing.channels
    if packing.bits == 16:
        values = np.ascontiguousarray(rows).view(packing.byte_order + "u2").astype(np.uint16)
    else:
        bits = np.unpackbits(rows, axis=1)[:, : count * packing.bits].reshape(height, count, packing.bits)
        values = np.zeros((height, count), np.uint16)
        for bit in range(packing.bits):
            values <<= 1
            values |= bits[:, :, bit]
    values = values.reshape(height, packing.width, packing.channels)
    if packing.differences:
        for left in range(0, packing.width, packing.differences):
            part = values[:, left : left + packing.differences]
            np.cumsum(part, axis=1, dtype=np.uint16, out=part)
    return values
