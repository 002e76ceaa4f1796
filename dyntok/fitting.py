"""How a picture is brought to a grid of patches: which grid, and which part of the picture covers which part of it.

Pure arithmetic on sizes. Not here: the pixels themselves (`image.py`).
"""

import math
from dataclasses import dataclass

from dyntok.config import ImageConfig
from dyntok.errors import ImageError
from dyntok.layout import MAX_SIDE
from dyntok.original import Original

LONGEST_STRIP = 8  # long side over short side of pictures that keep their aspect ratio
_ODDNESS = 2.0  # how much a changed aspect ratio counts against unused patches


@dataclass(frozen=True)
class Fitting:
    """Where a picture goes.

    size: (height, width) of the result in pixels.
    box: the part of the original that is used: left, top, right, bottom in its pixels.
    inner: the part of the result that it covers: left, top, right, bottom. The rest is white.
    """

    size: tuple[int, int]
    box: tuple[float, float, float, float]
    inner: tuple[int, int, int, int]


def fit(width: int, height: int, config: ImageConfig) -> Fitting:
    """Returns how an original of this size in pixels is fitted.

    Raises `ImageError` where the aspect ratio is to be kept and one side is over 8 times the other.
    """
    target = target_size(config)
    if config.resize == "keep":
        target = _kept(width, height, config)
    rows, columns = target
    box, inner = (0.0, 0.0, float(width), float(height)), (0, 0, columns, rows)
    if config.resize == "crop":
        box = _centered(width, height, columns / rows)
    elif config.resize == "pad":
        inner = padded_inside(width, height, target)
    return Fitting(target, box, inner)


def padded_inside(width: int, height: int, target: tuple[int, int]) -> tuple[int, int, int, int]:
    """Returns the part of a (height, width) that a whole original covers with fit "pad": left, top, right, bottom."""
    rows, columns = target
    scale = min(columns / width, rows / height)
    w, h = max(1, round(width * scale)), max(1, round(height * scale))
    left, top = (columns - w) // 2, (rows - h) // 2
    return left, top, left + w, top + h


def original(width: int, height: int, config: ImageConfig) -> Original:
    """Returns what is to be remembered of a picture of this size in pixels. Errors are those of `fit`."""
    left, top, right, bottom = map(int, fit(width, height, config).box)
    return Original((height, width), (left, top, right, bottom), config.resize)


def smallest_decoding(width: int, height: int, place: Fitting) -> tuple[int, int]:
    """Returns the least (width, height) at which an original of this size may be decoded before it is resized.

    It is twice the size that the whole original would get.
    """
    left, top, right, bottom = place.box
    across = (place.inner[2] - place.inner[0]) / (right - left)
    down = (place.inner[3] - place.inner[1]) / (bottom - top)
    return math.ceil(2 * width * across), math.ceil(2 * height * down)


def target_size(config: ImageConfig) -> tuple[int, int]:
    """Returns (height, width) in pixels of the rectangle that pictures are fitted to.

    It is `size` where that is given; else the largest square of at most `max_patches`; else `img_size`.
    """
    if config.size is not None:
        return config.size
    if config.max_patches is not None:
        side = math.isqrt(config.max_patches) * config.patch_size
        return side, side
    return config.img_size, config.img_size


def choose_grid(width: int, height: int, max_patches: int) -> tuple[int, int]:
    """Returns the grid (rows, columns) of at most `max_patches` that suits a picture's aspect ratio best.

    It weighs how far the grid's aspect ratio is off against how many patches it leaves unused.
    """
    aspect = width / height

    def cost(grid: tuple[int, int]) -> float:
        rows, columns = grid
        off = abs(math.log(columns / rows / aspect))
        return _ODDNESS * off + 1 - rows * columns / max_patches

    grids = []
    for rows in range(1, min(MAX_SIDE, max_patches) + 1):
        ideal = rows * aspect
        for columns in {math.floor(ideal), math.ceil(ideal)}:
            grids.append((rows, min(max(columns, 1), MAX_SIDE, max_patches // rows)))
    return min(grids, key=lambda grid: (cost(grid), grid))


def _kept(width: int, height: int, config: ImageConfig) -> tuple[int, int]:
    ratio = max(width, height) / min(width, height)
    if ratio > LONGEST_STRIP:
        raise ImageError(
            f"{width} x {height} pixels are {ratio:.1f} to 1, expected at most {LONGEST_STRIP} to 1 "
            "with fit 'keep'; cut the picture into tiles, or give fit='crop', 'squash' or 'pad' (--fit)"
        )
    patch = config.patch_size
    if config.size is None:
        rows, columns = choose_grid(width, height, config.max_patches)
    else:  # inside the rectangle
        scale = min(config.size[0] / height, config.size[1] / width) / patch
        rows, columns = max(1, round(height * scale)), max(1, round(width * scale))
    return rows * patch, columns * patch


def _centered(width: int, height: int, aspect: float) -> tuple[float, float, float, float]:
    """Returns the largest box of an aspect ratio in the middle.

    It has whole pixels, so that a picture of the right size is not blurred.
    """
    w = min(width, max(1, round(height * aspect)))
    h = min(height, max(1, round(width / aspect)))
    left, top = (width - w) // 2, (height - h) // 2
    return float(left), float(top), float(left + w), float(top + h)
