"""Keep masks that know nothing of the picture: the selector's rivals, with as many tokens as it took.

Not here: choices that look at the picture (`dyntok/selector.py`).
"""

import hashlib

import torch
from torch import Tensor

_GOLDEN = (5**0.5 - 1) / 2


def seed_of(key: str, salt: str) -> int:
    """The same 63-bit seed for a key in every run and on every machine."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{key}".encode()).digest()[:8], "big") >> 1


def random_mask(count: int, grid: tuple[int, int], key: str) -> Tensor:
    """`count` of rows * columns patches, drawn by a seed made of `key`: bool [N]."""
    num_patches = grid[0] * grid[1]
    drawn = torch.randperm(num_patches, generator=torch.Generator().manual_seed(seed_of(key, "random_mask")))
    return torch.zeros(num_patches, dtype=torch.bool).index_fill_(0, drawn[:count], True)


def even_mask(count: int, grid: tuple[int, int]) -> Tensor:
    """`count` of rows * columns patches, spread evenly over the picture in both directions: bool [N].

    Rows get as equal numbers as possible. Within a row the patches lie at equal distances, and each row that has any begins by the golden
    ratio of that distance further, so that no column is preferred (a Fibonacci lattice).
    """
    rows, columns = grid
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    bounds = [(2 * row * count + rows) // (2 * rows) for row in range(rows + 1)]
    start = 0.5
    for row in range(rows):
        here = bounds[row + 1] - bounds[row]
        mask[row, [int((i + start) * columns / here) for i in range(here)]] = True
        start = (start + _GOLDEN) % 1 if here else start
    return mask.flatten()
