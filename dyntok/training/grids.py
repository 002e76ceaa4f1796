"""The grids of training pictures: which shape and size the pictures of each batch have.

All pictures of a batch have one grid, which follows from the seed and the step alone. Large grids get fewer pictures,
so that all batches have about the same number of patches. Not here: reading and cropping pictures (`data.py`).
"""

import math
import random
from dataclasses import dataclass

from dyntok.config import MAX_PATCHES
from dyntok.fitting import LONGEST_STRIP
from dyntok.layout import MAX_SIDE
from dyntok.structure import require

_COMMON = (1.0, 1.0, 1.0, 3 / 2, 2 / 3, 4 / 3, 3 / 4)  # aspect ratios of photographs
_COMMON_SHARE = 0.4  # of the batches have one of them


@dataclass(frozen=True)
class Band:
    """A range of grid sizes, and how often it is drawn."""

    share: float = 1.0  # relative to the other bands
    patches: tuple[int, int] = (64, 1024)  # log-uniform

    def __post_init__(self) -> None:
        object.__setattr__(self, "patches", tuple(self.patches))
        low, high = self.patches
        require(self.share > 0, f"grids.bands has a share of {self.share}, expected a positive number")
        expected = f"expected [low, high] within 1 and {MAX_PATCHES:,}"
        require(1 <= low <= high <= MAX_PATCHES, f"grids.bands has patches {list(self.patches)}, {expected}")


@dataclass(frozen=True)
class Grids:
    """How grids are drawn: a band by its share, a number of patches from it, and an aspect ratio."""

    bands: tuple[Band, ...] = (Band(),)
    aspect: float = 3.0  # the widest pictures are aspect : 1, the tallest 1 : aspect
    min_scale: float = 0.75  # a picture that has fewer of the pixels along a side gives way to a larger one

    def __post_init__(self) -> None:
        object.__setattr__(self, "bands", tuple(self.bands))
        require(bool(self.bands), "grids.bands is empty, expected at least one band")
        expected = f"expected 1 to {LONGEST_STRIP}"
        require(1 <= self.aspect <= LONGEST_STRIP, f"grids.aspect is {self.aspect}, {expected}")
        require(0 <= self.min_scale <= 1, f"grids.min_scale is {self.min_scale}, expected a share from 0 to 1")

    def patches(self, seed: int, step: int) -> int:
        """Returns the number of patches that is drawn for a step. The same seed and step always give the same."""
        return self._draw_patches(random.Random(seed * 1_000_003 + step))

    def grid(self, seed: int, step: int) -> tuple[int, int]:
        """Returns the grid (rows, columns) of a step's pictures: at most `patches(seed, step)`, and nearly as many."""
        draw = random.Random(seed * 1_000_003 + step)
        patches = self._draw_patches(draw)
        common = [ratio for ratio in _COMMON if 1 / self.aspect <= ratio <= self.aspect]
        if draw.random() < _COMMON_SHARE:
            aspect = common[int(draw.random() * len(common))]
        else:  # the logarithm is triangular: extreme shapes are rare
            aspect = self.aspect ** (draw.random() + draw.random() - 1)
        rows = min(max(1, round(math.sqrt(patches / aspect))), MAX_SIDE)
        return rows, min(patches // rows, MAX_SIDE)

    def _draw_patches(self, draw: random.Random) -> int:
        at = draw.random() * sum(band.share for band in self.bands)
        chosen = self.bands[-1]
        for band in self.bands:
            if at < band.share:
                chosen = band
                break
            at -= band.share
        low, high = chosen.patches
        return min(high, int(low * ((high + 1) / low) ** draw.random()))
